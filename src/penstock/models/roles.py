"""The four jobs of PPO: a decoder and what stands on its hidden states.

Actor and reference read log-probabilities through the decoder's head; critic and reward model carry a scalar head in
fp32. All of them take right-padded tokens with lengths and return packed values of the valid positions only.
"""

import copy
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.errors import UserError
from penstock.memory.program import ALWAYS_THERE, Part
from penstock.models import pretrained
from penstock.models.decoder import Context, Decoder
from penstock.models.lora import remove
from penstock.models.lora_targets import LoraSpec
from penstock.models.packed import quantise_base
from penstock.models.weight_shapes import BaseDtype


class Role(nn.Module):
    """A decoder at work, as a program that a strategy can feed (memory.program.Program)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states [B, T, D]."""
        return self.decoder(tokens, lengths)

    @property
    def feed(self) -> Any:
        """Who brings the weights."""
        return self.decoder.feed

    @feed.setter
    def feed(self, feed: Any) -> None:
        self.decoder.feed = feed

    def groups(self) -> list[tuple[str, list[str]]]:
        """The decoder's, under this role's names."""
        return [(group, [f"decoder.{name}" for name in names]) for group, names in self.decoder.groups()]

    def parts(self) -> Sequence[Part]:
        """The decoder's."""
        return self.decoder.parts()

    def reads(self) -> tuple[str, ...]:
        """What log-probabilities are read with: the decoder's head."""
        return self.decoder.reads()

    def begin(self, tokens: Tensor) -> Context:
        """The decoder's."""
        return self.decoder.begin(tokens)

    def slice(self, budget: int) -> None:
        """See Decoder.slice."""
        self.decoder.slice(budget)

    def recipe(self, name: str) -> Hashable:
        """The decoder's, of its own weights."""
        return self.decoder.recipe(name.removeprefix("decoder.")) if name.startswith("decoder.") else None

    def fill(self, weights: dict[str, Tensor]) -> None:
        """First values, from the decoder's recipe."""
        self.decoder.fill({name.removeprefix("decoder."): weight for name, weight in weights.items()})


class Actor(Role):
    """A language model that answers. The reference is one too, frozen."""

    @staticmethod
    def from_pretrained(
        source: str, *, lora: LoraSpec | int | None = None, adapter: str | None = None, seed: int = 0,
        base_dtype: BaseDtype | None = None, unfrozen: int | None = None, allow_pickle: bool = False,
    ) -> "Actor":  # fmt: skip
        """From a Hugging Face directory or hub id, on torch's default device and in its default dtype.

        `lora`, a rank or a Spec: it is frozen and learns through an adapter, drawn from `seed`. `adapter`: one that was
        saved (peft's format) and learns on; its directory as `source` gives the base that it names. `base_dtype`:
        frozen products are packed (models.packed). `unfrozen`: only so many of the last blocks learn. Raises
        UserError for a reward model: what it says was never trained.
        """
        decoder, extras = _load(source, allow_pickle, lora, adapter, seed, base_dtype, unfrozen)
        if extras:
            raise UserError(f"{source}: is a reward model, and a language model is needed; give the one it came from.")
        return Actor(decoder)

    def frozen(self) -> "Actor":
        """A copy that takes no gradient: the reference. Raises ValueError once a strategy feeds the model."""
        if self.feed is not ALWAYS_THERE:
            raise ValueError("this model's weights have moved to a strategy's keeping; copy it before prepare()")
        adapted = self.decoder.adapted
        twin = copy.deepcopy(self).eval().requires_grad_(False)
        if adapted is not None and adapted.saved is None:
            remove(twin.decoder)  # it starts by adding nothing
        return twin

    def save_pretrained(self, directory: Path | None) -> None:
        """A directory that `transformers.AutoModelForCausalLM` loads."""
        pretrained.save(self.decoder, directory)


class ActorCritic(Actor):
    """An actor whose own states a value head reads: two of PPO's models in one (Ziegler et al. 2019).

    It is saved as the actor that it is; the head starts at 0 and lives on in the run's checkpoints.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.score = nn.Parameter(Critic.new_head(decoder))

    def read(self, states: Tensor) -> Tensor:
        """States [N, D] -> values [N] fp32."""
        with self.feed.visit("score"):
            return F.linear(states.float(), self.score)[:, 0]

    def groups(self) -> list[tuple[str, list[str]]]:
        """The actor's, and the value head."""
        return [*super().groups(), ("score", ["score"])]

    def reads(self) -> tuple[str, ...]:
        """The language-model head and the value head."""
        return (*super().reads(), "score")


class ScalarModel(Role):
    """A decoder with one number per state: the reward model reads it at the last token, the critic at every state.

    The number is (state . weight - mean) / std; mean and std are the reward model's normalisation (PPO.md 10), so a
    critic that starts from it predicts the same scale.
    """

    def __init__(self, decoder: Decoder, weight: Tensor | None = None, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__(decoder)
        weight = self.new_head(decoder) if weight is None else weight
        home = decoder.head_weight.device
        self.score = nn.Parameter(weight.to("cpu" if home.type == "meta" else home, torch.float32).clone())
        self.mean, self.std = mean, std
        self.facts: dict[str, float] = {}
        """What training found out about the score (held-out pair accuracy, ...); saved with the model."""

    @classmethod
    def from_pretrained(
        cls, source: str, *, lora: LoraSpec | int | None = None, adapter: str | None = None, seed: int = 0,
        base_dtype: BaseDtype | None = None, unfrozen: int | None = None, allow_pickle: bool = False,
    ) -> Self:  # fmt: skip
        """From a language model (a new head) or from what `save_pretrained` wrote (its head and scale).

        `lora` to `unfrozen` as in Actor.from_pretrained; the score head learns in full either way.
        """
        decoder, extras = _load(source, allow_pickle, lora, adapter, seed, base_dtype, unfrozen)
        weight = extras.get("score.weight", cls.new_head(decoder))
        config = decoder.config.hf
        mean, std = float(config.get("penstock_score_mean", 0.0)), float(config.get("penstock_score_std", 1.0))
        model = cls(decoder, weight, mean, std)
        model.facts = config.get("penstock_facts", {})
        return model

    @staticmethod
    def new_head(decoder: Decoder) -> Tensor:
        """What a head without training starts from, [1, D] fp32."""
        raise NotImplementedError

    def read(self, states: Tensor) -> Tensor:
        """States [N, D] -> numbers [N], in fp32 whatever the weights' dtype (PPO.md 22)."""
        with self.feed.visit("score"):
            return (F.linear(states.float(), self.score)[:, 0] - self.mean) / self.std

    def groups(self) -> list[tuple[str, list[str]]]:
        """The decoder's and the score head. A language-model head that nobody reads stays behind."""
        return [(group, names) for group, names in super().groups() if group != "head"] + [("score", ["score"])]

    def reads(self) -> tuple[str, ...]:
        """The score head."""
        return ("score",)

    def save_pretrained(self, directory: Path | None) -> None:
        """A directory that `transformers.AutoModelForSequenceClassification` loads, with head `score`.

        transformers gives the raw score; mean and std lie in config.json as penstock_score_mean and _std.
        """
        scale = {"penstock_score_mean": self.mean, "penstock_score_std": self.std, "penstock_facts": self.facts}
        with self.feed.visit("score"):
            score = self.score.detach().clone()
        pretrained.save(self.decoder, directory, score=score, extra_config=scale)


class Critic(ScalarModel):
    """Predicts the return from the state before each response token; made from a language model it starts at 0."""

    @staticmethod
    def new_head(decoder: Decoder) -> Tensor:
        """Zeros (PPO.md 19)."""
        return torch.zeros(1, decoder.head_weight.shape[1], dtype=torch.float32, device="cpu")


class RewardModel(ScalarModel):
    """Scores a whole response at its last token."""

    @staticmethod
    def new_head(decoder: Decoder) -> Tensor:
        """N(0, 1/sqrt(D+1)): the first scores are near unit scale whatever the width (PPO.md 22)."""
        width = decoder.head_weight.shape[1]
        return torch.randn(1, width, dtype=torch.float32, device="cpu") / (width + 1) ** 0.5

    @staticmethod
    def trained(source: str, *, base_dtype: BaseDtype | None = None, allow_pickle: bool = False) -> "RewardModel":
        """A reward model that has been trained. Raises UserError for a language model, which has no score to give."""
        decoder, extras = _load(source, allow_pickle)
        if not extras:
            raise UserError(f"{source}: is no reward model (no score head in it); make one with penstock reward.")
        del decoder
        return RewardModel.from_pretrained(source, base_dtype=base_dtype, allow_pickle=allow_pickle)


def _load(
    source: str, allow_pickle: bool, spec: LoraSpec | int | None = None, adapter: str | None = None, seed: int = 0,
    base_dtype: BaseDtype | None = None, unfrozen: int | None = None,
) -> tuple[Decoder, dict[str, Tensor]]:  # fmt: skip
    decoder, extras = pretrained.load(
        source, dtype=torch.get_default_dtype(), device=torch.get_default_device(), allow_pickle=allow_pickle,
        adapter=adapter,
    )  # fmt: skip
    if spec is not None:
        spec = LoraSpec(spec) if isinstance(spec, int) else spec
        if decoder.adapted is None:
            pretrained.adapt(decoder, spec, base=source, seed=seed)
        elif decoder.adapted.spec.rank != spec.rank:
            raise UserError(
                f"--lora {spec.rank}: {source} has an adapter of rank {decoder.adapted.spec.rank}, which goes on "
                "learning; leave --lora out, or start from penstock export --merge of it."
            )
    if base_dtype is not None:
        quantise_base(decoder, base_dtype)
    if unfrozen is not None:
        _freeze_start(decoder, unfrozen)
    return decoder, extras


def _freeze_start(decoder: Decoder, unfrozen: int) -> None:
    """Leaves the last `unfrozen` blocks and what follows them to learn; a tied head is the token table, and frozen."""
    layers = decoder.config.num_layers
    if unfrozen > layers:
        raise UserError(f"--num-layers-unfrozen {unfrozen}: the model has {layers} blocks; give that or less.")
    decoder.embed.requires_grad_(False)
    decoder.blocks[: layers - unfrozen].requires_grad_(False)
