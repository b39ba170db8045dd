"""Ours against other stacks at the same work, each in an environment of its own, step by step in turns.

    make bench-peers        or: python -m benchmarks.peers.run [--only ROW ...] [--repeats 5] [--keep] [--tiny]

Both sides of a row are processes that wait; A does a step, then B, A, B, ...: what disturbs the machine disturbs both.
A warm-up step of each is not counted. Medians, the median of the paired ratios (above 1: ours is faster) and both peak
RSS go to benchmarks/results/peers.json, row by row; rows of earlier runs stay. A peer that cannot be installed, or
stops, has a row that says why.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.facts import RESULTS, ROOT, write
from benchmarks.peers.turns import MARK
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
        "deepspeed",
        "deepspeed_zero3.py",
        "--dtype bf16",
        "--work sft --strategy gemini_cpu --dtype bf16",
        narrow=True,
    ),
    "sft, DeepSpeed ZeRO-3 offload, fp32": Race(
        "deepspeed", "deepspeed_zero3.py", "", "--work sft --strategy gemini_cpu"
    ),
    "sft, FSDP2, fp32": Race("fsdp2", "fsdp2_offload.py", "", "--work sft --strategy gemini_cpu"),
}


class Side:
    """A process that does a step when it is asked to. Raises RuntimeError, with its last words, when it stops."""

    def __init__(self, python: Path | str, script: str, flags: list[str]) -> None:
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if str(python) != sys.executable:
            environment.pop("PYTHONPATH", None)  # the peer's own packages alone
        self._process = subprocess.Popen(
            [str(python), str(HERE / script), *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._words, text=True, env=environment,
        )  # fmt: skip
        try:
            self._answer()
        except RuntimeError:
            self.end()
            raise

    def step(self) -> dict[str, float]:
        """One step: its seconds, and the peak RSS so far."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has stopped, and its last words say why
        found = self._answer()
        self._answer()  # ready again
        return found

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        while line and not line.startswith(MARK):  # some libraries talk while they are imported
            line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._words.seek(0)
            words = [one for one in self._words.read().strip().splitlines() if one.strip()]
            raise RuntimeError(f"exit code {code}: {words[-1] if words else 'killed, most likely for its memory'}")
        return json.loads(line.removeprefix(MARK))

    def end(self) -> None:
        """Closes its input, which ends it; kills it if it will not."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=60)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._words.close()


def environment_of(name: str) -> Path:
    """The peer's own python, installed if it is not there. Raises RuntimeError with pip's last words otherwise."""
    place, wanted = ENVIRONMENTS / name, HERE / "requirements" / f"{name}.txt"
    python, stamp = place / "bin" / "python", place / ".installed"
    if stamp.exists() and stamp.read_text() == wanted.read_text():
        return python
    shutil.rmtree(place, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(place)],
        [
            *pip,
            requirements_of(name)[0],
            "setuptools",
            "wheel",
        ],  # first and alone: anything else would bring another build of it
        [*pip, "--no-build-isolation", "-r", str(wanted)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_BUILD_OPS": "0"})
        if done.returncode:
            words = [one for one in (done.stderr or done.stdout).strip().splitlines() if one.strip()]
            raise RuntimeError(f"not installed: {words[-1] if words else done.returncode}")
    stamp.write_text(wanted.read_text())
    return python


def race(one: Race, python: Path | str, repeats: int, more: list[str]) -> dict[str, Any]:
    """A B A B ..., ours first. Raises RuntimeError when a side stops."""
    with contextlib.ExitStack() as ending:
        theirs = Side(python, one.script, [*one.theirs.split(), *more])
        ending.callback(theirs.end)
        ours = Side(sys.executable, OURS, [*one.ours.split(), *more])
        ending.callback(ours.end)
        found = [(ours.step(), theirs.step()) for _ in range(1 if one.once else repeats + 1)]
    timed = found[0 if one.once else 1 :]
    seconds = [[pair[side]["seconds"] for pair in timed] for side in (0, 1)]
    peaks = [found[-1][side]["peak_rss_bytes"] for side in (0, 1)]
    return {
        "ours_seconds": statistics.median(seconds[0]),
        "theirs_seconds": statistics.median(seconds[1]),
        "times_faster": statistics.median(b / a for a, b in zip(*seconds, strict=True)),
        "ours_seconds_each": seconds[0],
        "theirs_seconds_each": seconds[1],
        "ours_peak_rss_bytes": peaks[0],
        "theirs_peak_rss_bytes": peaks[1],
        "share_of_their_rss": peaks[0] / peaks[1],
        "ours": f"ours.py {one.ours}".strip(),
        "theirs": f"{one.script} {one.theirs}".strip(),
        "requirements": requirements_of(one.environment),
    }


def requirements_of(name: str) -> list[str]:
    """What a peer's environment holds, without comments; torch first."""
    lines = (HERE / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def main(arguments: list[str] | None = None) -> None:
    """Runs the rows and writes each as soon as it has ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(RACES), choices=list(RACES), metavar="ROW")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="leave the environments (.peers/, about 1 GB each) there")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes: tests the rows, and the figures mean nothing"
    )
    parser.add_argument("--name", default="peers", help="of the file in benchmarks/results/")
    asked = parser.parse_args(arguments)
    before = Path(os.environ.get("OUT", RESULTS)) / f"{asked.name}.json"
    rows = json.loads(before.read_text(encoding="utf-8"))["rows"] if before.exists() else {}
    for name in asked.only:
        one = RACES[name]
        try:
            python = environment_of(one.environment)
            rows[name] = race(one, python, asked.repeats, TINY if asked.tiny else [])
        except RuntimeError as error:
            rows[name] = {"why_not": str(error)}
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
        write(asked.name, {"rows": {key: rows[key] for key in RACES if key in rows}})
    if not asked.keep:
        shutil.rmtree(ENVIRONMENTS, ignore_errors=True)


if __name__ == "__main__":
    main()
