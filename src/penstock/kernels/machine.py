"""Which processor this is, how much memory is free, and where penstock keeps what it made. No torch in here."""

import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path

BUSY = 0.75
"""Load for each core from which other work is in the way."""


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


def available_ram(root: Path = Path("/")) -> int:
    """Bytes that programs can still take without swapping, within a container's limit, which kills what passes it."""
    if not (root / "proc/meminfo").exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([free, *_left_in_cgroups(root)])


CGROUPS = {
    # controllers in /proc/self/cgroup: the tree below /sys/fs/cgroup, limit, use, and what of it the kernel gives back
    "": ("", "memory.max", "memory.current", "inactive_file "),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
}


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes that are left of each limit of this process' control group and of those around it, in versions 2 and 1."""
    own = root / "proc/self/cgroup"
    for line in own.read_text(encoding="utf-8").splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in CGROUPS:
            continue
        tree, limit, use, cached = CGROUPS[controllers]
        top = root / "sys/fs/cgroup" / tree
        group = top / path.strip("/")  # in a container, whose own group is the top, it may not exist
        for folder in (group, *group.parents):
            try:
                statistics = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
                spare = next(int(row.removeprefix(cached)) for row in statistics if row.startswith(cached))
                left = int((folder / limit).read_text()) - int((folder / use).read_text()) + spare
                yield max(left, 0)
            except (OSError, ValueError, StopIteration):  # no such group; "max": no limit
                pass
            if folder == top:
                break


def busy() -> str | None:
    """What to say where a machine was busy in the last minute; None where it was not, or cannot be known."""
    cores = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return None
    if load < BUSY * cores:
        return None
    return (
        f"this machine was busy in the last minute (load {load:.1f} on {cores} cores): times will change with that, "
        "and with OMP_NUM_THREADS=1 threads do not wait for each other"
    )


def unnamed() -> str | None:
    """What to say where this machine's own name has no address, as torchrun looks it up; None where it has one."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return (
            f"nothing here has an address for this machine's name, {name}, by which torchrun's processes look for "
            f"each other, for minutes: put a line '127.0.1.1 {name}' into /etc/hosts, or give torchrun "
            "--local-addr 127.0.0.1"
        )
    return None
