"""Which of a machine's cores one rank computes on. No torch in here.

torchrun sets OMP_NUM_THREADS=1 for several processes, where its user has set nothing: the optimizer of states in host
memory would have one core of a server.
"""

import os
from pathlib import Path


def threads(environment: dict[str, str], root: Path = Path("/")) -> int | None:
    """How many threads a rank of this environment computes with: an equal share of the cores that this process may use.
    None: as many as its user says, or torch's default."""
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if ranks == 1 or ("OMP_NUM_THREADS" in environment and not _by_torchrun(environment, root)):
        return None
    own = allowed()
    return max(min(_shared(own, root) // ranks, len(own)), 1)


def _shared(own: set[int], root: Path) -> int:
    """How many cores the machine's ranks have together: those of our parent, if this rank was bound to some of them;
    in a container no more than its share of the machine's time, beyond which all its threads are stopped."""
    try:
        count = len(os.sched_getaffinity(os.getppid()) | own)
    except (AttributeError, OSError):
        count = len(own)
    try:
        time, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return min(count, int(time) // int(period))
    except (OSError, ValueError):  # "max": no limit
        return count


def _by_torchrun(environment: dict[str, str], root: Path) -> bool:
    """Whether OMP_NUM_THREADS is torchrun's own: then it is not among what torchrun, our parent, was started with.

    Where the system does not show that (macOS, a parent of another user), it counts as the user's.
    """
    if environment["OMP_NUM_THREADS"] != "1" or "TORCHELASTIC_RUN_ID" not in environment:
        return False
    try:
        started_with = (root / "proc" / str(os.getppid()) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return bool(started_with[0]) and not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in started_with)


def allowed() -> set[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def bind(address: str, root: Path = Path("/")) -> set[int]:
    """Keeps this thread, and those that it starts, on the cores near a GPU, whose PCI address is like 0000:65:00.0; its
    host memory is then the near one too. Returns these cores. Empty, and nothing is changed: the system does not say
    which they are, or this process may use none of them. As torchrun's --numa-binding=node does, which few give."""
    try:
        node = int((root / "sys/bus/pci/devices" / address.lower() / "numa_node").read_text())
        near = _numbers((root / f"sys/devices/system/node/node{node}/cpulist").read_text())  # -1: no node has it
    except (OSError, ValueError):
        return set()
    cores = near & allowed()
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    return cores


def _numbers(text: str) -> set[int]:
    """The kernel's lists: {0, 1, 2, 8} of "0-2,8"."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}
