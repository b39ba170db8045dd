"""What a run will need and move: peak bytes per tier and phase, bytes through each tier, seconds. Pure arithmetic.

It walks the same program as `stream.py`, with the same slots and the same rule for who leaves one, on ids and byte
counts: 175B takes less than a second. How far it is from what a run measures is itself measured (benchmarks/planner).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from penstock.memory import plan
from penstock.memory.chunks import ITEMSIZE, Chunk
from penstock.memory.placement import TierName
from penstock.memory.plan import UPDATE_TILE, UPDATE_WIDTH, Model, Slots
from penstock.planner.activations import Pass, activations_of

TIERS: tuple[TierName, ...] = ("device", "host", "disk")
SLACK, SHARE = 1 << 16, 0.01
"""Bytes, and a share of all activations, for what is too small to be listed: scalars, statistics, gradients of biases
and norms on their way."""
WARM = 3
"""Passes over the same order after which slots hold the same chunks again."""


@dataclass(frozen=True)
class Rates:
    """What the machine can do, per rank: operations and bytes per second."""

    flops: float = 200e12
    link: float = 25e9
    """Between host and device, each way."""
    disk_read: float = 3e9
    disk_write: float = 2e9
    host: float = 38e9
    """Host memory, reads and writes together, as the optimizer's update meets it."""
    network: float = 25e9
    """Between ranks, each way."""


@dataclass(frozen=True)
class Seconds:
    """One phase of one iteration, and which of the machine's limits it meets."""

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
    """Per phase: the model and what it does when device memory is fullest."""
    objects: dict[str, dict[TierName, int]]
    traffic: dict[str, dict[str, int]]
    """Phase -> host_read, host_written, disk_read, disk_written, ranks."""
    seconds: dict[str, Seconds]
    slots: Slots
    activations: int
    """The most that tensors beside homes and slots take."""
    ahead: int
    recompute: bool | None
    """Whether blocks are run again in backward; None: where weights move."""
    swapped: int
    """Bytes of a KV cache that lives in host memory; 0: on the device."""

    @property
    def peak(self) -> dict[TierName, int]:
        """Per tier, over all phases."""
        return {tier: max(phase[tier] for phase in self.phases.values()) for tier in TIERS}


class Walk:
    """Chunks passing through slots, on ids: what `stream.Stream` and `arena.Arena` do, counted."""

    @dataclass
    class Place:
        """An imagined slot."""

        nbytes: int
        key: Hashable | None = None
        users: int = 0
        age: int = 0

    def __init__(self, sizes: Sequence[int], world: int, ahead: int) -> None:
        self._places = [Walk.Place(nbytes) for nbytes in sorted(sizes)]
        self._world, self._ahead, self._clock = world, ahead, 0

    def follow(
        self, model: Model, order: Sequence[Sequence[str]], fetched: Counter[str], *, repeats: bool
    ) -> Iterator[None]:
        """One pass over the order, a visit at a time; adds what it fetches to host_read, disk_read, and ranks for what
        is gathered."""
        moving: dict[str, list[plan.Placed]] = {}
        for one in model.placed:
            if not plan.resident(one.row, self._world):
                moving.setdefault(one.chunk.group, []).append(one)
        if not moving:
            return
        positions: dict[str, list[int]] = {}
        for i, groups in enumerate(order):
            for group in groups:
                positions.setdefault(group, []).append(i)
        group_of = {_key(model, one.chunk): one.chunk.group for one in model.placed}
        at = 0

        def next_use(key: Hashable) -> int:
            if key not in group_of:
                return 1 << 60
            places = positions.get(group_of[key], ())
            later = next((place for place in places if place > at), None)
            if later is not None:
                return later - at
            return len(order) - at + places[0] if repeats and places else 1 << 60

        def bring(one: plan.Placed, before: int) -> Walk.Place | None:
            key = _key(model, one.chunk)
            place = next((place for place in self._places if place.key == key), None)
            if place is None:
                place = plan.choose(self._places, one.chunk.nbytes, next_use, before)
                if place is None:
                    return None
                self._clock += 1
                place.key, place.age = key, self._clock
                nbytes = one.chunk.nbytes // (self._world if one.row.params.sharded else 1)
                fetched[f"{one.row.params.tier}_read"] += nbytes
                fetched["ranks"] += one.chunk.nbytes - nbytes
            return place

        for at, groups in enumerate(order):
            needed = [one for group in groups for one in moving.get(group, ())]
            held = [bring(one, 0) for one in sorted(needed, key=lambda one: -one.chunk.nbytes)]
            for place in held:
                if place is not None:
                    place.users += 1
            for step in range(1, self._ahead + 1):
                if at + step < len(order) or repeats:
                    for group in order[(at + step) % len(order)]:
                        for one in moving.get(group, ()):
                            bring(one, step)
            for place in held:
                if place is not None:
                    place.users -= 1
            yield

    def forget(self, model: Model) -> None:
        """After an update: what slots hold of its trained chunks is old."""
        old = {_key(model, one.chunk) for one in model.placed if one.chunk.trained}
        for place in self._places:
            if place.key in old:
                place.key = None


def _key(model: Model, chunk: Chunk) -> Hashable:
    """What a slot with this chunk holds: models that share it hold the same."""
    return chunk.shared or (model.name, chunk.index)


def sharing_groups(passes: Sequence[Pass], models: Mapping[str, Model], world: int) -> list[list[Pass]]:
    """Passes that go side by side because their models move the same weights: `strategy._in_companies`."""
    found: list[list[Pass]] = []
    for one in passes:
        mine = {chunk.shared for chunk in models[one.model].moving(world)} - {None}
        for company in found:
            first = models[company[0].model]
            theirs = {placed.chunk.shared for placed in first.placed}
            if company[0].kind == one.kind != "generate" and mine & theirs:
                company.append(one)
                break
        else:
            found.append([one])
    return found


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
    moves = {name: bool(model.moving(world)) for name, model in models.items()}
    needs = {
        phase: [
            (activations_of([(one, moves[one.model]) for one in company], recompute), company)
            for company in sharing_groups(passes, models, world)
        ]
        for phase, passes in phases.items()
    }
    scratch: Counter[str] = Counter()
    for model in models.values():
        where, nbytes = _scratch(model, world)
        scratch[where] = max(scratch[where], nbytes)
    shard = max((_shard(model, world) for model in models.values()), default=0)
    fullest = max([*(nbytes for passes in needs.values() for nbytes, _ in passes), scratch["device"]])
    activations = with_slack(fullest, shard)
    room = None if device is None else device - at_home.get("device", 0)
    slots = plan.cut(list(models.values()), world, room, activations, ahead)
    on_disk = any(one.chunk.trained and "disk" in (one.row.params.tier, one.row.optimizer.tier)
                  for model in models.values() for one in model.placed)  # fmt: skip
    buffers = plan.SETS * plan.SET_BYTES if on_disk else 0

    peaks: dict[str, dict[TierName, int]] = {}
    worst: dict[str, str] = {}
    for phase, passes in needs.items():
        most, who = max(passes, key=lambda pair: pair[0])
        trains = any(one.kind == "step" for one in phases[phase])
        beside = with_slack(max(most, scratch["device"] if trains else 0), shard)
        host = at_home.get("host", 0) + (scratch["host"] if trains else 0)
        peaks[phase] = {
            "device": at_home.get("device", 0) + slots.nbytes + beside,
            "host": host + (buffers if trains else 0) + max(one.swapped for one in phases[phase]),
            "disk": at_home.get("disk", 0),
        }
        worst[phase] = f"{', '.join(one.model for one in who)} {who[0].kind}"
    traffic, seconds = _moved(models, phases, slots, world, recompute, ahead, rates or Rates()) if timed else ({}, {})
    return Forecast(
        phases=peaks,
        worst=worst,
        objects=_objects(models, needs, phases, slots, world, buffers),
        traffic=traffic,
        seconds=seconds,
        slots=slots,
        activations=activations,
        ahead=ahead,
        recompute=recompute,
        swapped=max((one.swapped for passes in phases.values() for one in passes), default=0),
    )


def _scratch(model: Model, world: int) -> tuple[str, int]:
    """Where a model is updated, and what that needs in between: adam.AdamW.update."""
    trained = [one for one in model.placed if one.chunk.trained]
    most = 0
    for one in trained:
        share = one.chunk.numel // (world if one.row.optimizer.sharded else 1)
        gathered = one.chunk.nbytes if share < one.chunk.numel and not one.row.params.sharded else 0
        wide = UPDATE_WIDTH[one.row.bits] + (0 if one.chunk.dtype == "float32" else 4)
        most = max(most, min(share, UPDATE_TILE) * wide + gathered)
    return ("device" if {one.row.optimizer.tier for one in trained} <= {"device"} else "host"), most


def _shard(model: Model, world: int) -> int:
    """The largest part of a chunk that one rank sends to the others or gets from them."""
    if world == 1:
        return 0
    parts = [one.chunk.nbytes // world for one in model.placed if one.row.params.sharded or one.row.grads.sharded]
    return max(parts, default=0)


def with_slack(activations: int, shard: int) -> int:
    """What to keep free for these activations: what is too small to be listed, and in training a shard's copies: one on
    its way, and what it is added to. On a CPU the latter is no copy, so a dry run may hold less."""
    return activations + int(activations * SHARE) + SLACK + 2 * shard


def _objects(
    models: Mapping[str, Model],
    needs: Mapping[str, Sequence[tuple[int, Sequence[Pass]]]],
    phases: Mapping[str, Sequence[Pass]],
    slots: Slots,
    world: int,
    buffers: int,
) -> dict[str, dict[TierName, int]]:
    kinds: dict[str, Counter[TierName]] = {"weights": Counter(), "grads": Counter(), "optimizer": Counter()}
    everything = plan.homes([model.placed for model in models.values()], world)
    seen: set[Hashable] = set()
    for model in models.values():
        for one in model.placed:
            if one.chunk.shared is not None:
                if one.chunk.shared in seen:
                    continue
                seen.add(one.chunk.shared)
            kinds["weights"][one.row.params.tier] += one.chunk.nbytes // (world if one.row.params.sharded else 1)
            if one.chunk.trained:
                count = one.chunk.numel // (world if one.row.optimizer.sharded else 1)
                kinds["optimizer"][one.row.optimizer.tier] += plan.state_bytes(count, one.chunk.dtype, one.row.bits)
    for tier, nbytes in everything.items():
        rest = nbytes - kinds["weights"][tier] - kinds["optimizer"][tier]
        if tier != "disk":
            kinds["grads"][tier] += rest
    passes = [one for each in phases.values() for one in each]
    generating = [one for one in passes if one.kind == "generate"]
    heads = [one.work.backward_head if one.kind == "step" else one.work.forward_head for one in passes]
    held = {
        "slots": {"device": slots.nbytes},
        "activations": {
            "device": max(nbytes - company[0].beside for each in needs.values() for nbytes, company in each)
        },
        "kv_cache": {
            "device": max((one.beside for one in generating), default=0),
            "host": max((one.swapped for one in generating), default=0),
        },
        "head_tile": {"device": max(heads, default=0)},
        "update_buffers": {"host": buffers},
    }
    return {**{name: dict(found) for name, found in kinds.items()}, **held}  # type: ignore[dict-item]


def _moved(
    models: Mapping[str, Model],
    phases: Mapping[str, Sequence[Pass]],
    slots: Slots,
    world: int,
    recompute: bool | None,
    ahead: int,
    rates: Rates,
) -> tuple[dict[str, dict[str, int]], dict[str, Seconds]]:
    """Traffic and seconds of one iteration; one before it has filled the slots."""
    walk = Walk(slots.weights, world, ahead)
    traffic: dict[str, dict[str, int]] = {}
    seconds: dict[str, Seconds] = {}
    for _ in range(2):
        for phase, passes in phases.items():
            moved: Counter[str] = Counter()
            parts = [
                _time([(one, models[one.model]) for one in company], walk, moved, world, recompute, rates)
                for company in sharing_groups(passes, models, world)
            ]
            traffic[phase] = {
                key: int(moved[key]) for key in ("host_read", "host_written", "disk_read", "disk_written", "ranks")
            }
            seconds[phase] = Seconds(*(sum(column) for column in zip(*parts, strict=True)))
    return traffic, seconds


def _time(
    company: Sequence[tuple[Pass, Model]],
    walk: Walk,
    moved: Counter[str],
    world: int,
    recompute: bool | None,
    rates: Rates,
) -> tuple[float, ...]:
    """Adds the bytes of passes that go side by side to `moved`; returns (total, compute, link, disk, optimizer,
    network) seconds."""
    seconds = [0.0] * 6

    def spend(bytes_moved: Counter[str], flops: float) -> None:
        compute = flops / rates.flops
        link = (bytes_moved["host_read"] + bytes_moved["disk_read"]) / rates.link
        link = max(link, bytes_moved["host_written"] / rates.link)
        disk = bytes_moved["disk_read"] / rates.disk_read + bytes_moved["disk_written"] / rates.disk_write
        network = bytes_moved["ranks"] / rates.network
        for i, spent in enumerate((max(compute, link, disk, network), compute, link, disk, 0.0, network)):
            seconds[i] += spent
        moved.update(bytes_moved)

    def fetched(orders: Sequence[Sequence[Sequence[str]]], *, repeats: bool) -> Counter[str]:
        """Of one pass of each model, a visit of each in turn."""
        found: Counter[str] = Counter()
        walks = [
            walk.follow(model, order, found, repeats=repeats) for (_, model), order in zip(company, orders, strict=True)
        ]
        for _ in zip_longest(*walks):
            pass
        return found

    first = company[0][0]
    if first.kind == "step":
        _steps(company, walk, moved, fetched, spend, seconds, world, recompute, rates)
        return tuple(seconds)
    cycles = [[*one.visits[:-1], (one.visits[-1][0],), one.visits[-1][1:]] for _, one in company]
    if first.kind == "evaluate":
        for _ in range(first.times):
            spend(fetched(cycles, repeats=True), sum(one.flops for one, _ in company))
        return tuple(seconds)
    step: Counter[str] = Counter()
    for i in range(first.times):
        for j in range(first.prefills + first.tokens):
            if i + j < WARM:
                step = fetched(cycles, repeats=True)
            if j < first.prefills:
                swap = Counter(host_written=first.swap_writes[0] // first.prefills)
                spend(step + swap, first.flops / first.prefills)
            else:
                swap = Counter(host_read=first.swapped, host_written=first.swap_writes[1])
                spend(step + swap, first.decode_flops / first.tokens)
    return tuple(seconds)


def _steps(
    company: Sequence[tuple[Pass, Model]],
    walk: Walk,
    moved: Counter[str],
    fetched: Callable[..., Counter[str]],
    spend: Callable[[Counter[str], float], None],
    seconds: list[float],
    world: int,
    recompute: bool | None,
    rates: Rates,
) -> None:
    """Optimizer steps of models that go side by side: forward, backward, and their updates one after the other."""
    firsts = [_first_trained(model) for _, model in company]
    orders = [
        [*model.visits, *reversed(model.visits[first:-1])] for first, (_, model) in zip(firsts, company, strict=True)
    ]
    twice = plan.recomputes(any(model.moving(world) for _, model in company), recompute)
    flops = sum(one.flops for one, _ in company) * (4 / 3 if twice else 1)
    once: Counter[str] = Counter()
    for i in range(company[0][0].times):
        if i < WARM:
            once = Counter()
            for wave in range(1 if twice else company[0][0].count):
                once.update(fetched(orders, repeats=False))
                for first, (_, model) in zip(firsts, company, strict=True):
                    once.update(_gradients(model, first, world, again=wave > 0))
            for _, model in company:
                walk.forget(model)
        spend(once, flops)
        for _, model in company:
            update, spent = _update(model, world, rates)
            moved.update(update)
            seconds[0] += spent
            seconds[4] += spent


def _first_trained(model: Model) -> int:
    trained = {one.chunk.group for one in model.placed if one.chunk.trained}
    return next((i for i, groups in enumerate(model.visits) if trained & set(groups)), len(model.visits) - 1)


def _gradients(model: Model, first: int, world: int, again: bool) -> Counter[str]:
    """Bytes that a backward's gradients move on their way home; a second visit fetches what the first left there."""
    moved: Counter[str] = Counter()
    seen: set[int] = set()
    by_group: dict[str, list[plan.Placed]] = {}
    for one in model.placed:
        if one.chunk.trained and not plan.in_place(one.row, world):
            by_group.setdefault(one.chunk.group, []).append(one)
    for groups in reversed(model.visits[first:]):
        for one in (one for group in groups for one in by_group.get(group, ())):
            chunk, tier = one.chunk, one.row.grads.tier
            mine = chunk.nbytes // (world if one.row.grads.sharded else 1)
            if (again or chunk.index in seen) and world == 1:
                moved[f"{tier}_read"] += mine
            moved[f"{tier}_written"] += mine
            moved["ranks"] += chunk.nbytes - mine
            seen.add(chunk.index)
    return moved


def _update(model: Model, world: int, rates: Rates) -> tuple[Counter[str], float]:
    """Bytes of homes on a disk that an update reads and writes, and its seconds."""
    moved: Counter[str] = Counter()
    touched = 0
    for one in model.placed:
        if not one.chunk.trained:
            continue
        count = one.chunk.numel // (world if one.row.optimizer.sharded else 1)
        states = plan.state_bytes(count, one.chunk.dtype, one.row.bits)
        weights = count * ITEMSIZE[one.chunk.dtype]
        touched += 2 * states + 3 * weights
        for tier, nbytes in ((one.row.optimizer.tier, states), (one.row.params.tier, weights)):
            if tier == "disk":
                moved["disk_read"] += nbytes
                moved["disk_written"] += nbytes
    disk = moved["disk_read"] / rates.disk_read + moved["disk_written"] / rates.disk_write
    return moved, max(touched / rates.host, disk)
