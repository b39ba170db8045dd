"""A gate before the engines of a server in another process: answers wait at it until a test lets them go on.

    with served.gate.held(after=20) as gate:    # the next answer gets 20 tokens, and waits
        ...
        gate.let(20)                            # it gets 20 more
    ...                                         # it goes on to its end

So that nothing depends on who is faster, the browser or the model. The server takes orders while an answer waits:
stopping, deleting and watching do what they always do. `python -m tests.serve.gate FILE serve ...` is `penstock serve`
behind the gate whose counts are in FILE.
"""

import contextlib
import mmap
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HELD, LET, TAKEN = range(3)
"""Counts in the file: whether the gate is held, and how many steps it has let through and engines have taken."""


def counts_in(path: Path) -> memoryview:
    """The counts, shared by all processes that read the file. The test writes HELD and LET, the server TAKEN."""
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 3 * 8)).cast("q")


class Gate:
    """The test's side. A step is a token for every answer that runs; the first of an answer reads its prompt."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(3 * 8))
        self._counts = counts_in(path)

    @contextlib.contextmanager
    def held(self, after: int = 0) -> Iterator["Gate"]:
        """Within, engines take `after` steps and those of `let`."""
        self._counts[LET] = self._counts[TAKEN] + after
        self._counts[HELD] = True
        try:
            yield self
        finally:
            self._counts[HELD] = False

    def let(self, steps: int) -> None:
        """Lets so many steps more through."""
        self._counts[LET] += steps


def main(path: str, *command: str) -> None:
    from penstock.cli import main as penstock
    from penstock.serve import scheduler

    scheduler.WORKER = f"from tests.serve.gate import worker; worker({path!r}, {{descriptor}}, {{threads}})"
    penstock([*command])


def worker(path: str, *arguments: int | None) -> None:
    """The models' process, behind the gate."""
    from penstock.rollout.engine import Engine
    from penstock.serve.models.worker import main as work

    counts, step = counts_in(Path(path)), Engine.step

    def step_behind_the_gate(engine: Engine) -> list:
        if counts[HELD] and counts[TAKEN] >= counts[LET]:
            time.sleep(0.002)
            return []  # no answer got a token, and the worker takes its orders
        counts[TAKEN] += 1
        return step(engine)

    Engine.step = step_behind_the_gate
    work(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
