"""A disk that is full, that fails, or a process that dies, at every operation on a file of a run; a wall clock that
jumps; memory that is refused. All by faults.c, which stands before libc in these processes."""

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reliability.runs import RESOURCES, STAGES, USER, Subject, limit_memory, subject, worst
from penstock.kernels.machine import cache_directory

FAULTS: dict[str, dict[str, Any]] = {
    "disk full": {"FAULT_ERRNO": errno.ENOSPC},
    "disk full for once": {"FAULT_ERRNO": errno.ENOSPC, "FAULT_ONCE": 1},
    "I/O error": {"FAULT_ERRNO": errno.EIO},
    "I/O error for once": {"FAULT_ERRNO": errno.EIO, "FAULT_ONCE": 1},
    "read-only": {"FAULT_ERRNO": errno.EROFS},
    "kill -9": {"FAULT_ERRNO": 0},
}
RUNS = (*((stage, "ddp") for stage in STAGES), ("sft", "gemini_nvme"), ("ppo", "gemini_nvme"))
JUMPS = {"an hour ahead": 3600, "an hour back": -3600, "a day back": -86400, "ten years ahead": 3650 * 86400,
         "to 1970": -1_700_000_000}  # fmt: skip


def preloaded(arguments: list[str]) -> None:
    """Starts this program again with faults.c before libc, unless it is there."""
    library = cache_directory() / "faults.so"
    if os.environ.get("LD_PRELOAD") == str(library):
        return
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    source, fresh = Path(__file__).with_name("faults.c"), library.with_suffix(f".{os.getpid()}")
    flags = ("-O1", "-shared", "-fPIC", str(source), "-o", str(fresh), "-ldl")
    subprocess.run([os.environ.get("CC", "cc"), *flags], check=True)
    fresh.replace(library)  # others may begin now
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", "reliability", *arguments], environment)


def disk(trials: int) -> Iterator[dict[str, Any]]:
    """Operations below the run's directory (create, write, fsync, rename, mkdir, unlink, fallocate ...), each with
    every fault; randomly chosen ones where there are more than trials."""
    share = max(1, trials // len(RUNS))
    for stage, strategy in RUNS[:trials]:
        with subject(stage, strategy) as run:
            below = {"FAULT_ROOT": f"{run.work}/"}
            operations = traced(run, below)
            chosen = [(at, fault) for at in range(1, len(operations) + 1) for fault in FAULTS]
            if len(chosen) > share:
                chosen = sorted(random.Random(stage).sample(chosen, share))
            for at, fault in chosen:
                ended = worst(run.start({**below, **FAULTS[fault], "FAULT_AT": at}))
                what, _, path = operations[at - 1].partition(" ")
                row = run.judged(ended, (RESOURCES, USER) if fault == "read-only" else (RESOURCES,))
                yield {"name": f"{stage} {strategy}: {fault}", **row, "at": f"{at}: {what} {Path(path).name}"}


def traced(run: Subject, environment: dict[str, Any]) -> list[str]:
    """What faults.c counts in an undisturbed run."""
    trace = run.work.with_name("trace")
    worst(run.start({**environment, "FAULT_TRACE": trace}))
    lines = trace.read_text().splitlines()
    trace.unlink()
    return lines


def clock(trials: int) -> Iterator[dict[str, Any]]:
    """The wall clock jumps at a random look at it."""
    kinds = [*JUMPS]
    for place, stage in enumerate(STAGES[:trials]):
        rng = random.Random(stage)
        with subject(stage) as run:
            for number in range(place, trials, len(STAGES)):
                kind, at = kinds[number % len(kinds)], int(10 ** rng.uniform(0, 3))
                row = run.judged(worst(run.start({"FAULT_CLOCK": JUMPS[kind], "FAULT_AT": at})))
                yield {"name": f"{stage}: {kind}", **row, "at": f"look {at}"}


def memory(trials: int) -> Iterator[dict[str, Any]]:
    """In turns: the n-th tensor finds no memory, n anywhere in the run; and a limit of address space (RLIMIT_AS), from
    one that no run can begin in to one that does no harm."""
    for place, stage in enumerate(STAGES[:trials]):
        rng = random.Random(stage)
        with subject(stage) as run:
            requests = len(traced(run, {"FAULT_MEMORY": 0}))
            for number in range(place, trials, len(STAGES)):
                if (number // len(STAGES)) % 2 == 0:
                    at = rng.randint(1, requests)
                    ended, kind = worst(run.start({"FAULT_MEMORY": at})), f"tensor {at} of {requests}"
                else:
                    more = int(10 ** rng.uniform(6, 8.5))
                    ended, kind = worst(run.start(prepare=partial(limit_memory, more))), f"{more >> 10} KiB"
                yield {"name": stage, **run.judged(ended), "at": kind}
