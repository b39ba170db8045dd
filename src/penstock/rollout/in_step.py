"""Rows that are read in step: how text is made where the layers, and so the cache, are transformers' own.

[Note: rows in step] Architectures differ in how they treat padding and positions, and all agree on rows of equal
length. So all rows of a batch stand at one position, and nothing is padded or masked: the first forward reads as many
tokens as the shortest prompt has, each further one a token per row: the prompt's own while there are any, then those
that were sampled. A batch takes as many forwards as its longest row has tokens behind the shortest prompt.

[Note: a cache is checked] transformers decodes some state-space hybrids otherwise than it reads whole rows (Bamba,
Nemotron-H and Zamba2 on a CPU, 5.23). The first steps of a model are compared, and where they differ whole rows are
read for every token: slow, and what the trainer computes.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.models.decoder import Decoder
from penstock.models.foreign.decoder import ForeignDecoder, Past

TOLERANCE = {torch.float32: 1e-4}
"""Of states, relative to the largest of them; 0.05 in other dtypes."""


class RowsInStep:
    """The rows of a batch, and transformers' cache of what has been read of them."""

    def __init__(self, decoder: Decoder) -> None:
        assert isinstance(decoder, ForeignDecoder)
        self._decoder = decoder
        self.clear()

    def clear(self) -> None:
        """No rows: the next ones are a batch of their own."""
        self._past: Past | None = self._decoder.past()
        self._read = 0
        """Tokens of each row that have been read."""
        self._slots: list[int] = []
        """Each row's place in the cache, where ended rows keep theirs."""
        self._size = 0
        """Rows of the cache."""

    def read(self, rows: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """One forward over rows of tokens, the same rows as before with what was added. Returns which of them are read
        to their end, and the states behind these: [n, D]. Without rows it only visits the weights."""
        if not rows:
            return [], self._decoder.idle()
        if not self._read:
            self._slots, self._size = list(range(len(rows))), len(rows)
        stop = self._read + 1 if self._read else min(map(len, rows))
        start = 0 if self._past is None else self._read
        states = self._states([row[start:stop] for row in rows])
        if self._past is not None and self._past.cache is None:
            self._past = None  # this model makes none
        elif self._past is not None and self._read and self._decoder.unchecked:
            states = self._checked(states, [row[:stop] for row in rows])
        self._read = stop
        ended = [i for i, row in enumerate(rows) if len(row) == stop]
        return ended, states[ended]

    def _states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The states behind the last token of each row, [n, D]."""
        device, moved = self._decoder.device, len(rows) != self._size and self._past is not None
        tokens = torch.tensor(rows, device=device)
        if moved:  # ended rows read something too
            every = torch.zeros(self._size, tokens.shape[1], dtype=torch.int64, device=device)
            every[self._slots] = tokens
            tokens = every
        states = self._decoder.forward(tokens, cache=self._past)[:, -1]  # type: ignore[arg-type]
        return states[self._slots] if moved else states

    def _checked(self, states: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
        """These states, if whole rows give the same; else those of whole rows, from now on."""
        self._decoder.unchecked -= 1
        if self._decoder.feed.collective:  # other ranks are at other steps
            return states
        tokens = torch.tensor(rows, device=self._decoder.device)
        whole = self._decoder.forward(tokens)[:, -1]
        gap = (states - whole).abs().max() / whole.abs().max()
        if bool(gap <= TOLERANCE.get(states.dtype, 0.05)):  # in a dry run: yes
            return states
        warnings.warn(
            f"{self._decoder.config.family}: transformers' cache gives other states than whole rows (by "
            f"{float(gap):.2g} of the largest), so whole rows are read for every token, which is slow.",
            stacklevel=2,
        )
        self._decoder.cached, self._past = False, None
        return whole

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        if not rows:
            self.clear()
        elif self._past is None or self._past.cache is None:
            self._size = len(rows)
        elif self._decoder.rows_can_leave(self._past):
            self._past.cache.reorder_cache(torch.tensor(rows, device=self._decoder.device))
            self._slots, self._size = list(range(len(rows))), len(rows)
        else:
            self._slots = [self._slots[row] for row in rows]
