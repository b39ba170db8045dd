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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.facts import ROOT, flags, last_words, result_path, write
from benchmarks.peers.turns import Side
from penstock.models.linear import slow_in_bf16

HERE = Path(__file__).parent
OURS = "ours.py"
ENVIRONMENTS = ROOT / ".peers"
TINY = ["--layers", "1", "--width", "32", "--vocab", "64", "--prompt", "6", "--new", "6", "--rank", "4"]


@dataclass(frozen=True)
class Race:
    """One row: a peer's script and flags, and ours."""

    environment: str
    script: str
    theirs: str
    ours: str
    narrow: bool = False
    """Theirs is in bf16. On a processor without bf16 instructions a step takes minutes: one of each, and no warm-up."""

    @property
    def once(self) -> bool:
        """Whether this processor is one of those."""
        return self.narrow and slow_in_bf16("cpu")


RACES = {
    "ppo, TRL, bf16": Race("trl", "trl_ppo.py", "--dtype bf16", "--dtype bf16", narrow=True),
    "ppo, TRL, bf16, ours with 8-bit moments": Race(
        "trl", "trl_ppo.py", "--dtype bf16", "--dtype bf16 --strategy ddp_8bit", narrow=True
    ),
    "ppo, TRL, bf16 by autocast": Race("trl", "trl_ppo.py", "--autocast bf16", "--dtype bf16", narrow=True),
    "ppo, TRL, bf16 by autocast, ours recomputing": Race(
        "trl", "trl_ppo.py", "--autocast bf16", "--dtype bf16 --recompute yes", narrow=True
    ),
    "ppo, TRL, bf16 by autocast, ours with 8-bit moments": Race(
        "trl", "trl_ppo.py", "--autocast bf16", "--dtype bf16 --strategy ddp_8bit", narrow=True
    ),
    "ppo, TRL, fp32": Race("trl", "trl_ppo.py", "", ""),
    "ppo, TRL in fp32, ours in bf16": Race("trl", "trl_ppo.py", "", "--dtype bf16"),
    "ppo, plain as published, fp32": Race("plain", "plain.py", "--kind published", ""),
    "ppo, plain and fair, bf16": Race("plain", "plain.py", "--kind fair --dtype bf16", "--dtype bf16", narrow=True),
    "sft through LoRA, peft, fp32": Race("peft", "peft_lora.py", "", "--work lora"),
    "sft through LoRA, peft, bf16": Race(
        "peft", "peft_lora.py", "--dtype bf16", "--work lora --dtype bf16", narrow=True
    ),
    "sft, DeepSpeed ZeRO-3 offload, bf16": Race(
        "deepspeed", "deepspeed_zero3.py", "--dtype bf16", "--work sft --strategy gemini_cpu --dtype bf16", narrow=True
    ),
    "sft, DeepSpeed ZeRO-3 offload, fp32": Race(
        "deepspeed", "deepspeed_zero3.py", "", "--work sft --strategy gemini_cpu"
    ),
    "sft, FSDP2, fp32": Race("fsdp2", "fsdp2_offload.py", "", "--work sft --strategy gemini_cpu"),
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
    with contextlib.ExitStack() as ending:
        own_packages = {"PYTHONPATH": None} if str(python) != sys.executable else {}
        peer = Side([str(python), str(HERE / contest.script), *contest.theirs.split(), *shape], own_packages)
        ending.callback(peer.end)
        ours = Side([sys.executable, str(HERE / OURS), *contest.ours.split(), *shape])
        ending.callback(ours.end)
        rounds, warm_ups = (1, 0) if contest.once else (repeats, 1)
        steps = timing.alternate({"ours": ours.step, "theirs": peer.step}, rounds, warm_ups)
    seconds = {side: [step["seconds"] for step in steps[side]] for side in steps}
    peaks = {side: steps[side][-1]["peak_rss_bytes"] for side in steps}
    return {
        **{f"{side}_seconds": median for side, median in timing.medians(seconds).items()},
        "times_faster": timing.ratio(seconds, "theirs", "ours"),
        **{f"{side}_seconds_each": times for side, times in seconds.items()},
        **{f"{side}_peak_rss_bytes": peak for side, peak in peaks.items()},
        "share_of_their_rss": peaks["ours"] / peaks["theirs"],
        "ours": f"ours.py {contest.ours}".strip(),
        "theirs": f"{contest.script} {contest.theirs}".strip(),
        "requirements": requirements_of(contest.environment),
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
