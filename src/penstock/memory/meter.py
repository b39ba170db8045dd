"""What tensors cost while something runs: bytes alive and their peak, on real memory and on fake.

It watches every operation and counts each new storage until it dies, so it sees what `max_memory_allocated` sees on a
GPU, and gives the same on a CPU and on fake tensors. Slabs that existed before (homes, slots) are not counted.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """`with Meter() as meter: ...`, then `meter.peak`: the most bytes that tensors made inside were using at once."""

    def __init__(self) -> None:
        super().__init__()
        self.used = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage not in self._known and _storage(x) not in before:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        nbytes = storage.nbytes()
        self._known[storage] = nbytes
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        weakref.finalize(storage, self._died, nbytes)

    def _died(self, nbytes: int) -> None:
        self.used -= nbytes


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
