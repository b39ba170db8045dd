"""The teacher of a distillation: a model that reads answers, or what it said of them, kept in the run directory.

The file names the teacher, the rows and the settings that it was made from. A resumed run reads it, and refuses one
that was made from others.
"""

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.config import DistillConfig, DistillFlags
from penstock.algorithms.distillation.inputs import Inputs, workload
from penstock.algorithms.reference import weights_digest
from penstock.algorithms.setup import reserve_activations, strategy_of
from penstock.algorithms.sft import Rows, micro_batches, trained_tokens
from penstock.data.chat import Example
from penstock.distributed.world import World
from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.memory.stream import Stream
from penstock.memory.tiers import Disk
from penstock.models import safetensors_writer
from penstock.models.safetensors_writer import Entry
from penstock.run.session import Session

Read = tuple[Tensor, Tensor]
"""ids [N, k] int64 and log-probabilities [N, k + 1] fp32: see models.log_probs.top_logprobs."""


@dataclass(frozen=True)
class Taught(Rows):
    """A micro-batch that the teacher has read."""

    ids: Tensor
    """[N, k] int64: its likeliest tokens, at each of the N trained tokens."""
    logprobs: Tensor
    """[N, k + 1] fp32: the teacher's, of these tokens and of all others together."""


def read_teacher(
    strategy: Strategy, teacher: Stream, batches: Sequence[Rows], flags: DistillFlags, vocabulary: int
) -> list[Read]:
    """The teacher's likeliest tokens, below `vocabulary`, at every trained token of each micro-batch."""

    def read(hidden: Tensor, rows: Rows) -> Read:
        states = fn.states_before(hidden, rows.trained, rows.computed)
        k, temperature = flags.teacher_top_k, flags.temperature
        return teacher.model.decoder.top_logprobs(states, k, temperature, vocabulary=vocabulary)

    with strategy.phase("score"):
        return strategy.evaluate(teacher, batches, read)


def read_whole(
    strategy: Strategy, teacher: Stream, rows: Sequence[Example], size: int, flags: DistillFlags, vocabulary: int
) -> Read:
    """`read_teacher` of rows that every rank holds, in their order, on the CPU of every rank."""
    world, own = strategy.world, dict[int, tuple[Tensor, ...]]()
    share = sorted(world.share_of(list(enumerate(rows))), key=lambda pair: len(pair[1].tokens))
    batches = micro_batches([row for _, row in share], size, world.device)
    for i, read in enumerate(read_teacher(strategy, teacher, batches, flags, vocabulary)):
        group = share[i * size : (i + 1) * size]
        counts = [sum(row.trained) for _, row in group]
        parts = zip(*(tensor.cpu().split(counts) for tensor in read), strict=True)
        own |= {number: part for (number, _), part in zip(group, parts, strict=True)}
    every = {number: read for part in world.gather(own) for number, read in part.items()}
    ids, logprobs = zip(*(every[number] for number in range(len(rows))), strict=True)
    return torch.cat(ids), torch.cat(logprobs)


def stored_teacher(config: DistillConfig, session: Session, inputs: Inputs) -> "TeacherStore":
    """The teacher's likeliest tokens of all given answers: the run's file, which is written first if there is none."""
    rows, flags, path = [*inputs.train, *inputs.heldout], inputs.flags, session.path / NAME
    size, settings = config.optim.batch_size, {"top_k": flags.teacher_top_k, "temperature": flags.temperature}
    dtypes = {"dtype": config.run.dtype, "teacher_dtype": config.teacher_dtype}
    facts = facts_of(weights_digest(inputs.teacher), rows, batch_size=size, **settings, **dtypes)
    if not path.exists():
        session.say(f"the teacher reads {len(rows)} answers of {trained_tokens(rows)} tokens: {path}")
        _write(path, rows, config, inputs, facts)
    del inputs.teacher
    gc.collect()  # a model and its stream know each other
    return TeacherStore(path, rows, facts, size)


def _write(path: Path, rows: Sequence[Example], config: DistillConfig, inputs: Inputs, facts: dict[str, str]) -> None:
    """The teacher reads under a strategy of its own: what it holds is free before the student holds anything."""
    strategy, words, flags = strategy_of(config.run), inputs.student.decoder.config.vocab_size, inputs.flags
    reserve_activations(strategy, workload(config, inputs, {"teacher": inputs.teacher}))
    teacher, size = strategy.prepare(inputs.teacher), config.optim.micro_batch_size
    read = lambda part: read_whole(strategy, teacher, part, size, flags, words)  # noqa: E731
    write(path, rows, facts, config.optim.batch_size, read, strategy.world)
    for tier in strategy.tiers.values():
        if isinstance(tier, Disk):
            tier.close()


# --- the file -------------------------------------------------------------------------------------------------------

NAME = "teacher.safetensors"


def facts_of(teacher: str, rows: Sequence[Example], **settings: object) -> dict[str, str]:
    """What a file was made from; `teacher` is the digest of its weights."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.tokens} {row.trained}".encode())
    return {"teacher": teacher, "data": digest.hexdigest(), **{name: str(value) for name, value in settings.items()}}


class TeacherStore:
    """A file, open. Rows are numbered as they were when it was written."""

    def __init__(self, path: Path, rows: Sequence[Example], facts: dict[str, str], size: int) -> None:
        """size: rows per tensor. Raises UserError for a file that was made from other facts, or that is damaged."""
        try:
            self._file = safetensors.safe_open(path, framework="pt")
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: is damaged ({error}); delete it, and penstock resume makes it again.") from error
        made = self._file.metadata()
        if other := [name for name in facts if made.get(name) != facts[name]]:
            raise UserError(
                f"{path}: was made from another {' and another '.join(other)}; put that back, or delete the file, and "
                "penstock resume makes it again."
            )
        self._starts, self._size = _starts(rows), size

    def read(self, numbers: Sequence[int]) -> Read:
        """What the teacher says of these rows, on the CPU, their trained tokens one after the other."""
        parts = []
        for number in numbers:
            piece = number // self._size
            first = self._starts[piece * self._size]
            tokens = slice(self._starts[number] - first, self._starts[number + 1] - first)
            parts.append([self._file.get_slice(f"{name}.{piece}")[tokens] for name in ("ids", "logprobs")])
        ids, logprobs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return ids.long(), logprobs


def write(
    path: Path, rows: Sequence[Example], facts: dict[str, str], size: int, read: Callable[[Sequence[Example]], Read],
    world: World,
) -> None:  # fmt: skip
    """Writes what the teacher says of `rows`, a tensor per `size` of them. `read` gives it, the same on all ranks; the
    first one writes. The file has its name once it is whole."""
    starts, k = _starts(rows), int(facts["top_k"])
    pieces = [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    entries = []
    for i, piece in enumerate(pieces):
        count = starts[piece.stop] - starts[piece.start]
        entries.append(Entry(f"ids.{i}", torch.int32, (count, k)))
        entries.append(Entry(f"logprobs.{i}", torch.float32, (count, k + 1)))

    def tensors() -> Iterator[Tensor]:
        for piece in pieces:
            ids, logprobs = read(rows[piece])
            yield ids.int()
            yield logprobs

    if world.first:
        unfinished = path.with_suffix(".tmp")
        safetensors_writer.write(unfinished, entries, tensors(), facts)
        unfinished.rename(path)
    else:
        for _ in tensors():
            pass
    world.broadcast(None)  # no rank reads the file before it is whole


def _starts(rows: Sequence[Example]) -> list[int]:
    """Of each row, the trained tokens before it; and of all rows."""
    return [0, *accumulate(sum(row.trained) for row in rows)]
