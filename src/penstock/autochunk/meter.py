"""Counts the bytes of tensors while code runs: bytes alive and their peak, for real and for fake tensors.

It watches every operation and counts each new storage until it dies, as `max_memory_allocated` does on a GPU, and gives
the same number on a CPU and on fake tensors. It does not count slabs that existed before (homes, slots).
"""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Meter(TorchDispatchMode):
    """`with Meter() as meter: ...`, then `meter.peak`: the most bytes that tensors made inside used at once.

    If a CPU is both device and host, `with meter.on("host"):` counts the tensors made inside separately, see `peaks`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = "device"
        self.used: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under a meter, and the guard costs as much as the count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_view(func):
            for x in result if isinstance(result, tuple | list) else (result,):
                if isinstance(x, Tensor) and x.dtype != torch.uint8:  # slabs are uint8, and the tiers count them
                    storage = x.untyped_storage()
                    if storage not in self._known:
                        self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        nbytes = storage.nbytes()
        self._known[storage] = nbytes
        self.used[self.place] += nbytes
        self.peaks[self.place] = max(self.peaks[self.place], self.used[self.place])
        weakref.finalize(storage, self._died, self.place, nbytes)

    def _died(self, place: str, nbytes: int) -> None:
        self.used[place] -= nbytes

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return self.peaks["device"]

    @contextlib.contextmanager
    def on(self, place: str) -> Iterator[None]:
        """Counts tensors made inside under this name."""
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether the result shares memory with the arguments; collectives return the tensors that they filled."""
    return func.namespace == "c10d" or any(result.alias_info is not None for result in func._schema.returns)
