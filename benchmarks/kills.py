"""kill -9 at random moments, `penstock resume`, and a comparison with an undisturbed run.

    python -m benchmarks kills [--kills 10]

For each stage the real command trains a tiny model in a process of its own and is killed at a random moment of the
whole length of its training (checkpoints are written every third step, so some kills hit one). After the resume, every
weight file's sha256, `metrics.jsonl` and `samples.jsonl` must equal those of the undisturbed run, byte for byte. Two of
the campaigns keep weights and optimizer states on a disk; killed runs must leave nothing of that behind.
"""

import dataclasses
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.facts import flags, write
from penstock.flags import to_dict
from tests.conftest import stage_config

STEPS = 60
PENSTOCK = [sys.executable, "-m", "penstock"]
STAGES = {
    "sft": "ddp", "reward": "ddp", "ppo": "ddp", "grpo": "ddp", "dpo": "ddp", "kto": "ddp", "distill": "ddp",
    "sft on disk": "gemini_nvme", "ppo on disk": "gemini_nvme",
}  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def outcome(run: str | Path) -> dict[str, str]:
    """What must be equal: sha256 of metrics, samples, and every weight file of the last checkpoint."""
    run = Path(run)
    files = [run / "metrics.jsonl", run / "samples.jsonl", *sorted(last_checkpoint(run).rglob("*.safetensors"))]
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.exists() and file.name != "state.safetensors"  # random state of threads that no sample depends on
    }


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint's directory."""
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def campaign(stage: str, directory: Path, kills: int) -> list[dict[str, Any]]:
    """One record per kill: where it struck and whether the resumed run ended equal."""
    whole = directory / "whole"
    length = training_seconds(start(stage, directory, "whole"), whole)
    expected, rng, records = outcome(whole), random.Random(f"{stage} {kills}"), []
    while len(records) < kills:
        run = directory / "killed"
        process = start(stage, directory, "killed")
        wait_for(run / "config.toml", process)
        time.sleep(rng.random() * length)
        if process.poll() is not None:  # it was faster than the run that was timed
            shutil.rmtree(run)
            continue
        process.send_signal(signal.SIGKILL)
        process.wait()
        metrics = run / "metrics.jsonl"
        record = {
            "stage": stage,
            "steps_logged": len(metrics.read_text().splitlines()) if metrics.exists() else 0,
            "checkpoints": sorted(path.name for path in run.glob("checkpoints/step-*")),
            "left_on_disk": [path.name for path in directory.glob("disk/*")],
        }
        resumed = subprocess.run([*PENSTOCK, "resume", str(run)], env=ENVIRONMENT, capture_output=True, text=True)
        record["equal"] = resumed.returncode == 0 and outcome(run) == expected and not record["left_on_disk"]
        if not record["equal"]:
            record["stderr"] = resumed.stderr[-2000:]
        records.append(record)
        shutil.rmtree(run)
    return records


def start(stage: str, directory: Path, out: str) -> subprocess.Popen:
    """The stage as a process, its flags in a TOML file."""
    name, strategy = stage.split()[0], STAGES[stage]
    config = stage_config(directory, name, out, steps=STEPS)
    if strategy == "gemini_nvme":
        run = dataclasses.replace(config.run, strategy=strategy, disk=str(directory / "disk"))
        config = dataclasses.replace(config, run=run)
    path = directory / f"{out}.toml"
    path.write_text(tomli_w.dumps(to_dict(config)))
    return subprocess.Popen([*PENSTOCK, name, "--config", str(path)], env=ENVIRONMENT, stderr=subprocess.DEVNULL)


def training_seconds(process: subprocess.Popen, run: Path) -> float:
    """From the first file of the run to the end of the process. Raises RuntimeError when it fails."""
    wait_for(run / "config.toml", process)
    started = time.monotonic()
    if process.wait(timeout=600) != 0:
        raise RuntimeError(f"the undisturbed run failed with {process.returncode}")
    return time.monotonic() - started


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until the file is there or the process has ended."""
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def main(arguments: list[str]) -> int:
    """Returns 1 when a resumed run differs."""
    parser = flags(__doc__)
    parser.add_argument("--kills", type=int, default=10, help="per stage")
    kills = parser.parse_args(arguments).kills
    records = []
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as directory:
            records += campaign(stage, Path(directory), kills)
        print(f"{stage}: {sum(record['equal'] for record in records[-kills:])} of {kills} equal", flush=True)
    equal = sum(record["equal"] for record in records)
    midway = sum(any(".tmp-" in name for name in record["checkpoints"]) for record in records)
    write("kills", {"kills": len(records), "equal": equal, "while_writing_a_checkpoint": midway, "records": records})
    return int(equal != len(records))
