"""The pre-flight: what can go wrong in hours is looked at in minutes.

Reading the data has shown already that the template renders, that every row has a token that is learned, that an end of
sequence is known and that rows fit (inventory.py). Here something answers and is scored, and every stage runs a few
steps of the real command on the real data, from the trial of the stage before it, and goes on from its own checkpoint.
"""

import dataclasses
import gc
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from penstock.algorithms import setup
from penstock.algorithms.heldout import interval_of
from penstock.commands.align.choice import Duration
from penstock.commands.align.evaluation import Judge, sampled
from penstock.commands.align.inventory import MEASURED
from penstock.commands.align.planning import OVERHEAD, StagePlan
from penstock.commands.align.stages import Stage, run_stage
from penstock.errors import ResourceError, UserError
from penstock.run.metrics import peak_rss_bytes, read_lines

STEPS, SAVED = 5, 3
"""Steps of a stage's trial: the first warms up, a checkpoint follows the third, the last is evaluated; and one more
goes on from the last checkpoint."""
ASKED = 16
"""Held-out prompts that the start answers, to see that its answers can be scored and end."""
NEVER = 1_000_000


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a stage took in its trial."""

    duration: Duration
    """Of the whole stage, from the trial's steps."""
    peak_bytes: int
    """The process's most memory: on a GPU the device's, else the host's."""


def score_sanity(judge: Judge, model: str, *, learns_first: bool) -> tuple[list[str], int]:
    """Has the start answer a few held-out prompts, and returns facts of its answers and their scores, and how many.

    Raises UserError where scores are not numbers, or all the same and no other stage `learns_first`: nothing could be
    learned from them. A task that is seldom solved has many equal ones: then all prompts are asked.
    """
    lines = sampled(judge, model, ASKED)
    if not learns_first and len({line["score"] for line in lines}) == 1:
        lines = sampled(judge, model, MEASURED)
    scores, cut = [line["score"] for line in lines], sum(line["finish_reason"] != "stop" for line in lines)
    facts = [f"{len(lines)} answers of the start: {len(lines) - cut} end by themselves"]
    if not all(math.isfinite(score) for score in scores):
        raise UserError(f"{judge.name}: gives {scores} for {len(scores)} answers; a score must be a finite number.")
    facts.append(f"their scores by {judge.name}: {min(scores):.3g} to {max(scores):.3g}")
    if not learns_first and len(scores) > 1 and max(scores) - min(scores) < 1e-9:
        raise UserError(
            f"{judge.name}: gives {scores[0]:.3g} for each of {len(scores)} answers of {model}, so nothing can be "
            "learned from it; mend the score, give easier prompts, begin with demonstrations, or leave this out: "
            "--no-check."
        )
    return facts, len(lines)


def expected_seconds(stages: Sequence[StagePlan]) -> float:
    """What `try_stages` will take, by the forecast: each stage's few steps, an evaluation, and what any run takes."""
    return sum(OVERHEAD + (STEPS + 2) * stage.duration.per_step for stage in stages)


def try_stages(
    stages: Sequence[StagePlan], root: Path, heldout: Callable[[Stage], int], say: Callable[[str], None]
) -> list[Measured]:
    """Runs every stage for a few steps in `root`, which is removed, and returns what the whole stages will take.

    heldout: rows that a stage is evaluated on. What a stage raises goes through.
    """
    shutil.rmtree(root, ignore_errors=True)
    measured = []
    for planned in stages:
        say(f"  {planned.stage.command}: {STEPS + 1} steps")
        with memory_meter() as peak, setup.trial():
            began = time.perf_counter()
            flags: dict[str, Any] = {
                "checkpoint_every": SAVED,
                "eval_every": NEVER,
                "quiet": True,
                "json": False,
                "log": (),
            }
            path = run_stage(planned.stage, root, steps=STEPS, **flags)
            seconds = time.perf_counter() - began
        with setup.trial():  # its models may stand beside those of the run before
            run_stage(planned.stage, root, steps=STEPS + 1)
        measured.append(Measured(extrapolated(planned, path, seconds, heldout(planned.stage)), peak[0]))
        check_finite(planned.stage, path)
    shutil.rmtree(root, ignore_errors=True)
    return measured


def extrapolated(planned: StagePlan, path: Path, seconds: float, rows: int) -> Duration:
    """What all steps of a stage take, by the steps of its trial; `seconds`: of the trial without its resumed step."""
    steps = [row["timing/step_seconds"] for row in read_lines(path / "perf.jsonl")]
    per_step = statistics.mean(steps[1:SAVED])
    saving = max(steps[SAVED] - per_step, 0.0)
    evaluation = max(statistics.mean(steps[STEPS - 1 :]) - per_step, 0.0) if rows else 0.0
    total, config = planned.duration.steps, planned.stage.config(path.parent, data="-")
    times = math.ceil(total / interval_of(config.eval_every, total, rows, config.optim.batch_size)) if rows else 0
    fixed = seconds - sum(steps[:STEPS]) + max(steps[0] - per_step, 0.0)
    fixed += times * evaluation + (total - 1) // config.run.checkpoint_every * saving
    return Duration(total, per_step, fixed)


def check_finite(stage: Stage, path: Path) -> None:
    """Raises ResourceError where a trial's loss is no number."""
    rows = read_lines(path / "metrics.jsonl")
    bad = {name for row in rows for name, value in row.items() if value is None and name.rpartition("/")[2] == "loss"}
    if bad:
        raise ResourceError(
            f"the trial of {stage.command}: {', '.join(sorted(bad))} is not finite after {len(rows)} steps; give a "
            f"lower --set {stage.command}.lr, or --dtype fp32."
        )


@contextmanager
def memory_meter() -> Iterator[list[int]]:
    """Puts the most memory that the block took into the list: the device's on a GPU, else the process's."""
    peak, cuda = [0], torch.cuda.is_available()
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    yield peak
    peak[0] = torch.cuda.max_memory_allocated() if cuda else peak_rss_bytes()
    gc.collect()


def forget_peak() -> None:
    """Sets the process's peak of memory to what it has now, where the kernel lets it: on Linux."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        try:
            file.write_text("5", encoding="ascii")
        except OSError:
            return
