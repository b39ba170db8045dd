"""What a run on FSDP2 (memory/fsdp.py) holds and moves: its own arithmetic, for PyTorch gathers by rules of its own.

At home a rank has its shards: fp32 weights, gradients and moments of what is trained, frozen weights as they are. Whole
on a rank are the root's group and two blocks, the one that computes and the one that is being gathered; in backward the
block's gradients too, in the weights' dtype as autograd makes them and in fp32 as they are sent. Models share no base.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from penstock.memory import plan
from penstock.memory.chunks import ITEMSIZE, Weight
from penstock.memory.placement import TierName
from penstock.memory.plan import UPDATE_TILE, UPDATE_WIDTH, Model, Slots
from penstock.planner.activations import Pass, activations_of, kept, visits_of
from penstock.planner.forecast import Forecast, with_slack
from penstock.planner.traffic import Rates, Seconds, inside_machine
from penstock.units import show_bytes

ROOT = -1
STILL = dict.fromkeys(("host_read", "host_written", "disk_read", "disk_written"), 0)


@dataclass(frozen=True)
class Whole:
    """Bytes that a model takes whole on one rank, at most at once."""

    root: int
    widest: int
    """A block's."""
    forward: int
    """Of a step: the root's group, a block, and what the next one's gather passes through."""
    turn: int
    """Where a forward ends and its backward begins: the root's group and its gradients."""
    backward: int
    all: int
    """All weights, with what the last gather passed through."""


def whole(model: Model) -> Whole:
    """How much of a model is gathered at once."""
    blocks = {group: i for i, groups in enumerate(model.visits[1:-1]) for group in groups}
    weights, gradients, sums = Counter[int](), Counter[int](), Counter[int]()
    for group, weight in _weights(model):
        at, nbytes = blocks.get(group, ROOT), weight.numel * ITEMSIZE[weight.dtype]
        weights[at] += nbytes
        if weight.trained:
            gradients[at] += nbytes
            sums[at] += weight.numel * plan.MASTER
    root = weights.pop(ROOT)
    block = max(weights, key=lambda at: weights[at])
    widest = weights[block]
    return Whole(
        root,
        widest,
        root + 2 * widest,
        root + gradients[ROOT] + widest,
        max(root + gradients[ROOT] + 2 * widest + gradients[block] + sums[block], gradients[ROOT] + sums[ROOT]),
        root + sum(weights.values()) + max(root, widest),
    )


def _weights(model: Model) -> list[tuple[str, Weight]]:
    return [(placed.chunk.group, weight) for placed in model.placed for weight in placed.chunk.weights]


def forecast(
    models: Mapping[str, Model], phases: Mapping[str, Sequence[Pass]], *, shards: int, nodes: int, copies: int,
    budgets: Mapping[TierName, int | None], recompute: bool | None, rates: Rates,
) -> Forecast:  # fmt: skip
    """As forecast.forecast, of ranks on `nodes` machines, `shards` of which hold one of `copies` of the models."""
    homes = {name: plan.shard_homes((w for _, w in _weights(model)), shards) for name, model in models.items()}
    resting = sum(home["weights"] + home["optimizer"] for home in homes.values())
    grads = max(home["grads"] for home in homes.values())  # one model steps at a time
    staged, unstaged = _staged(homes, budgets.get("host"))
    gathered = {name: whole(model) for name, model in models.items()}
    scratch = max((_update_scratch(model, shards) for model in models.values()), default=0)
    passes = [each for of_phase in phases.values() for each in of_phase]
    activations = with_slack(max(*(_activations(each, recompute) for each in passes), scratch))

    once = (device := budgets.get("device")) is None or all(
        resting + _peak(each, gathered[each.model], recompute, True, scratch) <= device
        for each in passes
        if each.kind == "generate"
    )
    peaks = {
        phase: max(((_peak(each, gathered[each.model], recompute, once, scratch), each) for each in of_phase),
                   key=lambda pair: pair[0])
        for phase, of_phase in phases.items()
    }  # fmt: skip
    local = rates if nodes > copies else inside_machine(rates)  # where a copy is inside a machine, so are its gathers
    between = {
        phase: [
            (_moved(each, models[each.model], shards, once), _crossed(each, homes[each.model], copies))
            for each in of_phase
        ]
        for phase, of_phase in phases.items()
    }
    seconds = {
        phase: [
            _seconds(each, nbytes, homes[each.model], (local, rates), recompute)
            for each, nbytes in zip(of_phase, between[phase], strict=True)
        ]
        for phase, of_phase in phases.items()
    }
    answering = once and "rollout" in phases
    most_whole = max(max(model.backward, model.all if answering else 0) for model in gathered.values())
    return Forecast(
        phases={
            phase: {"device": resting + (grads if phase == "train" else 0) + nbytes, "host": staged, "disk": 0}
            for phase, (nbytes, _) in peaks.items()
        },
        worst={phase: f"{each.model} {each.kind}" for phase, (_, each) in peaks.items()},
        objects=_objects(homes, passes, grads, most_whole, recompute) | {"checkpoints": {"host": staged}},
        traffic={phase: {**STILL, "ranks": sum(map(sum, nbytes))} for phase, nbytes in between.items()},
        seconds={phase: Seconds(*map(sum, zip(*spent, strict=True))) for phase, spent in seconds.items()},
        slots=Slots([most_whole], [], most_whole),
        activations=activations,
        ahead=1,
        recompute=recompute,
        swapped=0,
        offloaded=0,
        few_tokens=0,
        gathers_once=once,
        notes=unstaged,
    )


def _staged(homes: Mapping[str, Mapping[str, int]], host: int | None) -> tuple[int, tuple[str, ...]]:
    """Bytes of host memory that checkpoints are written from; and what is to say where it has no room for a model's."""
    staged, notes = 0, []
    for name, home in homes.items():
        if plan.stages(home, staged, host):
            staged += home["staged"]
        else:
            notes.append(plan.UNSTAGED.format(name, show_bytes(home["staged"])))
    return staged, tuple(notes)


def _objects(
    homes: Mapping[str, Mapping[str, int]], passes: Sequence[Pass], grads: int, whole_bytes: int,
    recompute: bool | None,
) -> dict[str, dict[TierName, int]]:  # fmt: skip
    """Bytes on the device, by what they are, as forecast.Forecast has them."""
    heads = [each.work.backward_head if each.kind == "step" else each.work.forward_head for each in passes]
    return {
        "weights": {"device": sum(home["weights"] for home in homes.values())},
        "grads": {"device": grads},
        "optimizer": {"device": sum(home["optimizer"] for home in homes.values())},
        "slots": {"device": whole_bytes},
        "activations": {"device": max(_activations(each, recompute) - each.cache_bytes for each in passes)},
        "kv_cache": {"device": max((each.cache_bytes for each in passes if each.kind == "generate"), default=0)},
        "head_tile": {"device": max(heads, default=0)},
        "update_buffers": {},
    }


def _peak(each: Pass, gathered: Whole, recompute: bool | None, once: bool, scratch: int) -> int:
    """Bytes on top of the shards: what is whole and what is computed, visit by visit."""
    if each.kind == "generate":
        reading = 2 * max(gathered.root, gathered.widest)  # one of them at a time, and what its gather passes through
        return (gathered.all if once else reading) + with_slack(_activations(each, recompute))
    visits = [visit.lasting + visit.passing for visit in visits_of(_alone(each), True, recompute)]
    if each.kind == "evaluate":
        at_blocks = 2 * max(gathered.root, gathered.widest) + with_slack(max(visits[:-1]))
        return max(at_blocks, gathered.root + with_slack(visits[-1]))
    if len(visits) == 1:  # nothing is recomputed
        turned, behind = kept(each.work)
        return max(gathered.turn + with_slack(turned), gathered.backward + with_slack(max(behind, scratch)))
    turn = len(visits) // 2
    return max(
        gathered.forward + with_slack(max(visits[:turn])),
        gathered.turn + with_slack(visits[turn]),
        gathered.backward + with_slack(max(*visits[turn + 1 :], scratch)),
    )


def _activations(each: Pass, recompute: bool | None) -> int:
    return activations_of([(_alone(each), True)], recompute)


def _alone(each: Pass) -> Pass:
    """FSDP2 trains one micro-batch after the other."""
    return replace(each, count=1) if each.kind == "step" else each


def _update_scratch(model: Model, shards: int) -> int:
    largest = max((weight.numel // shards for _, weight in _weights(model) if weight.trained), default=0)
    return min(largest, UPDATE_TILE) * UPDATE_WIDTH[32]


def _moved(each: Pass, model: Model, shards: int, once: bool) -> int:
    """Bytes that a rank gets from others, or sends: weights in the dtype of compute, gradients in fp32."""
    visits = set(model.visits[0]) | set(model.visits[-1])
    weights = sum(weight.numel * ITEMSIZE[weight.dtype] for _, weight in _weights(model))
    root = sum(weight.numel * ITEMSIZE[weight.dtype] for group, weight in _weights(model) if group in visits)
    sums = sum(weight.numel * plan.MASTER for _, weight in _weights(model) if weight.trained)
    if each.kind == "generate":
        passes = each.times * (each.prefills + each.tokens)
        whole_bytes = weights if once else passes * (weights + 2 * root)
    elif each.kind == "evaluate":
        whole_bytes = each.times * (weights + 2 * root)  # for the embedding, the last norm, and the head
    else:
        whole_bytes = each.times * each.count * (2 * weights - root + sums)
    return int(whole_bytes * (shards - 1) / shards)


def _crossed(each: Pass, home: Mapping[str, int], copies: int) -> int:
    """Bytes of the sums of copies' gradients, of a rank's shards: scattered, and gathered."""
    return 2 * each.times * each.count * home["grads"] * (copies - 1) // copies if each.kind == "step" else 0


def _seconds(
    each: Pass, between: tuple[int, int], home: Mapping[str, int], rates: tuple[Rates, Rates], recompute: bool | None
) -> tuple[float, ...]:
    """As Seconds. FSDP2 gathers beside computing where it trains; what is leased is gathered first. `between`: bytes of
    gathers, and of sums of copies; `rates`: of where each of them goes."""
    (moved, crossed), (local, outside) = between, rates
    compute = each.times * (each.flops + each.decode_flops) / local.flops
    network = moved / local.network + crossed / outside.network
    if plan.recomputes(True, recompute) and each.kind == "step":
        compute *= 4 / 3
    if each.kind != "step":
        return compute + network, compute, 0.0, 0.0, 0.0, network
    update = each.times * 7 * home["grads"] / local.device  # of moments, weights and gradients, as many bytes each
    return max(compute, network) + update, compute, 0.0, 0.0, update, network
