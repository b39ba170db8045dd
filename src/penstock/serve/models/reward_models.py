"""Reward models in the worker: which models are some, how they are loaded, and what they say of rows of tokens."""

from collections.abc import Sequence

import torch

from penstock.memory.strategy import Strategy
from penstock.models import pretrained
from penstock.models.roles import RewardModel


@torch.no_grad()
def score(model: RewardModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """What the model says at the end of each row."""
    lengths, device = torch.tensor([len(row) for row in rows]), model.decoder.device
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    hidden = model(tokens.to(device), lengths.to(device))
    return model.read(hidden[torch.arange(len(rows)), lengths.to(device) - 1]).tolist()


def is_reward_model(path: str) -> bool:
    """Whether a model's files hold a head that scores, in the place of one that speaks."""
    decoder, extras = pretrained.load(path, device="meta")
    speaks = any("CausalLM" in name for name in decoder.config.hf.get("architectures") or ())
    return bool(extras) and (decoder.adapted is not None or not speaks)


def load(path: str, dtype: str, device: str | None) -> RewardModel:
    """A reward model on one device. In int8 no scores are computed, but in bf16."""
    strategy = Strategy.named("naive", dtype="bf16" if dtype == "int8" else dtype, device=device)
    with strategy.init():
        model = RewardModel.trained(path).eval().requires_grad_(False)
    strategy.prepare(model)
    return model
