"""`penstock bench micro`: the ceilings of this machine, each the best of a few runs.

They are saved in the user's cache (planner/machine.py), where `penstock plan --rates measured` reads them.
"""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from penstock.commands.bench.clock import settle
from penstock.commands.bench.config import MicroConfig
from penstock.distributed.world import World
from penstock.kernels import cpu_ops
from penstock.memory.adamw import AdamW, states_of
from penstock.memory.tiers import Disk, Ram
from penstock.models import linear
from penstock.planner import machine
from penstock.units import show_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UPDATED = 28
"""Bytes per weight that an update moves at least: bf16 weight, remainder and gradient, two fp32 moments; all but the
gradient written back; and 2 for the gradient's own arrival."""


def micro(config: MicroConfig) -> dict[str, Any]:
    """Measures, saves and prints. Raises UserError for a device or a directory that cannot be used."""
    device = World.join(config.device).device
    ceilings = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "device": device.type, "threads": torch.get_num_threads(),
        **{f"gemm_{name}": gemm_peak(device, name, config.repeats, quick=config.quick) for name in DTYPES},
        **copies(device, config.repeats, config.quick),
        **disk_rates(config.disk or str(machine.cache_directory()), config.repeats, config.quick),
        "adamw": adamw_rate(device, config.repeats, config.quick),
        **decode_rates(device, config.repeats, config.quick),
    }  # fmt: skip
    path = machine.save(device.type, ceilings)
    print(json.dumps(ceilings, indent=1) if config.json else as_text(ceilings, path))
    return ceilings


def best(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    fastest = float("inf")
    for turn in range(repeats + 1):
        settle(device)
        began = time.perf_counter()
        call()
        settle(device)
        if turn:
            fastest = min(fastest, time.perf_counter() - began)
    return fastest


def gemm_peak(device: torch.device, dtype: str, repeats: int = 3, *, quick: bool = True) -> float:
    """Operations per second of the best square product that weights of this dtype can be multiplied by.

    Where bf16 has no instructions the engine multiplies it in fp32, and then that is its ceiling.
    """
    sides: tuple[int, ...]
    if device.type == "cpu":
        kind = torch.float32 if linear.slow_in_bf16("cpu") else DTYPES[dtype]
        sides = (512, 1024) if quick else (512, 1024, 2048)
    else:
        kind, sides = DTYPES[dtype], (4096,) if quick else (2048, 4096, 8192)
    rates = []
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        rates.append(2.0 * side**3 / best(lambda a=a, b=b: a @ b, repeats, device))  # type: ignore[misc]
    return max(rates)


def copies(device: torch.device, repeats: int, quick: bool) -> dict[str, float]:
    """Bytes per second: `copy` reads and writes device memory, `link` comes from the host; on a CPU a copy too."""
    nbytes = (16 if quick else 256) << 20
    host = Ram("host", torch.device("cpu"), pins=device.type == "cuda")
    source = host.home(nbytes, torch.uint8, "a source", travels=True).tensor.fill_(1)
    target, origin = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    return {
        "copy": 2 * nbytes / best(lambda: target.copy_(origin), repeats, device),
        "link": nbytes / best(lambda: target.copy_(source, non_blocking=True), repeats, device),
    }


def disk_rates(directory: str, repeats: int, quick: bool) -> dict[str, Any]:
    """Bytes per second of the disk tier, past the page cache where the file system allows it."""
    tier = Disk(directory)
    try:
        numel = (4 if quick else 128) << 20
        home = tier.home(numel, torch.float32, "a test")
        memory = Ram("host", torch.device("cpu")).home(numel, torch.float32, "a test").tensor.fill_(1)
        cpu = torch.device("cpu")
        written = 4 * numel / best(lambda: home.write(memory), repeats, cpu)
        return {
            "disk_write": written, "disk_read": 4 * numel / best(lambda: home.read(memory), repeats, cpu),
            "disk_direct": tier.direct,
        }  # fmt: skip
    finally:
        tier.close()


def adamw_rate(device: torch.device, repeats: int, quick: bool) -> float:
    """Bytes of weights, gradients and states per second that an update of split masters moves, in host memory."""
    numel = 1 << (20 if quick else 26)
    weights, grads = (torch.randn(numel).bfloat16() for _ in range(2))
    states = {name: torch.zeros(numel, dtype=dtype) for name, (dtype, _) in states_of(torch.bfloat16).items()}
    step = lambda: AdamW().update(weights, states, grads, lr=1e-6, scale=0.5, step=1)  # noqa: E731
    return UPDATED * numel / best(step, repeats, torch.device("cpu"))


def decode_rates(device: torch.device, repeats: int, quick: bool) -> dict[str, float]:
    """Bytes of weights per second that a product with one token reads, far more weights than a cache holds."""
    outputs, inputs = (512, 768) if quick else (50257, 768)
    ceilings = {}
    for name, kind in DTYPES.items():
        weight, x = (torch.randn(n, inputs, device=device).to(kind) for n in (outputs, 1))

        def once(x: torch.Tensor = x, weight: torch.Tensor = weight) -> None:
            with cpu_ops.one_token():
                linear.linear(x, weight)

        with torch.no_grad():
            ceilings[f"decode_{name}"] = weight.nbytes / best(once, repeats, device)
    return ceilings


def as_text(ceilings: dict[str, Any], path: Path) -> str:
    direct = "past the page cache" if ceilings["disk_direct"] else "through the page cache: the file system wants it so"
    rows = [
        ("product of matrices, fp32", f"{ceilings['gemm_fp32'] / 1e9:.0f} GFLOP/s"),
        ("product of matrices, bf16 weights", f"{ceilings['gemm_bf16'] / 1e9:.0f} GFLOP/s"),
        ("copy in device memory, read + write", f"{show_bytes(ceilings['copy'])}/s"),
        ("host to device", f"{show_bytes(ceilings['link'])}/s"),
        (f"disk, read ({direct})", f"{show_bytes(ceilings['disk_read'])}/s"),
        ("disk, write", f"{show_bytes(ceilings['disk_write'])}/s"),
        (f"optimizer in host memory, {UPDATED} bytes per weight", f"{show_bytes(ceilings['adamw'])}/s"),
        ("weights read by one-token products, fp32", f"{show_bytes(ceilings['decode_fp32'])}/s"),
        ("weights read by one-token products, bf16", f"{show_bytes(ceilings['decode_bf16'])}/s"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {rate}" for name, rate in rows]
    return "\n".join(
        [f"{ceilings['device']}, {ceilings['threads']} threads; the best of each:", *lines, f"kept in {path}; "
         "penstock plan --rates measured reads it"]
    )  # fmt: skip
