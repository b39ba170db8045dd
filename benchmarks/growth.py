"""How cost grows with model size and with sequence length: `penstock bench` for each point, one process each.

    python -m benchmarks.growth [--sizes s m l xl] [--lengths 128 256 512 1024 2048] [--disk DIR] [--strategy NAME]

One prompt, answered with --new tokens; bf16. The device budget of each point is the least that its plan can work with
(within 2 %): with more, slots hold more blocks than they must, and the peak says what was allowed, not needed. Seconds
per token of a row, and the most device memory, against what they could grow with: parameters, the largest block, depth,
length. A slope is that of a straight line through logarithms: 1 is in proportion, 0 does not grow.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.facts import write
from penstock.commands.bench.capacity import arguments_of, strategy_of
from penstock.commands.bench.config import BenchConfig
from penstock.commands.bench.fit import check, shape_of
from penstock.errors import ResourceError
from penstock.models import weight_shapes
from penstock.planner.workload import config_of


def point(size: str, length: int, layers: int | None, asked: argparse.Namespace) -> dict[str, Any]:
    """One run: seconds, bytes, and what they may depend on. Raises RuntimeError with its last words when it fails."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "found.json"
        config = BenchConfig(
            size, asked.strategy, experience_batch_size=1, train_batch_size=1, update_timesteps=1, max_epochs=1,
            top_k=0, dtype="bf16", prompt_length=length - asked.new, max_length=length, iterations=1, layers=layers,
            disk=asked.disk or None,
        )  # fmt: skip
        budget = least_device_bytes(config) if asked.device_memory == "least" else asked.device_memory
        flags = arguments_of(dataclasses.replace(config, device_memory=str(budget)))
        command = [sys.executable, "-m", "penstock", "bench", *flags, "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise RuntimeError(f"exit code {done.returncode}: {lines[-1] if lines else 'killed'}")
        found = json.loads(out.read_text(encoding="utf-8"))
    groups = weight_shapes.groups_of(config_of(size, "--sizes"), "bfloat16", trained=True, scalar=False)
    block = sum(2 * weight.numel for group, weights in groups if group == "blocks.0" for weight in weights)
    return {
        "size": size,
        "length": length,
        "layers": found["layers"],
        "parameters": found["parameters"]["actor"],
        "block_bytes": block,
        "seconds_per_token": found["seconds_per_iteration"] / length,
        "seconds_per_iteration": found["seconds_per_iteration"],
        "phases": {name: one["seconds"] for name, one in found["phases"].items()},
        "peak_device_bytes": found["peak_device_bytes"],
        "planned_device_bytes": found["planned"]["device"],
        "peak_rss_bytes": found["peak_rss_bytes"],
        "flops": sum(one["flops_per_rank"] for one in found["phases"].values()),
    }


def least_device_bytes(config: BenchConfig) -> int:
    """The smallest device budget under which the plan fits, within 2 % above it."""
    strategy = strategy_of(config)
    device = strategy.tiers["device"]

    def fits(nbytes: int) -> bool:
        device.budget = nbytes
        try:
            check(config, shape_of(config), strategy)
        except ResourceError:
            return False
        return True

    high = check(config, shape_of(config), strategy)["device"]
    low = high // 1024
    while high > low * 1.02:
        middle = int((low * high) ** 0.5)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def slope(points: list[dict[str, Any]], x: str, y: str) -> float | None:
    """Of the line of least squares through the logarithms of two columns; None for fewer than two points."""
    pairs = [(math.log(one[x]), math.log(one[y])) for one in points]
    if len({a for a, _ in pairs}) < 2:
        return None
    middle_x, middle_y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    above = sum((a - middle_x) * (b - middle_y) for a, b in pairs)
    return above / sum((a - middle_x) ** 2 for a, _ in pairs)


def main() -> None:
    """Measures, point by point, and writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["s", "m", "l", "xl"])
    parser.add_argument("--lengths", nargs="*", type=int, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--depths", nargs="*", type=int, default=[3, 6, 12, 24, 48], help="blocks of the first size")
    parser.add_argument("--new", type=int, default=16, help="tokens per response")
    parser.add_argument("--strategy", default="gemini_nvme")
    parser.add_argument("--disk", default="/tmp/penstock-growth")
    parser.add_argument("--device-memory", default="least", help="of every point, or 2GB, ...")
    parser.add_argument("--name", default="growth", help="of the file in benchmarks/results/")
    asked = parser.parse_args()
    first = asked.sizes[0]
    wanted = {
        "sizes": [(size, 128, None) for size in asked.sizes],
        "lengths": [(first, length, None) for length in asked.lengths],
        "depths": [(first, 128, layers) for layers in asked.depths],
    }
    found: dict[str, Any] = {
        "strategy": asked.strategy, "device_memory": asked.device_memory, "new_tokens": asked.new
    }  # fmt: skip
    for series, runs in wanted.items():
        found[series] = []
        for size, length, layers in runs:
            try:
                found[series].append(point(size, length, layers, asked))
            except RuntimeError as error:
                found[series].append({"size": size, "length": length, "layers": layers, "why_not": str(error)})
            print(json.dumps({series: found[series][-1]}), flush=True)
            done = [one for one in found[series] if "why_not" not in one]
            x = {"sizes": "parameters", "lengths": "length", "depths": "layers"}[series]
            y = "seconds_per_iteration" if series == "lengths" else "seconds_per_token"
            found[f"slopes_{series}"] = {
                f"{y} by {x}": slope(done, x, y),
                f"peak_device_bytes by {x}": slope(done, x, "peak_device_bytes"),
                "peak_device_bytes by block_bytes": slope(done, "block_bytes", "peak_device_bytes"),
            }
            write(asked.name, found)


if __name__ == "__main__":
    main()
