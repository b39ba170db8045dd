"""Everything that only a GPU can tell, in one call under nine minutes: exactness first, then memory, then time.

    make gpu-check        or: python -m benchmarks gpu [--only exact small ...] [--seconds 500]

A list of the other benchmarks with `--device cuda`, each in a process of its own, forked from one that has imported
everything. A result is added to benchmarks/results/gpu.json ($OUT/gpu.json where OUT is set) as soon as its check ends,
so that running out of time loses nothing. `--device cpu --tiny` runs the same code on small shapes without a GPU: that
tests the checks, and its figures mean nothing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import engine, exact, gpu_tables, rollout, timing
from benchmarks.apart import THREADS, apart
from benchmarks.facts import flags, write
from benchmarks.gpu_tables import Target
from penstock.commands.bench.capacity import capacity as search
from penstock.commands.bench.config import CapacityConfig
from penstock.memory.tiers import Ram

SETTINGS = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Of the process that the checks are forked from. The last is Hopper's own default; torch requires it to be set where
results must not vary."""


def rates(target: Target) -> dict[str, Any]:
    """What the machine can do: the link both ways, pinned and not, a device copy, a bf16 product; bytes and FLOP/s."""
    nbytes, width = (1 << 20, 64) if target.tiny else (1 << 30, 8192)
    on_device = torch.empty(nbytes, dtype=torch.uint8, device=target.device)
    copy = torch.empty_like(on_device)
    unpinned = torch.zeros(nbytes, dtype=torch.uint8)
    pinned = unpinned.clone().pin_memory() if target.gpu else unpinned.clone()
    a = torch.randn(width, width, device=target.device).bfloat16()
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "to_device_pinned": (nbytes, lambda: on_device.copy_(pinned, non_blocking=True)),
        "to_host_pinned": (nbytes, lambda: pinned.copy_(on_device, non_blocking=True)),
        "to_device_unpinned": (nbytes, lambda: on_device.copy_(unpinned)),
        "device_copy": (2 * nbytes, lambda: copy.copy_(on_device)),
        "bf16_flops": (2 * width**3, lambda: a @ a),
    }
    seconds = timing.in_turns({name: call for name, (_, call) in calls.items()}, 5, target.device)
    workspace = _blas_workspace() if target.gpu else 0
    began = time.perf_counter()
    Ram("host", torch.device("cpu"), pins=target.gpu).home(4 * nbytes, torch.uint8, "a test", travels=True)
    return {
        **{name: calls[name][0] / min(times) for name, times in seconds.items()},
        "pinned": 4 * nbytes / (time.perf_counter() - began),
        "blas_workspace": workspace,
    }


def _blas_workspace() -> int:
    """Bytes of the allocator that the libraries keep for products, once a product and one with a bias have been made
    on the main stream; a fresh process's first product takes them."""
    a, bias = torch.randn(64, 64, device="cuda").bfloat16(), torch.zeros(64, device="cuda").bfloat16()
    torch.addmm(bias, a, a)
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    torch.addmm(bias, a, a) @ a
    return torch.cuda.memory_allocated() - before


def small(target: Target) -> dict[str, Any]:
    """`engine small`: 124M PPO, batch 1, 400 + 112 tokens, in 180 MB of device tier."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # a small budget sets its own
    shape = {"layers": 2, "prompt": 24, "new": 8} if target.tiny else {}
    return engine.small(device=target.device, **shape)


def tax(target: Target, **settings: Any) -> dict[str, Any]:
    """`engine tax`: an SFT step streamed from host memory against resident, in bf16."""
    if target.tiny:
        settings = {"layers": 1, "length": 16, "micro": 16, "repeats": 1}
    return engine.tax(device=target.device, dtype="bf16", **settings)


def capacity(target: Target) -> dict[str, Any]:
    """`penstock bench capacity` under a cap of 16 GB, blocks of 2b's width."""
    return search(
        CapacityConfig(
            device_memory="3GB" if target.tiny else "16GB", model="s" if target.tiny else "2b", strategy="gemini_auto",
            experience_batch_size=2, prompt_length=64, max_length=68 if target.tiny else 128, dtype="bf16",
            disk=f"{target.disk}:{'1GB' if target.tiny else '45GB'}", layers=4 if target.tiny else 400,
        )
    )  # fmt: skip


CHECKS: dict[str, Callable[[Target], dict[str, Any]]] = {
    "exact": lambda target: exact.strategies(target.device, target.disk, steps=2 if target.tiny else 10),
    "features": lambda target: exact.features(target.device),
    "rates": rates,
    "small": small,
    "table": gpu_tables.table,
    "giants": gpu_tables.giants,
    "autochunk": gpu_tables.autochunk,
    "tax_xl": lambda target: tax(target, size="xl", layers=48, length=1024, micro=4, repeats=3, device_memory="12GB"),
    "rollout": lambda target: rollout.on_gpu(target.device, target.tiny),
    "capacity": capacity,
    # 72 GB of weights and states on either side
    "tax_6b": lambda target: tax(target, size="6b", layers=30, length=1024, micro=2, repeats=2, device_memory="24GB"),
}


def main(arguments: list[str]) -> int:
    """Runs the checks in order; returns 1 when one of them failed."""
    parser = flags(__doc__)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--disk", default="/tmp/penstock-gpu-check")
    parser.add_argument("--seconds", type=float, default=500, help="for all checks together")
    parser.add_argument("--rows", nargs="*", help="of the checks that are tables: these alone")
    options = parser.parse_args(arguments)
    if THREADS not in os.environ:  # a process whose OpenMP has begun to work must not fork a process that works too
        command = [sys.executable, "-m", "benchmarks", "gpu", *arguments]
        threads = "1" if options.tiny else str(len(os.sched_getaffinity(0)))
        return subprocess.run(command, env={**os.environ, **SETTINGS, THREADS: threads}).returncode
    if options.device == "cuda" and not apart(lambda: {"available": torch.cuda.is_available()}, 60)["available"]:
        print("this machine has no CUDA device; --device cpu --tiny tests the checks without one")
        return 2
    end = time.monotonic() + options.seconds
    target = Target(options.device, options.tiny, options.disk, end, tuple(options.rows or ()))
    results: dict[str, Any] = {}
    for name in options.only:
        if target.left() < 5:
            print(f"{name}: no time left")
            continue
        results[name] = apart(lambda name=name: CHECKS[name](target), target.left())
        print(name, json.dumps(results[name], indent=1), flush=True)
        apart(lambda: {"path": str(write("gpu", results, "transformers"))}, 60)  # it asks the driver for the GPU's name
    return int(any("error" in result for result in results.values()))
