"""Log-probabilities of the tokens of prompts, as the trainer's forward over whole rows has them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.models.decoder import Decoder
from penstock.models.tiling import prefills

TILE = 256
"""Positions whose logits exist at once."""
Scored = tuple[float | None, tuple[tuple[int, float], ...]]
"""A token's log-probability behind those before it, None for the first one; the likeliest tokens there, and theirs."""


@torch.no_grad()
def prompt_logprobs(
    decoder: Decoder, prompts: Sequence[Sequence[int]], top: int, adapter: int | None = None
) -> list[list[Scored]]:
    """One `Scored` per token of each prompt, with the `top` likeliest tokens at its place. `adapter`: of several that
    the decoder has (surgery.add_adapters_by_row), the one it reads them with."""
    if decoder.row_adapters is not None:
        decoder.row_adapters.choose([adapter], decoder.device)
    lengths = [len(prompt) for prompt in prompts]
    alone = [slice(i, i + 1) for i in range(len(prompts))]  # transformers' own layers want no padding
    results: list[list[Scored]] = []
    for rows in alone if decoder.config.foreign else prefills(lengths):
        some = prompts[rows]
        tokens = torch.zeros(len(some), max(lengths[rows]), dtype=torch.int64)
        for row, prompt in enumerate(some):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        tokens = tokens.to(decoder.device)
        hidden = decoder.forward(tokens, torch.tensor(lengths[rows], device=decoder.device))
        for row, prompt in enumerate(some):
            behind = len(prompt) - 1
            results.append([(None, ()), *_scored(decoder, hidden[row, :behind], tokens[row, 1 : behind + 1], top)])
    return results


def _scored(decoder: Decoder, hidden: Tensor, targets: Tensor, top: int) -> list[Scored]:
    """hidden [N, D], targets [N]: each behind the state in its place."""
    scored: list[Scored] = []
    for states, words in zip(hidden.split(TILE), targets.split(TILE), strict=True):
        logprobs = decoder.logits(states).float().log_softmax(-1)
        chosen = logprobs.gather(1, words[:, None])[:, 0].tolist()
        values, ids = (part.tolist() for part in logprobs.topk(top))
        scored += [
            (own, tuple(zip(of_ids, of_values, strict=True)))
            for own, of_ids, of_values in zip(chosen, ids, values, strict=True)
        ]
    return scored
