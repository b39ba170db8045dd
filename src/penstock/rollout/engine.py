"""Text from a decoder: right-padded prefill, then one token per row and step until EOS.

It works on token ids and the trainer's own weights; text and templates belong to `data.chat`. Rows that have ended
leave the batch when half of it is idle.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.models.decoder import Decoder
from penstock.rollout.cache import allocate, keep_rows
from penstock.rollout.sampling import Sampling, pick, stream


@dataclass
class Answer:
    """One sampled response. Example: Answer([5, 9], [7, 2], [-0.3, -1.1], "stop")."""

    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    """The sampled tokens; a first EOS ends the response and belongs to it (PPO.md 1)."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each response token at the sampling temperature."""
    finish_reason: str = "length"
    """`stop` when EOS was sampled, `length` when the limit came first."""


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    episodes: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> list[Answer]:
    """`sampling.n` answers per prompt, those of one prompt side by side.

    `episodes` numbers the answers' random streams (0, 1, 2 ... by default). An answer ends at the first of `eos_ids`,
    at `max_new_tokens`, or where the model's positions end. `batch_size` answers are decoded together, all by default.
    """
    answers = [Answer(list(prompt)) for prompt in prompts for _ in range(sampling.n)]
    episodes = range(len(answers)) if episodes is None else episodes
    uniforms = [stream(sampling.seed, episode, sampling.max_new_tokens) for episode in episodes]
    size = batch_size or len(answers)
    # Long prompts together: less padding. The order of decoding changes no answer.
    order = sorted(range(len(answers)), key=lambda i: len(answers[i].prompt_ids))
    for start in range(0, len(order), max(size, 1)):
        rows = order[start : start + size]
        numbers = torch.stack([uniforms[i] for i in rows])
        for _ in decode_steps(decoder, [answers[i] for i in rows], numbers, sampling, eos_ids):
            pass
    return answers


@torch.no_grad()
def stream_tokens(
    decoder: Decoder, prompt: list[int], sampling: Sampling, *, eos_ids: Sequence[int], episode: int = 0
) -> Iterator[int]:
    """The tokens of one answer as they are made, EOS included. Stop iterating to cancel."""
    answer = Answer(list(prompt))
    numbers = stream(sampling.seed, episode, sampling.max_new_tokens)[None]
    for _ in decode_steps(decoder, [answer], numbers, sampling, eos_ids):
        yield answer.response_ids[-1]


def decode_steps(
    decoder: Decoder, answers: list[Answer], uniforms: Tensor, sampling: Sampling, eos_ids: Sequence[int]
) -> Iterator[None]:
    """Fills the answers in place, one token each per iteration; the prefill belongs to the first.

    uniforms: [answers, max_new_tokens], the random numbers that pick each one's tokens.
    """
    device = decoder.device
    lengths = torch.tensor([len(answer.prompt_ids) for answer in answers], device=device)
    width = int(lengths.max())
    if int(lengths.min()) < 1:
        raise ValueError("an empty prompt has no state to continue from; give it a BOS token")
    if width >= decoder.config.max_length:
        raise ValueError(f"a prompt of {width} tokens leaves no room in the model's {decoder.config.max_length}")
    tokens = torch.zeros(len(answers), width, dtype=torch.int64, device=device)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer.prompt_ids)] = torch.tensor(answer.prompt_ids, device=device)
    room = decoder.config.max_length
    limits = [min(sampling.max_new_tokens, room - len(answer.prompt_ids)) for answer in answers]
    slots = min(width + max(limits), room)
    cache = allocate(decoder, len(answers), slots)
    uniforms = uniforms.to(device)
    hidden = decoder.forward(tokens, lengths, cache)[torch.arange(len(answers), device=device), lengths - 1]

    most = decoder.feed.most(max(limits))
    live = list(range(len(answers)))  # rows of the batch -> answers
    done = [False] * len(answers)
    positions = lengths
    for step in range(most):
        picked, logprobs = pick(decoder.logits(hidden), uniforms[live, min(step, uniforms.shape[1] - 1)], sampling)
        # sync: the host must know who has ended
        for i, token, logprob in zip(live, picked.tolist(), logprobs.tolist(), strict=True):
            if not done[i]:
                answers[i].response_ids.append(token)
                answers[i].logprobs.append(logprob)
                if token in eos_ids:
                    answers[i].finish_reason = "stop"
                done[i] = token in eos_ids or len(answers[i].response_ids) == limits[i]
        yield
        still = [row for row, i in enumerate(live) if not done[i]]
        if not decoder.feed.together(bool(still)):  # weights sharded over ranks: who is done goes on visiting
            return
        if 0 < len(still) <= len(live) // 2:
            rows = torch.tensor(still, device=device)
            live, cache = [live[row] for row in still], keep_rows(cache, rows)
            picked, positions = picked[rows], positions[rows]
        hidden = decoder.decode(picked, cache, positions)
        positions = (positions + 1).clamp(max=slots - 1)  # a row that has ended may idle at the last position
