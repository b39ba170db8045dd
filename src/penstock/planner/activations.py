"""Bytes that one pass of a model holds on the device outside homes and slots: `stream.Stream`'s loops, line by line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.memory import plan


@dataclass(frozen=True)
class Batch:
    """One micro-batch of whole rows."""

    rows: int
    length: int
    """Tokens per row, padding included."""
    read: int
    """States that log-probabilities or values are read from, all rows."""


@dataclass(frozen=True)
class PartWork:
    """Bytes that one part of a program holds for one micro-batch, its input not counted."""

    groups: tuple[str, ...]
    output: int
    saved: int
    """What autograd keeps after the forward, the output included."""
    forward: int
    """At the fullest instant of a forward without gradients, the output included."""
    backward: int
    """At the fullest instant of forward and backward, what is saved included."""


@dataclass(frozen=True)
class Work:
    """Bytes that one model holds on the device for one micro-batch."""

    parts: tuple[PartWork, ...]
    """All but the last one, which belongs to the head."""
    context: int
    """What depends on positions alone, and the tokens."""
    forward_head: int
    """The last part and what reads its states, without gradients."""
    backward_head: int
    """The same, forward and backward."""
    note: str = ""
    """What the plan has to say of these numbers."""


@dataclass(frozen=True)
class Pass:
    """One use of a model in a phase: `count` micro-batches, on the rank that has most of them, `times` times over."""

    model: str
    kind: Literal["generate", "evaluate", "step"]
    work: Work
    count: int = 1
    times: int = 1
    flops: float = 0.0
    """Of one time, over all of this rank's micro-batches, recomputation not counted."""
    cache_bytes: int = 0
    """Generating: bytes of the KV cache on the device."""
    tokens: int = 0
    """Generating: decoding steps after the prefill."""
    decode_flops: float = 0.0
    """Generating: of all decoding steps."""
    sampling: int = 0
    """Generating: bytes that choosing tokens holds."""
    recorded: int = 0
    """Generating: bytes of decoding steps that a GPU has recorded, where weights stay meanwhile; 0: they cannot be."""
    prefills: int = 1
    """Generating: visits that read the prompts."""
    swapped: int = 0
    """Generating: bytes of a KV cache on the host, all of which every decoding step reads."""
    copy_bytes: int = 0
    """Generating: bytes of a packed copy of the model, which answers."""
    copy_scratch: int = 0
    """Generating: bytes that making it takes, before there is a cache."""
    teacher_bytes: int = 0
    """Bytes of what a teacher says of all micro-batches."""
    visited_by: tuple[int, int] = (0, 0)
    """Generating: tokens of each visit that reads prompts, and of each decoding step."""
    swap_writes: tuple[int, int] = (0, 0)
    """Bytes that go back there from the prompts, and from each decoding step."""
    offloaded: int = 0
    """A step: bytes of inputs of blocks that wait in host memory for backward."""

    @property
    def inputs(self) -> int:
        """Bytes of what all blocks but the last one read, of all micro-batches."""
        return self.count * sum(part.output for part in self.work.parts[:-2])


@dataclass(frozen=True)
class Visit:
    """One visit of a pass, in bytes."""

    lasting: int
    """States of all micro-batches that exist before or after it."""
    passing: int
    """The most on top of them in between."""


def activations_of(group: Sequence[tuple[Pass, bool]], recompute: bool | None) -> int:
    """Bytes that tensors take outside homes and slots while these passes run side by side.

    Each comes with whether its model's weights move: all micro-batches then share a visit. Several passes go through
    the same weights in turn, so each holds its lasting bytes all the time. `recompute` None: where weights move.
    """
    passes = [visits_of(each, moves, recompute) for each, moves in group]
    fullest = 0
    for at in range(max(map(len, passes))):
        current = [visits[min(at, len(visits) - 1)] for visits in passes]
        fullest = max(fullest, sum(visit.lasting for visit in current) + max(visit.passing for visit in current))
    return fullest + max(each.cache_bytes + each.copy_bytes + each.teacher_bytes for each, _ in group)


def visits_of(each: Pass, moves: bool, recompute: bool | None) -> list[Visit]:
    """The visits of one pass, in order: of a step with recomputation the parts, the head, and the parts backward."""
    work = each.work
    if each.kind == "generate":
        fullest = max(visit.lasting + visit.passing for visit in _forward(work, 1))
        return [Visit(0, max(fullest, each.sampling + work.context, each.copy_scratch - each.cache_bytes))]
    if each.kind == "evaluate":
        return _forward(work, each.count if moves or recompute else 1)
    if plan.recomputes(moves, recompute):
        return _recomputed(work, each.count, each.offloaded > 0)
    fullest = max(kept(work))
    return [Visit(fullest, 0) if moves else Visit(0, fullest)]


def resting(each: Pass, moves: bool, recompute: bool | None) -> list[int]:
    """Bytes that a step holds when a visit's gradients go home: the head's, and of each part before it, backward."""
    parts, context = each.work.parts, each.work.context
    if plan.recomputes(moves, recompute):
        return [visit.lasting for visit in visits_of(each, moves, recompute)[len(parts) :]]
    saved = [sum(part.saved for part in parts[:stop]) for stop in range(len(parts) + 1)]
    return [context + saved[stop] + parts[max(stop - 1, 0)].output for stop in reversed(range(len(parts) + 1))]


def _forward(work: Work, count: int) -> list[Visit]:
    """Without gradients: each part's outputs take the place of its inputs, one micro-batch after the other."""
    visits, inputs = [], 0
    for part in work.parts:
        visits.append(Visit(count * (work.context + inputs), (count - 1) * part.output + part.forward))
        inputs = part.output
    return [*visits, Visit(count * (work.context + inputs), work.forward_head)]


def _recomputed(work: Work, count: int, offloads: bool) -> list[Visit]:
    """Forward keeps the inputs of parts, backward runs each part once more. `offloads`: as program.Inputs does."""
    states = [part.output for part in work.parts]

    def inputs(stop: int, near: int) -> int:
        """Of the outputs of the parts before `stop`, which later parts read, those on the device: with `offloads` the
        last `near`."""
        return sum(states[max(stop - near, 0) if offloads else 0 : stop])

    visits = []
    for i, part in enumerate(work.parts):
        visits.append(Visit(count * (work.context + inputs(i, 1)), (count - 1) * part.output + part.forward))
    visits.append(Visit(count * (work.context + inputs(len(states), 2)), work.backward_head))
    for i in reversed(range(len(work.parts))):  # and the gradient of its output
        visits.append(Visit(count * (work.context + inputs(i, 2) + states[i]), work.parts[i].backward))
    return visits


def kept(work: Work) -> tuple[int, int]:
    """The most that one micro-batch holds with an ordinary graph: at the head, and in backward of the parts before."""
    saved = fullest = 0
    for part in work.parts:  # its backward runs while those before it are saved
        fullest = max(fullest, saved + part.output + part.backward)
        saved += part.saved
    return work.context + saved + work.backward_head, work.context + fullest
