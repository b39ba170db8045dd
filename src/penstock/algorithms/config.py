"""The flags of what aligns a model beside PPO, whose are in penstock.config. No torch here."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from penstock.config import (
    AnswerFlags,
    DataFlags,
    EvalFlags,
    Flags,
    LoraFlags,
    OptimFlags,
    RewardFlags,
    RolloutFlags,
    RunFlags,
)


@dataclass(frozen=True, kw_only=True)
class DPOFlags(AnswerFlags):
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
    group_size: int = 2
    """--online: answers per prompt, which are ranked."""
    rollout_dtype: ClassVar[None] = None  # the model itself answers

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

    @property
    def kl_coef(self) -> float | None:
        """What holds the model near a reference; None where the loss knows none."""
        return None if self.loss in ("simpo", "orpo", "cpo") else self.beta


@dataclass(frozen=True, kw_only=True)
class DPOConfig(RewardFlags, EvalFlags):
    """DPO and its kin: learn from comparisons of answers, those of --data or, with --online, of its own."""

    LR: ClassVar[float] = 1e-6  # TRL's; Rafailov et al. 2023 too; Zephyr (Tunstall et al. 2023) and Tulu 3 take 5e-7
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
    online: bool = False
    """--data are prompts: in each step the model answers --batch-size of them, --group-size times each, and learns from
    the order in which --reward or --reward-fn put the answers."""
    samples: int = 8
    """--online: prompts answered before and after training, for the report."""

    @property
    def actor(self) -> str:
        """PPO's word for the model that answers."""
        return self.model

    @property
    def rollout(self) -> DPOFlags:
        """What algorithms share: each config names its own flags."""
        return self.dpo


@dataclass(frozen=True)
class KTOFlags(Flags):
    """KTO: the loss."""

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto measures rewards from the KL of mismatched pairs (Ethayarajh et al. 2024); apo_zero_unpaired from 0,
    for liked answers that are better than the model's own (D'Oosterlinck et al. 2024)."""
    beta: float = 0.1
    """How near the policy stays to the reference: a larger beta is nearer."""
    desirable_weight: float = 1.0
    """Weight of liked answers in the loss."""
    undesirable_weight: float = 1.0
    """Weight of disliked answers in the loss."""


@dataclass(frozen=True, kw_only=True)
class KTOConfig(EvalFlags):
    """KTO: learn from single votes, each an answer that was liked or disliked."""

    LR: ClassVar[float] = 1e-6
    model: str
    """The SFT model to start from: Hugging Face directory, hub id or run directory."""
    data: DataFlags
    run: RunFlags
    peft: LoraFlags = field(default_factory=LoraFlags)
    reference: str | None = None
    """The frozen model that the policy is measured from. Default: the start of --model."""
    optim: OptimFlags = field(default_factory=OptimFlags)
    kto: KTOFlags = field(default_factory=KTOFlags)


@dataclass(frozen=True, kw_only=True)
class GRPOFlags(RolloutFlags):
    """GRPO: groups, advantages, KL and losses."""

    group_size: int = 8
    """Answers per prompt, which are compared with each other."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline"] = "grpo"
    """What an answer's reward is compared with: the group's mean in units of its standard deviation (grpo), the mean
    alone (dr_grpo), the mean of the other answers (rloo), the batch (reinforce++), the group's mean in units of the
    batch's deviation (reinforce++_baseline)."""
    loss: Literal["clip", "gspo", "cispo"] = "clip"
    """clip: PPO's, of each token's ratio; gspo: of the answer's; cispo: the token's ratio is clipped and every token's
    gradient kept."""
    clip_high: float | None = None
    """Clip of ratios above 1, which lets rare tokens rise (DAPO: 0.28). Default: --clip."""
    normalization: Literal["token", "sequence", "constant"] | None = None
    """What the loss is a mean over: all tokens of the batch; each answer's, then answers (the GRPO paper's);
    --max-new-tokens and answers (no bias by length). Default: constant for dr_grpo, else token."""
    kl_coef: float = 0.04
    """Weight of KL from the reference. At 0 no reference is loaded and KL is not measured, unless --reference names
    one."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where KL counts: as a term of the loss, or taken off the rewards."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How KL is estimated from one token (Schulman 2020); k1 is for rewards alone."""
    dynamic_sampling: bool = False
    """Draw new prompts for groups whose answers all score alike: they teach nothing (DAPO)."""
    max_resamples: int = 4
    """Rounds of new prompts per step at most, under --dynamic-sampling."""
    overlong_buffer: int = 0
    """The last so many of --max-new-tokens cost reward, 0 to 1 over their length (DAPO's soft punishment), instead of
    --missing-eos-penalty; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(RewardFlags, EvalFlags):
    """GRPO: improve a model against a score by comparing several answers to each prompt; there is no critic."""

    LR: ClassVar[float] = 5e-6
    model: str
    """The SFT model: Hugging Face directory, hub id or run directory."""
    data: DataFlags
    run: RunFlags
    peft: LoraFlags = field(default_factory=LoraFlags)
    reference: str | None = None
    """The frozen model that KL is measured from. Default: the model's start; none at --kl-coef 0."""
    optim: OptimFlags = field(default_factory=lambda: OptimFlags(batch_size=64, steps=500))
    grpo: GRPOFlags = field(default_factory=GRPOFlags)
    mini_batch_size: int | None = None
    """Answers per optimizer step. Default: the whole batch."""
    max_eval_samples: int | None = 64
    """Prompts that are held out or read from --eval-data at most; none is no limit."""
    samples: int = 8
    """Prompts answered before and after training, for the report."""

    @property
    def actor(self) -> str:
        """PPO's word for the model that answers."""
        return self.model

    @property
    def rereads(self) -> bool:
        """Whether answers' log-probs are needed before they are learned from: by a second update, by KL in rewards, or
        beside those of a copy. Otherwise the only update computes them."""
        updates = self.optim.epochs * math.ceil(self.optim.batch_size / (self.mini_batch_size or self.optim.batch_size))
        return updates > 1 or self.grpo.kl_in == "reward" or self.grpo.rollout_dtype is not None

    @property
    def rollout(self) -> GRPOFlags:
        """What algorithms share: each config names its own flags."""
        return self.grpo


@dataclass(frozen=True, kw_only=True)
class DistillFlags(Flags):
    """Distillation: what is learned from the teacher, and on which answers."""

    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """The divergence per token: forward_kl covers all that the teacher says, reverse_kl keeps to what it says most, jsd
    is between the two."""
    jsd_beta: float = 0.5
    """jsd: the teacher's weight in the mixture; 0 is forward_kl and 1 reverse_kl, as in TRL's GKD."""
    temperature: float = 1.0
    """Divides the logits of both models, in the loss and in sampling."""
    teacher_top_k: int = 64
    """The teacher's likeliest tokens that are compared one by one; all others are compared as one."""
    sft_coef: float = 0.0
    """Weight of the negative log-likelihood per token of given answers beside the divergence."""
    on_policy: float = 0.0
    """Share of the steps that learn on the student's own samples instead of the given answers (GKD's lambda). At 1 only
    prompts are read, and the samples for held-out prompts are what is evaluated."""
    max_new_tokens: int = 128
    """Tokens per sampled answer."""
    rollout_batch_size: int | None = None
    """Answers that one process generates together. Fewer need a smaller KV cache. Default: all of its answers."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(EvalFlags):
    """Distillation: a student learns a teacher's probabilities of the next token."""

    LR: ClassVar[float] = 1e-5
    model: str
    """The student: Hugging Face directory, hub id or run directory."""
    teacher: str
    """The frozen model that is learned from; its token ids mean what the student's mean."""
    data: DataFlags
    run: RunFlags
    peft: LoraFlags = field(default_factory=LoraFlags)
    optim: OptimFlags = field(default_factory=OptimFlags)
    distill: DistillFlags = field(default_factory=DistillFlags)
    teacher_dtype: Literal["int8", "nf4"] | None = None
    """Keep the weights of the teacher's blocks in 8 bits, or in 4 (QLoRA's NF4)."""
    precompute_teacher: bool = False
    """Have the teacher read all given answers once, before training, and keep its likeliest tokens in the run
    directory: teacher and student are never in memory together."""
    samples: int = 8
    """Held-out prompts answered before and after training, for the report."""
