"""Decoding steps at fixed addresses: on a GPU each is recorded once as a CUDA graph and then replayed.

[Note: decoding is a CUDA graph] A step of a small batch is hundreds of kernels of a few microseconds, and launching
them from Python takes longer than running them. A graph launches them all at once, but only for the shapes and
addresses it was recorded with: so rows and the slots that attention sees are rounded up to one of a few sizes, inputs
are copied to where the graph reads them, and weights must stay where they are. Updates happen in place, and the next
replay sees them. Weights that stream and a swapped cache are not recorded: their addresses change; but those of a
rollout that leases all weights are, anew for each lease (memory.stream). The cache is not
paged: PPO's answers have one common length.

[Note: one stream per recorder] The library of products keeps a workspace (34 MB on an H100) for every stream that it
has met, and a graph goes on using the one of the stream that it was recorded on. So all steps of a recorder are warmed
up and recorded on one stream, whose workspace is taken before the first recording and belongs to no graph's pool; no
two recorders that exist have the same one, so that two graphs never write to one workspace; and the stream of a
recorder that is gone is given to the next.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from penstock.models.decoder import Decoder
from penstock.rollout.cache import FEWEST_SLOTS, KVCache

_FREE: dict[torch.device, list[Any]] = {}
"""Streams of recorders that are gone. torch has 32 of a device, and gives the first again after the last."""


class Steps:
    """Decoding steps of a decoder over the first rows of a cache. On a CPU they are run as they are."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        """Every weight must be, and stay, on the device, and the cache as large as it is."""
        self._decoder, self._cache, self._rows, self._slots = decoder, cache, cache.rows, cache.slots
        self._inputs = torch.zeros(2, cache.rows, dtype=torch.int64, device=decoder.device)
        """Tokens, and the slots they are written to."""
        self._recorded: dict[tuple[int, int], Callable[[], Tensor]] = {}
        """(rows, slots seen) -> the step: it reads the inputs and returns the states."""
        self._pool: Any = None
        self._stream: Any = None
        """See [Note: one stream per recorder]."""

    def run(self, tokens: list[int], slots: list[int]) -> Tensor:
        """[n, D]: the states behind one token per row, which go to these slots. They last until the next `run`."""
        count = len(tokens)
        rows, seen = self.size_of(count, max(slots) + 1)
        spare = [0] * (self._rows - count)  # rows nobody uses write a slot that a prefill will write again
        self._inputs.copy_(torch.tensor([tokens + spare, slots + spare]))
        if (rows, seen) not in self._recorded:
            self._recorded[rows, seen] = self._record(rows, seen)
        return self._recorded[rows, seen]()[:count]

    def size_of(self, rows: int, seen: int) -> tuple[int, int]:
        """What they are rounded up to. Rows: 1, 2, 4, then multiples of 8; slots: powers of two from 128 on."""
        rounded = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
        return min(rounded, self._rows), min(max(1 << (seen - 1).bit_length(), FEWEST_SLOTS), self._slots)

    def _step(self, rows: int, seen: int) -> Tensor:
        tokens, slots = self._inputs[:, :rows]
        with self._cache.lend(0, rows, slots) as layers:
            return self._decoder.decode(tokens, layers, slots, seen)

    def _record(self, rows: int, seen: int) -> Callable[[], Tensor]:
        step = partial(self._step, rows, seen)
        if self._inputs.device.type != "cuda":
            return step
        device = self._inputs.device
        if self._stream is None:
            free = _FREE.setdefault(device, [])
            self._stream = free.pop() if free else torch.cuda.Stream(device)
            weakref.finalize(self, free.append, self._stream)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):  # once as it is: libraries take their workspaces now
            step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # One pool of memory for all, for no two run at once. Other threads may read another model's chunks meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            states = step()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return states

        return replay
