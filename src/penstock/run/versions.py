"""The versions of a model that learns from its users: a folder of runs, and the lines of `versions.jsonl` beside them.

A line is never changed. A round adds a version, with its data, figures and the decision on it; a person adds which
version is served from now on, and whose votes count. Everything else, what is served above all, follows from the lines.

    versions.jsonl   improve.toml   lock   version-0001/   version-0002/   judges/
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from penstock.errors import UserError
from penstock.run.metrics import read_lines, to_json

FILE = "versions.jsonl"
TRUSTED, WAITING, REFUSED, WITHDRAWN = "trusted", "waiting", "refused", "withdrawn"
"""States of the votes that came with a version: they may be learned; they are too few to tell; they contradict earlier
ones, or a person distrusts them; a version that learned them was rolled back."""


class Versions:
    """The lines as they are now. `add` appends one, and reads what others have appended since."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.read()

    @staticmethod
    def exist(path: str | Path) -> bool:
        """Whether a folder holds versions."""
        return (Path(path) / FILE).is_file()

    @staticmethod
    def begin(path: Path, model: str) -> "Versions":
        """A new folder, whose version 0 is the model to start from."""
        path.mkdir(parents=True, exist_ok=True)
        versions = Versions(path)
        versions.add(version=0, parent=None, model=model, decision="start", why="the model to start from", learned=[])
        return versions

    def read(self) -> None:
        """Reads the lines. Raises UserError where they are damaged."""
        try:
            self.rows = read_lines(self.path / FILE)
            self.numbered = {row["version"]: row for row in self.rows if "decision" in row}
            self._follow()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path / FILE}: is damaged ({error!r}); restore it from a copy.") from error

    def add(self, **row: Any) -> None:
        """Appends a line, whole or not at all."""
        with (self.path / FILE).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            whole = (self.path / FILE).read_bytes().rfind(b"\n") + 1
            os.truncate(file.fileno(), whole)  # what a killed process left of a line
            file.write(to_json({"at": time.time(), **row}).encode("utf-8", "backslashreplace") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.read()

    def _follow(self) -> None:
        """What is served, and the state of each version's votes, after all lines."""
        self.current, self.states = 0, dict[int, str]()
        for row in self.rows:
            number = row["version"]
            if "decision" in row:
                self.states |= {number: row.get("state", REFUSED)} if number else {}
                self.states |= {int(other): state for other, state in row.get("changed", {}).items()}
                if row["decision"] == "promoted":
                    self.current = number
            elif row["event"] == "serve":
                before, after = self.learned(self.current), self.learned(number)
                self.states |= dict.fromkeys(before - after, WITHDRAWN) | dict.fromkeys(after, TRUSTED)
                self.current = number
            else:
                self.states[number] = TRUSTED if row["event"] == "trust" else REFUSED

    def lineage(self, number: int) -> list[int]:
        """A version and those it came from, the newest first."""
        line = [number]
        while (parent := self.numbered[line[-1]]["parent"]) is not None:
            line.append(parent)
        return line

    def learned(self, number: int) -> set[int]:
        """The versions whose votes it has learned."""
        return {source for version in self.lineage(number) for source in self.numbered[version]["learned"]}

    def model(self, number: int) -> str:
        """The run or directory of a version's weights. Raises UserError for a version without any."""
        if number not in self.numbered:
            raise UserError(f"{self.path}: has no version {number}; the newest is {max(self.numbered)}.")
        model = self.numbered[number].get("model")
        if model is None:
            raise UserError(f"{self.path}: version {number} was not trained; there is nothing to serve.")
        return str(self.path / model) if (self.path / model).exists() else str(model)

    def serve(self, number: int, why: str) -> None:
        """Serves a version from now on; the votes that only versions after it learned are withdrawn."""
        self.model(number)
        if number == self.current:
            raise UserError(f"{self.path}: version {number} is served already.")
        self.add(version=number, event="serve", why=why)

    def trust(self, number: int, trusted: bool, why: str) -> None:
        """Says whether the votes that came with a version count. Raises UserError where none came."""
        if number not in self.states:
            raise UserError(f"{self.path}: no votes came with a version {number}; the newest is {max(self.numbered)}.")
        self.add(version=number, event="trust" if trusted else "distrust", why=why)

    def before(self) -> int:
        """The version from which the served one came. Raises UserError for the first."""
        parent = self.numbered[self.current]["parent"]
        if parent is None:
            raise UserError(f"{self.path}: the model to start from is served; there is no version before it.")
        return int(parent)

    @contextlib.contextmanager
    def round(self) -> Iterator[None]:
        """Held while a round trains. Raises UserError where another process holds it."""
        with (self.path / "lock").open("ab") as file:
            for _ in range(10):  # `busy` holds it for a moment
                if _lock(file, fcntl.LOCK_EX):
                    break
                time.sleep(0.05)
            else:
                raise UserError(f"{self.path}: another round is running; wait for it, or stop it first.")
            yield

    @property
    def busy(self) -> bool:
        """Whether a round runs now, in whatever process."""
        with (self.path / "lock").open("ab") as file:
            return not _lock(file, fcntl.LOCK_SH)


def _lock(file: IO[bytes], kind: int) -> bool:
    """Whether the lock could be had at once; it goes with the file."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def served_model(path: str | Path) -> tuple[str, str]:
    """The name of the version that a folder serves, and its model. Example: ("v3", "runs/live/version-0003/dpo")."""
    versions = Versions(path)
    return f"v{versions.current}", versions.model(versions.current)
