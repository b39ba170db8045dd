"""How long passes wait for updates that a thread makes beside them: see [Note: updates overlap] in memory/sink.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from penstock.planner.activations import Pass


@dataclass(frozen=True)
class Lap:
    """What a sharing group does once in a phase: a pass, and after a step updates that a thread makes beside what
    follows."""

    models: frozenset[str]
    steps: bool
    whole: float
    """Seconds of the pass without what it waits for."""
    forward: float
    """Of these, those until its models have been visited once."""
    idle: float
    """The share of them in which the disk does nothing."""
    updates: float
    """Seconds of the updates."""
    on_disk: bool
    """Whether they use the disk."""
    chunks: int
    """So many are updated one after the other."""


def lap_of(
    group: Sequence[Pass], seconds: Mapping[str, float], updates: float, *, twice: bool, on_disk: bool, chunks: int
) -> Lap:
    """From the seconds of a group's passes, and those of their updates; `twice`: backward runs blocks once more."""
    times, kind, total = group[0].times, group[0].kind, seconds["total"]
    visits = {"step": 4 if twice else 3, "generate": group[0].prefills + group[0].tokens, "evaluate": 1}[kind]
    idle = max(1 - seconds["disk"] / total, 0.0) if total else 1.0
    models = frozenset(each.model for each in group)
    return Lap(models, kind == "step", total / times, total / times / visits, idle, updates / times, on_disk, chunks)


def waits(laps: Sequence[Lap], owed: Lap | None) -> tuple[list[float], Lap | None]:
    """Seconds that each lap waits for updates of the one before it, and the last one whose updates may still go on.

    A pass of the same model reads chunks in the order of their updates. A step of another one writes its gradients,
    until it ends, to memory that those updates read. `owed`: the lap before the first one.
    """
    waited = []
    for lap in laps:
        waited.append(0.0)
        if owed is not None:
            room = lap.idle if owed.on_disk else 1.0
            left = max(owed.updates - room * lap.whole, 0.0)
            if owed.models & lap.models:
                first = 1 / owed.chunks
                waited[-1] = max(owed.updates * first, owed.updates - room * lap.forward * (1 - first))
                left = 0.0
            elif lap.steps:
                waited[-1] = left
            owed = replace(owed, updates=left)
        if lap.steps:
            owed = lap
    return waited, owed
