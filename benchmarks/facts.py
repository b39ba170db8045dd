"""What every measured figure carries with it: when, where, from which commit, by which command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def write(name: str, measured: dict[str, Any], *packages: str) -> Path:
    """Writes benchmarks/results/NAME.json ($OUT/NAME.json where that is set): the facts, then the figures."""
    arguments = shlex.join(sys.argv[1:])
    dirty = " with uncommitted changes" if _git("status", "--porcelain", "src") else ""
    facts = {
        "command": f"python -m {_module(Path(sys.argv[0]))} {arguments}".strip(),
        "commit": os.environ.get("COMMIT") or _git("rev-parse", "HEAD") + dirty,  # a machine may have the files alone
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "ram_gb": round(_ram_bytes() / 2**30), "gpu": _gpu()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", *packages)}},
    }
    path = Path(os.environ.get("OUT", RESULTS)) / f"{name}.json"
    path.write_text(json.dumps({**facts, **measured}, indent=1) + "\n", encoding="utf-8")
    return path


def _module(script: Path) -> str:
    """benchmarks.engine, benchmarks.peers.run, ...; outside the repository the file's own name."""
    script = script.resolve()
    return ".".join(script.relative_to(ROOT).with_suffix("").parts) if script.is_relative_to(ROOT) else script.stem


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()}, torch's capability {_capability()}"


def _capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability() + " with AMX" * torch.cpu._is_amx_tile_supported()


def _ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
