"""The four roles of PPO: a decoder, and the head that reads its hidden states.

Actor and reference read log-probabilities through the decoder's head; critic and reward model have a scalar head in
fp32. All of them take right-padded tokens with lengths and return packed values of the valid positions only.
"""

import copy
import dataclasses
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.distributed.world import World
from penstock.errors import UserError
from penstock.memory.program import ALWAYS_THERE, Part
from penstock.models import pretrained
from penstock.models.decoder import Context, Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.recipe import fill, filling, recipe_of
from penstock.models.surgery import quantise_base, remove_adapters
from penstock.models.weight_shapes import BaseDtype


class LoadOptions(TypedDict, total=False):
    """Options of `from_pretrained`."""

    lora: LoraSpec | int | None
    """Adapters, or their rank: the model is frozen and they learn. Default: none, the whole model learns."""
    adapter: str | None
    """A directory with saved adapters (peft's format), which go on learning."""
    seed: int
    """Of fresh adapters. Default: 0."""
    base_dtype: BaseDtype | None
    """The dtype that frozen products are packed in (models.packed). Default: not packed."""
    unfrozen: int | None
    """The number of last blocks that learn. Default: all."""
    router_aux_loss_coef: float | None
    """Weight of the loss that balances experts. Default: the model's own."""
    allow_pickle: bool
    """Whether .bin files are read. Default: False."""


class Role(nn.Module):
    """A decoder as a program that a strategy can feed (memory.program.Program)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.padding_free = False
        """Whether rows of different lengths lie end to end; see decoder, [Note: rows end to end]."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states [B, T, D]."""
        return self.decoder(tokens, lengths)

    @property
    def feed(self) -> Any:
        """Brings the weights to the device; see Decoder.feed."""
        return self.decoder.feed

    @feed.setter
    def feed(self, feed: Any) -> None:
        self.decoder.feed = feed

    def groups(self) -> list[tuple[str, list[str]]]:
        return [(group, [f"decoder.{name}" for name in names]) for group, names in self.decoder.groups()]

    def parts(self) -> Sequence[Part]:
        return self.decoder.parts()

    def reads(self) -> tuple[str, ...]:
        """The groups that log-probabilities are read with: the decoder's head."""
        return self.decoder.reads()

    def begin(self, tokens: Tensor, batch: Any = None, *, learns: bool = False) -> Context:
        if batch is None or self.pads:
            context = self.decoder.begin(tokens)
        else:
            context = self.decoder.begin(tokens, valid=batch.valid, computed=batch.computed)
        if batch is None or not learns or self.decoder.balance is None:
            return context
        return dataclasses.replace(context, valid=batch.valid if context.ragged is None else context.ragged.readers)

    @property
    def pads(self) -> bool:
        """Whether rows of a micro-batch are always padded: layers of transformers and slices know no others."""
        return not self.padding_free or self.decoder.slicer is not None or self.decoder.config.foreign is not None

    def learn(self, micro_batches: Sequence[Any], world: World) -> None:
        """Counts the tokens of an update, over which the experts' loads are balanced."""
        if self.decoder.balance is not None:
            tokens = sum(batch.valid.sum() for batch in micro_batches)
            self.decoder.balance.begin(world.sum(torch.as_tensor(tokens, dtype=torch.float32, device=world.device)))

    def turn(self, world: World) -> None:
        if self.decoder.balance is not None and self.decoder.balance.sums is not None:
            self.decoder.balance.sums = world.sum(self.decoder.balance.sums)

    def measured(self) -> dict[str, float]:
        """The balancing loss of the experts, where there is one: where loads are even, the experts per token."""
        balance = self.decoder.balance
        return {} if balance is None or balance.sums is None else {"aux_loss": float(balance.loss())}

    def slice(self, budget: int) -> None:
        """From now on, whole rows hold at most `budget` bytes inside a block. Raises UserError for blocks that are not
        cut; see sliced_blocks.slicer_of."""
        from penstock.models.sliced_blocks import slicer_of  # slow to import

        self.decoder.slicer = slicer_of(self.decoder.config, budget)

    def recipe(self, name: str) -> Hashable:
        """As `recipe.recipe_of`, by this role's names. None for a head, which exists already."""
        return recipe_of(self.decoder, name.removeprefix("decoder.")) if name.startswith("decoder.") else None

    def filling(self) -> AbstractContextManager[None]:
        """Around several calls of `fill`."""
        return filling(self.decoder)

    def fill(self, weights: dict[str, Tensor]) -> None:
        """Writes the first values of these weights of the decoder, by this role's names."""
        fill(self.decoder, {name.removeprefix("decoder."): weight for name, weight in weights.items()})


class Actor(Role):
    """A language model that answers. The reference is a frozen one."""

    @staticmethod
    def from_pretrained(source: str, **options: Unpack[LoadOptions]) -> "Actor":
        """From a Hugging Face directory or hub id, or an adapter's directory, which names its base; on torch's default
        device and in its default dtype. Raises UserError for a reward model: its answers were never trained.
        """
        decoder, extras = _load(source, **options)
        if extras:
            raise UserError(
                f"{source}: is a reward model, and a language model is needed (it has a head score, classifier or "
                "v_head); give the one it came from."
            )
        return Actor(decoder)

    def frozen(self) -> "Actor":
        """A copy that takes no gradient: the reference. Raises ValueError once a strategy feeds the model."""
        if self.feed is not ALWAYS_THERE:
            raise ValueError("this model's weights have moved to a strategy's keeping; copy it before prepare()")
        adapted = self.decoder.adapted
        reference = copy.deepcopy(self).eval().requires_grad_(False)
        if adapted is not None and adapted.saved is None:
            remove_adapters(reference.decoder)  # fresh adapters add 0
        return reference

    def save_pretrained(self, directory: Path | None) -> None:
        """A directory that `transformers.AutoModelForCausalLM` loads."""
        pretrained.save(self.decoder, directory)


class ActorCritic(Actor):
    """An actor with a value head on its states: two of PPO's models in one (Ziegler et al. 2019).

    `save_pretrained` saves the actor alone. The head starts at 0, and the run's checkpoints keep it.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.score = nn.Parameter(Critic.new_head(decoder))

    def read(self, states: Tensor) -> Tensor:
        """States [N, D] -> values [N] fp32."""
        with self.feed.visit("score"):
            return F.linear(states.float(), self.score)[:, 0]

    def groups(self) -> list[tuple[str, list[str]]]:
        return [*super().groups(), ("score", ["score"])]

    def reads(self) -> tuple[str, ...]:
        return (*super().reads(), "score")


class ScalarModel(Role):
    """A decoder and one number per state: the reward model reads it at the last token, the critic at every state.

    The number is (state . weight - mean) / std; mean and std are the reward model's normalisation (PPO.md 10), so a
    critic that starts from it predicts the same scale.
    """

    def __init__(self, decoder: Decoder, weight: Tensor | None = None, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__(decoder)
        weight = self.new_head(decoder) if weight is None else weight
        device = decoder.head_weight.device
        self.score = nn.Parameter(weight.to("cpu" if device.type == "meta" else device, torch.float32).clone())
        self.mean, self.std = mean, std
        self.facts: dict[str, float] = {}
        """Measured in training (held-out pair accuracy, ...); saved with the model."""

    @classmethod
    def from_pretrained(cls, source: str, **options: Unpack[LoadOptions]) -> Self:
        """From a language model (a new head) or from a saved scalar model (its head and scale). The score head always
        learns in full; a bias of it becomes part of the mean."""
        decoder, extras = _load(source, **options)
        weight = extras.get("score.weight", cls.new_head(decoder))
        config = decoder.config.hf
        mean, std = float(config.get("penstock_score_mean", 0.0)), float(config.get("penstock_score_std", 1.0))
        mean -= float(extras.get("score.bias", 0.0))
        model = cls(decoder, weight, mean, std)
        model.facts = config.get("penstock_facts", {})
        return model

    @staticmethod
    def new_head(decoder: Decoder) -> Tensor:
        """The first value of a fresh head, [1, D] fp32."""
        raise NotImplementedError

    def read(self, states: Tensor) -> Tensor:
        """States [N, D] -> numbers [N], in fp32 whatever the weights' dtype (PPO.md 22)."""
        with self.feed.visit("score"):
            return (F.linear(states.float(), self.score)[:, 0] - self.mean) / self.std

    def groups(self) -> list[tuple[str, list[str]]]:
        """The decoder's without its language-model head, and the score head."""
        return [(group, names) for group, names in super().groups() if group != "head"] + [("score", ["score"])]

    def reads(self) -> tuple[str, ...]:
        return ("score",)

    def save_pretrained(self, directory: Path | None) -> None:
        """A directory that `transformers.AutoModelForSequenceClassification` loads, with head `score`.

        transformers returns the raw score; mean and std are in config.json as penstock_score_mean and _std.
        """
        scale = {"penstock_score_mean": self.mean, "penstock_score_std": self.std, "penstock_facts": self.facts}
        with self.feed.visit("score"):
            score = self.score.detach().clone()
        pretrained.save(self.decoder, directory, score=score, extra_config=scale)


class Critic(ScalarModel):
    """Predicts the return from the state before each response token. From a language model it starts at 0."""

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
        """A reward model that has been trained. Raises UserError for a language model, which has no score head."""
        decoder, extras = _load(source, allow_pickle=allow_pickle)
        if not extras:
            raise UserError(f"{source}: is no reward model (no score head in it); make one with penstock reward.")
        del decoder
        return RewardModel.from_pretrained(source, base_dtype=base_dtype, allow_pickle=allow_pickle)


def _load(
    source: str,
    *,
    lora: LoraSpec | int | None = None,
    adapter: str | None = None,
    seed: int = 0,
    base_dtype: BaseDtype | None = None,
    unfrozen: int | None = None,
    router_aux_loss_coef: float | None = None,
    allow_pickle: bool = False,
) -> tuple[Decoder, dict[str, Tensor]]:
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    decoder, extras = pretrained.load(source, dtype=dtype, device=device, allow_pickle=allow_pickle, adapter=adapter)
    if lora is not None:
        spec = LoraSpec(lora) if isinstance(lora, int) else lora
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
    if router_aux_loss_coef is not None:
        if not decoder.config.num_experts or router_aux_loss_coef < 0:
            raise UserError(
                f"--router-aux-loss-coef {router_aux_loss_coef}: is a number from 0 for a mixture of experts, and "
                f"{source} has {decoder.config.num_experts} experts in a block; leave it out, or give another number."
            )
        decoder.config = dataclasses.replace(decoder.config, router_aux_loss_coef=router_aux_loss_coef)
        decoder.balance = decoder.new_balance()
    return decoder, extras


def _freeze_start(decoder: Decoder, unfrozen: int) -> None:
    """Freezes all but the last `unfrozen` blocks, the last norm and an untied head."""
    layers = decoder.config.num_layers
    learns = {"last", "head", *(f"blocks.{i}" for i in range(layers - unfrozen, layers))}
    if unfrozen > layers:
        raise UserError(f"--num-layers-unfrozen {unfrozen}: the model has {layers} blocks; give that or less.")
    for group, names in decoder.groups():
        for name in names if group not in learns else ():
            decoder.get_parameter(name).requires_grad_(False)
