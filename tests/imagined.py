"""A device that does not exist, for the code that a CPU alone never tests: what is put on it is computed by the CPU,
with real numbers, and nothing that is on it meets what is not.

    python -m tests.imagined cuda 4 JOBS.json

runs command lines on so many ranks, whose only accelerator is that device. Refused are: operations on tensors of both
devices (but numbers, and indices, as on a GPU), collectives on the CPU's tensors, and what Apple's GPU lacks on `mps`.

[Note: a CPU tensor that says otherwise] An `Imagined` tensor is a wrapper around one of the CPU. For torch's C++ it is
on the CPU too, because autograd wants a device's driver; Python code, and each operation, sees another device.
"""

import functools
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
CPU = torch.device("cpu")
CROSSING = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
"""Operations that read one device and write to another."""
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Their indices may be the CPU's."""
STRICT = {aten.cat.default, aten.stack.default, aten.mm.default, aten.addmm.default, aten.bmm.default}
"""Operations in which not even a number may be the CPU's."""


class MixedDevices(AssertionError):
    """What a real device refuses."""


class Imagined(Tensor):
    """A tensor on the imagined device. See [Note: a CPU tensor that says otherwise]."""

    where = CPU
    """The imagined device."""
    wide = True
    """Whether it has fp64."""
    behind: Tensor

    @staticmethod
    def __new__(cls, behind: Tensor) -> "Imagined":
        if not cls.wide and behind.dtype in (torch.float64, torch.complex64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to {behind.dtype} dtype")
        tensor = Tensor._make_wrapper_subclass(
            cls, behind.shape, behind.stride(), behind.storage_offset(), dtype=behind.dtype, device=CPU
        )
        tensor.behind = behind
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Imagined({self.behind})"

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MOVES:
            return _to(*args, **kwargs) if func is Tensor.to else _to(args[0], CPU)
        if func in (Tensor.numpy, Tensor.__array__, Tensor.data_ptr):
            raise TypeError(f"{func.__name__} of a tensor that is not on the CPU")
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        if func is Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].behind = args[1].behind
        if func is Tensor.grad.__set__ and args[1] is not None and type(args[0]) is not type(args[1]):  # type: ignore[attr-defined]
            raise MixedDevices("a gradient on another device than its tensor")
        with torch._C.DisableTorchFunctionSubclass():  # results are no Imagined unless `_run` says so
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


MOVES = (Tensor.to, Tensor.cpu)


def _to(x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """x.to(...), which C++ would not send to another device."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    crosses = device is not None and torch.device(device).type != x.device.type
    if not crosses and not copy and dtype in (None, x.dtype):
        return x
    return aten._to_copy.default(x, dtype=dtype, device=device if crosses else x.device, non_blocking=non_blocking)


class _Factories(TorchDispatchMode):
    """Sees what makes tensors from none."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on what is behind its tensors, and its results on their device."""
    tensors = list(_tensors((args, tuple(kwargs.values()))))
    imagined = any(isinstance(x, Imagined) for x in tensors)
    # For new_zeros and the like autograd gives the device that C++ sees.
    given = None if imagined and func is not aten._to_copy.default else kwargs.get("device")
    if not imagined and func is aten.zeros.default and sys._getframe(2).f_code.co_filename.endswith(BACKWARD):
        given = Imagined.where  # autograd's own, for a gradient that is not there
    _check(func, args, tensors)
    if given is None and not imagined:
        return func(*args, **kwargs)
    lands = imagined if given is None else torch.device(given).type == Imagined.where.type
    real = {name: _behind(value) for name, value in kwargs.items() if name != "pin_memory"}
    if lands and "device" in real:
        real["device"] = CPU
    if func is aten._fused_adamw_.default and Imagined.where.type == "mps":
        real.pop("grad_scale", None)  # its kernel does not read it (FusedAdamWKernelImpl.mm), and does not say so
    results = func(*_behind(args), **real)
    if func in CROSSING and func is not aten._to_copy.default:
        return args[0]
    if not lands:
        return results
    wrapped = _wrapped(results)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if imagined and _aliases(func) else wrapped


@functools.cache
def _aliases(func: Any) -> bool:
    """Whether a result is, or is a view of, an argument."""
    return any(result.alias_info is not None for result in func._schema.returns)


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raises MixedDevices for what a real device refuses."""
    if func.namespace == "c10d":
        if not _packing and not all(isinstance(x, Imagined) for x in tensors):
            raise MixedDevices(f"{func}: a collective on the CPU's tensors")
        return
    if func in CROSSING or not any(isinstance(x, Imagined) for x in tensors):
        return
    if func in INDEXING:
        if not isinstance(args[0], Imagined):
            raise MixedDevices(f"{func}: the device's indices into the CPU's tensor")
        tensors = list(_tensors(args[2:]))
    strict = func in STRICT
    if others := [x for x in tensors if not isinstance(x, Imagined) and (x.dim() > 0 or strict)]:
        raise MixedDevices(f"{func}: expected all tensors on one device, and {[*others[0].shape]} is on the CPU")
    if LACKING and func.name().removeprefix("aten::") in LACKING:
        raise NotImplementedError(f"{func}: not implemented for {Imagined.where}")


BACKWARD = os.path.join("autograd", "graph.py")
"""The file of torch that begins a backward: it calls us where no other Python code does."""
LACKING: set[str] = set()
"""Operations that the device has not, by name."""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _behind(value: Any) -> Any:
    if isinstance(value, Imagined):
        return value.behind
    return type(value)(map(_behind, value)) if type(value) in (list, tuple) else value


def _wrapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if isinstance(value, Imagined) else Imagined(value)
    return type(value)(map(_wrapped, value)) if type(value) in (list, tuple) else value


# --- the rest of a machine with such a device -------------------------------------------------------------------------


class _Stream:
    """A stream on which everything has happened already; also its events."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None: ...
    def __getattr__(self, name: str) -> Callable[..., "_Stream"]:
        return lambda *_, **__: _Stream()


_packing: list[bool] = []
"""Not empty while Python objects are gathered: NCCL moves those through the device by itself."""


def _packs(function: Callable) -> Callable:
    @functools.wraps(function)
    def packing(*args: Any, **kwargs: Any) -> Any:
        _packing.append(True)
        try:
            return function(*args, **kwargs)
        finally:
            _packing.pop()

    return packing


PCI = ("pci_domain_id", "pci_bus_id", "pci_device_id")


@contextmanager
def imagining(kind: str) -> Iterator[torch.device]:
    """Inside, this process has an accelerator of that kind, and torch's functions for it do nothing."""
    from penstock.distributed import world
    from penstock.rollout.cuda_graphs import Steps
    from penstock.run import report

    Imagined.where, Imagined.wide, begin = torch.device(kind, 0), kind != "mps", world._begin
    accelerator = types.SimpleNamespace(type=kind)
    driver = types.SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    patches: list[tuple[Any, str, Any]] = [
        (torch.accelerator, "current_accelerator", lambda **_: accelerator),
        (torch.accelerator, "current_stream", _Stream), (torch, "Stream", _Stream), (torch, "Event", _Stream),
        (torch.cuda, "_lazy_init", lambda: None), (torch.cuda, "set_device", lambda _: None),
        (torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(**dict.fromkeys(PCI, 0))),
        (torch.cuda, "device_count", lambda: 8), (torch.cuda, "cudart", lambda: driver),
        (torch.cuda, "mem_get_info", lambda *_: (80 * 10**9, 80 * 10**9)),
        (torch.cuda, "max_memory_allocated", lambda *_: 0), (torch.cuda, "is_bf16_supported", lambda **_: True),
        (Steps, "_record", lambda self, rows, seen: functools.partial(self._step, rows, seen)),
        (report, "run_report", lambda path, _: path),
        (dist, "all_gather_object", _packs(dist.all_gather_object)),
        (dist, "broadcast_object_list", _packs(dist.broadcast_object_list)),
        (world, "_begin", lambda _, rank, size: begin("gloo", rank, size)),
    ]  # fmt: skip
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for patch in patches:
        setattr(*patch)
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) then goes through the mode
    try:
        with _Factories():
            yield Imagined.where
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        for patch in before:
            setattr(*patch)


def main(kind: str, size: int, jobs: list[list[str]]) -> int:
    """Runs each command line on that many ranks, forked from this process. Returns how many ranks failed."""
    import penstock.algorithms.ppo  # noqa: F401  (once for all ranks)
    from tests.conftest import rank_environments

    torch.set_num_threads(1)
    environments = [rank_environments(size) for _ in jobs]
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            os._exit(_rank(kind, [group[rank] for group in environments], jobs))
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def _rank(kind: str, environments: list[dict[str, str]], jobs: list[list[str]]) -> int:
    from tests.conftest import cli

    failed = False
    for environment, arguments in zip(environments, jobs, strict=True):
        os.environ.update(environment)
        with imagining(kind):
            failed = cli(*arguments) != 0
        if failed:  # it ended the other ranks: nobody would join the next run
            break
    sys.stderr.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())))
