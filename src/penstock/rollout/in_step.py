"""Rows that are read in step: how text is made where the layers, and so the cache, are transformers' own.

[Note: rows in step] Architectures differ in how they treat padding and positions, and all agree on rows of equal
length. So all rows of a batch stand at one position, and nothing is padded or masked: the first forward reads as many
tokens as the shortest prompt has, each further one a token per row: the prompt's own while there are any, then those
that were sampled. A batch takes as many forwards as its longest row has tokens behind the shortest prompt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.models.decoder import Decoder
from penstock.models.foreign.decoder import ForeignDecoder, Past


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

    def read(self, rows: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """One forward over rows of tokens, the same rows as before with what was added. Returns which of them are read
        to their end, and the states behind these: [n, D]. Without rows it only visits the weights."""
        if not rows:
            return [], self._decoder.idle()
        stop = self._read + 1 if self._read else min(map(len, rows))
        start = 0 if self._past is None else self._read
        tokens = torch.tensor([row[start:stop] for row in rows], device=self._decoder.device)
        states = self._decoder.forward(tokens, cache=self._past)[:, -1]  # type: ignore[arg-type]
        self._read = stop
        if self._past is not None and self._past.cache is None:
            self._past = None  # this model makes none: whole rows are read each time
        ended = [i for i, row in enumerate(rows) if len(row) == stop]
        return ended, states[ended]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        if not rows:
            self.clear()
        elif self._past is not None and self._past.cache is not None:
            self._past.cache.reorder_cache(torch.tensor(rows, device=self._decoder.device))
