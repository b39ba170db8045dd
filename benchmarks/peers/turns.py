"""One side of a race: does a step each time the other end of a pipe asks for one, and tells what it took.

Every peer runs in an environment of its own and so in a process of its own; `python -m benchmarks.peers.run` has them
take turns. Imported by scripts of any environment: the standard library alone.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable

MARK = "turn: "
"""What a line of the pipe begins with: some libraries talk while they are imported."""


class Turns:
    """Take one as soon as a process starts: what libraries print afterwards goes to stderr, not to the pipe."""

    def __init__(self) -> None:
        self._report = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = 0.0

    def wait(self) -> bool:
        """Ready: returns when the next step is asked for; False when there is none."""
        self._say({"ready": True})
        asked = bool(sys.stdin.readline())
        self._began = time.perf_counter()
        return asked

    def done(self) -> None:
        """Tells of the step that has just ended."""
        seconds = time.perf_counter() - self._began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._say({"seconds": seconds, "peak_rss_bytes": peak * (1 if sys.platform == "darwin" else 1024)})

    def take(self, step: Callable[[], object]) -> None:
        """All of them."""
        while self.wait():
            step()
            self.done()

    def _say(self, what: dict) -> None:
        self._report.write(f"{MARK}{json.dumps(what)}\n")
        self._report.flush()


def flags(doc: str, **more: list[str]) -> argparse.Namespace:
    """What every side is told: shape, rows and tokens. `more` are choices by name, the first one by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens; a row of supervised training has prompt + new")
    parser.add_argument("--new", type=int, default=64, help="tokens per response")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rank", type=int, default=16, help="of adapters")
    for name, choices in more.items():
        parser.add_argument(f"--{name}", default=choices[0], choices=choices)
    return parser.parse_args()
