"""One use of a model in a phase, and what it holds on the device: `stream.Stream`'s loops, line by line, in bytes."""

from dataclasses import dataclass
from typing import Literal


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


def activations_of(one: Pass, moves: bool, recompute: bool) -> int:
    """Bytes that tensors take beside homes and slots while `one` runs: `stream.Stream`'s loops, line by line.

    `moves`: the model's weights do not stay where they are used, so all micro-batches share a visit.
    """
    if one.kind == "generate":
        return one.beside + max(_forward(one.work, 1), one.sampling + one.work.context)
    together = one.count if moves or recompute else 1
    if one.kind == "evaluate":
        return one.beside + _forward(one.work, together)
    return one.beside + (_recomputed(one.work, together) if moves or recompute else _kept(one.work))


def _forward(work: Work, count: int) -> int:
    held = count * work.context
    inputs, fullest = 0, 0
    for part in work.parts:
        fullest = max(fullest, count * inputs + (count - 1) * part.output + part.forward)
        inputs = part.output
    return held + max(fullest, count * inputs + work.forward_head)


def _recomputed(work: Work, count: int) -> int:
    """Forward keeps the inputs of parts, backward runs each part once more."""
    states = [part.output for part in work.parts]
    kept = sum(states[:-1])  # the inputs of all parts but the first, whose are tokens
    slopes = states[-1]
    fullest = count * (kept + states[-1]) + work.backward_head
    fullest = max(fullest, _forward(work, count) - count * work.context + count * kept)
    for i in reversed(range(len(work.parts))):
        part = work.parts[i]
        fullest = max(fullest, count * (kept + slopes) + part.backward)
        if i:
            kept -= states[i - 1]
            slopes = states[i - 1]
    return count * work.context + fullest


def _kept(work: Work) -> int:
    """Everything that autograd keeps of one micro-batch."""
    saved = sum(part.saved for part in work.parts)
    last = work.parts[-1]
    beyond = max(work.backward_head, last.output + last.backward - last.saved)
    return work.context + saved + beyond
