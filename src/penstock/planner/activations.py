"""One use of a model in a phase, and what it holds on the device: `stream.Stream`'s loops, line by line, in bytes."""

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
    """Bytes that one part of a program holds for one micro-batch, beside its input."""

    groups: tuple[str, ...]
    output: int
    saved: int
    """When its forward has run with gradients: what autograd keeps, the output included."""
    forward: int
    """At the fullest instant of a forward without gradients, the output included."""
    backward: int
    """At the fullest instant of forward and backward, what is saved included."""


@dataclass(frozen=True)
class Work:
    """What one model holds on the device for one micro-batch."""

    parts: tuple[PartWork, ...]
    """All but the last, which belongs to the head."""
    context: int
    """What depends on positions alone, and the tokens."""
    forward_head: int
    """The last part and what reads its states, without gradients."""
    backward_head: int
    """The same, forward and backward."""


@dataclass(frozen=True)
class Pass:
    """One use of a model in a phase. `count` micro-batches on the rank that has most, `times` times over."""

    model: str
    kind: Literal["generate", "evaluate", "step"]
    work: Work
    count: int = 1
    times: int = 1
    flops: float = 0.0
    """Of one time, over all of this rank's micro-batches, recomputation not counted."""
    beside: int = 0
    """Bytes on the device meanwhile: the KV cache, the batch itself."""
    tokens: int = 0
    """Generating: decoding steps behind the prefill."""
    decode_flops: float = 0.0
    """Generating: of all decoding steps."""
    sampling: int = 0
    """Generating: bytes that choosing tokens holds."""
    prefills: int = 1
    """Generating: visits that read the prompts."""
    swapped: int = 0
    """Generating: bytes of a KV cache on the host, all of which every decoding step reads."""
    swap_writes: tuple[int, int] = (0, 0)
    """Bytes that go back there from the prompts, and from each decoding step."""


@dataclass(frozen=True)
class Visit:
    """One visit of a pass: bytes that it finds and leaves, states of all micro-batches, and those on top meanwhile."""

    held: int
    more: int


def activations_of(company: Sequence[tuple[Pass, bool]], recompute: bool | None) -> int:
    """Bytes that tensors take beside homes and slots while these passes run: `stream.Stream`'s loops, line by line.

    Each comes with whether its model's weights move: all micro-batches then share a visit. A company of several goes
    through the same weights side by side: what one holds between visits, all do. `recompute`: None is where they move.
    """
    passes = [_visits(one, moves, recompute) for one, moves in company]
    fullest = 0
    for at in range(max(map(len, passes))):
        here = [visits[min(at, len(visits) - 1)] for visits in passes]
        fullest = max(fullest, sum(one.held for one in here) + max(one.more for one in here))
    return fullest + max(one.beside for one, _ in company)


def _visits(one: Pass, moves: bool, recompute: bool | None) -> list[Visit]:
    work = one.work
    if one.kind == "generate":
        most = max(visit.held + visit.more for visit in _forward(work, 1))
        return [Visit(0, max(most, one.sampling + work.context))]
    if one.kind == "evaluate":
        return _forward(work, one.count if moves or recompute else 1)
    if plan.recomputes(moves, recompute):
        return _recomputed(work, one.count)
    return [Visit(_kept(work), 0) if moves else Visit(0, _kept(work))]


def _forward(work: Work, count: int) -> list[Visit]:
    """Without gradients: each part's outputs take the place of its inputs, one micro-batch after the other."""
    visits, inputs = [], 0
    for part in work.parts:
        visits.append(Visit(count * (work.context + inputs), (count - 1) * part.output + part.forward))
        inputs = part.output
    return [*visits, Visit(count * (work.context + inputs), work.forward_head)]


def _recomputed(work: Work, count: int) -> list[Visit]:
    """Forward keeps the inputs of parts, backward runs each part once more."""
    states = [part.output for part in work.parts]
    visits, kept = [], 0
    for i, part in enumerate(work.parts):  # the first part's inputs are tokens
        visits.append(Visit(count * (work.context + kept), (count - 1) * part.output + part.forward))
        kept += states[i]
    visits.append(Visit(count * (work.context + kept), work.backward_head))
    slopes, kept = states[-1], kept - states[-1]
    for i in reversed(range(len(work.parts))):
        visits.append(Visit(count * (work.context + kept + slopes), work.parts[i].backward))
        if i:
            kept -= states[i - 1]
            slopes = states[i - 1]
    return visits


def _kept(work: Work) -> int:
    """Everything that autograd keeps of one micro-batch."""
    saved = sum(part.saved for part in work.parts)
    last = work.parts[-1]
    beyond = max(work.backward_head, last.output + last.backward - last.saved)
    return work.context + saved + beyond
