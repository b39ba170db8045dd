"""What CUDA's libraries and PyTorch's allocator take of a device besides what the engine asks for. Pure: no torch here.

A dry run has neither libraries nor an allocator, so a plan has these bytes as terms of their own.

[Note: what CUDA takes besides] An H100's peaks (benchmarks/results/gpu_h100.json) were up to 11 % above the plan of
their day; these terms explain them to 0.2 %.
Workspaces: cuBLAS keeps one for each pair of a thread's handle and a stream that multiplies (PyTorch's notes on CUDA
semantics, "cuBLAS workspaces"): for the thread that computes, for autograd's, which runs backward, and for the stream
that decoding is recorded on.
Rounding: the allocator takes large runs of memory from the driver in steps of 2 MiB, cuts off a rest only where it is
more than 1 MiB, and counts it as allocated otherwise. A block of GPT-2 in fp32 is 27.04 MiB and takes 28.
Graph pool: recorded steps have memory of their own, and keep the states that they return.
Not counted, for PyTorch does not count it either: the CUDA context, and buffers of NCCL; some hundreds of MB.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from penstock.memory import plan
from penstock.memory.chunks import ITEMSIZE, Chunk
from penstock.memory.plan import Model
from penstock.planner.activations import Pass
from penstock.planner.forecast import Forecast

WORKSPACE = 33 << 20
"""Bytes of a workspace on Hopper: CUBLAS_WORKSPACE_CONFIG=:4096:8, and 1 MiB of cuBLASLt's; an H100's blas_workspace in
that file. Elsewhere it is a quarter of that."""
SMALL_WORKSPACE = 8 << 20
"""The same where Strategy.named asks for small ones: 4 MiB of either library."""
STEP, REST = 2 << 20, 1 << 20
"""Of the allocator (c10/core/AllocatorConfig.h: kRoundLarge, kSmallSize)."""
LARGE, SEGMENT = 10 << 20, 20 << 20
"""Runs below the first share segments of the second size (kMinLargeAlloc)."""
UPDATE_TILE = 1 << 23
"""adamw.GPU_TILE."""


def workspace_of(device_memory: int | None) -> int:
    """Bytes of a workspace under this budget."""
    return SMALL_WORKSPACE if device_memory is not None and device_memory < plan.SMALL_BUDGET else WORKSPACE


def rounding(nbytes: int) -> int:
    """Bytes by which a run of memory grows that the allocator takes from the driver."""
    rest = -nbytes % STEP
    return rest if nbytes >= LARGE and rest <= REST else 0


def most(
    workspace: int, layouts: Iterable[Sequence[Chunk]], phases: Mapping[str, Sequence[Pass]], device: int | None
) -> int:
    """Bytes to keep free for all of it, before anything is placed in `device` bytes. workspace: as workspace_of, or 0
    where the device is no GPU of NVIDIA's: then it takes nothing."""
    if not workspace or device is None:
        return 0
    sizes = [nbytes for chunks in layouts for chunk in chunks for nbytes in _runs_of(chunk)]
    share = max((rounding(nbytes) / nbytes for nbytes in sizes), default=0.0)
    terms = _terms(workspace, phases, records=True)
    return sum(terms.values()) + int(min(sum(map(rounding, sizes)), share * device))


def besides(forecast: Forecast, models: Mapping[str, Model], phases: Mapping[str, Sequence[Pass]], world: int,
            workspace: int, kept: int) -> Forecast:  # fmt: skip
    """The forecast with these terms; `kept`: bytes that `most` said, which activations are left on top of theirs."""
    if not workspace:
        return forecast
    answering = [each for of_phase in phases.values() for each in of_phase if each.kind == "generate"]
    records = any(
        each.recorded and not each.swapped
        and (each.copy_bytes or plan.fit_at_once(models[each.model].moving(world), forecast.slots.weights))
        for each in answering
    )  # fmt: skip
    terms = _terms(workspace, phases, records)
    slots = [*forecast.slots.weights, *forecast.slots.gradients]
    terms["rounding"] = sum(map(rounding, [*_runs(models.values(), world), *slots]))
    outside = sum(terms.values())
    return dataclasses.replace(
        forecast,
        phases={phase: {**peaks, "device": peaks["device"] + outside} for phase, peaks in forecast.phases.items()},
        objects={**forecast.objects, **{name: {"device": nbytes} for name, nbytes in terms.items()}},
        activations=forecast.activations + kept,
        outside=outside,
    )


def _terms(workspace: int, phases: Mapping[str, Sequence[Pass]], records: bool) -> dict[str, int]:
    passes = [each for of_phase in phases.values() for each in of_phase]
    recorded = max((each.recorded for each in passes), default=0) if records else 0
    backward = any(each.kind == "step" for each in passes)
    return {
        "workspaces": workspace * (1 + backward + bool(recorded)),
        "graph_pool": STEP + -(-recorded // SEGMENT) * SEGMENT if recorded else 0,
    }


def _runs(models: Iterable[Model], world: int) -> Iterator[int]:
    """Bytes of each run of device memory that is a home; gradients are those of the model with most of them."""
    existing, gradients = set(), [[0]]
    for model in models:
        gradients.append([])
        for chunk, row in ((placed.chunk, placed.row) for placed in model.placed):
            if chunk.shared is None or chunk.shared not in existing:
                existing.add(chunk.shared)
                if row.params.tier == "device":
                    yield chunk.nbytes // (world if row.params.sharded else 1)
            if chunk.trained and row.grads.tier == "device":
                gradients[-1].append(plan.gradient_bytes(chunk, row) // (world if row.grads.sharded else 1))
            if chunk.trained and row.optimizer.tier == "device":
                count = chunk.numel // (world if row.optimizer.sharded else 1)
                yield from (count // per * ITEMSIZE[dtype] for dtype, per in _states(chunk, row.bits))
    yield from max(gradients, key=sum)


def _runs_of(chunk: Chunk) -> list[int]:
    """Bytes of all runs that a chunk may be kept in."""
    states = [chunk.numel // per * ITEMSIZE[dtype] for dtype, per in _states(chunk, 32)] if chunk.trained else []
    return [chunk.nbytes, *states, *([chunk.numel * ITEMSIZE[plan.SUMS]] if chunk.trained else [])]


def _states(chunk: Chunk, bits: int) -> Iterable[tuple[str, int]]:
    return plan.states_of(chunk.dtype, bits).values()
