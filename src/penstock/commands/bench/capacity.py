"""`penstock bench capacity`: the deepest model that completes a PPO iteration in a device budget, ours and plain.

Both are found by bisection over the number of blocks.

Ours: the plan refuses what cannot fit in milliseconds, so bisection runs on it, and the deepest that it allows is then
run in a process of its own; if that run fails, bisection goes on below it by runs alone. What is reported was run.

Plain PyTorch (bench/plain.py) is run in steps too. On a GPU its limit is the allocator's, set to the budget. A CPU has
no device memory, so there a Meter counts every tensor of a real iteration (weights, gradients, Adam's moments,
activations, KV cache: all that is made inside it), and a depth fits if their peak does not pass the budget. Nothing is
counted for fragmentation or for the allocator's own blocks, so the count favours plain PyTorch.
"""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from penstock.algorithms.setup import strategy_of
from penstock.autochunk.meter import Meter
from penstock.commands.bench.config import BenchConfig, CapacityConfig
from penstock.commands.bench.fit import check, shape_of
from penstock.commands.bench.plain import Kind, Plain
from penstock.distributed.world import World
from penstock.errors import ResourceError
from penstock.kernels.machine import available_ram
from penstock.memory.placement import known
from penstock.models import weight_shapes
from penstock.models.config import DecoderConfig
from penstock.units import parse_bytes, show_bytes

SLACK = 0.9
"""Share of free RAM that ours may fill, where no --host-memory is given."""


def capacity(config: CapacityConfig) -> dict[str, Any]:
    """Measures, prints, writes `--json`.

    Raises ResourceError where not even one block fits either side, UserError for what does not exist.
    """
    budget, device = parse_bytes(config.device_memory, "--device-memory"), World.join(None).device
    host = config.host_memory or str(int(SLACK * available_ram()))
    known(config.strategy)
    shape = shape_of(bench_config(config, host, 1))
    planned, runs = runs_of_ours(config, host)
    ours, run = next((layers, run) for layers, run in sorted(runs.items(), reverse=True) if isinstance(run, dict))
    plain, peaks = deepest_of_plain(config, shape, budget, device)
    layers = {"ours": ours, **plain}
    parameters = {
        name: weight_shapes.count_of(dataclasses.replace(shape, num_layers=depth), scalar=False) if depth else None
        for name, depth in layers.items()
    }
    result = {
        "settings": dataclasses.asdict(config),
        "budget_bytes": budget,
        "host_budget_bytes": parse_bytes(host, "--host-memory"),
        "device": str(device),
        "layers": layers,
        "parameters_per_model": parameters,
        "ratios": {kind: _ratio(parameters["ours"], parameters[kind]) for kind in KINDS},
        "planned_layers": planned,
        "runs_of_ours": {str(depth): run if isinstance(run, str) else "completed" for depth, run in runs.items()},
        "ours": {key: run[key] for key in ("seconds_per_iteration", "planned", *PEAKS)},
        "peak_device_bytes_of_plain": peaks,
    }
    print(as_text(result))
    if config.json:
        Path(config.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def runs_of_ours(config: CapacityConfig, host: str) -> tuple[int, dict[int, dict[str, Any] | str]]:
    """The deepest model that the plan allows, and by depth what was run to find the deepest that completes."""

    def planned(layers: int) -> bool:
        bench = bench_config(config, host, layers)
        try:
            check(bench, shape_of(bench), strategy_of(bench))
        except ResourceError:
            return False
        return True

    runs: dict[int, dict[str, Any] | str] = {}

    def completes(layers: int) -> bool:
        runs[layers] = run_apart(bench_config(config, host, layers))
        return isinstance(runs[layers], dict)

    deepest = most_layers(planned, 1, config.layers)
    if not completes(deepest):
        most_layers(completes, 1, deepest - 1)
    return deepest, runs


def deepest_of_plain(
    config: CapacityConfig, shape: DecoderConfig, budget: int, device: torch.device
) -> tuple[dict[str, int], dict[str, int | None]]:
    """For each kind of plain PyTorch the deepest model that completes (0: none), and its peak bytes."""
    rows = (config.experience_batch_size, config.prompt_length)
    prompts = torch.randint(shape.vocab_size, rows, generator=torch.Generator().manual_seed(0)).to(device)
    new = config.max_length - config.prompt_length
    layers: dict[str, int] = {}
    peaks: dict[str, int | None] = {}
    for kind in KINDS:
        seen: dict[int, int | None] = {}

        def fits(depth: int, kind: Kind = kind, seen: dict[int, int | None] = seen) -> bool:
            return runs_plainly(dataclasses.replace(shape, num_layers=depth), kind, budget, prompts, new, seen)

        layers[kind] = most_layers(fits, 1, config.layers) if fits(1) else 0
        peaks[kind] = seen.get(layers[kind])
    return layers, peaks


KINDS: tuple[Kind, ...] = ("published", "fair")
PEAKS = ("peak_device_bytes", "peak_host_bytes", "peak_disk_bytes", "peak_rss_bytes")


def bench_config(config: CapacityConfig, host: str, layers: int) -> BenchConfig:
    """The one iteration that a depth must complete, after one to warm up."""
    return BenchConfig(
        config.model, strategy=config.strategy, experience_batch_size=config.experience_batch_size,
        train_batch_size=config.experience_batch_size, update_timesteps=1, max_epochs=1, top_k=0, dtype=config.dtype,
        prompt_length=config.prompt_length, max_length=config.max_length, iterations=1,
        micro_batch_size=config.micro_batch_size, layers=layers, device_memory=config.device_memory, host_memory=host,
        disk=config.disk,
    )  # fmt: skip


def run_apart(config: BenchConfig) -> dict[str, Any] | str:
    """The result of `penstock bench` in a process of its own, or why it failed.

    A depth that the machine cannot hold then ends that process and not the search.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        command = [sys.executable, "-m", "penstock", "bench", *arguments_of(config), "--json", str(out)]
        process = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if process.returncode == 0:
            return json.loads(out.read_text(encoding="utf-8"))
    lines = process.stderr.strip().splitlines()
    return f"exit code {process.returncode}: {lines[-1] if lines else 'killed, most likely for its memory'}"


def arguments_of(config: BenchConfig) -> list[str]:
    """The flags that differ from their defaults."""
    arguments: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            flag = "--" + field.name.replace("_", "-")
            arguments += [flag] if value is True else [flag, str(value)]
    return arguments


def most_layers(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest depth in [low, high] that fits, by bisection. Raises ResourceError when not even `low` does.

    It doubles its steps from below first, so that nothing is tried that is more than twice as deep as what fits.
    """
    if low > high or not fits(low):
        raise ResourceError(f"not even {low} block{'s' * (low != 1)} fit; give a larger --device-memory.")
    step = 1
    while low < high:
        tried = min(low + step, high)
        if not fits(tried):
            high = tried - 1
            break
        low, step = tried, step * 2
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def runs_plainly(
    shape: DecoderConfig, kind: Kind, budget: int, prompts: torch.Tensor, new: int, seen: dict[int, int | None]
) -> bool:
    """Whether plain PyTorch completes an iteration in the budget. Writes the peak bytes by depth to `seen`."""
    if prompts.device.type == "cuda":
        return _in_the_allocator(shape, kind, budget, prompts, new, seen)
    with Meter() as meter:
        Plain(shape, kind, prompts.device).step(prompts, new)
    gc.collect()
    seen[shape.num_layers] = meter.peak
    return meter.peak <= budget


def _in_the_allocator(
    shape: DecoderConfig, kind: Kind, budget: int, prompts: torch.Tensor, new: int, seen: dict[int, int | None]
) -> bool:
    torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.mem_get_info()[1])
    torch.cuda.reset_peak_memory_stats()
    try:
        Plain(shape, kind, prompts.device).step(prompts, new)
        seen[shape.num_layers] = torch.cuda.max_memory_allocated()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def _ratio(ours: int | None, plain: int | None) -> float | None:
    return ours / plain if ours and plain else None


def as_text(result: dict[str, Any]) -> str:
    names = {"ours": "penstock", "published": "plain PyTorch, fp32", "fair": "plain PyTorch, bf16 and fp32 masters"}
    settings = result["settings"]
    model, memory = settings["model"], settings["device_memory"]
    lines = [f"the deepest {model} that completes a PPO iteration in {memory} of the device:"]
    for key, name in names.items():
        layers, peak = result["layers"][key], result["peak_device_bytes_of_plain"].get(key)
        if key == "ours":
            peak = result["ours"]["peak_device_bytes"]
        if not layers:
            lines.append(f"  {name:37} not even one block fits")
            continue
        ratio, parameters = result["ratios"].get(key), result["parameters_per_model"][key]
        comparison = f"; ours has {ratio:.1f} times as many" if ratio else ""
        lines.append(
            f"  {name:37} {layers:4} blocks, {parameters / 1e6:.1f}M parameters in each of four models, "
            f"{show_bytes(peak or 0)} at most{comparison}"
        )
    return "\n".join([*lines, f"one iteration of ours takes {result['ours']['seconds_per_iteration']:.1f} s"])
