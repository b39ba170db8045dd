"""Ours against other stacks at the same work, each in an environment of its own, step by step in turns.

    make bench-peers        or: python -m benchmarks peers [--only ROW ...] [--repeats 5] [--keep] [--tiny]

Both sides of a row are processes that wait; A does a step, then B, A, B, ...: what disturbs the machine disturbs both.
A warm-up step of each is not counted. Medians, the median of the paired ratios (above 1: ours is faster) and both peak
RSS go to benchmarks/results/peers.json, row by row; rows of earlier runs stay. A peer that cannot be installed, or
stops, has a row that says why.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.facts import ROOT, flags, result_path, write
from benchmarks.peers.turns import Side, last_words
from penstock.models.linear import slow_in_bf16

HERE = Path(__file__).parent
OURS = str(HERE / "ours.py")
ENVIRONMENTS = ROOT / ".peers"
TINY = ["--layers", "1", "--width", "32", "--vocab", "64", "--prompt", "6", "--new", "6", "--rank", "4"]


@dataclass(frozen=True)
class Race:
    """One row: a peer's script and flags, and ours."""

    environment: str
    theirs: str
    ours: str
    narrow: bool = False
    """Theirs is in bf16. On a processor without bf16 instructions a step takes minutes: one of each, and no warm-up."""


GRPO, OUR_GRPO = "trl_grpo.py --rows 64", "--work grpo --rows 64"
TRL, BF16, AUTOCAST = "trl_ppo.py", "--dtype bf16", "trl_ppo.py --autocast bf16"
EIGHT_BIT, STREAMED = "--strategy ddp_8bit", "--work sft --strategy gemini_cpu"
RACES = {
    "ppo, TRL, bf16": Race("trl", f"{TRL} {BF16}", BF16, narrow=True),
    "ppo, TRL, bf16, ours with 8-bit moments": Race("trl", f"{TRL} {BF16}", f"{BF16} {EIGHT_BIT}", narrow=True),
    "ppo, TRL, bf16 by autocast": Race("trl", AUTOCAST, BF16, narrow=True),
    "ppo, TRL, bf16 by autocast, ours recomputing": Race("trl", AUTOCAST, f"{BF16} --recompute yes", narrow=True),
    "ppo, TRL, bf16 by autocast, ours with 8-bit moments": Race("trl", AUTOCAST, f"{BF16} {EIGHT_BIT}", narrow=True),
    "ppo, TRL, fp32": Race("trl", TRL, ""),
    "ppo, TRL in fp32, ours in bf16": Race("trl", TRL, BF16),
    "grpo, TRL, bf16 by autocast": Race("trl_newest", f"{GRPO} --autocast bf16", f"{OUR_GRPO} {BF16}", narrow=True),
    "grpo, TRL recomputing, bf16 by autocast": Race(
        "trl_newest", f"{GRPO} --autocast bf16 --recompute yes", f"{OUR_GRPO} {BF16}", narrow=True
    ),
    "grpo, TRL, bf16 by autocast, ours with 8-bit moments": Race(
        "trl_newest", f"{GRPO} --autocast bf16", f"{OUR_GRPO} {BF16} {EIGHT_BIT}", narrow=True
    ),
    "grpo, TRL, fp32": Race("trl_newest", GRPO, OUR_GRPO),
    "grpo, TRL recomputing, fp32": Race("trl_newest", f"{GRPO} --recompute yes", OUR_GRPO),
    "grpo, TRL, fp32, ours with 8-bit moments": Race("trl_newest", GRPO, f"{OUR_GRPO} {EIGHT_BIT}"),
    "ppo, plain as published, fp32": Race("plain", "plain.py --kind published", ""),
    "ppo, plain and fair, bf16": Race("plain", f"plain.py --kind fair {BF16}", BF16, narrow=True),
    "sft through LoRA, peft, fp32": Race("peft", "supervised.py --by peft", "--work lora"),
    "sft through LoRA, peft, bf16": Race("peft", f"supervised.py --by peft {BF16}", f"--work lora {BF16}", narrow=True),
    "sft, DeepSpeed ZeRO-3 offload, bf16": Race(
        "deepspeed", f"supervised.py --by deepspeed {BF16}", f"{STREAMED} {BF16}", narrow=True
    ),
    "sft, DeepSpeed ZeRO-3 offload, fp32": Race("deepspeed", "supervised.py --by deepspeed", STREAMED),
    "sft, FSDP2, fp32": Race("fsdp2", "supervised.py --by fsdp2", STREAMED),
}


def environment_of(name: str) -> Path:
    """The peer's own python, installed if it is missing. Raises RuntimeError with pip's last line otherwise."""
    directory, requirements = ENVIRONMENTS / name, HERE / "requirements" / f"{name}.txt"
    python, stamp = directory / "bin" / "python", directory / ".installed"
    if stamp.exists() and stamp.read_text() == requirements.read_text():
        return python
    shutil.rmtree(directory, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(directory)],
        # torch first and alone: anything else would bring another build of it
        [*pip, requirements_of(name)[0], "setuptools", "wheel"],
        [*pip, "--no-build-isolation", "-r", str(requirements)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_BUILD_OPS": "0"})
        if done.returncode:
            raise RuntimeError(f"not installed: {last_words(done.returncode, done.stderr or done.stdout)}")
    stamp.write_text(requirements.read_text())
    return python


def race(contest: Race, python: Path | str, repeats: int, shape: list[str]) -> dict[str, Any]:
    """A B A B ..., ours first. Raises RuntimeError when a side stops."""
    script, *their_flags = contest.theirs.split()
    own_packages = {"PYTHONPATH": None} if str(python) != sys.executable else {}
    sides = {
        "ours": partial(Side, [sys.executable, OURS, *contest.ours.split(), *shape]),
        "theirs": partial(Side, [str(python), str(HERE / script), *their_flags, *shape], own_packages),
    }
    once = contest.narrow and slow_in_bf16("cpu")
    seconds, figures = figures_of(sides, *((1, 0) if once else (repeats, 1)))
    return {
        **figures,
        "times_faster": timing.ratio(seconds, "theirs", "ours"),
        "share_of_their_rss": figures["ours_peak_rss_bytes"] / figures["theirs_peak_rss_bytes"],
        "ours": f"ours.py {contest.ours}".strip(),
        "theirs": contest.theirs,
        "requirements": requirements_of(contest.environment),
    }


def figures_of(sides: dict[str, Callable[[], Side]], rounds: int, warm_ups: int) -> tuple[timing.Seconds, dict]:
    """Starts the sides and takes their steps in turns: the seconds of each step, and the figures of each side."""
    with contextlib.ExitStack() as ending:
        running = {name: ending.enter_context(contextlib.closing(start())) for name, start in sides.items()}
        steps = timing.alternate({name: side.step for name, side in running.items()}, rounds, warm_ups)
    seconds = {name: [step["seconds"] for step in steps[name]] for name in steps}
    return seconds, {
        **{f"{name}_seconds": median for name, median in timing.medians(seconds).items()},
        **{f"{name}_seconds_each": times for name, times in seconds.items()},
        **{f"{name}_peak_rss_bytes": steps[name][-1]["peak_rss_bytes"] for name in steps},
    }


def requirements_of(name: str) -> list[str]:
    """The packages of a peer's environment; torch first."""
    lines = (HERE / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def main(arguments: list[str]) -> int:
    """Runs the rows and writes each as soon as it has ended."""
    parser = flags(__doc__)
    parser.add_argument("--only", nargs="+", default=list(RACES), choices=list(RACES), metavar="ROW")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="keep the environments (.peers/, about 1 GB each)")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes: tests the rows, and the figures mean nothing"
    )
    parser.add_argument("--name", default="peers", help="of the file in benchmarks/results/")
    options = parser.parse_args(arguments)
    before = result_path(options.name)
    rows = json.loads(before.read_text(encoding="utf-8"))["rows"] if before.exists() else {}
    for name in options.only:
        try:
            python = environment_of(RACES[name].environment)
            rows[name] = race(RACES[name], python, options.repeats, TINY if options.tiny else [])
        except RuntimeError as error:
            rows[name] = {"why_not": str(error)}
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
        write(options.name, {"rows": {key: rows[key] for key in RACES if key in rows}})
    if not options.keep:
        shutil.rmtree(ENVIRONMENTS, ignore_errors=True)
    return 0
