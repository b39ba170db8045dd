"""Runs that are killed, starved, interrupted and lied to: what is lost, and what each refusal says.

    python -m benchmarks reliability [PART ...] [--counts 10]

Parts: kills, disk, clock, memory, ranks, damage, twice, data, models; the functions of these names say what each does.
Models are tiny, each trial is a process of its own, and what it must keep is in runs.py: an undisturbed run's bytes, at
once or after `penstock resume`, or one paragraph with its exit code. A part that the result has is not made again; to
make it again, take it out of the file. Ctrl-C or SIGTERM ends a part, with the trials that it has made. The result has
every trial that broke a promise, and counts of the others.
"""

import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.facts import ROOT, commit_of, flags, result_path, write
from benchmarks.reliability import damage, faults, fuzz, kills, ranks
from benchmarks.reliability.runs import UNHARMED, import_all

Part = Callable[[int], Iterator[dict[str, Any]]]
PARTS: dict[str, tuple[Part, int]] = {
    # name: (trials, how many)
    "kills": (kills.kills, 300),
    "disk": (faults.disk, 900),
    "clock": (faults.clock, 70),
    "memory": (faults.memory, 210),
    "ranks": (ranks.ranks, 12),
    "damage": (damage.damage, 420),
    "twice": (damage.twice, 42),
    "data": (fuzz.data, 1000),
    "models": (fuzz.models, 1000),
}


def main(arguments: list[str]) -> int:
    """Returns 1 where a promise was broken."""
    parser = flags(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--counts", type=int, help="trials of each part; default: each part's own number")
    options = parser.parse_args(arguments)
    if unknown := {*options.parts} - {*PARTS}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    faults.preloaded(arguments)
    import_all()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in options.parts or PARTS:
        if name not in made():
            trials, count = PARTS[name]
            rows = summary(name, trials(options.counts or count))
            parts = {**made(), name: rows}  # another process may have made others meanwhile
            write("reliability", {"parts": {part: parts[part] for part in PARTS if part in parts}})
    return int(any(part["broken"] for part in made().values()))


def made() -> dict[str, Any]:
    """The parts in the result."""
    path = result_path("reliability")
    return json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}


def summary(name: str, trials: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """A part's counts, what its refusals said, and each trial that broke a promise."""
    started, rows = time.monotonic(), []
    try:
        for row in trials:
            rows.append(row | {"text": row.get("text", "").replace(sys.prefix, "PREFIX").replace(str(ROOT), ".")})
            if row["verdict"] not in UNHARMED:
                print(f"{name}: {row}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"{name}: ended early, after {len(rows)} trials", file=sys.stderr, flush=True)
    verdicts = Counter(row["verdict"] for row in rows)
    facts = Counter(key for row in rows for key, fact in row.items() if fact is True)
    print(f"{name}: {len(rows)} trials: {dict(verdicts)}", flush=True)
    return {
        "commit": commit_of(ROOT), "seconds": round(time.monotonic() - started), "trials": len(rows),
        **{verdict: verdicts.pop(verdict, 0) for verdict in UNHARMED}, **facts, "faults": dict(verdicts),
        "broken": [row for row in rows if row["verdict"] not in UNHARMED],
    }  # fmt: skip
