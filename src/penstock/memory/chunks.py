"""How a model's weights lie in chunks: names, offsets and counts. Pure: it never sees a tensor and imports no torch.

The program of a model visits *groups* of weights in a fixed order (the token table, block 0, block 1, ...). A group's
weights of one dtype, trained or frozen, lie end to end in one chunk; a group above `max_numel` is cut between weights
into even chunks. Equal blocks give equal chunks, so that one slot serves them all. Every chunk is padded so that its
shards are equally long and every shard begins and ends on a page, in any dtype: disks and collectives ask for that.
"""

import functools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

ALIGN = 2048
"""Elements: 4096 bytes, a page, in two-byte dtypes."""

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "int8": 1, "float8_e4m3fn": 1, "uint8": 1}
"""Bytes per element."""


@dataclass(frozen=True)
class Weight:
    """One parameter. Example: Weight("decoder.blocks.0.qkv.weight", (48, 16), 768, "float32", True)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    recipe: Hashable = None
    """Identifies its first value: frozen weights of equal recipes are the same bytes in every model. None: it is unlike
    any other model's."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Chunk:
    """A contiguous run of consecutive weights of one group."""

    index: int
    """Its position in the model's operational order."""
    group: str
    weights: tuple[Weight, ...]
    offsets: tuple[int, ...]
    """Where each weight begins, in elements."""
    numel: int
    """Elements with the padding: a multiple of world * ALIGN."""

    @property
    def dtype(self) -> str:
        """Of its weights."""
        return self.weights[0].dtype

    @property
    def trained(self) -> bool:
        """Whether an optimizer moves it; a frozen chunk has weights and nothing else."""
        return self.weights[0].trained

    @property
    def decaying(self) -> Iterator[slice]:
        """The elements that weight decay moves: of weights with two dimensions, so not of norms and biases."""
        for weight, offset in zip(self.weights, self.offsets, strict=True):
            if len(weight.shape) > 1:
                yield slice(offset, offset + weight.numel)

    @functools.cached_property
    def shared(self) -> tuple[Weight, ...] | None:
        """Its key among frozen chunks: models with equal keys share the chunk. None: no model shares it."""
        return None if self.trained or any(weight.recipe is None for weight in self.weights) else self.weights

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, whole."""
        return self.numel * ITEMSIZE[self.dtype]


def layout(
    groups: Iterable[tuple[str, Sequence[Weight]]], *, world: int = 1, max_numel: int | None = None
) -> list[Chunk]:
    """The chunks of a model whose groups come in operational order. Every weight is in exactly one chunk."""
    chunks: list[Chunk] = []
    for group, weights in groups:
        alike: dict[Hashable, list[Weight]] = {}
        for weight in weights:
            recipe = None if weight.trained else weight.recipe  # so that frozen weights beside an adapter are shared
            alike.setdefault((weight.dtype, weight.trained, recipe), []).append(weight)
        for alike_weights in alike.values():
            for run in even_runs(alike_weights, max_numel):
                offsets, end = [], 0
                for weight in run:
                    offsets.append(end)
                    end += weight.numel
                padded = -(-end // (world * ALIGN)) * world * ALIGN
                chunks.append(Chunk(len(chunks), group, tuple(run), tuple(offsets), padded))
    return chunks


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The blocks, as (offsets, sizes), that elements start..stop of a weight of that shape fall into, in order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    edges = [(start, first * inner), (last * inner, stop)] if first <= last else [(start, stop)]
    for i, (begin, end) in enumerate(edges):
        if i and first < last:
            yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
        row = begin // inner
        for offsets, sizes in boxes(begin - row * inner, end - row * inner, shape[1:]):
            yield (row, *offsets), (1, *sizes)


def even_runs(weights: Sequence[Weight], max_numel: int | None) -> list[list[Weight]]:
    """Consecutive weights in the fewest runs of at most `max_numel` elements, the longest run as short as it can be.

    A weight that is longer by itself is a run of its own: weights are never cut.
    """
    total = sum(weight.numel for weight in weights)
    if max_numel is None or total <= max_numel or len(weights) == 1:
        return [list(weights)]
    fewest = len(_fill(weights, max_numel))
    low, high = max((weight.numel for weight in weights if weight.numel <= max_numel), default=1), max_numel
    while low < high:  # the least capacity that still needs no more runs
        middle = (low + high) // 2
        if len(_fill(weights, middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return _fill(weights, low)


def _fill(weights: Sequence[Weight], capacity: int) -> list[list[Weight]]:
    runs: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights:
        if runs[-1] and filled + weight.numel > capacity:
            runs.append([])
            filled = 0
        runs[-1].append(weight)
        filled += weight.numel
    return runs
