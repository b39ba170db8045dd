"""Two versions of the source, seconds of the same steps: step by step in turns, A B A B ...

    python -m benchmarks speed OLD_CHECKOUT [NEW_CHECKOUT] [--only ROW ...] [--rounds 7] [--tiny]

Each side of a row is a process that imports its checkout and does a step when it is told (peers/ours.py). After a
warm-up of each, the medians of both sides and of the ratios new/old go to benchmarks/results/speed.json; a ratio below
1 says the new version is faster. The new checkout is this one by default; the old one must have the names that
peers/ours.py imports (for one that has others, run this from a checkout of the commit in its result).
"""

import json
import sys
from functools import partial
from pathlib import Path

from benchmarks import timing
from benchmarks.facts import ROOT, commit_of, flags, write
from benchmarks.peers.run import OURS, TINY, figures_of
from benchmarks.peers.turns import Side

ROWS = {
    # few blocks and seconds per step: all rows take minutes together
    "sft": "--work sft --layers 3",
    "ppo": "--work ppo --layers 3",
    "sft bf16": "--work sft --layers 3 --dtype bf16",
    "ppo bf16": "--work ppo --layers 3 --dtype bf16",
    **{f"generate {rows}": f"--work generate --layers 3 --rows {rows}" for rows in (1, 8, 32)},
    "streamed": "--work sft --strategy gemini_cpu --device-memory 500MB --layers 4 --width 1600 --vocab 8192",
}


def main(arguments: list[str]) -> int:
    """Measures row by row and writes after each."""
    parser = flags(__doc__)
    parser.add_argument("old", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("new", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="small shapes: tests the rows; the figures mean nothing")
    parser.add_argument("--name", default="speed", help="of the file in benchmarks/results/")
    options = parser.parse_args(arguments)
    checkouts = {"old": options.old, "new": options.new}
    rows = {}
    for row in options.only:
        command = [sys.executable, OURS, *ROWS[row].split(), *(TINY if options.tiny else [])]
        sides = {
            name: partial(Side, command, {"PYTHONPATH": str(checkout.resolve() / "src")})
            for name, checkout in checkouts.items()
        }
        seconds, figures = figures_of(sides, options.rounds, 1)
        rows[row] = {"ratio": timing.ratio(seconds, "new", "old"), "rounds": options.rounds, **figures}
        print(row, json.dumps(rows[row]), flush=True)
        commits = {name: commit_of(checkout) for name, checkout in checkouts.items()}
        write(options.name, {"commits": commits, "rows": rows})
    return 0
