"""The plan against the engine: predicted and measured peak bytes per tier and bytes moved, over many configurations.

python -m benchmarks planner           strategies x sizes x batches x processes, on pretended tensors
python -m benchmarks planner 175b      the dry runs of 175B on 32 and on 8 processes: seconds, RSS, what fits
python -m benchmarks planner one-card  the same of 66B, and of 175B on nf4, with LoRA and four roles on one base
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.facts import flags, write
from penstock.commands.dry_run import dry_run
from penstock.models.tiling import Arithmetic
from penstock.planner.workload import RoleSpec, Setting, Workload, config_of, forecast_of

SIZES = {
    # name: (layers kept, device budgets in MB: none, and one that is tight)
    "s": (6, (None, 900)), "xl": (4, (None, 1700)), "opt-1.3b": (4, (None, 2300)), "opt-350m": (6, (None, 1100)),
    "bloom-560m": (4, (None, 4200)), "llama-3-8b": (2, (None, 11000)),
}  # fmt: skip
BATCHES = ((8, 4, 64, 16), (16, 8, 400, 112))
"""Episodes, micro-batch, tokens per prompt, tokens per response."""
RUNS = (
    ("gemini_cpu", 1), ("gemini_nvme", 1), ("gemini_auto", 1), ("zero2_cpu", 2), ("gemini", 4), ("gemini_cpu", 4),
    ("ddp", 1), ("zero1", 4),
)  # fmt: skip
ARITHMETIC: tuple[Arithmetic, ...] = ("narrow", "wide sums", "wide")
ON_CPUS = ("ddp", "gemini_cpu", "gemini_auto")
"""Strategies that are tried with a CPU's arithmetic too."""


def work(size: str, batch: tuple[int, int, int, int]) -> Workload:
    """PPO of four models of a size, a few of its blocks."""
    config = dataclasses.replace(config_of(size, "--model"), num_layers=SIZES[size][0], windows=())
    rows, micro, prompt, response = batch
    roles = (
        RoleSpec("actor", config, trained=True, scalar=False),
        RoleSpec("critic", config, trained=True, scalar=True),
        RoleSpec("reference", config, trained=False, scalar=False),
        RoleSpec("reward", config, trained=False, scalar=True),
    )
    return Workload("ppo", roles, rows, micro, rows, 1, prompt, response)


def compare(
    size: str, batch: tuple[int, int, int, int], strategy: str, world: int, device: int | None,
    arithmetic: Arithmetic = "narrow",
) -> dict:  # fmt: skip
    """One configuration."""
    budgets: Any = {"device": device, "host": None, "disk": None}
    setting = Setting(work(size, batch), strategy, "bf16", world, budgets, arithmetic=arithmetic)
    planned, measured = forecast_of(setting), dry_run(setting)
    traffic = measured.pop("traffic")
    keys = ("host_read", "host_written", "disk_read", "disk_written")
    moved = {
        key: (sum(phase[key] for phase in planned.traffic.values()), sum(phase[key] for phase in traffic.values()))
        for key in keys
    }
    return {
        "size": size, "layers": SIZES[size][0], "batch": batch, "strategy": strategy, "world": world, "budget": device,
        "arithmetic": arithmetic,
        "predicted": planned.peak, "measured": measured,
        "ratio": {tier: planned.peak[tier] / nbytes for tier, nbytes in measured.items() if nbytes},
        "moved": moved, "moved_ratio": {key: plan / engine for key, (plan, engine) in moved.items() if engine},
    }  # fmt: skip


def grid() -> None:
    """Every strategy with every size and batch."""
    rows = []
    for i, size in enumerate(SIZES):
        for j, batch in enumerate(BATCHES):
            for k, (strategy, world) in enumerate(RUNS):
                if (i + j + k) % 2 and size != "s":  # half of them: every pair of strategy and size is there
                    continue
                tight = SIZES[size][1][1] * 10**6 if strategy in ("gemini_cpu", "gemini_nvme", "gemini_auto") else None
                for arithmetic in ARITHMETIC if strategy in ON_CPUS and world == 1 else ARITHMETIC[:1]:
                    rows.append(compare(size, batch, strategy, world, tight, arithmetic))
                    printed = ("size", "batch", "strategy", "world", "arithmetic", "ratio")
                    print(json.dumps({key: rows[-1][key] for key in printed}), flush=True)
    ratios = [ratio for row in rows for ratio in row["ratio"].values()]
    moved = [ratio for row in rows for ratio in row["moved_ratio"].values()]
    write(
        "planner",
        {
            "configurations": len(rows), "lowest": min(ratios), "highest": max(ratios),
            "moved_lowest": min(moved), "moved_highest": max(moved), "rows": rows,
        },
    )  # fmt: skip


LARGEST = [
    f"--model 175b --critic-model 6b --world {world} --device-memory 80GB{more}"
    for world, more in ((32, ""), (8, " --host-memory 200GB"))
]
"""175B actor and reference with a 6B critic and reward model, 80 GB of device memory per process."""
ONE_CARD = [
    f"--model {model} --lora 16{more} --strategy gemini_auto --device-memory 70GB --host-memory 120GB --batch-size 4 "
    "--micro-batch-size 4 --prompt-length 400 --max-new-tokens 112"
    for model, more in (("opt-66b", ""), ("175b", " --base-dtype nf4"))
]
"""Four roles on one base, on one card of 80 GB with 128 GB of host memory."""


def dry_runs(name: str, settings: list[str]) -> None:
    """The dry run of each: seconds, RSS, its peaks and those of the plan, and whether it fits."""
    rows = []
    for setting in settings:
        command = [sys.executable, "-m", "penstock", "plan", *setting.split(), "--dry-run", "--json"]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        result = json.loads(process.stdout.read())
        _, code, used = os.wait4(process.pid, 0)
        assert code == 0
        rows.append(
            {
                "command": " ".join(command[2:]), "wall_seconds": time.perf_counter() - began,
                "peak_rss_bytes": used.ru_maxrss * 1024,
                **{key: result[key] for key in ("fits", "predicted", "measured", "budgets")},
            }
        )  # fmt: skip
        print(json.dumps(rows[-1], indent=2))
        write(name, {"rows": rows})  # the next may take long


def main(arguments: list[str]) -> int:
    """Measures one of the three."""
    parser = flags(__doc__)
    parser.add_argument("measure", nargs="?", choices=["grid", "175b", "one-card"], default="grid")
    measure = parser.parse_args(arguments).measure
    if measure == "grid":
        grid()
    else:
        dry_runs(*{"175b": ("planner_175b", LARGEST), "one-card": ("planner_one_card", ONE_CARD)}[measure])
    return 0
