"""Two versions of the source, seconds of the same steps: step by step in turns, A B A B ...

    python -m benchmarks speed OLD_CHECKOUT [NEW_CHECKOUT] [--only ROW ...] [--rounds 7] [--tiny]

Each side of a row is a process that imports its checkout and does a step when it is told (speed_steps.py). After a
warm-up of each, the medians of both sides and the ratio new/old of each round go to benchmarks/results/speed.json; a
ratio below 1 says the new version is faster. The new checkout is this one by default.
"""

import contextlib
import json
import sys
from pathlib import Path

from benchmarks import timing
from benchmarks.facts import ROOT, commit_of, flags, write
from benchmarks.peers.turns import Side

SCRIPT = Path(__file__).parent / "speed_steps.py"
ROWS = ("sft", "ppo", "generate 1", "generate 8", "generate 32", "streamed")


def row_of(checkouts: dict[str, Path], row: str, rounds: int, tiny: bool) -> dict:
    """Seconds of both sides, and new over old."""
    arguments = [*row.split(), *(["--tiny"] if tiny else [])]
    with contextlib.ExitStack() as ending:
        sides = {}
        for name, checkout in checkouts.items():
            environment = {"PYTHONPATH": str(checkout.resolve() / "src")}
            sides[name] = Side([sys.executable, str(SCRIPT), *arguments], environment)
            ending.callback(sides[name].end)
        steps = timing.alternate({name: side.step for name, side in sides.items()}, rounds, warm_ups=1)
    seconds = {name: [step["seconds"] for step in steps[name]] for name in steps}
    medians = timing.medians(seconds)
    return {
        "old_seconds": medians["old"],
        "new_seconds": medians["new"],
        "ratio": medians["new"] / medians["old"],
        "median_of_ratios": timing.ratio(seconds, "new", "old"),
        "rounds": rounds,
        "seconds": seconds,
        "peak_rss_bytes": {name: steps[name][-1]["peak_rss_bytes"] for name in steps},
    }


def main(arguments: list[str]) -> int:
    """Measures row by row and writes after each."""
    parser = flags(__doc__)
    parser.add_argument("old", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("new", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes: tests the rows, and the figures mean nothing"
    )
    parser.add_argument("--name", default="speed", help="of the file in benchmarks/results/")
    options = parser.parse_args(arguments)
    checkouts = {"old": options.old, "new": options.new}
    rows = {}
    for row in options.only:
        rows[row] = row_of(checkouts, row, options.rounds, options.tiny)
        print(row, json.dumps({key: rows[row][key] for key in ("old_seconds", "new_seconds", "ratio")}), flush=True)
        commits = {name: commit_of(checkout) for name, checkout in checkouts.items()}
        write(options.name, {"commits": commits, "rows": rows})
    return 0
