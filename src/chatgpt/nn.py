"""GPTActor, OPTCritic, RewardModel and their like: penstock's roles under the names of the 2023 script.

Made inside `strategy.model_init_context()` they are recipes: no weight exists before the trainer prepares them. Where
they live then is the strategy's business, so `.cuda()` is taken as a hint, on a machine without a GPU too.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from penstock.models import pretrained, roles
from penstock.models.decoder import Decoder
from penstock.models.families import family_of

SMALLEST: dict[str, dict[str, Any]] = {
    # what each name means without `pretrained=` and `config=`: gpt2, facebook/opt-125m, bigscience/bloom-560m
    "gpt2": {},
    "opt": {"vocab_size": 50272, "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
            "ffn_dim": 3072},
    "bloom": {"vocab_size": 250880, "n_layer": 24, "hidden_size": 1024, "n_head": 16},
}  # fmt: skip


class Hinted(nn.Module):
    """Takes `.cuda()` and `.to(device)` as hints while it is a recipe."""

    @property
    def model(self) -> Decoder:
        """The decoder below the head."""
        decoder = self.decoder
        assert isinstance(decoder, Decoder)
        return decoder

    def cuda(self, device: Any = None) -> Self:
        """Moves weights that exist, if there is a GPU to move them to."""
        if any(parameter.is_meta for parameter in self.parameters()) or not torch.cuda.is_available():
            return self
        return super().cuda(device)


class RewardModel(Hinted, roles.RewardModel):
    """A score on top of `model`, a decoder such as `critic.model`; `value_head` [1, D] is its weight."""

    def __init__(self, model: Decoder, value_head: Tensor | nn.Linear | None = None) -> None:
        weight = value_head.weight if isinstance(value_head, nn.Linear) else value_head
        super().__init__(model, None if weight is None or weight.is_meta else weight.detach())


def _decoder(family: str, source: str | None, config: Any) -> Decoder:
    if source is not None:
        return pretrained.load(source, dtype=torch.get_default_dtype(), device=torch.get_default_device())[0]
    hf = SMALLEST[family] if config is None else config if isinstance(config, dict) else config.to_dict()
    return Decoder(family_of(family, "config").config_from_hf({"model_type": family, **hf}))


class _Actor(Hinted, roles.Actor):
    FAMILY = ""

    def __init__(self, pretrained: str | None = None, config: Any = None, checkpoint: bool = False) -> None:
        """From a directory or hub id, a transformers config, or the family's smallest published shape with random
        weights. `checkpoint` is accepted: blocks are recomputed wherever weights move."""
        super().__init__(_decoder(self.FAMILY, pretrained, config))


class _Critic(Hinted, roles.Critic):
    FAMILY = ""

    def __init__(self, pretrained: str | None = None, config: Any = None, checkpoint: bool = False) -> None:
        super().__init__(_decoder(self.FAMILY, pretrained, config))

    @property
    def value_head(self) -> Tensor:
        """The head's weight, [1, D]."""
        return self.score


class GPTActor(_Actor):
    FAMILY = "gpt2"


class GPTCritic(_Critic):
    FAMILY = "gpt2"


class OPTActor(_Actor):
    FAMILY = "opt"


class OPTCritic(_Critic):
    FAMILY = "opt"


class BLOOMActor(_Actor):
    FAMILY = "bloom"


class BLOOMCritic(_Critic):
    FAMILY = "bloom"
