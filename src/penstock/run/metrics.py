"""Numbers as JSON lines that survive a kill.

metrics.jsonl holds what follows from data and seed, byte-equal after a resume; perf.jsonl holds times and memory.
"""

import hashlib
import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Lines:
    """A JSON-lines file, cut back to `offset` bytes when opened: lines after the checkpoint are removed.

    `digest`: what `sync` gave with that offset; a line says so where the bytes are others.
    """

    def __init__(self, path: Path, offset: int = 0, digest: str | None = None) -> None:
        self._file = path.open("ab", buffering=0)
        self._path, size = path, os.fstat(self._file.fileno()).st_size
        if size < offset:  # the file was cut or deleted: training goes on, with a gap in its record
            print(f"WARNING: {path}: has {size} bytes instead of {offset}, earlier lines are lost", file=sys.stderr)
            offset = path.read_bytes().rfind(b"\n") + 1
            digest = None
        self._file.truncate(offset)
        with path.open("rb") as file:
            self._digest = hashlib.file_digest(file, "sha256")
        if digest not in (None, self._digest.hexdigest()):
            print(f"WARNING: {path}: has changed since its checkpoint was written (sha256); the run goes on, "
                  "with a damaged record", file=sys.stderr)  # fmt: skip

    def write(self, row: Mapping[str, Any]) -> None:
        """One object, one line. Numbers that are not finite become null: JSON has no NaN."""
        line = memoryview(to_json(row).encode("utf-8", "backslashreplace") + b"\n")  # a lone surrogate: its JSON escape
        try:
            while line:  # a nearly full disk may write a part only
                written = self._file.write(line)
                self._digest.update(line[:written])
                line = line[written:]
        except OSError as error:  # a failed write names no file
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def sync(self) -> tuple[int, str]:
        """Forces all lines to the disk; the file's length in bytes and its sha256, to be kept in the checkpoint."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size, self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def to_json(row: Mapping[str, Any]) -> str:
    """A row as one line of strict JSON, in any depth null for a number that is not finite."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: finite(part) for key, part in value.items()}
        return [finite(part) for part in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file that a run wrote; empty without a file. An incomplete last line is left out."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def read_record(path: Path, *fields: str) -> list[dict[str, Any]]:
    """As `read_lines`, for people to look at: a line that is no object with a step and these fields is damaged, and
    left out with a warning."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), 1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = ""
        if isinstance(row, dict) and all(field in row for field in ("step", *fields)):
            rows.append(row)
        elif row is not None:
            print(f"WARNING: {path}:{number}: is damaged, and left out", file=sys.stderr)
    return rows


def peak_rss_bytes() -> int:
    """The peak of this process's physical memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
