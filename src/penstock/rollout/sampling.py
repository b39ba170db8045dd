"""From logits to one token per row: what may be sampled, and the random number that picks it.

[Note: one random stream per answer] Each answer's uniform numbers come from (seed, episode), and tokens are picked by
inverting the CDF. So the same prompt and seed give the same answer alone or in any batch, on one rank or on four, and a
resumed run needs only the episode counter.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels import cpu_ops


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
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt and response, multiplies negative ones (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the response has."""
    frequency_penalty: float = 0.0
    """Taken from them once per time that the response has them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; needs a tokenizer."""
    top_logprobs: int = 0
    """The number of likeliest tokens that are returned with each token."""
    min_new_tokens: int = 0
    """No EOS before so many tokens, which it counts among: 2 forbids it as the first, max_new_tokens + 1 altogether."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer as an EOS does."""
    ignore_eos: bool = False
    """An EOS is a token as others are: an answer goes on behind it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        object.__setattr__(self, "logit_bias", tuple((int(token), float(more)) for token, more in bias))
        for ok, text in (
            (
                all(isinstance(stop, str) and stop for stop in self.stop),
                f"stop={self.stop} holds what is not a text, or an empty one; give texts",
            ),
            (0 <= self.min_p <= 1, f"min_p={self.min_p} is not in [0, 1]; 0 turns it off"),
            (self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty} is not above 0; 1 is off"),
            (0 <= self.top_logprobs <= 1000, f"top_logprobs={self.top_logprobs} is not in 0 .. 1000"),
            (self.temperature >= 0, f"temperature={self.temperature} is below 0; 0 is greedy, 1 is the model's own"),
            (self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} leaves no room for an answer; give >= 1"),
            (
                0 <= self.min_new_tokens <= self.max_new_tokens + 1,
                f"min_new_tokens={self.min_new_tokens} is not in 0 .. max_new_tokens + 1 = {self.max_new_tokens + 1}",
            ),
            (self.n >= 1, f"n={self.n} answers per prompt; give >= 1"),
            (self.top_k >= 0, f"top_k={self.top_k} is below 0; 0 turns it off"),
            (0 < self.top_p <= 1, f"top_p={self.top_p} is not in (0, 1]; 1 turns it off"),
        ):
            if not ok:
                raise ValueError(text)

    @functools.cached_property
    def rule(self) -> "Sampling":
        """What `pick` needs of it: answers with the same rule are picked together."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

    @functools.cached_property
    def adjusts(self) -> bool:
        """Whether logits change with the response so far."""
        plain = self.repetition_penalty == 1 and not self.presence_penalty and not self.frequency_penalty
        return bool(self.logit_bias) or not plain


def adjust(logits: Tensor, sampling: Sampling, prompt: Sequence[int], response: Sequence[int]) -> None:
    """Penalties and biases of one row, logits [V] fp32, in place and before the temperature. Does nothing by default.

    Tokens outside the vocabulary in `logit_bias` are left out.
    """
    if not sampling.adjusts:
        return
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *response}), device=logits.device)
        old = logits[seen]
        logits[seen] = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
    if response and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, counts = torch.tensor(list(response), device=logits.device).unique(return_counts=True)
        logits[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token, more in sampling.logit_bias:
        if 0 <= token < len(logits):
            logits[token] += more


def stream(seed: int, episode: int, count: int) -> Tensor:
    """The first `count` uniform numbers in [0, 1) of one answer's random stream: [count] fp32."""
    generator = torch.Generator().manual_seed(_mix(_mix(seed) ^ episode))
    return torch.rand(count, generator=generator)


def pick(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the distribution's CDF: logits [B, V], uniforms [B] -> tokens [B], logprobs [B].

    The log-probability is that of the token under softmax(logits / temperature) in fp32, before any truncation:
    the same number that `models.log_probs.logprobs` gives (PPO.md 3).
    """
    logits = logits.float()
    if sampling.temperature == 0.0 or not _cuts(sampling, logits.shape[-1]):
        chosen = cpu_ops.choose(logits, uniforms, sampling.temperature)
        if chosen is not None:
            return chosen
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if sampling.temperature == 0.0:
        tokens = logits.argmax(dim=-1)
    else:
        cdf = _truncate(logprobs, sampling).exp().cumsum_(dim=-1)
        # right=True: the first token whose CDF is *above* the number, so a token of probability 0 is never picked.
        tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _cuts(sampling: Sampling, vocabulary: int) -> bool:
    """Whether tokens are left out."""
    return 0 < sampling.top_k < vocabulary or sampling.min_p > 0 or sampling.top_p < 1.0


def _truncate(logprobs: Tensor, sampling: Sampling) -> Tensor:
    if 0 < sampling.top_k < logprobs.shape[-1]:
        weakest_kept = logprobs.topk(sampling.top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < weakest_kept, -torch.inf)
    if sampling.min_p > 0:
        likeliest = logprobs.max(dim=-1, keepdim=True).values
        logprobs = logprobs.masked_fill(logprobs < likeliest + math.log(sampling.min_p), -torch.inf)
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
