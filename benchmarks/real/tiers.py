"""One run of the sentiment experiment in three places: resident, in host memory, on a disk.

    python -m benchmarks tiers [--steps 20]

GRPO of all weights of SmolLM2-135M-Instruct in bf16, the same seed three times. The two that stream have 300 MB of
device memory, which the engine keeps to (on a CPU the "device" is the part of RAM that is counted so). Metrics must be
equal to the last byte; benchmarks/results/tiers.json has the curve, and what each tier held.
"""

import json
import shutil
from pathlib import Path

from benchmarks.facts import flags, write
from benchmarks.real import runs
from benchmarks.real.sentiment import REWARD, TOKENS, prompt_files
from penstock.run.metrics import read_lines
from tests.smollm2 import directory

BUDGET = "300MB"


def placements(disk: Path) -> dict[str, runs.Record]:
    """Of weights, gradients and optimizer states, by name."""
    return {
        "resident": {"strategy": "ddp"},
        "host memory": {"strategy": "gemini_cpu", "device_memory": BUDGET},
        "disk": {"strategy": "gemini_nvme", "device_memory": BUDGET, "disk": disk},
    }


def held(run: Path) -> list[dict[str, float]]:
    """The most bytes that each tier held, and the process, in every step."""
    names = ("_tier_bytes", "_peak_bytes")
    return [
        {name.removeprefix("perf/"): row[name] for name in row if name.endswith(names)}
        for row in read_lines(run / "perf.jsonl")
    ]


def main(arguments: list[str]) -> int:
    """Returns 1 where a placement's metrics differ from the resident run's."""
    parser = flags(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args(arguments).steps
    asked, heldout = prompt_files()
    disk = runs.RUNS / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    rows, metrics = {}, {}
    for name, placement in placements(disk).items():
        run = runs.train(
            f"tiers-{name.replace(' ', '-')}", "grpo", model=directory(), data=asked, eval_data=heldout, seed=0,
            reward_fn=REWARD, steps=steps, batch_size=64, micro_batch_size=4, rollout_batch_size=16, dtype="bf16",
            max_new_tokens=TOKENS, max_length=96, missing_eos_penalty="none", eval_every=max(steps // 2, 1),
            checkpoint_every=1000, keep=1, lr=1e-5, recompute=True, **placement,
        )  # fmt: skip
        metrics[name] = (run / "metrics.jsonl").read_bytes()
        lines = held(run)
        rows[name] = {
            **placement,
            **runs.cost(run),
            "held": lines[-1],
            "device_bytes": [line["device_tier_bytes"] for line in lines],
            "equal": "equal" if metrics[name] == metrics["resident"] else "DIFFERENT",
        }
        rows[name].pop("disk", None)
        print(name, json.dumps(rows[name]), flush=True)
    curve = [[row["step"], row["objective/scores"]] for row in map(json.loads, metrics["resident"].splitlines())]
    shutil.rmtree(disk)
    write("tiers", {"budget": BUDGET, "curve": curve, "rows": rows}, "transformers", "vaderSentiment")
    return int(not all(row["equal"] == "equal" for row in rows.values()))
