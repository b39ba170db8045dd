"""What lives where, and how many slots there are: decided from ids and byte counts alone. No torch in here."""

from collections import Counter
from collections.abc import Sequence

from penstock.memory.chunks import Chunk
from penstock.memory.placement import Row, TierName

STATE_BYTES = {"float32": 8, "bfloat16": 10, "float16": 10}
"""Bytes per element of AdamW's states beside the weight: two fp32 moments, and the remainder of a split master."""


def homes(chunks: Sequence[Chunk], row: Row, world: int, pooled: int = 0) -> dict[TierName, int]:
    """Bytes that one model's weights, gradients and optimizer states take at home, per tier and rank.

    `pooled` bytes of gradients are there already: all models share them.
    """
    needs: Counter[TierName] = Counter()
    for chunk in chunks:
        needs[row.params.tier] += chunk.nbytes // (world if row.params.sharded else 1)
        if chunk.trained:
            states = chunk.numel * STATE_BYTES[chunk.dtype] // (world if row.optimizer.sharded else 1)
            needs[row.optimizer.tier] += states
    grads = sum(chunk.nbytes for chunk in chunks if chunk.trained) // (world if row.grads.sharded else 1)
    needs[row.grads.tier] += max(grads - pooled, 0)
    return dict(needs)


def weight_slots(chunks: Sequence[Chunk], visits: Sequence[Sequence[str]]) -> list[int]:
    """Bytes of the fewest slots that let a model's chunks pass with one visit fetched ahead; `chunks` are those that
    move, `visits` the groups that are needed at once, in order."""
    pairs = zip(visits, [*visits[1:], *visits[:1]], strict=True)
    return together([[chunk.nbytes for chunk in chunks if chunk.group in {*now, *then}] for now, then in pairs])


def gradient_slots(chunks: Sequence[Chunk], visits: Sequence[Sequence[str]]) -> list[int]:
    """Bytes of the slots that one visit's gradients need; `chunks` are those whose gradients do not stay there."""
    return together([[chunk.nbytes for chunk in chunks if chunk.group in groups] for groups in visits])


def together(needs: Sequence[Sequence[int]]) -> list[int]:
    """Slots that serve each of several needs, which never come at the same time: the i-th largest for the i-th."""
    ordered = [sorted(sizes, reverse=True) for sizes in needs]
    return [max(sizes[i] for sizes in ordered if i < len(sizes)) for i in range(max(map(len, ordered), default=0))]


def filled(slots: Sequence[int], models: Sequence[Sequence[Chunk]], room: int | None) -> list[int]:
    """More slots, as far as `room` bytes reach (None: without end), until the largest model stays in them whole.

    A model that stays is not fetched again for every token it generates.
    """
    largest = max(models, key=lambda chunks: sum(chunk.nbytes for chunk in chunks), default=[])
    wanted = Counter(chunk.nbytes for chunk in largest) - Counter(slots)
    result, held = list(slots), sum(slots)
    for nbytes in sorted(wanted.elements()):
        if room is not None and held + nbytes > room:
            break
        result.append(nbytes)
        held += nbytes
    return result
