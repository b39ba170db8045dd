"""Copies between host memory and a GPU, beside its work: one stream for what comes, one for what leaves.

A copy begins when all that has been asked of the device so far is done, and whoever needs it later waits for it on the
device alone: Python never does. On a CPU nothing goes beside anything, for the same cores would do it.
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
    side = _beside(out.device, "in")
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
        side = _beside(source.device, "out")
        with side, record_function("link.settle"):
            out.copy_(source, non_blocking=True)
            self._gone = side.record_event()

    def wait(self) -> None:
        """Makes the device wait before what it is asked next."""
        torch.accelerator.current_stream(self._device).wait_event(self._gone)

    def arrive(self) -> None:
        """Returns when the bytes are in host memory."""
        self._gone.synchronize()


def _fetch(source: Tensor, out: Tensor, tier: Ram) -> None:
    tier.bytes_read += source.nbytes
    with record_function("link.fetch"):
        out.copy_(source, non_blocking=True)


_SIDE: dict[tuple[torch.device, str], torch.Stream] = {}


def _beside(device: torch.device, way: str) -> torch.Stream:
    """The stream of that way, behind all that the device has been asked so far."""
    if (device, way) not in _SIDE:
        _SIDE[device, way] = torch.Stream(device)
    side = _SIDE[device, way]
    side.wait_stream(torch.accelerator.current_stream(device))
    return side
