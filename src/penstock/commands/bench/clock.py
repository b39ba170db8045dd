"""What a phase takes: seconds until the device is done, bytes through each tier, and the most memory of each kind.

A GPU's allocator says what its tensors took. A CPU's does not, so there a Meter counts them while the work warms up
(it costs time, and what is timed runs without it) and the device's peak is the tier's own bytes and those together.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import record_function

from penstock.autochunk.meter import Meter
from penstock.commands.bench.profile import PHASE
from penstock.commands.dry_run import moved, updates_count_at_home
from penstock.memory.strategy import Strategy
from penstock.memory.stream import Stream
from penstock.memory.tiers import Ram
from penstock.run.metrics import peak_rss_bytes


class Clock:
    """Times phases of one rank. Phases that are not timed count only for peak memory."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.seconds: dict[str, list[float]] = {}
        self.moved: dict[str, Counter[str]] = {}
        self._tensors: int | None = None

    @contextlib.contextmanager
    def phase(self, name: str, timed: bool) -> Iterator[None]:
        """One run of a phase."""
        settle(self.strategy.world.device)
        before, began = moved(self.strategy), time.perf_counter()
        with record_function(f"{PHASE}{name}"):
            yield
            settle(self.strategy.world.device)
        if timed:
            self.seconds.setdefault(name, []).append(time.perf_counter() - began)
            after = moved(self.strategy)
            self.moved.setdefault(name, Counter()).update({key: after[key] - before[key] for key in after})

    @contextlib.contextmanager
    def metered(self, streams: dict[str, Stream]) -> Iterator[None]:
        """Inside, a Meter counts tensors where no allocator does."""
        if self.strategy.world.device.type != "cpu":
            yield
            return
        with Meter() as meter:
            for stream in streams.values():
                updates_count_at_home(stream, meter)
            yield
        self._tensors = max(self._tensors or 0, meter.peak)

    def peaks(self) -> dict[str, int | None]:
        """The most bytes of this rank so far."""
        tiers, device = self.strategy.tiers, self.strategy.world.device
        if device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        else:
            allocated, reserved = tiers["device"].peak + (self._tensors or 0), None
        host = tiers["host"]
        return {
            "peak_device_bytes": allocated,
            "peak_device_reserved_bytes": reserved,
            "device_tier_bytes": tiers["device"].peak,
            "peak_host_bytes": host.peak,
            "pinned_bytes": host.pinned if isinstance(host, Ram) else 0,
            "peak_disk_bytes": tiers["disk"].peak if "disk" in tiers else 0,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def settle(device: torch.device) -> None:
    """Returns when the device has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def largest(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The maximum over ranks of every number; None stays None."""
    columns = {key: [rank[key] for rank in ranks] for key in ranks[0]}
    return {key: None if None in column else max(column) for key, column in columns.items()}
