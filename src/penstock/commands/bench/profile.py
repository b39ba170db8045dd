"""`--profile`: a Chrome trace of one iteration, and where its time went.

The table is read from the trace: of each phase's wall time, what the optimizer, the link and waiting for the disk took;
then what computing took beside them; the rest is idle (waiting for other ranks, and Python between operations). On a
GPU the spans are those of its streams, on a CPU those of the thread that runs the phases.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

Span = tuple[float, float]
"""Begin and end in microseconds."""
CLAIMS = ("optimizer", "disk", "link", "compute")
"""Columns in the order in which they claim an instant. The engine's `record_function` labels begin with these words."""

PHASE = "bench."
"""What the clock's own spans begin with: they end when the device is done."""


class Recorder:
    """Records once, between `start` and `stop`. Without a path it does nothing."""

    def __init__(self, path: str | None, device: torch.device) -> None:
        self.table: dict[str, dict[str, float]] | None = None
        self._path, self._done = path, path is None
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler: Any = torch.profiler.profile(activities=kinds) if path else None
        self._running = False

    def start(self) -> None:
        """Begins, the first time."""
        if not (self._done or self._running):
            self._profiler.start()
            self._running = True

    def stop(self) -> None:
        """Ends, writes the trace and reads the table from it."""
        if self._running:
            self._profiler.stop()
            self._running, self._done = False, True
            assert self._path is not None
            self._profiler.export_chrome_trace(self._path)
            events = json.loads(Path(self._path).read_text(encoding="utf-8"))["traceEvents"]
            self.table = table_of(events)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._profiler.stop()


def table_of(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of each phase in compute, link, disk, optimizer and idle, from a Chrome trace's events.

    Each instant counts once, for the first of CLAIMS that has it.
    """
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    phases = [event for event in spans if event["name"].startswith(PHASE) and event.get("cat") == "user_annotation"]
    on_gpu = any(event.get("cat") == "kernel" for event in spans)
    table: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(event["name"] for event in phases):
        row = dict.fromkeys(("compute", "link", "disk", "optimizer", "idle"), 0.0)
        for phase in phases:
            if phase["name"] == name:
                inside = [event for event in spans if _within(event, phase)]
                claims = _on_gpu(inside) if on_gpu else _on_thread(inside, phase["tid"])
                taken: list[Span] = []
                for column in CLAIMS:
                    claimed = union(claims[column])
                    fresh = total(union(taken + claimed)) - total(taken)
                    taken = union(taken + claimed)
                    row[column] += fresh / 1e6
                row["idle"] += max(phase["dur"] - total(taken), 0.0) / 1e6
        table[name.removeprefix(PHASE)] = row
    return table


def _on_thread(spans: list[dict[str, Any]], thread: Any) -> dict[str, list[Span]]:
    claims: dict[str, list[Span]] = {column: [] for column in CLAIMS}
    for event in spans:
        if event["tid"] != thread:
            continue
        if event.get("cat") == "cpu_op":
            claims["compute"].append(_span(event))
        elif event.get("cat") == "user_annotation" and (column := _column(event["name"])):
            claims[column].append(_span(event))
    return claims


def _on_gpu(spans: list[dict[str, Any]]) -> dict[str, list[Span]]:
    claims: dict[str, list[Span]] = {column: [] for column in CLAIMS}
    for event in spans:
        if event.get("cat") in ("kernel", "gpu_memset"):
            claims["compute"].append(_span(event))
        elif event.get("cat") == "gpu_memcpy":
            claims["compute" if "DtoD" in event["name"] else "link"].append(_span(event))
        elif event.get("cat") == "gpu_user_annotation" and _column(event["name"]) == "optimizer":
            claims["optimizer"].append(_span(event))
        elif event.get("cat") == "user_annotation" and _column(event["name"]) == "disk":
            claims["disk"].append(_span(event))
    return claims


def _column(name: str) -> str | None:
    label = name.split(".")[0]
    return label if label in CLAIMS else None


def _span(event: dict[str, Any]) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _within(event: dict[str, Any], phase: dict[str, Any]) -> bool:
    """Whether all of it is: device work is waited for at a phase's end, so an event beyond it is another phase's."""
    return phase["ts"] <= event["ts"] and event["ts"] + event["dur"] <= phase["ts"] + phase["dur"]


def union(spans: list[Span]) -> list[Span]:
    """The same instants without overlap, in order."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def total(spans: list[Span]) -> float:
    """Microseconds of spans without overlap."""
    return sum(end - begin for begin, end in spans)
