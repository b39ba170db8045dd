"""Copies between host memory and a GPU, beside its work: weights come on one stream, gradients leave on another.

A copy begins when all work that was queued on the device before it is done. Later work waits for the copy, on the
device; Python never waits. On a CPU a copy runs when it is needed, for the same cores do it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import record_function

from penstock.memory.tiers import Ram


def copy_ahead(source: Tensor, out: Tensor, tier: Ram) -> Callable[[], None]:
    """Starts copying a tier's host memory to the device; calling the result makes the device wait for it."""
    if out.device.type == "cpu":
        return lambda: _fetch(source, out, tier)  # when it is needed
    side = _side_stream(out.device, "in")
    with side:
        _fetch(source, out, tier)
        landed = side.record_event()
    return lambda: torch.accelerator.current_stream(out.device).wait_event(landed)


class Offload:
    """A copy from the device on its way to host memory."""

    def __init__(self, source: Tensor, out: Tensor, tier: Ram) -> None:
        """Starts it. `source` must keep its values until `wait`, and `out` is not to be read before `arrive`."""
        self._device = source.device
        tier.bytes_written += source.nbytes
        side = _side_stream(source.device, "out")
        with side, record_function("link.settle"):
            out.copy_(source, non_blocking=True)
            self._gone = side.record_event()

    def wait(self) -> None:
        """Makes the device wait before its next work."""
        torch.accelerator.current_stream(self._device).wait_event(self._gone)

    def arrive(self) -> None:
        """Returns when the bytes are in host memory."""
        self._gone.synchronize()


def _fetch(source: Tensor, out: Tensor, tier: Ram) -> None:
    tier.bytes_read += source.nbytes
    with record_function("link.fetch"):
        out.copy_(source, non_blocking=True)


_SIDE: dict[tuple[torch.device, str], torch.Stream] = {}


def _side_stream(device: torch.device, direction: str) -> torch.Stream:
    """The stream of that direction, after all work queued on the device so far."""
    if (device, direction) not in _SIDE:
        _SIDE[device, direction] = torch.Stream(device)
    side = _SIDE[device, direction]
    side.wait_stream(torch.accelerator.current_stream(device))
    return side
