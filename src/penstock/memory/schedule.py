"""Which chunk is in which slot, and in which order chunks are needed: ids and byte counts, without torch.

The engine runs it with slots of device memory, the forecast with imagined ones: see [Note: one arithmetic for plan and
engine].
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from penstock.memory.chunks import Chunk


@dataclass(eq=False)
class Slot:
    """A place for one chunk; in a forecast it is imagined. Free: no key. Cached: a key, no users. Leased: users."""

    nbytes: int
    key: Any = None
    """The chunk's home (`ScheduledHome`), or None."""
    users: int = 0
    age: int = 0
    """The table's count when it was filled."""

    def wait(self) -> None:
        """Returns when the chunk's bytes have arrived."""


SlotType = TypeVar("SlotType", bound=Slot)


class SlotTable(Generic[SlotType]):
    """Which chunk is in which slot.

    `together`: chunks for which it is equal are needed at the same visits. A block of experts has hundreds of them, and
    a claim looks at one of each.
    """

    def __init__(self, slots: Iterable[SlotType], together: Callable[[Any], Hashable] = lambda key: key) -> None:
        self.slots = sorted(slots, key=lambda slot: slot.nbytes)
        self._together = together
        self._clock = 0
        self._holding: dict[Hashable, SlotType] = {}
        """Chunk -> its slot."""
        self._empty: dict[int, list[SlotType]] = {}
        """By size, the smallest first."""
        self._filled: dict[int, dict[Hashable, dict[SlotType, None]]] = {}
        """By size, and by what is needed at the same visits; of these the oldest first."""
        for slot in self.slots:
            self._empty.setdefault(slot.nbytes, []).insert(0, slot)
            self._filled[slot.nbytes] = {}

    def find(self, key: Hashable) -> SlotType | None:
        """The slot that holds the chunk, arrived or on its way."""
        return self._holding.get(key)

    def claim(
        self, key: Hashable, nbytes: int, next_use: Callable[[Any], int], min_next_use: int = -1
    ) -> SlotType | None:
        """The slot that a chunk of `nbytes` goes to, or None when all that fit are in use.

        The smallest size that fits; within it an empty slot first, else the one whose chunk is used latest, which is
        optimal when the order is known (Belady 1966), and it is. None too when that is within `min_next_use` visits.
        """
        for size, empty in self._empty.items():
            if size >= nbytes and (slot := empty[-1] if empty else self._used_latest(size, next_use)) is not None:
                break
        else:
            return None
        if slot.key is not None:
            if next_use(slot.key) <= min_next_use:
                return None
            slot.wait()  # the copy of an unused prefetch must not write into the next chunk
            self.clear(slot)
        self._empty[size].pop()
        self._clock += 1
        slot.key, slot.age, self._holding[key] = key, self._clock, slot
        self._filled[size].setdefault(self._together(key), {})[slot] = None
        return slot

    def pin(self, homes: Iterable[Any], next_use: Callable[[Any], int]) -> Iterator[tuple[Any, SlotType]]:
        """Gives each of these chunks a slot, in which it stays; yields those that must be filled. See plan.fit_at_once.

        The largest first: a small chunk may be in a slot that a large one needs.
        """
        for home in sorted(homes, key=lambda home: -home.chunk.nbytes):
            slot = self.find(home)
            if slot is None:
                slot = self.claim(home, home.chunk.nbytes, next_use)
                assert slot is not None
                yield home, slot
            slot.users += 1

    def unpin(self, homes: Iterable[Any]) -> None:
        """They may leave again."""
        for home in homes:
            self._holding[home].users -= 1

    def _used_latest(self, size: int, next_use: Callable[[Any], int]) -> SlotType | None:
        latest: tuple[int, int] | None = None
        chosen: SlotType | None = None
        for members in self._filled[size].values():
            slot = next((slot for slot in members if not slot.users), None)
            if slot is not None and (latest is None or (next_use(slot.key), -slot.age) > latest):
                chosen, latest = slot, (next_use(slot.key), -slot.age)
        return chosen

    def clear(self, slot: SlotType) -> None:
        """Its chunk is there no more."""
        members = self._filled[slot.nbytes][self._together(slot.key)]
        del members[slot], self._holding[slot.key]
        if not members:
            del self._filled[slot.nbytes][self._together(slot.key)]
        slot.key = None
        self._empty[slot.nbytes].append(slot)

    def forget(self, is_old: Callable[[Any], bool]) -> None:
        """Empties the slots of chunks whose homes have changed."""
        for slot in self.slots:
            if slot.key is not None and is_old(slot.key):
                assert not slot.users
                slot.wait()
                self.clear(slot)


# --- the order of visits ----------------------------------------------------------------------------------------------

NEVER = 1 << 60


class ScheduledHome(Hashable, Protocol):
    """What a slot is filled from: a ChunkHome or an imagined one. Models that share a chunk share its home."""

    @property
    def chunk(self) -> Chunk:
        """The chunk that lives there."""


HomeType = TypeVar("HomeType", bound=ScheduledHome)


def moments(visits: Sequence[Sequence[str]]) -> dict[str, tuple[int, ...]]:
    """Group -> the visits that it is needed at, by number."""
    at: dict[str, list[int]] = {}
    for i, groups in enumerate(visits):
        for group in groups:
            at.setdefault(group, []).append(i)
    return {group: tuple(numbers) for group, numbers in at.items()}


def together_of(visits: Sequence[Sequence[str]]) -> dict[str, Hashable]:
    """Equal for groups that are needed at the same visits of every pass. Some passes cut the last visit in two."""
    return {group: group if len(visits) - 1 in at else at for group, at in moments(visits).items()}


class Schedule(Generic[HomeType]):
    """The visits of one pass of one model, in order: the current one, when a chunk is needed next, what to prefetch.

    `homes`: per group those whose weights move; `order`: groups per visit; `repeats`: the first visit follows the last
    one; `choices`: per visit, groups that it may need beside. The engine runs it with slots of an arena, the forecast
    with imagined ones.
    """

    def __init__(
        self, homes: Mapping[str, Sequence[HomeType]], order: Sequence[tuple[str, ...]], *, repeats: bool,
        choices: Sequence[tuple[str, ...]] = (),
    ) -> None:  # fmt: skip
        self._homes, self._order, self._repeats = homes, order, repeats
        self._members = {home for group in homes.values() for home in group}
        self._at = -1
        self._uses: dict[HomeType, int] = {}
        """What `next_use` said since the last visit began."""
        self._positions = moments(
            [(*groups, *few) for groups, few in zip(order, choices, strict=True)] if choices else order
        )

    def advance(self, groups: tuple[str, ...]) -> None:
        """Makes the next visit of these groups the current one; nothing changes when the order has no such visit."""
        for step in range(1, len(self._order) + 1):
            at = (self._at + step) % len(self._order)
            if self._order[at] == groups:
                self._at = at
                self._uses.clear()
                return

    def next_use(self, home: HomeType) -> int:
        """Visits from now until this chunk is needed again."""
        use = self._uses.get(home)
        if use is None:
            use = self._uses[home] = self._next_use(home)
        return use

    def _next_use(self, home: HomeType) -> int:
        if home not in self._members:
            return NEVER
        positions = self._positions.get(home.chunk.group, ())
        later = bisect_right(positions, self._at)
        if later < len(positions):
            return positions[later] - self._at
        return len(self._order) - self._at + positions[0] if self._repeats and positions else NEVER

    def prefetch(self, slots: SlotTable[SlotType], ahead: int) -> Iterator[tuple[HomeType, SlotType]]:
        """Claims slots for chunks of the next `ahead` visits, where one holds nothing that is needed sooner."""
        for step in range(1, ahead + 1):
            at = self._at + step
            if at >= len(self._order) and not self._repeats:
                return
            for group in self._order[at % len(self._order)]:
                for home in self._homes.get(group, ()):
                    if slots.find(home) is None:
                        slot = slots.claim(home, home.chunk.nbytes, self.next_use, min_next_use=step)
                        if slot is not None:
                            yield home, slot
