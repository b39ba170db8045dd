"""Which processor this is, and where penstock keeps what it made for it. No torch in here."""

import os
import platform
from pathlib import Path


def cache_directory() -> Path:
    """Where penstock keeps what it can make again; not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"


def cpu_facts() -> str:
    """What kind of processor this is, in the words of the kernel."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
