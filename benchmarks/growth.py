"""How cost grows with model size and with sequence length: `penstock bench` for each point, one process each.

    python -m benchmarks growth [--sizes s m l xl] [--lengths 128 256 512 1024 2048] [--disk DIR] [--strategy NAME]

One prompt, answered with --new tokens; bf16. The device budget of each point is the least that its plan can work with
(within 2 %): with more, slots hold more blocks than they must, and the peak says what was allowed, not needed. Seconds
per token of a row, and the most device memory, against what they could grow with: parameters, the largest block, depth,
length. A slope is that of a straight line through logarithms: 1 is in proportion, 0 does not grow.
"""

import argparse
import dataclasses
import json
import math
import statistics
from typing import Any

from benchmarks.facts import flags, write
from penstock.algorithms.setup import strategy_of
from penstock.commands.bench.capacity import most_layers, run_apart
from penstock.commands.bench.config import BenchConfig
from penstock.commands.bench.fit import check, shape_of
from penstock.errors import ResourceError
from penstock.models import weight_shapes
from penstock.planner.from_flags import config_of

SERIES = {"sizes": "parameters", "lengths": "length", "depths": "layers"}
"""What each series of points varies."""


def point(size: str, length: int, layers: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """One run: seconds, bytes, and what they may depend on. Raises RuntimeError with its last words when it fails."""
    config = BenchConfig(
        size, strategy=options.strategy, experience_batch_size=1, train_batch_size=1, update_timesteps=1, max_epochs=1,
        top_k=0, dtype="bf16", prompt_length=length - options.new, max_length=length, iterations=1, layers=layers,
        disk=options.disk or None,
    )  # fmt: skip
    budget = least_device_bytes(config) if options.device_memory == "least" else options.device_memory
    result = run_apart(dataclasses.replace(config, device_memory=str(budget)))
    if isinstance(result, str):
        raise RuntimeError(result)
    groups = weight_shapes.groups_of(config_of(size, "--sizes"), "bfloat16", trained=True, scalar=False)
    return {
        "size": size,
        "length": length,
        "layers": result["layers"],
        "parameters": result["parameters"]["actor"],
        "block_bytes": sum(2 * weight.numel for group, weights in groups if group == "blocks.0" for weight in weights),
        "seconds_per_token": result["seconds_per_iteration"] / length,
        "seconds_per_iteration": result["seconds_per_iteration"],
        "phases": {name: phase["seconds"] for name, phase in result["phases"].items()},
        "peak_device_bytes": result["peak_device_bytes"],
        "planned_device_bytes": result["planned"]["device"],
        "peak_rss_bytes": result["peak_rss_bytes"],
        "flops": sum(phase["flops_per_rank"] for phase in result["phases"].values()),
    }


def least_device_bytes(config: BenchConfig) -> int:
    """The smallest device budget under which the plan fits, within 2 % above it."""
    strategy = strategy_of(config)
    device = strategy.tiers["device"]

    most = check(config, shape_of(config), strategy)["device"]

    def fits(steps: int) -> bool:
        device.budget = int(most / 1.02**steps)
        try:
            check(config, shape_of(config), strategy)
        except ResourceError:
            return False
        return True

    return int(most / 1.02 ** most_layers(fits, 0, 350))


def slope(points: list[dict[str, Any]], x: str, y: str) -> float | None:
    """Of the line of least squares through the logarithms of two columns; None for fewer than two points."""
    xs, ys = ([math.log(point[key]) for point in points] for key in (x, y))
    return statistics.linear_regression(xs, ys).slope if len(set(xs)) > 1 else None


def slopes(series: str, points: list[dict[str, Any]]) -> dict[str, float | None]:
    """What grows with what, over the points that were measured."""
    measured = [point for point in points if "why_not" not in point]
    x = SERIES[series]
    y = "seconds_per_iteration" if series == "lengths" else "seconds_per_token"
    return {
        f"{y} by {x}": slope(measured, x, y),
        f"peak_device_bytes by {x}": slope(measured, x, "peak_device_bytes"),
        "peak_device_bytes by block_bytes": slope(measured, "block_bytes", "peak_device_bytes"),
    }


def main(arguments: list[str]) -> int:
    """Measures, point by point, and writes after each."""
    parser = flags(__doc__)
    parser.add_argument("--sizes", nargs="*", default=["s", "m", "l", "xl"])
    parser.add_argument("--lengths", nargs="*", type=int, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--depths", nargs="*", type=int, default=[3, 6, 12, 24, 48], help="blocks of the first size")
    parser.add_argument("--new", type=int, default=16, help="tokens per response")
    parser.add_argument("--strategy", default="gemini_nvme")
    parser.add_argument("--disk", default="/tmp/penstock-growth")
    parser.add_argument("--device-memory", default="least", help="of every point, or 2GB, ...")
    parser.add_argument("--name", default="growth", help="of the file in benchmarks/results/")
    options = parser.parse_args(arguments)
    first = options.sizes[0]
    runs = {
        "sizes": [(size, 128, None) for size in options.sizes],
        "lengths": [(first, length, None) for length in options.lengths],
        "depths": [(first, 128, layers) for layers in options.depths],
    }
    result: dict[str, Any] = {
        "strategy": options.strategy, "device_memory": options.device_memory, "new_tokens": options.new
    }  # fmt: skip
    for series, settings in runs.items():
        points = result[series] = []
        for size, length, layers in settings:
            try:
                points.append(point(size, length, layers, options))
            except RuntimeError as error:
                points.append({"size": size, "length": length, "layers": layers, "why_not": str(error)})
            print(json.dumps({series: points[-1]}), flush=True)
            result[f"slopes_{series}"] = slopes(series, points)
            write(options.name, result)
    return 0
