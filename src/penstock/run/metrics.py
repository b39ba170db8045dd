"""Numbers as JSON lines that survive a kill: what follows from data and seed in metrics.jsonl, byte-equal after a resume;
times and memory in perf.jsonl.
"""

import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Lines:
    """A JSON-lines file that is cut back to `offset` bytes when opened: what came after the checkpoint never happened."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._file = path.open("ab")
        self._file.truncate(offset)

    def write(self, row: Mapping[str, Any]) -> None:
        """One object, one line. Numbers that are not finite become null: JSON has no NaN."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Forces all lines to the disk and returns the file's length in bytes, to be kept in the checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file that a run wrote; empty when it wrote none."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def peak_rss_bytes() -> int:
    """The most physical memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
