"""What lives where, and how many slots there are: decided from ids and byte counts alone. No torch in here.

The engine asks before it allocates anything, and `forecast.py` asks the same functions when nothing will be allocated.
"""

from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from penstock.memory.chunks import ITEMSIZE, Chunk
from penstock.memory.placement import AUTO, DISK, HOST, SHARD, STRATEGIES, Placement, Row, TierName, bits_of

STATES: dict[int, dict[str, tuple[str, int]]] = {
    32: {"exp_avg": ("float32", 1), "exp_avg_sq": ("float32", 1)},
    8: {
        "exp_avg": ("uint8", 1), "exp_avg_sq": ("uint8", 1),
        "exp_avg_scale": ("float32", 256), "exp_avg_sq_scale": ("float32", 256),
    },
}  # fmt: skip
"""What AdamW keeps beside a weight, by the bits of its moments: name -> (dtype, elements of the weight per element).
Names are torch's own; memory.adamw_8bit says what codes and scales are."""
PIECE = 1 << 22
"""Elements that one set of buffers between a disk and the update holds."""
SETS, SET_BYTES = 3, PIECE * 14
"""A weight of up to 4 bytes, or of 2 and its remainder, and two moments."""
UPDATE_TILE = 1 << 20
"""Elements that an update works on at once where it is not compiled: adam.TILE."""
UPDATE_WIDTH = {32: 8, 8: 28}
"""Bytes that each of them takes meanwhile, by the bits of the moments; a split master takes 4 more."""
RESERVED = 0.25
"""Share of a device budget that is left to activations when nobody says what they need."""
PAGE = 4096


@dataclass(frozen=True)
class Placed:
    """A chunk and the row of the table that says where its bytes live."""

    chunk: Chunk
    row: Row


@dataclass(frozen=True)
class Model:
    """One model, as far as memory goes."""

    name: str
    placed: tuple[Placed, ...]
    visits: tuple[tuple[str, ...], ...]
    """Groups that are needed at once, in order."""

    def moving(self, world: int) -> list[Chunk]:
        """Chunks whose weights must be brought before they are used."""
        return [one.chunk for one in self.placed if not resident(one.row, world)]

    def passing(self, world: int) -> list[Chunk]:
        """Trained chunks whose gradients do not stay where autograd makes them."""
        return [one.chunk for one in self.placed if one.chunk.trained and not in_place(one.row, world)]


def resident(row: Row, world: int) -> bool:
    """Weights are used where they lie."""
    return row.params.tier == "device" and (world == 1 or not row.params.sharded)


def in_place(row: Row, world: int) -> bool:
    """Autograd adds straight into the home of the gradients."""
    return row.grads.tier == "device" and (world == 1 or not row.grads.sharded)


def recomputes(moves: bool, recompute: bool | None) -> bool:
    """Whether backward runs blocks once more: as it was asked for, or (None) where weights move."""
    return moves if recompute is None else recompute


def states_of(dtype: str, bits: int) -> dict[str, tuple[str, int]]:
    """STATES, and before them the `remainder` of a split master where the weight has 16 bits."""
    return STATES[bits] if dtype == "float32" else {"remainder": ("int16", 1), **STATES[bits]}


def state_bytes(numel: int, dtype: str, bits: int) -> int:
    """Bytes of AdamW's states for so many elements."""
    return sum(numel // per * ITEMSIZE[kind] for kind, per in states_of(dtype, bits).values())


# --- placement --------------------------------------------------------------------------------------------------------


def place(
    name: str,
    models: Sequence[tuple[Sequence[Chunk], Sequence[Sequence[str]]]],
    world: int,
    budgets: dict[TierName, int | None],
    reserve: int | None = None,
) -> list[list[Placed]]:
    """Every chunk's row under a strategy, for models as (chunks, visits) that are prepared together.

    `gemini_auto` fills the device first, then host memory, then the disk: weights before gradients before optimizer
    states, because a weight is read in every pass and a state once a step; and within each the models in order.
    `budgets` are what is left on each tier (None: no end); `reserve` bytes of the device are left to activations.
    """
    name, bits = bits_of(name)
    if name != AUTO:
        row = replace(STRATEGIES[name], bits=bits)
        return [[Placed(chunk, row) for chunk in chunks] for chunks, _ in models]
    room = dict(budgets)
    device = room.get("device")
    if device is not None and not _all_fits(models, world, device, reserve, bits):
        slots = sum(together([weight_slots(chunks, visits) for chunks, visits in models]))
        slots += sum(together([gradient_slots([c for c in chunks if c.trained], visits) for chunks, visits in models]))
        held = int((device - slots) * RESERVED) if reserve is None else reserve
        room["device"] = max(device - slots - held, 0)
    host = room.get("host")
    if host is not None:
        room["host"] = max(host - SETS * SET_BYTES - UPDATE_TILE * (UPDATE_WIDTH[bits] + 4), 0)

    def take(nbytes: int, tiers: Sequence[Placement]) -> Placement:
        for one in tiers:
            left = room.get(one.tier)
            if left is None and one.tier in room:
                return one
            if left is not None and left >= nbytes:
                room[one.tier] = left - nbytes
                return one
        return tiers[-1]  # too little everywhere: the tier itself will say so

    tiers = [one for one in (SHARD, HOST, DISK) if one.tier in room]
    shared: dict[Hashable, Placement] = {}

    def once(chunk: Chunk) -> Placement:
        home = shared.get(chunk.shared) or take(chunk.nbytes // world, tiers)
        if chunk.shared is not None:
            shared[chunk.shared] = home
        return home

    params = [[once(chunk) for chunk in chunks] for chunks, _ in models]
    grads = take(_gradients(models) // world, [one for one in tiers if one.tier != "disk"])
    placed = []
    for (chunks, _), homes_of_params in zip(models, params, strict=True):
        rows = []
        for chunk, home in zip(chunks, homes_of_params, strict=True):
            states = take(state_bytes(chunk.numel // world, chunk.dtype, bits), tiers) if chunk.trained else home
            rows.append(Placed(chunk, Row(home, grads, states, bits)))
        placed.append(rows)
    return placed


def _gradients(models: Sequence[tuple[Sequence[Chunk], Sequence[Sequence[str]]]]) -> int:
    """Bytes of gradients at once, as `homes` counts them: models share them, but those on the same frozen weights."""
    sums: Counter[int] = Counter()
    for first, (chunks, _) in zip(_sharing_groups([chunks for chunks, _ in models]), models, strict=True):
        sums[first] += sum(chunk.nbytes for chunk in chunks if chunk.trained)
    return max(sums.values())


def _sharing_groups(models: Sequence[Iterable[Chunk]]) -> list[int]:
    """For each model the first one that stands on some of the same frozen weights: they step side by side."""
    weights = [{chunk.shared for chunk in chunks} - {None} for chunks in models]
    firsts: list[int] = []
    for at, mine in enumerate(weights):
        firsts.append(next((firsts[i] for i in range(at) if weights[i] & mine), at))
    return firsts


def _all_fits(
    models: Sequence[tuple[Sequence[Chunk], Sequence[Sequence[str]]]],
    world: int,
    device: int,
    reserve: int | None,
    bits: int,
) -> bool:
    """Whether everything may stay on the device: then nothing moves and no slot is needed."""
    if world > 1:
        return False  # shards are gathered into slots
    row = replace(STRATEGIES["gemini"], bits=bits)
    placed = [[Placed(chunk, row) for chunk in chunks] for chunks, _ in models]
    held = sum(homes(placed, world).values())
    return held + (int(device * RESERVED) if reserve is None else reserve) <= device


def homes(
    models: Iterable[Sequence[Placed]], world: int, pooled: int = 0, there: Container[Hashable] = ()
) -> dict[TierName, int]:
    """Bytes that models' weights, gradients and optimizer states take at home, per tier and rank.

    Models step one at a time, so they share the gradients' bytes, of which `pooled` are there already; those that stand
    on the same frozen weights step side by side and do not. Such weights have one home; `there`: who has it already.
    """
    needs: Counter[TierName] = Counter()
    seen: set[Hashable] = set()
    models = list(models)
    companies: dict[int, Counter[TierName]] = {}
    for first, placed in zip(
        _sharing_groups([[one.chunk for one in placed] for placed in models]), models, strict=True
    ):
        grads = companies.setdefault(first, Counter())
        for one in placed:
            chunk, row = one.chunk, one.row
            if chunk.shared is not None:
                if chunk.shared in seen or chunk.shared in there:
                    continue
                seen.add(chunk.shared)
            needs[row.params.tier] += _on(row.params.tier, chunk.nbytes // _parts(row.params, world))
            if chunk.trained:
                count = chunk.numel // _parts(row.optimizer, world)
                for kind, per in states_of(chunk.dtype, row.bits).values():
                    needs[row.optimizer.tier] += _on(row.optimizer.tier, count // per * ITEMSIZE[kind])
                grads[row.grads.tier] += chunk.nbytes // _parts(row.grads, world)
    for tier in {tier for grads in companies.values() for tier in grads}:
        needs[tier] += max(max(grads[tier] for grads in companies.values()) - pooled, 0)
    return dict(needs)


def _parts(placement: Placement, world: int) -> int:
    return world if placement.sharded else 1


def _on(tier: TierName, nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE if tier == "disk" else nbytes


# --- slots ------------------------------------------------------------------------------------------------------------


def weight_slots(chunks: Sequence[Chunk], visits: Sequence[Sequence[str]], ahead: int = 1) -> list[int]:
    """Bytes of the fewest slots that let a model's chunks pass with `ahead` visits fetched beforehand; `chunks` are
    those that move, `visits` the groups that are needed at once, in order."""
    needs = []
    for i in range(len(visits)):
        near = {group for step in range(ahead + 1) for group in visits[(i + step) % len(visits)]}
        needs.append([chunk.nbytes for chunk in chunks if chunk.group in near])
    return together(needs)


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


@dataclass(frozen=True)
class Slots:
    """What the two arenas are cut into, bytes each."""

    weights: list[int]
    gradients: list[int]
    least: int
    """Bytes of the fewest slots that work."""

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(self.weights) + sum(self.gradients)


def cut(models: Sequence[Model], world: int, room: int | None, reserve: int | None = None, ahead: int = 1) -> Slots:
    """The slots for these models in `room` bytes of device memory, of which `reserve` are left to activations.

    Where room is too small the fewest that work are given, and `least` says what they take.
    """
    moving = [model.moving(world) for model in models]
    pairs = list(zip(models, moving, strict=True))
    weights = together([weight_slots(chunks, model.visits, ahead) for model, chunks in pairs])
    gradients = together([gradient_slots(model.passing(world), model.visits) for model in models])
    least = sum(weights) + sum(gradients)
    if room is not None:
        spare = max(room - least, 0)
        room = sum(weights) + (int(spare * (1 - RESERVED)) if reserve is None else max(spare - reserve, 0))
    return Slots(filled(weights, moving, room), gradients, least)


class Holder(Protocol):
    """A slot, real or imagined."""

    @property
    def nbytes(self) -> int:
        """How much it can hold."""

    @property
    def key(self) -> Hashable | None:
        """What it holds."""

    @property
    def users(self) -> int:
        """Above 0: it cannot be taken away."""

    @property
    def age(self) -> int:
        """When it was filled: the arena's count."""


Slot = TypeVar("Slot", bound=Holder)


def choose(slots: Iterable[Slot], nbytes: int, next_use: Callable[[Any], int], before: int = -1) -> Slot | None:
    """The slot that a chunk of `nbytes` goes to, or None when all that fit are in use.

    The smallest size that fits; within it an empty slot first, else the one whose chunk is used latest from now, which
    is optimal when the order is known (Belady 1966), and ours is. None too when that is within `before` visits.
    """
    fitting = [slot for slot in slots if slot.nbytes >= nbytes and not slot.users]
    if not fitting:
        return None
    size = min(slot.nbytes for slot in fitting)
    chosen = max(
        (slot for slot in fitting if slot.nbytes == size),
        key=lambda slot: (slot.key is None, 0 if slot.key is None else next_use(slot.key), -slot.age),
    )
    return None if chosen.key is not None and next_use(chosen.key) <= before else chosen
