"""The flags of what aligns a model beside PPO, whose are in penstock.config. No torch here."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from penstock.config import DataFlags, EvalFlags, Flags, LoraFlags, OptimFlags, RunFlags, settle_lr


@dataclass(frozen=True, kw_only=True)
class DPOFlags(Flags):
    """DPO: comparisons and losses."""

    loss: Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "cpo"] = "sigmoid"
    """sigmoid: DPO, and cDPO with --label-smoothing; robust: DPO for labels of which --label-smoothing are wrong; ipo;
    hinge: SLiC's; and without a reference simpo, orpo and cpo."""
    beta: float = None  # type: ignore[assignment]  # settled below
    """How much a nat of log-ratio counts: the higher, the nearer to the reference; ipo: its tau; orpo: the weight of
    the odds ratio. Default: 0.1; for simpo 2."""
    label_smoothing: float = 0.0
    """Share of the comparisons that are taken to be the wrong way round; for sigmoid, robust, simpo and cpo."""
    length_normalize: bool = False
    """Divide log-probabilities of an answer by its tokens; ipo, simpo and orpo always do."""
    sft_coef: float = None  # type: ignore[assignment]  # settled below
    """Weight of the negative log-likelihood per token of the best answers beside the loss (RPO's alpha). Default: 1 for
    orpo and cpo, else 0."""
    simpo_gamma: float | None = None
    """Margin that simpo asks for between the two rewards. Default: 1."""
    pairs: Literal["all", "best-worst"] = "all"
    """Of a ranking of more than two answers: compare all pairs, or the best with the worst alone."""

    def __post_init__(self) -> None:
        defaults = {
            "beta": 2.0 if self.loss == "simpo" else 0.1,  # Meng et al. 2024: 2 to 10, and gamma half of it
            "sft_coef": 1.0 if self.loss in ("orpo", "cpo") else 0.0,
            "simpo_gamma": 1.0 if self.loss == "simpo" else None,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class DPOConfig(EvalFlags):
    """DPO and its kin: learn from comparisons of answers, without a reward model.

    The learning rate's default is TRL's; DPO moves every answer's probability at once, and 1e-5 is known to break it
    (Rafailov et al. 2023 take 1e-6; Tunstall et al. 2023, Zephyr, and Lambert et al. 2024, Tulu 3, 5e-7).
    """

    LR: ClassVar[float] = 1e-6
    model: str
    """The SFT model to start from: Hugging Face directory, hub id or run directory."""
    data: DataFlags
    run: RunFlags
    peft: LoraFlags = field(default_factory=LoraFlags)
    optim: OptimFlags = field(default_factory=OptimFlags)
    dpo: DPOFlags = field(default_factory=DPOFlags)
    reference: str | None = None
    """The frozen model that answers are compared with. Default: the model's start."""
    precompute_reference: bool = False
    """Read all answers with the reference once, before training, and keep what it says in the run directory: no
    reference is in memory then."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settle_lr(self)
