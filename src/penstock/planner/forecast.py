"""What a run will need and move: peak bytes per tier and phase, bytes through each tier, seconds. Pure arithmetic.

It runs the engine's own decisions (`memory/plan.py`) on ids and byte counts: 175B takes less than a second. How near it
comes to what a run measures is itself measured (benchmarks/planner). See [Note: one arithmetic for plan and engine].
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.memory import plan
from penstock.memory.placement import TierName
from penstock.memory.plan import UPDATE_TILE, UPDATE_WIDTH, Model, Placed, Slots
from penstock.planner.activations import Pass, activations_of, resting
from penstock.planner.traffic import Account, Rates, Seconds

AHEAD = 1
"""Visits whose weights are prefetched: Strategy.ahead."""
TIERS: tuple[TierName, ...] = ("device", "host", "disk")
SLACK, SHARE = 1 << 16, 0.01
"""Bytes, and a share of all activations, for what is too small to be listed: scalars, statistics, gradients of biases
and norms on their way."""


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
    offloaded: int
    """The same of inputs of blocks, from forward to backward."""
    few_tokens: int
    """Tokens of a visit, while generating, up to which only the experts that they chose come."""
    gathers_once: bool = False
    """Whether all of the actor's weights that move come once for a rollout, and stay until it ends."""
    further: int = 0
    """Of `offloaded`, what models that go side by side have on top of the one with most."""
    outside: int = 0
    """Bytes of the device's peaks that a dry run does not have: see planner/cuda.py."""
    notes: tuple[str, ...] = ()
    """What there is to say of it, a line each."""

    @property
    def peak(self) -> dict[TierName, int]:
        """Per tier, over all phases."""
        return {tier: max(phase[tier] for phase in self.phases.values()) for tier in TIERS}

    @property
    def total(self) -> float:
        """Seconds of one iteration."""
        return sum(seconds.total for seconds in self.seconds.values())


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
    most = {name: max(getattr(forecast, name) for forecast in forecasts) for name in ("offloaded", "further")}
    return dataclasses.replace(largest, objects=objects, **most, **merged)


def with_slack(activations: int) -> int:
    """Bytes to keep free for these activations: SLACK and SHARE."""
    return activations + int(activations * SHARE) + SLACK


def bytes_of(
    group: Sequence[Pass], models: Mapping[str, Model], moves: Mapping[str, bool], world: int, recompute: bool | None
) -> int:
    """Bytes of activations of passes that go side by side, and of gradients that ranks then sum; `moves`: whether a
    model's weights do."""
    fullest = activations_of([(each, moves[each.model]) for each in group], recompute)
    steps = [each for each in group if each.kind == "step" and world > 1]
    rests = [resting(each, moves[each.model], recompute) for each in steps]
    leaving = [
        _leaving(models[each.model], world, each.count > 1 and not plan.recomputes(moves[each.model], recompute))
        for each in steps
    ]
    settling = 0
    for at in range(max(map(len, rests), default=0)):
        rest = sum(nbytes[min(at, len(nbytes) - 1)] for nbytes in rests)
        settling = max(settling, rest + max(nbytes[min(at, len(nbytes) - 1)] for nbytes in leaving))
    return max(fullest, settling)


def _leaving(model: Model, world: int, again: bool) -> list[int]:
    """plan.settling_bytes of each visit's largest chunk, the last visit first. again: all were visited before."""
    by_group: dict[str, list[Placed]] = {}
    for placed in model.placed:
        by_group.setdefault(placed.chunk.group, []).append(placed)
    visited = set(by_group) if again else set()
    largest = []
    for groups in reversed(model.visits):
        chunks = [
            (placed.chunk, placed.row, group in visited) for group in groups for placed in by_group.get(group, ())
        ]
        largest.append(max((plan.settling_bytes(chunk, row, world, seen) for chunk, row, seen in chunks), default=0))
        visited.update(groups)
    return largest


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
    budgets: Mapping[TierName, int | None],
    recompute: bool | None = None,
    rates: Rates | None = None,
    timed: bool = True,
    update_tile: int = UPDATE_TILE,
) -> Forecast:
    """What these models need, placed as they are, for one iteration of these phases within the budgets, in bytes.

    Without `timed` it has no traffic and no seconds, in a tenth of the time. update_tile: as `_update_scratch`'s tile.
    """
    at_home = plan.homes([model.placed for model in models.values()], world)
    needs = _needs(models, phases, world, recompute)
    scratch = _update_scratch(models, world, update_tile)
    scratch["device"] = max(scratch["device"], _gathered(models.values(), world))
    fullest = max([*(nbytes for needs_of_phase in needs.values() for nbytes, _ in needs_of_phase), scratch["device"]])
    activations = with_slack(fullest)
    room = None if (device := budgets.get("device")) is None else device - at_home.get("device", 0)
    slots = plan.cut(list(models.values()), world, room, activations, AHEAD)
    buffers = plan.buffers([model.placed for model in models.values()])
    on_host = _on_host(needs, at_home.get("host", 0), scratch["host"], buffers, budgets.get("host"))

    peaks: dict[str, dict[TierName, int]] = {}
    worst: dict[str, str] = {}
    for phase, passes in phases.items():
        nbytes, group = max(needs[phase], key=lambda pair: pair[0])
        trains = any(each.kind == "step" for each in passes)
        taken = with_slack(max(nbytes, scratch["device"] if trains else 0))
        peaks[phase] = {
            "device": at_home.get("device", 0) + slots.nbytes + taken,
            "host": on_host[phase],
            "disk": at_home.get("disk", 0),
        }
        worst[phase] = f"{', '.join(each.model for each in group)} {group[0].kind}"
    traffic: dict[str, dict[str, int]] = {}
    seconds: dict[str, Seconds] = {}
    few = _few_tokens(models, phases, world, rates or Rates(), slots)
    if timed:
        account = Account(models, slots.weights, world, AHEAD, recompute, rates or Rates(), few)
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
        ahead=AHEAD,
        recompute=recompute,
        swapped=max((each.swapped for passes in phases.values() for each in passes), default=0),
        **_offloaded(needs),
        few_tokens=few,
        gathers_once=_gathers_once(models, phases, world, slots),
    )


Needs = Mapping[str, Sequence[tuple[int, Sequence[Pass]]]]
"""Phase -> per sharing group its bytes of activations, and its passes."""


def _on_host(needs: Needs, homes: int, scratch: int, buffers: Mapping[str, int], budget: int | None) -> dict[str, int]:
    """Bytes of host memory in each phase. What is lent leaves its pages, the most of one pass and of those beside it,
    to whoever comes next where the budget has room for them beside an update: see Ram.lend."""
    lasting, passing = homes + buffers["disk_buffers"], buffers["update_buffers"] + buffers["gradient_buffer"]
    lent = {phase: _lent(groups) for phase, groups in needs.items()}
    spare = max(most for most, _ in lent.values())
    pages = spare + _further(needs)
    stays = budget is None or lasting + passing + pages + plan.UPDATE_ROOM <= budget
    trains = {phase for phase, groups in needs.items() if any(group[0].kind == "step" for _, group in groups)}
    return {
        phase: lasting + (scratch + passing if phase in trains else 0) + (max(sums, pages) if stays else sums)
        for phase, (_, sums) in lent.items()
    }


def _lent(groups: Sequence[tuple[int, Sequence[Pass]]]) -> tuple[int, int]:
    """Bytes of host memory that one phase's passes borrow: the most of one, and of those that go side by side."""
    lent = [[each.swapped + each.offloaded for each in group] for _, group in groups]
    return max(map(max, lent)), max(map(sum, lent))


def _offloaded(needs: Needs) -> dict[str, Any]:
    """Those of inputs of blocks, as Forecast names them."""
    return {"offloaded": _lent(needs["train"])[1] if "train" in needs else 0, "further": _further(needs)}


def _further(needs: Needs) -> int:
    """Bytes of host memory that passes side by side borrow on top of the one that borrows most."""
    return max(sums - most for most, sums in map(_lent, needs.values()))


def _gathers_once(models: Mapping[str, Model], phases: Mapping[str, Any], world: int, slots: Slots) -> bool:
    """Whether slots hold all of what generates: see [Note: one lease for a rollout] in memory/stream.py."""
    names = {each.model for passes in phases.values() for each in passes if each.kind == "generate"}
    moving = [models[name].moving(world) for name in names]
    return any(moving) and all(plan.fit_at_once(chunks, slots.weights) for chunks in moving)


def _few_tokens(models: Mapping[str, Model], phases: Mapping[str, Any], world: int, rates: Rates, slots: Slots) -> int:
    """plan.few_tokens of what generates, from where its weights are; 0 where all of them stay."""
    few = [0]
    if _gathers_once(models, phases, world, slots):
        return 0
    for name in {each.model for passes in phases.values() for each in passes if each.kind == "generate"}:
        model = models[name]
        if not any(p.row.params.sharded and world > 1 for p in model.placed):  # a visit is a collective there
            from_disk = any(p.row.params.tier == "disk" for p in model.placed)
            link = min(rates.link, rates.disk_read) if from_disk else rates.link
            few.append(plan.few_tokens(model, world, link, rates.flops, sum(slots.weights)))
    return max(few)


def _needs(
    models: Mapping[str, Model], phases: Mapping[str, Sequence[Pass]], world: int, recompute: bool | None
) -> Needs:
    moving = {name: model.moving(world) for name, model in models.items()}
    keys = {name: plan.shared_keys(chunks) for name, chunks in moving.items()}
    moves = {name: bool(chunks) for name, chunks in moving.items()}
    needs: dict[str, list[tuple[int, Sequence[Pass]]]] = {}
    for phase, passes in phases.items():
        groups = sharing_groups(passes, keys)
        nbytes = [bytes_of(group, models, moves, world, recompute) for group in groups]
        needs[phase] = list(zip(nbytes, groups, strict=True))
    return needs


def _update_scratch(models: Mapping[str, Model], world: int, tile: int) -> Counter[str]:
    """Bytes that updates need in between, on the tiers where they run: see adamw.AdamW.update. tile: elements that one
    on the device works on at once."""
    scratch: Counter[str] = Counter()
    for model in models.values():
        for chunk, row in ((placed.chunk, placed.row) for placed in model.placed if placed.chunk.trained):
            share, tier = chunk.numel // (world if row.optimizer.sharded else 1), plan.updated_on(row)
            width = UPDATE_WIDTH[row.bits] + (0 if chunk.dtype == "float32" else 4)
            comes = plan.PIECE * 4 if row.grads.tier != row.optimizer.tier == "device" else 0
            at_once = min(share, tile if tier == "device" else UPDATE_TILE)
            scratch[tier] = max(scratch[tier], at_once * width + min(comes, share * 4))
    return scratch


def _gathered(models: Iterable[Model], world: int) -> int:
    """Bytes of the device that a checkpoint gathers shares of states or weights through: see homes.gather."""
    placed = [each for model in models for each in model.placed if each.chunk.trained and world > 1]
    split = [each.chunk.numel * plan.MASTER for each in placed if each.row.optimizer.sharded or each.row.params.sharded]
    whole = min(max(split, default=0), plan.GATHER_BYTES)
    return whole + whole // world


def _checkpoint(models: Iterable[Model], world: int) -> int:
    """Bytes of host memory that a checkpoint takes at once: copies of a chunk's states and weights, whole and in fp32,
    where these are not in host memory whole as they are. See sink.Sink.saved_states."""
    most = 0
    for chunk, row in ((each.chunk, each.row) for model in models for each in model.placed if each.chunk.trained):
        lies = [where.tier == "host" and not (where.sharded and world > 1) for where in (row.optimizer, row.params)]
        states, narrow = plan.state_bytes(chunk.numel, chunk.dtype, row.bits), chunk.dtype != "float32"
        widened = 2 * chunk.numel * plan.MASTER if row.bits == 8 else 0
        master = chunk.numel * plan.MASTER if narrow else 0
        most = max(most, (0 if lies[0] else states) + widened + (0 if lies[1] else chunk.nbytes) + master)
    return most


def _objects(
    models: Mapping[str, Model], needs: Needs, slots: Slots, world: int, buffers: dict[str, int]
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
            if plan.shadowed(row):
                weights["host"] += chunk.nbytes // (world if row.optimizer.sharded else 1)
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
        "activations": {"device": max(nbytes - group[0].cache_bytes - group[0].copy_bytes for nbytes, group in groups)},
        "rollout_copy": {"device": max((each.copy_bytes for each in generating), default=0)},
        "kv_cache": {
            "device": max((each.cache_bytes for each in generating), default=0),
            "host": max((each.swapped for each in generating), default=0),
        },
        "block_inputs": {"host": max(sum(each.offloaded for each in group) for _, group in groups)},
        "head_tile": {"device": max(heads, default=0)},
        "checkpoint": {"device": _gathered(models.values(), world), "host": _checkpoint(models.values(), world)},
        **{name: {"host": nbytes} for name, nbytes in buffers.items()},
    }
