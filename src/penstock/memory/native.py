"""The engine's one piece of C: compiled by this machine's own compiler when first needed, and kept in the user's cache.

It saves time and changes nothing: without a compiler torch operations do the same work, to the same bits, at 0.4 of the
speed (benchmarks/results/engine_adamw.json). `penstock doctor` says which of the two it will be.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("adam.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
ALIGN = 64
"""Elements: threads begin on a cache line, and torch's kernel rounds the few beyond its last vector another way."""


class Rule(ctypes.Structure):
    """What adam.c calls Rule, in its order."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in ("decay", "lerp", "beta2", "square", "step_size", "root", "eps", "divisor")
    ]  # fmt: skip


def adamw(tensors: list[Tensor], rule: Rule) -> int:
    """Updates in place and returns how many elements are done: 0 where there is no compiler, or no CPU tensors.

    `tensors` are [n] each, in the order of adam.c's arguments: five for a split master, four for fp32.
    """
    whole = tensors[0].numel() // ALIGN * ALIGN
    if not whole or any(one.device.type != "cpu" for one in tensors) or torch._guards.detect_fake_mode() is not None:
        return 0
    compiled = library()
    if isinstance(compiled, str):
        return 0
    assert all(one.is_contiguous() and one.numel() >= whole for one in tensors)
    update = compiled.adamw_bf16 if len(tensors) == 5 else compiled.adamw_fp32

    def run(start: int) -> None:
        places = (ctypes.c_void_p(one.data_ptr() + start * one.element_size()) for one in tensors)
        update(*places, ctypes.c_int64(min(share, whole - start)), ctypes.byref(rule))  # without the GIL

    threads = torch.get_num_threads()
    share = -(-whole // (threads * ALIGN)) * ALIGN
    if threads == 1:
        run(0)
    else:
        list(_pool(threads).map(run, range(0, whole, share)))
    return whole


@functools.cache
def library() -> ctypes.CDLL | str:
    """adam.c, compiled for this machine, or why it is not."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "no C compiler (cc)"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"
    stamp = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *FLAGS, _cpu())).encode()).hexdigest()[:16]
    compiled = cache / f"adam-{stamp}.so"
    try:
        if not compiled.exists():
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=cache) as beside:
                fresh = Path(beside) / compiled.name
                command = [compiler, *FLAGS, str(SOURCE), "-o", str(fresh), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
                fresh.replace(compiled)  # whole or not at all: ranks may compile side by side
        return ctypes.CDLL(str(compiled))
    except subprocess.CalledProcessError as error:
        return f"{compiler}: {(error.stderr or '').strip().splitlines()[-1:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _cpu() -> str:
    """What a compiler takes `native` to mean: a cache may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="adamw")
