"""kill -9 at random moments, then `penstock resume`, for every algorithm under every strategy."""

import random
import signal
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.reliability.runs import STAGES, subject
from tests.conftest import ROWS

STEPS = 12
RUNS = [(stage, strategy) for strategy in (*ROWS, "gemini_cpu_8bit") for stage in STAGES]


def kills(trials: int) -> Iterator[dict[str, Any]]:
    """The moment is anywhere in the length of the run; checkpoints are written every third step, so that some kills hit
    one. A killed run must leave nothing on the disk that its weights and optimizer states lay on."""
    for place, (stage, strategy) in enumerate(RUNS[:trials]):
        rng = random.Random(f"{stage} {strategy}")
        with subject(stage, strategy, steps=STEPS, checkpoint_every=3, keep=2) as run:
            for _ in range(place, trials, len(RUNS)):
                [process] = run.start()
                time.sleep(rng.random() * run.seconds)
                process.signal(signal.SIGKILL)
                ended = process.wait()
                names = [path.name for path in run.run.glob("checkpoints/*")]
                left = [path.name for path in run.work.glob("disk/*")]
                row = run.judged(ended)
                if left:
                    row = {"verdict": "lost", "text": f"left behind: {left}"}
                yield {
                    "name": f"{stage} {strategy}", **row, "before a checkpoint": not names,
                    "while writing one": any(".tmp-" in name for name in names),
                }  # fmt: skip
