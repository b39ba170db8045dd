"""What a run will need and move: peak bytes per tier and phase, bytes through each tier, seconds. Pure arithmetic.

It runs the engine's own decisions (`memory/plan.py`) on ids and byte counts: 175B takes less than a second. How near it
comes to what a run measures is itself measured (benchmarks/planner). See [Note: one arithmetic for plan and engine].
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from penstock.memory import plan
from penstock.memory.chunks import ITEMSIZE, Chunk
from penstock.memory.placement import TierName
from penstock.memory.plan import UPDATE_TILE, UPDATE_WIDTH, Model, Placed, Slots
from penstock.memory.schedule import Schedule, Slot, SlotTable, together_of
from penstock.planner.activations import Pass, activations_of

TIERS: tuple[TierName, ...] = ("device", "host", "disk")
SLACK, SHARE = 1 << 16, 0.01
"""Bytes, and a share of all activations, for what is too small to be listed: scalars, statistics, gradients of biases
and norms on their way."""
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
    """Between ranks, each way."""


@dataclass(frozen=True)
class Seconds:
    """One phase of one iteration: in all, and as long as each of the machine's limits alone would take."""

    total: float
    compute: float
    link: float
    disk: float
    optimizer: float
    network: float


@dataclass(frozen=True)
class Forecast:
    """Per rank. Bytes are peaks; traffic and seconds are those of one iteration once it has settled."""

    phases: dict[str, dict[TierName, int]]
    worst: dict[str, str]
    """Per phase: the model and its kind of pass when device memory is fullest."""
    objects: dict[str, dict[TierName, int]]
    traffic: dict[str, dict[str, int]]
    """Phase -> host_read, host_written, disk_read, disk_written, ranks."""
    seconds: dict[str, Seconds]
    slots: Slots
    activations: int
    """The most that tensors outside homes and slots take."""
    ahead: int
    recompute: bool | None
    """Whether blocks are run again in backward; None: where weights move."""
    swapped: int
    """Bytes of a KV cache that lives in host memory; 0: on the device."""
    few_tokens: int
    """Tokens of a visit, while generating, up to which only the experts that they chose come."""

    @property
    def peak(self) -> dict[TierName, int]:
        """Per tier, over all phases."""
        return {tier: max(phase[tier] for phase in self.phases.values()) for tier in TIERS}


def one_after_the_other(forecasts: Sequence[Forecast]) -> Forecast:
    """Of runs that never hold anything at the same time."""
    merged: dict[str, Any] = {
        field: {name: value for forecast in forecasts for name, value in getattr(forecast, field).items()}
        for field in ("phases", "worst", "traffic", "seconds")
    }
    objects: dict[str, dict[TierName, int]] = {}
    for name, sizes in ((name, sizes) for forecast in forecasts for name, sizes in forecast.objects.items()):
        before = objects.get(name, {})
        objects[name] = {tier: max(before.get(tier, 0), sizes.get(tier, 0)) for tier in TIERS}
    largest = max(forecasts, key=lambda forecast: forecast.slots.nbytes)
    return dataclasses.replace(largest, objects=objects, **merged)


def with_slack(activations: int, shard: int) -> int:
    """Bytes to keep free for these activations: SLACK and SHARE, and plan.shard_bytes of the largest. On a CPU one of
    its two copies is none, so a dry run may take less."""
    return activations + int(activations * SHARE) + SLACK + shard


def sharing_groups(passes: Sequence[Pass], keys: Mapping[str, set[Hashable]]) -> list[list[Pass]]:
    """Passes of one phase, grouped: those of a group go side by side. `keys`: per model its shared weights that move.

    The engine does the same in `Strategy.evaluate_all` and `step_all`.
    """
    groups = plan.sharing_groups([keys[each.model] if each.kind != "generate" else set() for each in passes])
    return [[passes[i] for i in group] for group in groups]


def forecast(
    models: Mapping[str, Model],
    phases: Mapping[str, Sequence[Pass]],
    *,
    world: int,
    device: int | None,
    recompute: bool | None = None,
    ahead: int = 1,
    rates: Rates | None = None,
    timed: bool = True,
) -> Forecast:
    """What these models need, placed as they are, for one iteration of these phases in `device` bytes.

    Without `timed` there is no traffic and no seconds, in a tenth of the time.
    """
    at_home = plan.homes([model.placed for model in models.values()], world)
    needs = _needs(models, phases, world, recompute)
    scratch = _update_scratch(models, world)
    shard = max((_largest_shard(model, world) for model in models.values()), default=0)
    fullest = max([*(nbytes for needs_of_phase in needs.values() for nbytes, _ in needs_of_phase), scratch["device"]])
    activations = with_slack(fullest, shard)
    room = None if device is None else device - at_home.get("device", 0)
    slots = plan.cut(list(models.values()), world, room, activations, ahead)
    buffers = plan.SETS * plan.SET_BYTES if any(_updates_on_disk(model) for model in models.values()) else 0

    peaks: dict[str, dict[TierName, int]] = {}
    worst: dict[str, str] = {}
    for phase, passes in phases.items():
        nbytes, group = max(needs[phase], key=lambda pair: pair[0])
        trains = any(each.kind == "step" for each in passes)
        peaks[phase] = {
            "device": at_home.get("device", 0) + slots.nbytes
            + with_slack(max(nbytes, scratch["device"] if trains else 0), shard),
            "host": at_home.get("host", 0) + (scratch["host"] + buffers if trains else 0)
            + max(each.swapped for each in passes),
            "disk": at_home.get("disk", 0),
        }  # fmt: skip
        worst[phase] = f"{', '.join(each.model for each in group)} {group[0].kind}"
    traffic: dict[str, dict[str, int]] = {}
    seconds: dict[str, Seconds] = {}
    few = _few_tokens(models, phases, world, rates or Rates(), sum(slots.weights))
    if timed:
        account = _Account(models, slots.weights, world, ahead, recompute, rates or Rates(), few)
        for phase in [*phases, *phases]:  # the first iteration fills the slots
            traffic[phase], seconds[phase] = account.phase([group for _, group in needs[phase]])
    return Forecast(
        phases=peaks,
        worst=worst,
        objects=_objects(models, needs, slots, world, buffers),
        traffic=traffic,
        seconds=seconds,
        slots=slots,
        activations=activations,
        ahead=ahead,
        recompute=recompute,
        swapped=max((each.swapped for passes in phases.values() for each in passes), default=0),
        few_tokens=few,
    )


def _few_tokens(models: Mapping[str, Model], phases: Mapping[str, Any], world: int, rates: Rates, slots: int) -> int:
    """plan.few_tokens of what generates, from where its weights are."""
    few = [0]
    for name in {each.model for passes in phases.values() for each in passes if each.kind == "generate"}:
        model = models[name]
        if not any(p.row.params.sharded and world > 1 for p in model.placed):  # a visit is a collective there
            from_disk = any(p.row.params.tier == "disk" for p in model.placed)
            link = min(rates.link, rates.disk_read) if from_disk else rates.link
            few.append(plan.few_tokens(model, world, link, rates.flops, slots))
    return max(few)


Needs = Mapping[str, Sequence[tuple[int, Sequence[Pass]]]]
"""Phase -> per sharing group its bytes of activations, and its passes."""


def _needs(
    models: Mapping[str, Model], phases: Mapping[str, Sequence[Pass]], world: int, recompute: bool | None
) -> Needs:
    moving = {name: model.moving(world) for name, model in models.items()}
    keys = {name: plan.shared_keys(chunks) for name, chunks in moving.items()}
    needs: dict[str, list[tuple[int, Sequence[Pass]]]] = {}
    for phase, passes in phases.items():
        groups = sharing_groups(passes, keys)
        nbytes = [activations_of([(each, bool(moving[each.model])) for each in group], recompute) for group in groups]
        needs[phase] = list(zip(nbytes, groups, strict=True))
    return needs


def _update_scratch(models: Mapping[str, Model], world: int) -> Counter[str]:
    """Bytes that an update needs in between, on the tier where it runs: see adamw.AdamW.update."""
    scratch: Counter[str] = Counter()
    for model in models.values():
        trained = [placed for placed in model.placed if placed.chunk.trained]
        nbytes = 0
        for chunk, row in ((placed.chunk, placed.row) for placed in trained):
            share = chunk.numel // (world if row.optimizer.sharded else 1)
            gathered = chunk.nbytes if share < chunk.numel and not row.params.sharded else 0
            width = UPDATE_WIDTH[row.bits] + (0 if chunk.dtype == "float32" else 4)
            nbytes = max(nbytes, min(share, UPDATE_TILE) * width + gathered)
        tier = "device" if {placed.row.optimizer.tier for placed in trained} <= {"device"} else "host"
        scratch[tier] = max(scratch[tier], nbytes)
    return scratch


def _updates_on_disk(model: Model) -> bool:
    return any(p.chunk.trained and "disk" in (p.row.params.tier, p.row.optimizer.tier) for p in model.placed)


def _largest_shard(model: Model, world: int) -> int:
    """plan.shard_bytes of the largest chunk that ranks send to each other."""
    if world == 1:
        return 0
    parts = [p for p in model.placed if p.row.params.sharded or p.row.grads.sharded]
    return max((plan.shard_bytes(p.chunk, p.row, world) for p in parts), default=0)


def _objects(
    models: Mapping[str, Model], needs: Needs, slots: Slots, world: int, buffers: int
) -> dict[str, dict[TierName, int]]:
    """Bytes per tier, by what they are."""
    weights: Counter[TierName] = Counter()
    optimizer: Counter[TierName] = Counter()
    counted: set[Hashable] = set()
    for chunk, row in ((placed.chunk, placed.row) for model in models.values() for placed in model.placed):
        if chunk.shared is not None:
            if chunk.shared in counted:
                continue
            counted.add(chunk.shared)
        weights[row.params.tier] += chunk.nbytes // (world if row.params.sharded else 1)
        if chunk.trained:
            count = chunk.numel // (world if row.optimizer.sharded else 1)
            optimizer[row.optimizer.tier] += plan.state_bytes(count, chunk.dtype, row.bits)
    at_home = plan.homes([model.placed for model in models.values()], world)
    grads: dict[TierName, int] = {
        tier: nbytes - weights[tier] - optimizer[tier] for tier, nbytes in at_home.items() if tier != "disk"
    }
    groups = [(nbytes, group) for groups_of_phase in needs.values() for nbytes, group in groups_of_phase]
    passes = [each for _, group in groups for each in group]
    generating = [each for each in passes if each.kind == "generate"]
    heads = [each.work.backward_head if each.kind == "step" else each.work.forward_head for each in passes]
    return {
        "weights": dict(weights),
        "grads": grads,
        "optimizer": dict(optimizer),
        "slots": {"device": slots.nbytes},
        "activations": {"device": max(nbytes - group[0].cache_bytes for nbytes, group in groups)},
        "kv_cache": {
            "device": max((each.cache_bytes for each in generating), default=0),
            "host": max((each.swapped for each in generating), default=0),
        },
        "head_tile": {"device": max(heads, default=0)},
        "update_buffers": {"host": buffers},
    }


# --- traffic and seconds ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _ImaginedHome:
    """Where a chunk's weights would be. Like a ChunkHome, models that share the chunk have the same one."""

    chunk: Chunk
    tier: TierName
    nbytes: int
    """This rank's part."""
    visits: Hashable
    """As ChunkHome.visits."""


class _Account:
    """Bytes and seconds of passes, one after the other, through imagined slots: filled as the engine does."""

    def __init__(
        self, models: Mapping[str, Model], sizes: Sequence[int], world: int, ahead: int, recompute: bool | None,
        rates: Rates, few_tokens: int,
    ) -> None:  # fmt: skip
        self._models, self._world, self._ahead = models, world, ahead
        self._recompute, self._rates, self._few_tokens = recompute, rates, few_tokens
        self._random = random.Random(0)
        self._table = SlotTable(map(Slot, sizes), lambda home: home.visits)
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

    def phase(self, groups: Sequence[Sequence[Pass]]) -> tuple[dict[str, int], Seconds]:
        """Traffic and seconds of one phase: its sharing groups, one after the other."""
        self._moved = Counter()
        seconds = []
        for group in groups:
            self._seconds = dict.fromkeys(Seconds.__dataclass_fields__, 0.0)
            run = {"step": self._steps, "evaluate": self._evaluations, "generate": self._generation}[group[0].kind]
            run(group)
            seconds.append(self._seconds)
        traffic = {key: self._moved[key] for key in ("host_read", "host_written", "disk_read", "disk_written", "ranks")}
        return traffic, Seconds(**{name: sum(each[name] for each in seconds) for name in self._seconds})

    def _evaluations(self, group: Sequence[Pass]) -> None:
        for _ in range(group[0].times):
            self._spend(self._cycle(group), sum(each.flops for each in group))

    def _generation(self, group: Sequence[Pass]) -> None:
        (generation,) = group
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

    def _steps(self, group: Sequence[Pass]) -> None:
        """Optimizer steps: forward and backward side by side, then the updates one after the other."""
        models = [self._models[each.model] for each in group]
        firsts = [_first_trained(model) for model in models]
        orders = [
            [*model.visits, *reversed(model.visits[first:-1])] for model, first in zip(models, firsts, strict=True)
        ]
        twice = plan.recomputes(any(model.moving(self._world) for model in models), self._recompute)
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
            self._spend(step, flops)
            for model in models:
                self._update(model)

    def _mean_cycle(self, group: Sequence[Pass], drawn: int) -> Counter[str]:
        """`_cycle`; where tokens choose, the mean of the cycles after the first ones."""
        if not drawn:
            return self._cycle(group)
        cycles = [self._cycle(group, drawn) for _ in range(WARM + DRAWS)][WARM:]
        return Counter({key: sum(moved[key] for moved in cycles) // DRAWS for key in cycles[0]})

    def _cycle(self, group: Sequence[Pass], drawn: int = 0) -> Counter[str]:
        """Bytes that are fetched when each model is visited once, without gradients; see `_walk`."""
        orders = []
        for each in group:
            *visits, last = self._models[each.model].visits
            orders.append([*visits, last[:1], last[1:]])
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
        and ranks for what is gathered. `drawn`: so many tokens choose, each group as likely as any; 0: all come."""
        homes, table, model = self._homes[name], self._table, self._models[name]
        if not homes:
            return
        choices = [*model.choices, ()] if drawn and model.choices else [()] * len(order)
        order = [groups[: len(groups) - len(few)] for groups, few in zip(order, choices, strict=True)]
        schedule = Schedule(homes, order, repeats=repeats, choices=choices)

        def count(home: _ImaginedHome) -> None:
            moved[f"{home.tier}_read"] += home.nbytes
            moved["ranks"] += home.chunk.nbytes - home.nbytes

        def lease(groups: Iterable[str]) -> list[Slot]:
            needed = [home for group in groups for home in homes.get(group, ())]
            leased = []
            for home in sorted(needed, key=lambda home: -home.chunk.nbytes):
                slot = table.find(home)
                if slot is None:
                    slot = table.claim(home, home.chunk.nbytes, schedule.next_use)
                    if slot is None:  # too few slots: the engine raises there
                        continue
                    count(home)
                slot.users += 1
                leased.append(slot)
            for home, _ in schedule.prefetch(table, self._ahead):
                count(home)
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
        network = moved["ranks"] / rates.network
        total = compute + max(link, disk) if waits else max(compute, link, disk, network)
        self._add(total=total, compute=compute, link=link, disk=disk, network=network)
        self._moved.update(moved)

    def _update(self, model: Model) -> None:
        """Adds bytes of homes on a disk that an update reads and writes, and its seconds."""
        moved: Counter[str] = Counter()
        touched = 0
        for chunk, row in ((placed.chunk, placed.row) for placed in model.placed if placed.chunk.trained):
            count = chunk.numel // (self._world if row.optimizer.sharded else 1)
            states = plan.state_bytes(count, chunk.dtype, row.bits)
            weights = count * ITEMSIZE[chunk.dtype]
            touched += 2 * states + 3 * weights
            for tier, nbytes in ((row.optimizer.tier, states), (row.params.tier, weights)):
                if tier == "disk":
                    moved["disk_read"] += nbytes
                    moved["disk_written"] += nbytes
        disk = moved["disk_read"] / self._rates.disk_read + moved["disk_written"] / self._rates.disk_write
        seconds = max(touched / self._rates.host, disk)
        self._add(total=seconds, optimizer=seconds)
        self._moved.update(moved)

    def _add(self, **seconds: float) -> None:
        for name, spent in seconds.items():
            self._seconds[name] += spent


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
            if (again or chunk.index in visited) and world == 1:
                moved[f"{tier}_read"] += part
            moved[f"{tier}_written"] += part
            moved["ranks"] += sums - sums // parts
            visited.add(chunk.index)
    return moved
