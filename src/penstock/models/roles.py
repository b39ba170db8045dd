"""The four jobs of PPO: a decoder and what stands on its hidden states.

Actor and reference read log-probabilities through the decoder's head; critic and reward model carry a scalar head in
fp32. All of them take right-padded tokens with lengths and return packed values of the valid positions only.
"""

import copy
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.errors import UserError
from penstock.models import pretrained
from penstock.models.decoder import Decoder


class Actor(nn.Module):
    """A language model that answers. The reference is one too, frozen."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @staticmethod
    def from_pretrained(source: str, *, allow_pickle: bool = False) -> "Actor":
        """From a Hugging Face directory or hub id, on torch's default device and in its default dtype.

        Raises UserError for a reward model: what it says was never trained.
        """
        decoder, extras = _load(source, allow_pickle)
        if extras:
            raise UserError(f"{source}: is a reward model, and a language model is needed; give the one it came from.")
        return Actor(decoder)

    def frozen(self) -> "Actor":
        """A copy that takes no gradient: the reference."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states [B, T, D]."""
        return self.decoder(tokens, lengths)

    def save_pretrained(self, directory: Path) -> None:
        """A directory that `transformers.AutoModelForCausalLM` loads."""
        pretrained.save(self.decoder, directory)


class ScalarModel(nn.Module):
    """A decoder with one number per state: the reward model reads it at the last token, the critic at every state.

    The number is (state . weight - mean) / std; mean and std are the reward model's normalisation (PPO.md 10), so a
    critic that starts from it predicts the same scale.
    """

    def __init__(self, decoder: Decoder, weight: Tensor | None = None, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.decoder = decoder
        weight = self.new_head(decoder) if weight is None else weight
        self.score = nn.Parameter(weight.to(decoder.head_weight.device, torch.float32).clone())
        self.mean, self.std = mean, std
        self.facts: dict[str, float] = {}
        """What training found out about the score (held-out pair accuracy, ...); saved with the model."""

    @classmethod
    def from_pretrained(cls, source: str, *, allow_pickle: bool = False) -> Self:
        """From a language model (a new head) or from what `save_pretrained` wrote (its head and scale)."""
        decoder, extras = _load(source, allow_pickle)
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

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states [B, T, D]."""
        return self.decoder(tokens, lengths)

    def read(self, states: Tensor) -> Tensor:
        """States [N, D] -> numbers [N], in fp32 whatever the weights' dtype (PPO.md 22)."""
        return (F.linear(states.float(), self.score)[:, 0] - self.mean) / self.std

    def save_pretrained(self, directory: Path) -> None:
        """A directory that `transformers.AutoModelForSequenceClassification` loads, with head `score`.

        transformers gives the raw score; mean and std lie in config.json as penstock_score_mean and _std.
        """
        scale = {"penstock_score_mean": self.mean, "penstock_score_std": self.std, "penstock_facts": self.facts}
        pretrained.save(self.decoder, directory, score=self.score.detach(), extra_config=scale)


class Critic(ScalarModel):
    """Predicts the return from the state before each response token; made from a language model it starts at 0."""

    @staticmethod
    def new_head(decoder: Decoder) -> Tensor:
        """Zeros (PPO.md 19)."""
        return torch.zeros(1, decoder.head_weight.shape[1], dtype=torch.float32)


class RewardModel(ScalarModel):
    """Scores a whole response at its last token."""

    @staticmethod
    def new_head(decoder: Decoder) -> Tensor:
        """N(0, 1/sqrt(D+1)): the first scores are near unit scale whatever the width (PPO.md 22)."""
        width, device = decoder.head_weight.shape[1], decoder.head_weight.device
        return torch.randn(1, width, dtype=torch.float32, device=device) / (width + 1) ** 0.5

    @staticmethod
    def trained(source: str, *, allow_pickle: bool = False) -> "RewardModel":
        """A reward model that has been trained. Raises UserError for a language model, which has no score to give."""
        decoder, extras = _load(source, allow_pickle)
        if not extras:
            raise UserError(f"{source}: is no reward model (no score head in it); make one with penstock reward.")
        del decoder
        return RewardModel.from_pretrained(source, allow_pickle=allow_pickle)


def _load(source: str, allow_pickle: bool) -> tuple[Decoder, dict[str, Tensor]]:
    return pretrained.load(
        source, dtype=torch.get_default_dtype(), device=torch.get_default_device(), allow_pickle=allow_pickle
    )
