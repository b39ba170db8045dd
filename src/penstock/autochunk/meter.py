"""What tensors cost while something runs: bytes alive and their peak, on real memory and on fake.

It watches every operation and counts each new storage until it dies, so it sees what `max_memory_allocated` sees on a
GPU, and gives the same on a CPU and on fake tensors. Slabs that existed before (homes, slots) are not counted.
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
    """`with Meter() as meter: ...`, then `meter.peak`: the most bytes that tensors made inside were using at once.

    Where one processor plays both device and host, `on("host")` says whose tensors come next; `peaks` tells them apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.where = "device"
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
                if isinstance(x, Tensor) and x.dtype != torch.uint8:  # bytes are slabs, and the tiers count those
                    storage = x.untyped_storage()
                    if storage not in self._known:
                        self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        nbytes = storage.nbytes()
        self._known[storage] = nbytes
        self.used[self.where] += nbytes
        self.peaks[self.where] = max(self.peaks[self.where], self.used[self.where])
        weakref.finalize(storage, self._died, self.where, nbytes)

    def _died(self, where: str, nbytes: int) -> None:
        self.used[where] -= nbytes

    @property
    def peak(self) -> int:
        """On the device."""
        return self.peaks["device"]

    @contextlib.contextmanager
    def on(self, where: str) -> Iterator[None]:
        """Tensors made inside count there."""
        before, self.where = self.where, where
        try:
            yield
        finally:
            self.where = before


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether what it returns lies in the memory of what it was given; collectives return what they filled."""
    return func.namespace == "c10d" or any(one.alias_info is not None for one in func._schema.returns)
