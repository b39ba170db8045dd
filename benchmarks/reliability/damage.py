"""A changed byte in every file of a run, and two processes on one run directory."""

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.faults import traced
from benchmarks.reliability.runs import STAGES, USER, Ended, Subject, subject, worst
from penstock.run import checkpoint

RECORDS_NOTHING = ("lock", "log.txt", "report.html")
"""Files that no command reads."""


def damage(trials: int) -> Iterator[dict[str, Any]]:
    """A run that was killed before its last checkpoint; a random bit of each file in turn is changed, and the run is
    resumed, or its model exported. Found: said in a line that names the file, or without any effect on what is left."""
    for place, stage in enumerate(STAGES[:trials]):
        rng = random.Random(stage)
        with subject(stage, steps=6, keep=9) as run:
            _kill_before(run, "step-000006.tmp-")
            kept = run.work / "kept"
            run.run.rename(kept)
            files = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file())
            files = [file for file in files if (kept / file).stat().st_size]
            exported = _export(run, kept)
            for number in range(place, trials, len(STAGES)):
                turn, row = number // len(STAGES), {}
                file = files[turn % len(files)]
                shutil.rmtree(run.run, ignore_errors=True)
                shutil.copytree(kept, run.run)
                at, bit = rng.randrange((kept / file).stat().st_size), rng.randrange(8)
                _flip(run.run / file, at, bit)
                loads = turn // len(files) % 2
                row = _loaded(run, file, exported) if loads else _resumed(run, kept, file)
                yield {"name": f"{stage}: {'export' if loads else 'resume'}", **row, "at": f"{file} {at}.{bit}"}


def _kill_before(run: Subject, name: str) -> None:
    """The run, killed when it begins to write a file of that name."""
    below = {"FAULT_ROOT": f"{run.work}/"}
    operations = traced(run, below)
    at = next(number for number, line in enumerate(operations, 1) if name in line)
    assert worst(run.start({**below, "FAULT_AT": at, "FAULT_ERRNO": 0})).code == -signal.SIGKILL


def _flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def _resumed(run: Subject, kept: Path, file: Path) -> dict[str, Any]:
    damaged = (run.run / file).read_bytes()
    ended = worst(run.launch(["resume", run.run]))
    if ended.fault is not None:
        return {"verdict": ended.fault, "text": ended.text[-1500:]}
    if ended.code:
        shutil.copyfile(kept / file, run.run / file)
        wrong = run.go_on()
        return {"verdict": "lost", "text": f"{ended.line} THEN {wrong}"} if wrong else _refused(ended, file)
    warned = any("WARNING" in line and file.name in line for line in ended.text.splitlines())
    wrong = run.difference(str(file))
    if wrong:
        return {"verdict": "lost" if warned else "silent", "text": f"{wrong}: {ended.text[-1000:]}"}
    quiet = warned or str(file) in RECORDS_NOTHING or not _lasts(run.run / file, damaged)
    return {"verdict": "survived", "warned": warned} if quiet else {"verdict": "silent", "text": "nothing was said"}


def _lasts(path: Path, damaged: bytes) -> bool:
    """Whether the damage is still there and no reader would find it."""
    if not path.exists() or path.read_bytes()[: len(damaged)] != damaged:
        return False
    if path.name == "best":
        warnings: list[str] = []
        checkpoint.trusted(path.parent, warnings.append)
        return not warnings
    for parent in path.parents:
        if checkpoint.NAME.fullmatch(parent.name):
            try:
                checkpoint.verify(parent)
            except checkpoint.DamagedError:
                return False
            return path.name != checkpoint.MANIFEST  # white space there means nothing
    return True


def _refused(ended: Ended, file: Path) -> dict[str, Any]:
    named = file.name in ended.line
    return {"verdict": "refused" if named else "unnamed", "text": ended.line}


def _export(run: Subject, source: Path) -> tuple[Ended, bytes]:
    shutil.rmtree(run.work / "exported", ignore_errors=True)
    ended = worst(run.launch(["export", source, "--out", run.work / "exported"]))
    weights = run.work / "exported" / "model.safetensors"
    return ended, weights.read_bytes() if weights.exists() else b""


def _loaded(run: Subject, file: Path, exported: tuple[Ended, bytes]) -> dict[str, Any]:
    """The model must be the one that it was, or the file be named."""
    ended, weights = _export(run, run.run)
    if ended.fault is not None:
        return {"verdict": ended.fault, "text": ended.text[-1500:]}
    if ended.code:
        return _refused(ended, file)
    warned = file.name in ended.text
    if weights != exported[1] and not warned:
        return {"verdict": "silent", "text": ended.text[-1000:]}
    return {"verdict": "survived", "warned": warned}


# --- two processes ----------------------------------------------------------------------------------------------------
BESIDE = ("another begins", "another resumes", "two begin at once", "two resume at once")


def twice(trials: int) -> Iterator[dict[str, Any]]:
    """Two processes on one run directory: one goes on as if it were alone, the other is refused."""
    for place, stage in enumerate(STAGES[:trials]):
        rng = random.Random(stage)
        with subject(stage, steps=20, checkpoint_every=3, keep=2) as run:
            for number in range(place, trials, len(STAGES)):
                kind = BESIDE[number // len(STAGES) % len(BESIDE)]
                yield {"name": f"{stage}: {kind}", **_beside(run, kind, rng.random())}


def _beside(run: Subject, kind: str, moment: float) -> dict[str, Any]:
    resume = ["resume", run.run]
    [first] = run.start()
    if kind != "two begin at once":
        while first.poll() is None and not (run.run / "config.toml").exists():
            time.sleep(0.002)
        time.sleep(moment * run.seconds / 2)
    if kind == "two resume at once":
        first.signal(signal.SIGKILL)
        first.wait()
        [first] = run.launch(resume)
    [second] = run.launch(resume if "resume" in kind else run.begin)
    ended = [first.wait(), second.wait()]
    problems = [each.text[-1000:] for each in ended if each.fault is not None or each.code not in (0, USER)]
    wrong = run.difference()
    if problems or all(each.code for each in ended) or wrong:
        return {"verdict": "lost", "text": f"{wrong} {problems} {[each.line for each in ended]}"}
    refusal = next((each.line for each in ended if each.code), None)
    return {"verdict": "refused", "text": refusal} if refusal else {"verdict": "survived"}
