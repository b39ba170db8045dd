"""Steps in turns between processes: `Turns` in the process that does a step when it is told, `Side` in the one that
tells it.

Every peer runs in an environment of its own and so in a process of its own. Imported by scripts of any environment:
the standard library alone.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

MARK = "turn: "
"""What a line of the pipe begins with: some libraries print while they are imported."""


class Turns:
    """Made as soon as a process starts: what libraries print afterwards goes to stderr, not to the pipe."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = 0.0

    def wait(self) -> bool:
        """Says that it is ready; returns True when the next step is wanted, False when there is none."""
        self._send({"ready": True})
        wanted = bool(sys.stdin.readline())
        self._began = time.perf_counter()
        return wanted

    def done(self) -> None:
        """Sends the seconds of the step that has just ended, and the peak RSS."""
        seconds = time.perf_counter() - self._began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._send({"seconds": seconds, "peak_rss_bytes": peak * (1 if sys.platform == "darwin" else 1024)})

    def take(self, step: Callable[[], object]) -> None:
        """Does every step."""
        while self.wait():
            step()
            self.done()

    def _send(self, message: dict) -> None:
        self._pipe.write(f"{MARK}{json.dumps(message)}\n")
        self._pipe.flush()


class Side:
    """A process with `Turns`. Raises RuntimeError, with the last line that it printed, when it stops."""

    def __init__(self, command: list[str], environment: dict[str, str | None] | None = None) -> None:
        """environment: variables that differ from this process's; None removes one."""
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._output, text=True,
            env={name: value for name, value in variables.items() if value is not None},
        )  # fmt: skip
        try:
            self._receive()
        except RuntimeError:
            self.close()
            raise

    def step(self) -> dict[str, float]:
        """One step: its seconds, and the peak RSS so far."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has stopped, and its last line says why
        result = self._receive()
        self._receive()  # ready again
        return result

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        while line and not line.startswith(MARK):
            line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._output.seek(0)
            raise RuntimeError(last_words(code, self._output.read()))
        return json.loads(line.removeprefix(MARK))

    def close(self) -> None:
        """Closes its input, which ends it; kills it if it goes on."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=60)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._output.close()


def reward_of(ids: list[int]) -> float:
    """The reward of an answer in races of GRPO: answers of a group differ in it."""
    return sum(ids) % 7 / 7


def last_words(code: int, output: str) -> str:
    """Why a process failed: its exit code and the last line that it wrote."""
    lines = [line for line in output.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else 'killed, most likely for its memory'}"


def flags(doc: str, **choices: list[str] | None) -> argparse.Namespace:
    """The flags of every side: shape, rows and tokens. `choices` adds flags by name, the first choice the default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens; a row of supervised training has prompt + new")
    parser.add_argument("--new", type=int, default=64, help="tokens per response")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rank", type=int, default=16, help="of adapters")
    parser.add_argument("--group", type=int, default=8, help="answers per prompt, of GRPO")
    parser.add_argument("--micro", type=int, default=8, help="rows per forward pass, of GRPO")
    for name, values in choices.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=values[0] if values else None, choices=values)
    return parser.parse_args()
