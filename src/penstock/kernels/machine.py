"""Which processor this is, how much memory is free, and where penstock keeps what it made. No torch in here."""

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


def available_ram() -> int:
    """Bytes that programs can still take without swapping."""
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
