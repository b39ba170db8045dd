"""Bytes that move in one iteration, and seconds: passes through imagined slots, filled as the engine fills its own.

See [Note: one arithmetic for plan and engine].
"""

import random
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from penstock.memory import plan
from penstock.memory.chunks import ITEMSIZE, Chunk
from penstock.memory.placement import TierName
from penstock.memory.plan import Model, Placed
from penstock.memory.schedule import Schedule, Slot, SlotTable, together_of
from penstock.planner.activations import Pass
from penstock.planner.waits import Lap, lap_of, waits

WARM = 3
"""Passes over the same order after which slots hold the same chunks again."""
DRAWS = 5
"""Passes whose mean stands for all where tokens choose what comes."""


@dataclass(frozen=True)
class Rates:
    """What the machine can do, per rank: operations and bytes per second."""

    flops: float = 200e12
    link: float = 25e9
    """Between host and device, each way."""
    disk_read: float = 3e9
    disk_write: float = 2e9
    host: float = 38e9
    """Host memory, reads and writes together, during the optimizer's update."""
    network: float = 25e9
    """Between ranks of different machines, each way."""
    device: float = 1.5e12
    """Device memory, reads and writes together, during an update of states that are there."""
    network_inside: float = 25e9
    """Between ranks of one machine, each way."""


def inside_machine(rates: "Rates") -> "Rates":
    """What ranks that share a machine see."""
    return replace(rates, network=rates.network_inside)


@dataclass(frozen=True)
class Seconds:
    """One phase of one iteration: in all, and as long as each of the machine's limits alone would take."""

    total: float
    compute: float
    link: float
    disk: float
    optimizer: float
    network: float


@dataclass(eq=False)
class _ImaginedHome:
    """Where a chunk's weights would be. Like a ChunkHome, models that share the chunk have the same one."""

    chunk: Chunk
    tier: TierName
    nbytes: int
    """This rank's part."""
    visits: Hashable
    """As ChunkHome.visits."""


class Account:
    """Bytes and seconds of passes, one after the other, through imagined slots: filled as the engine does."""

    def __init__(
        self, models: Mapping[str, Model], sizes: Sequence[int], world: int, ahead: int, recompute: bool | None,
        rates: Rates, few_tokens: int,
    ) -> None:  # fmt: skip
        self._models, self._world, self._ahead = models, world, ahead
        self._recompute, self._rates, self._few_tokens = recompute, rates, few_tokens
        self._random = random.Random(0)
        self._sizes, self._table = sizes, SlotTable(map(Slot, sizes), lambda home: home.visits)
        self._homes: dict[str, dict[str, list[_ImaginedHome]]] = {name: {} for name in models}
        """Per model and group: what must be fetched."""
        shared: dict[Hashable, _ImaginedHome] = {}
        for name, model in models.items():
            together = together_of(model.visits)
            for chunk, row in ((placed.chunk, placed.row) for placed in model.placed):
                if not plan.resident(row, world):
                    nbytes = chunk.nbytes // (world if row.params.sharded else 1)
                    home = _ImaginedHome(chunk, row.params.tier, nbytes, (name, together.get(chunk.group)))
                    if chunk.shared is not None:
                        home = shared.setdefault(chunk.shared, home)
                    self._homes[name].setdefault(chunk.group, []).append(home)
        self._moved: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._later = 0.0
        """Seconds of a sharing group's updates beside what follows."""
        self._owed: Lap | None = None
        """The last one whose updates may still go on."""

    def phase(self, groups: Sequence[Sequence[Pass]]) -> tuple[dict[str, int], Seconds]:
        """Traffic and seconds of one phase: its sharing groups, one after the other."""
        self._moved = Counter()
        seconds, laps = [], []
        for group in groups:
            self._seconds, self._later = dict.fromkeys(Seconds.__dataclass_fields__, 0.0), 0.0
            run = {"step": self._steps, "evaluate": self._evaluations, "generate": self._generation}[group[0].kind]
            run(group)
            seconds.append(self._seconds)
            laps.append(self._lap(group))
        first, owed = waits(laps, self._owed)
        steady, self._owed = waits(laps, owed)
        for group, spent, once, again in zip(groups, seconds, first, steady, strict=True):
            spent["total"] += once + (group[0].times - 1) * again
        self._moved["ranks"] += self._moved["ahead"]
        traffic = {key: self._moved[key] for key in ("host_read", "host_written", "disk_read", "disk_written", "ranks")}
        return traffic, Seconds(**{name: sum(each[name] for each in seconds) for name in self._seconds})

    def _lap(self, group: Sequence[Pass]) -> Lap:
        models = [self._models[each.model] for each in group]
        on_disk, chunks = any(map(updates_on_disk, models)), len(models[0].visits)
        return lap_of(group, self._seconds, self._later, twice=self._twice(group), on_disk=on_disk, chunks=chunks)

    def _twice(self, group: Sequence[Pass]) -> bool:
        """Whether backward runs blocks once more."""
        return plan.recomputes(any(self._models[each.model].moving(self._world) for each in group), self._recompute)

    def _evaluations(self, group: Sequence[Pass]) -> None:
        for _ in range(group[0].times):
            self._spend(self._cycle(group), sum(each.flops for each in group))

    def _generation(self, group: Sequence[Pass]) -> None:
        (generation,) = group
        fits = plan.fit_at_once(self._models[generation.model].moving(self._world), self._sizes)
        if fits or generation.copy_bytes:
            self._resident(generation, self._leased(generation.model) if fits else self._cycle(group))
            return
        drawn = [tokens if tokens <= self._few_tokens else 0 for tokens in generation.visited_by]
        step: Counter[str] = Counter()
        means: dict[bool, Counter[str]] = {}
        for i in range(generation.times):
            for j in range(generation.prefills + generation.tokens):
                decodes = j >= generation.prefills
                if not any(drawn) and i + j < WARM:
                    step = self._cycle(group)
                elif any(drawn) and j in (0, generation.prefills):
                    means[decodes] = means.get(decodes) or self._mean_cycle(group, drawn[decodes])
                    step = means[decodes]
                if not decodes:
                    swap = Counter(host_written=generation.swap_writes[0] // generation.prefills)
                    self._spend(step + swap, generation.flops / generation.prefills)
                else:
                    swap = Counter(host_read=generation.swapped, host_written=generation.swap_writes[1])
                    self._spend(step + swap, generation.decode_flops / generation.tokens, waits=drawn[1] > 0)

    def _leased(self, name: str) -> Counter[str]:
        """Bytes that come where a rollout keeps all weights: see [Note: one lease for a rollout] in stream.py."""
        by_group, order = self._homes[name], _order(self._models[name])
        moved, homes = Counter[str](), [home for of_group in by_group.values() for home in of_group]
        for home, _ in self._table.pin(homes, Schedule(by_group, order, repeats=True).next_use):
            self._count(home, moved, "ranks")
        self._table.unpin(homes)
        return moved

    def _resident(self, generation: Pass, moved: Counter[str]) -> None:
        """A rollout whose weights stay, once `moved` has come."""
        for _ in range(generation.times):
            swap = Counter(host_written=generation.swap_writes[0])
            self._spend(moved + swap, generation.flops)
            tokens, moved = generation.tokens, Counter()
            swap = Counter(host_read=generation.swapped * tokens, host_written=generation.swap_writes[1] * tokens)
            self._spend(swap, generation.decode_flops)

    def _count(self, home: _ImaginedHome, moved: Counter[str], gathered: str) -> None:
        """Adds what comes of a chunk, and from where; `gathered`: as what the other ranks' parts count."""
        moved[f"{home.tier}_read"] += home.nbytes
        moved[gathered] += home.chunk.nbytes - home.nbytes

    def _steps(self, group: Sequence[Pass]) -> None:
        """Optimizer steps: forward and backward side by side, then the updates one after the other."""
        models = [self._models[each.model] for each in group]
        firsts = [_first_trained(model) for model in models]
        orders = [
            [*model.visits, *reversed(model.visits[first:-1])] for model, first in zip(models, firsts, strict=True)
        ]
        twice = self._twice(group)
        flops = sum(each.flops for each in group) * (4 / 3 if twice else 1)
        step: Counter[str] = Counter()
        for i in range(group[0].times):
            if i < WARM:
                step = Counter()
                for wave in range(1 if twice else group[0].count):
                    step.update(self._fetched(group, orders, repeats=False))
                    for model, first in zip(models, firsts, strict=True):
                        step.update(_gradients(model, first, self._world, again=wave > 0))
                homes = [home for each in group for homes in self._homes[each.model].values() for home in homes]
                self._table.forget({home for home in homes if home.chunk.trained}.__contains__)
            offloaded = sum(each.offloaded for each in group)
            self._spend(step + Counter(host_written=offloaded, host_read=offloaded), flops)
            for model in models:
                self._sum(model)
                self._update(model)

    def _mean_cycle(self, group: Sequence[Pass], drawn: int) -> Counter[str]:
        """`_cycle`; where tokens choose, the mean of the cycles after the first ones."""
        if not drawn:
            return self._cycle(group)
        cycles = [self._cycle(group, drawn) for _ in range(WARM + DRAWS)][WARM:]
        return Counter({key: sum(moved[key] for moved in cycles) // DRAWS for key in cycles[0]})

    def _cycle(self, group: Sequence[Pass], drawn: int = 0) -> Counter[str]:
        """Bytes that are fetched when each model is visited once, without gradients; see `_walk`."""
        orders = [_order(self._models[each.model]) for each in group]
        return self._fetched(group, orders, repeats=True, drawn=drawn)

    def _fetched(
        self, group: Sequence[Pass], orders: Sequence[Sequence[tuple[str, ...]]], *, repeats: bool, drawn: int = 0
    ) -> Counter[str]:
        """Bytes that are fetched in one pass of each model, a visit of each in turn."""
        moved: Counter[str] = Counter()
        walks = [
            self._walk(each.model, order, moved, repeats, drawn) for each, order in zip(group, orders, strict=True)
        ]
        for _ in zip_longest(*walks):
            pass
        return moved

    def _walk(
        self, name: str, order: Sequence[tuple[str, ...]], moved: Counter[str], repeats: bool, drawn: int
    ) -> Iterator[None]:
        """One pass, a visit at a time: what `Stream.lease` does to slots. Adds what it fetches to host_read, disk_read,
        and for what is gathered to ahead, or to ranks where nothing is computed meanwhile. `drawn`: so many tokens
        choose, each group as likely as any; 0: all come."""
        homes, table, model = self._homes[name], self._table, self._models[name]
        if not homes:
            return
        choices = [*model.choices, ()] if drawn and model.choices else [()] * len(order)
        order = [groups[: len(groups) - len(few)] for groups, few in zip(order, choices, strict=True)]
        schedule = Schedule(homes, order, repeats=repeats, choices=choices)

        def lease(groups: Iterable[str]) -> list[Slot]:
            needed = [home for group in groups for home in homes.get(group, ())]
            leased = []
            for home in sorted(needed, key=lambda home: -home.chunk.nbytes):
                slot = table.find(home)
                if slot is None:
                    slot = table.claim(home, home.chunk.nbytes, schedule.next_use)
                    if slot is None:  # too few slots: the engine raises there
                        continue
                    self._count(home, moved, "ranks")
                slot.users += 1
                leased.append(slot)
            for home, _ in schedule.prefetch(table, self._ahead):
                self._count(home, moved, "ahead")
            return leased

        for groups, few in zip(order, choices, strict=True):
            schedule.advance(groups)
            leased = lease(groups)
            if few:
                tokens = (self._random.sample(few, model.per_token) for _ in range(drawn))
                leased += lease(sorted({group for chosen in tokens for group in chosen}, key=few.index))
            for slot in leased:
                slot.users -= 1
            yield

    def _spend(self, moved: Counter[str], flops: float, waits: bool = False) -> None:
        """Adds bytes, and the seconds of what goes on at the same time. `waits`: computing waits for what moves."""
        rates = self._rates
        compute = flops / rates.flops
        link = (moved["host_read"] + moved["disk_read"]) / rates.link
        link = max(link, moved["host_written"] / rates.link)
        disk = moved["disk_read"] / rates.disk_read + moved["disk_written"] / rates.disk_write
        ahead, network = moved["ahead"] / rates.network, moved["ranks"] / rates.network
        # What is fetched comes while computing goes on; shards are joined once they are there: see World.join_ahead.
        fetched = max(link, disk) + ahead
        total = (compute + fetched if waits else max(compute, fetched)) + network
        self._add(total=total, compute=compute, link=link, disk=disk, network=ahead + network)
        self._moved.update(moved)

    def _sum(self, model: Model) -> None:
        """Adds the sum over ranks of gradients that stay where autograd adds them, and its seconds: before the norm."""
        world, resting = self._world, [p for p in model.placed if p.chunk.trained]
        sums = sum(p.chunk.numel * ITEMSIZE[plan.SUMS] for p in resting if plan.in_place(p.chunk, p.row, world))
        self._exchange(2 * (sums - sums // world))  # scattered, and gathered

    def _exchange(self, nbytes: int) -> None:
        """Adds bytes between ranks while nothing else goes on."""
        seconds = nbytes / self._rates.network
        self._moved["ranks"] += nbytes
        self._add(total=seconds, network=seconds)

    def _update(self, model: Model) -> None:
        """Adds bytes that an update moves between tiers, and of shares of weights that ranks then give to each other
        (ZeRO-1 and 2); and its seconds: those that a GPU does not wait for (sink.overlaps) where something waits."""
        moved: Counter[str] = Counter()
        seconds = {False: 0.0, True: 0.0}
        shares = 0
        for chunk, row in ((placed.chunk, placed.row) for placed in model.placed if placed.chunk.trained):
            parts, at = self._world if row.optimizer.sharded else 1, plan.updated_on(row)
            states = plan.state_bytes(chunk.numel // parts, chunk.dtype, row.bits)
            weights, grads = chunk.nbytes // parts, plan.gradient_bytes(chunk, row) // parts
            gathers = row.optimizer.sharded and not row.params.sharded
            shares += chunk.nbytes - weights if gathers else 0
            rate = self._rates.device if at == "device" else self._rates.host
            aside = not (gathers and self._world > 1) and (at != "device" or row.params.tier == "disk")
            before = moved["host_read"] + moved["host_written"]
            seconds[aside] += (2 * states + 3 * weights) / rate
            for tier, nbytes in ((row.optimizer.tier, states), (row.params.tier, weights)):
                if tier == "disk":
                    moved["disk_read"] += nbytes
                    moved["disk_written"] += nbytes
            if row.grads.tier != at:
                moved["host_read" if at == "device" else "host_written"] += grads
            if row.params.tier == "device" != at:
                moved["host_read"] += weights
                moved["host_written"] += 0 if plan.shadowed(row) else weights
            seconds[aside] += (moved["host_read"] + moved["host_written"] - before) / self._rates.link
        disk = moved["disk_read"] / self._rates.disk_read + moved["disk_written"] / self._rates.disk_write
        link = (moved["host_read"] + moved["host_written"]) / self._rates.link
        later = max(seconds[True], disk)
        self._later += later
        self._add(total=seconds[False], optimizer=seconds[False] + later, link=link)
        self._moved.update(moved)
        self._exchange(shares)

    def _add(self, **seconds: float) -> None:
        for name, spent in seconds.items():
            self._seconds[name] += spent


def _order(model: Model) -> list[tuple[str, ...]]:
    """The visits of a pass without gradients: what reads the last part's states comes on its own."""
    *visits, last = model.visits
    return [*visits, last[:1], last[1:]]


def updates_on_disk(model: Model) -> bool:
    """Whether an update of this model reads from a disk, and writes there."""
    return any(p.chunk.trained and "disk" in (p.row.params.tier, p.row.optimizer.tier) for p in model.placed)


def _first_trained(model: Model) -> int:
    trained = {placed.chunk.group for placed in model.placed if placed.chunk.trained}
    return next((i for i, groups in enumerate(model.visits) if trained & set(groups)), len(model.visits) - 1)


def _gradients(model: Model, first: int, world: int, again: bool) -> Counter[str]:
    """Bytes that a backward's gradients move on their way home; a second visit fetches the first one's sum."""
    moved: Counter[str] = Counter()
    visited: set[int] = set()
    by_group: dict[str, list[Placed]] = {}
    for placed in model.placed:
        if placed.chunk.trained and not plan.in_place(placed.chunk, placed.row, world):
            by_group.setdefault(placed.chunk.group, []).append(placed)
    for groups in reversed(model.visits[first:]):
        for placed in (placed for group in groups for placed in by_group.get(group, ())):
            chunk, tier = placed.chunk, placed.row.grads.tier
            parts = world if placed.row.grads.sharded else 1
            part, sums = plan.gradient_bytes(chunk, placed.row) // parts, chunk.numel * ITEMSIZE[plan.SUMS]
            if again or chunk.index in visited:
                moved[f"{tier}_read"] += part
            moved[f"{tier}_written"] += part
            if world > 1:  # all have the sum in the end: it is scattered, and gathered
                moved["ranks"] += (sums - sums // world) * (2 if parts == 1 else 1)
            visited.add(chunk.index)
    return moved
