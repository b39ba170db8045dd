"""From logits to one token per row: what may be sampled, and the random number that picks it.

Each answer has a random stream of its own, keyed by (seed, episode), so the same prompt and seed give the same
answer alone or among others, on one rank or on four, and a resumed run needs only the episode counter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. The defaults are plain sampling from the model, with no hidden warper (PPO.md 4)."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    max_new_tokens: int = 128
    """Tokens per answer at most, EOS included."""
    n: int = 1
    """Answers per prompt."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens that holds this much probability; 1 is off."""
    seed: int = 0
    """Keys the random streams, with the episode number."""

    def __post_init__(self) -> None:
        for ok, text in (
            (self.temperature >= 0, f"temperature={self.temperature} is below 0; 0 is greedy, 1 is the model's own"),
            (self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} leaves no room for an answer; give >= 1"),
            (self.n >= 1, f"n={self.n} answers per prompt; give >= 1"),
            (self.top_k >= 0, f"top_k={self.top_k} is below 0; 0 turns it off"),
            (0 < self.top_p <= 1, f"top_p={self.top_p} is not in (0, 1]; 1 turns it off"),
        ):
            if not ok:
                raise ValueError(text)


def stream(seed: int, episode: int, count: int) -> Tensor:
    """The first `count` uniform numbers in [0, 1) of one answer's random stream: [count] fp32."""
    generator = torch.Generator().manual_seed(_mix(_mix(seed) ^ episode))
    return torch.rand(count, generator=generator)


def pick(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the distribution's CDF: logits [B, V], uniforms [B] -> tokens [B], logprobs [B].

    The log-probability is that of the token under softmax(logits / temperature) in fp32, before any truncation:
    the same number that `algorithms.functional.token_logprobs` gives (PPO.md 3).
    """
    logits = logits.float()
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if sampling.temperature == 0.0:
        tokens = logits.argmax(dim=-1)
    else:
        cdf = _truncate(logprobs, sampling).exp().cumsum(dim=-1)
        # right=True: the first token whose CDF is *above* the number, so a token of probability 0 is never picked.
        tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _truncate(logprobs: Tensor, sampling: Sampling) -> Tensor:
    if 0 < sampling.top_k < logprobs.shape[-1]:
        weakest_kept = logprobs.topk(sampling.top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < weakest_kept, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logprobs.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token goes when the ones before it already hold top_p; the likeliest always stays.
        drop = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        logprobs = logprobs.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return logprobs


def _mix(x: int) -> int:
    """splitmix64 (Steele et al. 2014): neighbouring keys give unrelated 64-bit seeds."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
