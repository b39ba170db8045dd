"""Rows into tensors, and the order in which rows are used."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pad(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Ragged rows right-padded: tokens [B, T] int64 and lengths [B] int64, which alone tell what is padding."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tokens = torch.full((len(rows), int(lengths.max())), pad_id, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens, lengths


class Shuffle:
    """An endless walk over `count` items, a new permutation each epoch; its state resumes exactly.

    A batch that crosses the end of an epoch takes its last items from the next one, so that every batch is full.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError("there is nothing to shuffle: no rows are left")
        self.count = count
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.cursor = 0
        self.permutations = 0

    @property
    def epochs(self) -> float:
        """Epochs walked so far, with the fraction of the current one."""
        return max(self.permutations - 1, 0) + self.cursor / self.count if self.permutations else 0.0

    def next(self, k: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < k:
            if self.cursor == len(self.order):
                self.order = torch.randperm(self.count, generator=self.generator).tolist()
                self.cursor = 0
                self.permutations += 1
            indices = self.order[self.cursor : self.cursor + k - len(taken)]
            taken += indices
            self.cursor += len(indices)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Cursor, permutation and generator."""
        walk = {"count": self.count, "cursor": self.cursor, "order": list(self.order)}
        return {**walk, "permutations": self.permutations, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises ValueError when the number of items has changed since."""
        if state["count"] != self.count:
            raise ValueError(f"the checkpoint walked over {state['count']} rows and the data now has {self.count}")
        self.cursor, self.order, self.permutations = state["cursor"], list(state["order"]), state["permutations"]
        self.generator.set_state(state["generator"])


def split_by_prompt(
    prompts: Sequence[str], fraction: float, seed: int, *, most: int | None = None
) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out: about `fraction` of the prompts, each whole on one side (PPO.md 23).

    At least one prompt stays on each side when fraction is above 0 and there are two; `most` rows at most are held out.
    """
    distinct = sorted(set(prompts))
    random.Random(seed).shuffle(distinct)
    count = round(len(distinct) * fraction)
    if fraction > 0:
        count = min(max(count, 1), len(distinct) - 1)
    rows, heldout = Counter(prompts), set(distinct[:count])
    if most is not None:
        room = itertools.accumulate(rows[prompt] for prompt in distinct[:count])
        heldout = {prompt for prompt, filled in zip(distinct, room, strict=False) if filled <= most}
    train = [i for i, prompt in enumerate(prompts) if prompt not in heldout]
    return train, [i for i, prompt in enumerate(prompts) if prompt in heldout]
