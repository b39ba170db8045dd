"""The memory engine against what it could be at best, each in one run.

python -m benchmarks engine adamw     the split-master update of 100M weights against a plain copy's bandwidth
python -m benchmarks engine tax       an SFT step under gemini_cpu against the same step resident, 8192 tokens per visit
python -m benchmarks engine small     PPO of four GPT2-s, batch 1, 400 + 112 tokens: the most device memory in use
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from benchmarks import timing
from benchmarks.facts import run_measures
from penstock.algorithms import functional as fn
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.autochunk.meter import Meter
from penstock.commands.bench.work import Four, fill_quickly
from penstock.kernels import compile as compiler
from penstock.memory.adamw import SOURCE, AdamW, states_of
from penstock.memory.strategy import Strategy
from penstock.models import presets
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor

ROWS = 16
"""Of each step of `tax`."""


def adamw(repeats: int = 9, numel: int = 100_000_000) -> dict[str, Any]:
    """28 bytes per parameter move at least: weight, remainder, gradient and two moments in, all but the gradient out,
    and 2 for the gradient's own arrival. The copy reads and writes 8."""
    weights, grads = (torch.randn(numel).bfloat16() for _ in range(2))
    states = {name: torch.zeros(numel, dtype=dtype) for name, (dtype, _) in states_of(torch.bfloat16).items()}
    x, y = torch.zeros(numel), torch.ones(numel)

    def update() -> None:
        AdamW().update(weights, states, grads, lr=1e-6, scale=0.5, step=1)

    def without_compiler() -> None:
        with mock.patch.object(compiler, "compiled", return_value="not this time"):
            update()

    calls = {"update": update, "in_torch_operations": without_compiler, "copy": lambda: x.copy_(y)}
    seconds = timing.in_turns(calls, repeats)
    rates = {**timing.rates(seconds, 28 * numel), "copy": timing.rates(seconds, 8 * numel)["copy"]}
    return {
        "compiled": not isinstance(compiler.compiled(SOURCE), str),
        "bytes_per_second": rates,
        "ratio": rates["update"] / rates["copy"],
        "ratio_in_torch_operations": rates["in_torch_operations"] / rates["copy"],
        "seconds": seconds,
    }


def tax(
    size: str = "s", layers: int = 3, length: int = 512, micro: int = 4, repeats: int = 7,
    *, device: str = "cpu", dtype: str = "fp32", device_memory: str = "600MB",
) -> dict[str, Any]:  # fmt: skip
    """SFT steps of a GPT-2 with `layers` of its blocks. `resident` recomputes too, as every streamed run does; `kept`
    is resident and keeps what is inside a micro-batch's blocks. Half of 600 MB is the token table and its gradient.
    """
    tokens = torch.randint(50257, (ROWS, length), device=device)
    shape = dataclasses.replace(presets.named(size), num_layers=layers)

    def step_under(name: str, recompute: bool) -> Callable[[], object]:
        budget = device_memory if name == "gemini_cpu" else None
        strategy = Strategy.named(name, dtype=dtype, device=device, device_memory=budget, recompute=recompute)
        with strategy.init():
            actor = Actor(Decoder(shape))
        actor.fill = fill_quickly  # type: ignore[method-assign]
        stream = strategy.prepare(actor)
        trained = torch.arange(length, device=device) >= max(1, length - 64)
        batches = [Rows(part, trained.expand_as(part)) for part in tokens.split(micro)]
        count = sum(int(batch.trained.sum()) for batch in batches)

        def loss_of(hidden: torch.Tensor, batch: Rows) -> tuple:
            return fn.sft_loss(response_logprobs(actor, hidden, batch), count), {}

        return lambda: strategy.step(stream, batches, loss_of, lr=1e-5)

    calls = {
        "gemini_cpu": step_under("gemini_cpu", True),
        "resident": step_under("gemini", True),
        "kept": step_under("gemini", False),
    }
    seconds = timing.in_turns(calls, repeats, device)
    medians = timing.medians(seconds)
    return {
        "tokens_per_visit": ROWS * length,
        "layers": layers,
        "seconds": medians,
        "ratio_to_resident": timing.ratio(seconds, "gemini_cpu", "resident"),
        "ratios_to_resident": timing.ratios(seconds, "gemini_cpu", "resident"),
        "ratio_to_kept": medians["gemini_cpu"] / medians["kept"],
    }


def small(
    size: str = "s", layers: int = 12, prompt: int = 400, new: int = 112, device: str = "cpu",
    device_memory: str = "180MB",
) -> dict[str, Any]:  # fmt: skip
    """Two iterations of PPO with batch 1: the device tier, and the most bytes of tensors outside it in each phase. A
    GPU's allocator counts both; its 124M PPO needed 1.62 GB in the reference system."""
    on_gpu = device.startswith("cuda")
    strategy = Strategy.named("gemini_cpu", dtype="bf16", device=device, device_memory=device_memory)
    four = Four(strategy, dataclasses.replace(presets.named(size), num_layers=layers))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    tensors: dict[str, int] = {}
    seconds: dict[str, float] = {}
    with contextlib.nullcontext() if on_gpu else Meter() as meter:
        for _ in range(2):
            began = time.perf_counter()
            for phase in four.iteration(torch.randint(50257, (1, prompt)).tolist(), new):
                seconds[phase] = time.perf_counter() - began
                began = time.perf_counter()
                if meter is not None:
                    tensors[phase] = max(meter.peak, tensors.get(phase, 0))
                    meter.peaks["device"] = meter.used["device"]
    tier = strategy.tiers["device"].peak
    return {
        "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else tier + max(tensors.values()),
        "device_tier_bytes": tier,
        "tensors_beside_it_bytes": tensors,
        "host_bytes": strategy.tiers["host"].peak,
        "phase_seconds": seconds,
    }


def main(arguments: list[str]) -> int:
    """Writes engine_NAME.json."""
    return run_measures(arguments, __doc__, {"adamw": adamw, "tax": tax, "small": small}, "engine")
