"""The KV cache: a preallocated tensor per layer, rows are answers, written in place; on the device, or swapped.

[Note: a swapped cache] Where a device budget cannot hold the cache but can hold two of its layers, it lives in host
memory, and answers are the same to the bit. While block i computes, layer i is in one of two buffers on the device and
layer i + 1 on its way to the other; the token that block i adds goes home when the next layer is asked for. The next
rollout's cache takes the same pages: see [Note: pages stay pinned].

[Note: a cache grows] A model reads 8,192 tokens or a million, and answers have a hundred: all rows and positions of 64
rows of SmolLM2-135M would be 24 GB. So a cache is made for what runs, and doubles as rows and tokens come; a planned
rollout knows both before, and has it whole.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from penstock.memory.tiers import Ram, copy_ahead
from penstock.models.decoder import Decoder

Layers = Sequence[tuple[Tensor, Tensor]]


FEWEST_SLOTS = 128


class KVCache:
    """`slots` positions for `rows` answers: per layer [2, rows, H_kv, slots, head_dim], keys and values."""

    def __init__(self, decoder: Decoder, rows: int, slots: int, swap: Ram | None = None, whole: bool = True) -> None:
        """With `swap`, layers live in that tier, whole. Raises ResourceError when its budget is too small. Not `whole`:
        `rows` and `slots` are the most, and it begins empty."""
        c, dtype, self._most = decoder.config, decoder.dtype, (rows, slots)
        if not (whole or swap):
            rows = slots = 0
        shape = (2, rows, c.num_kv_heads, slots, c.head_dim)
        self._swap, self.rows, self.slots = swap, rows, slots
        if swap is None:
            self._layers = [torch.zeros(shape, dtype=dtype, device=decoder.device) for _ in range(c.num_layers)]
            return
        numel = c.num_layers * math.prod(shape)
        pages = swap.lend((numel + numel // slots) * dtype.itemsize, "the KV cache", self).view(dtype)
        self._layers = [*pages[:numel].view(c.num_layers, *shape)]
        self._buffers = [torch.zeros(shape, dtype=dtype, device=decoder.device) for _ in range(2)]
        self._fresh = pages[numel:].view(c.num_layers, rows, 2, c.num_kv_heads, c.head_dim)
        """What decoding added and homes do not hold yet."""
        self._added: Tensor | None = None
        """[n] int64: the slots it belongs to."""

    @contextlib.contextmanager
    def lend(self, start: int, stop: int, slots: Tensor | None = None) -> Iterator[Layers]:
        """Rows start .. stop-1 for one pass over the layers, in order: layer i is (keys, values), each [n, H_kv, S, E].

        Decoding reads them and adds a token per row at `slots` [n] int64; without, a prefill writes them from slot 0.
        """
        if self._swap is None:
            yield [(keys[start:stop], values[start:stop]) for keys, values in self._layers]
            return
        self._keep_added()
        visit = _Visit(self, start, stop, slots)
        yield visit
        visit.settle()
        self._added = slots

    def make_room(self, lengths: Sequence[int]) -> bool:
        """For rows of these many tokens, to the next powers of two. Whether it grew: all addresses are new then."""
        needed = len(lengths), max(lengths, default=0)
        if needed[0] <= self.rows and needed[1] <= self.slots:
            return False
        rows, slots = max(needed[0], self.rows), max(needed[1], self.slots, FEWEST_SLOTS)
        rows, slots = (min(1 << (n - 1).bit_length(), most) for n, most in zip((rows, slots), self._most, strict=True))
        for i, old in enumerate(self._layers):  # one after the other: there is never more than one layer twice
            self._layers[i] = old.new_zeros(2, rows, old.shape[2], slots, old.shape[4])
            self._layers[i][:, : self.rows, :, : self.slots] = old
        self.rows, self.slots = rows, slots
        return True

    def copy_row(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one row, copied over another's."""
        self._keep_added()
        for layer in self._layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]

    def _keep_added(self) -> None:
        """Decoding's last tokens go where they belong. By now the device has sent them: a token was chosen since."""
        if self._swap is None or self._added is None:
            return
        slots, self._added = self._added.cpu(), None
        rows = torch.arange(len(slots))
        for layer, fresh in zip(self._layers, self._fresh, strict=True):
            layer[:, rows, :, slots] = fresh[: len(slots)]


class _Visit(Layers):
    """The layers of a swapped cache, each lent until the next is asked for."""

    def __init__(self, cache: KVCache, start: int, stop: int, slots: Tensor | None) -> None:
        self._cache, self._rows, self._slots = cache, slice(start, stop), slots
        self._at: int | None = None
        self._landing = self._bring(0)

    def __len__(self) -> int:
        return len(self._cache._layers)

    def __getitem__(self, i):
        """Layer i on the device."""
        self.settle()
        for landed in self._landing:
            landed()
        self._landing = self._bring(i + 1)
        self._at = i
        keys, values = self._buffer(i)
        return keys, values

    def settle(self) -> None:
        """Sends home what the block has written."""
        if self._at is None:
            return
        layer, swap = self._at, self._cache._swap
        assert swap is not None
        buffer, self._at = self._buffer(layer), None
        if self._slots is None:
            self._cache._layers[layer][:, self._rows] = buffer  # whole: a part of each row would be many runs of memory
            swap.bytes_written += buffer.nbytes
        else:
            rows = torch.arange(len(self._slots), device=buffer.device)
            added = buffer[:, rows, :, self._slots]  # [n, 2, H_kv, E]
            self._cache._fresh[layer, : len(added)].copy_(added, non_blocking=True)
            swap.bytes_written += added.nbytes

    def _buffer(self, i: int) -> Tensor:
        return self._cache._buffers[i % 2][:, : self._rows.stop - self._rows.start]

    def _bring(self, i: int) -> list:
        """Sends for a layer; halves, because each is one run of memory."""
        if self._slots is None or i == len(self):
            return []
        home, swap = self._cache._layers[i][:, self._rows], self._cache._swap
        assert swap is not None
        return [copy_ahead(half, out, swap) for half, out in zip(home, self._buffer(i), strict=True)]
