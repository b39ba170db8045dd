"""The plan against the engine: predicted and measured peak bytes per tier and bytes moved, over many configurations.

python -m benchmarks planner           sizes x strategies, stages x ways to run them, on pretended tensors
python -m benchmarks planner 175b      the dry runs of 175B on 32 and on 8 processes: seconds, RSS, what fits
python -m benchmarks planner one-card  the same of 66B, and of 175B on nf4, with LoRA and four roles on one base
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.facts import flags, write
from penstock.commands.dry_run import dry_run
from penstock.models.config import DecoderConfig
from penstock.models.tiling import Arithmetic
from penstock.planner.config import PlanConfig
from penstock.planner.from_flags import config_of, workload_of
from penstock.planner.workload import Setting, forecast_of

BAR = (1.0, 1.15)
"""Bytes planned by bytes taken, at least and at most."""
LAYERS = 2
"""Of each model, so many are kept."""
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # name: the published size, what is different
    **{size: (size, {}) for size in ("s", "xl", "opt-1.3b", "opt-350m", "bloom-560m", "llama-3-8b")},
    "qwen3": ("llama-3-8b", {
        "family": "qwen3", "d_model": 1024, "num_heads": 16, "d_ff": 3072, "qk_norm": True, "tied": True,
    }),
    "gemma2": ("llama-3-8b", {
        "family": "gemma2", "d_model": 1024, "num_heads": 8, "num_kv_heads": 4, "d_ff": 4096, "windows": (256, 0),
        "out_norms": True, "norm_offset": 1.0, "embed_scale": 32.0, "tied": True, "activation": "gelu_tanh",
        "attention_softcap": 50.0, "logit_softcap": 30.0,
    }),
    "mistral": ("llama-7b", {"family": "mistral", "d_model": 2048, "num_heads": 16, "num_kv_heads": 4, "d_ff": 5632,
                             "windows": (256,) * LAYERS}),
    "qwen3_moe": ("llama-3-8b", {
        "family": "qwen3_moe", "d_model": 1024, "num_heads": 16, "qk_norm": True, "num_experts": 16,
        "experts_per_token": 4, "expert_ff": 768, "d_ff": 3072, "dense_layers": (0,),
    }),
}  # fmt: skip
SIZES = ("s", "opt-350m", "bloom-560m", "llama-3-8b")
BATCHES = ((8, 4, 64, 16), (16, 8, 400, 112))
"""Episodes, micro-batch, tokens per prompt, tokens per response."""
RUNS = (
    ("gemini_cpu", 1), ("gemini_nvme", 1), ("gemini_auto", 1), ("zero2_cpu", 2), ("gemini", 4), ("gemini_cpu", 4),
    ("ddp", 1), ("zero1", 4),
)  # fmt: skip
ARITHMETIC: tuple[Arithmetic, ...] = ("wide", "narrow", "wide sums")
"""In turns where one process computes: as a GPU does, and as CPUs do."""
STREAMS = ("gemini_cpu", "gemini_nvme", "gemini_auto")
"""Strategies that get a device budget halfway between the least and all that there is to hold."""
STAGES: dict[str, dict[str, Any]] = {
    "sft": {}, "reward": {}, "dpo": {}, "kto": {}, "ppo": {"mini_batch_size": 4},
    "grpo": {"group_size": 4}, "distill": {"teacher_model": "m"},
    "distill, sampled": {"teacher_model": "m", "on_policy": 0.5},
    "distill, stored": {"teacher_model": "m", "precompute_teacher": True},
}  # fmt: skip
WAYS: tuple[dict[str, Any], ...] = (
    {"strategy": "naive", "dtype": "fp32"}, {"strategy": "ddp"}, {"strategy": "gemini_cpu_8bit"},
    {"strategy": "gemini_nvme", "dtype": "fp32"}, {"strategy": "gemini_auto"}, {"strategy": "zero2_cpu", "world": 2},
    {"strategy": "zero1_cpu", "world": 2, "dtype": "fp32"}, {"strategy": "gemini", "world": 2},
    {"strategy": "gemini_cpu", "world": 2, "keep_activations": True}, {"strategy": "gemini_cpu", "lora": 16},
    {"strategy": "naive", "lora": 16, "base_dtype": "nf4"},
    {"strategy": "gemini_auto", "lora": 16, "base_dtype": "int8"},
)  # fmt: skip
"""How the stages are run."""


def shape_of(name: str) -> DecoderConfig:
    """A few blocks of a model."""
    size, changes = SHAPES[name]
    return dataclasses.replace(config_of(size, "--model"), **{"num_layers": LAYERS, "windows": (), **changes})


def ppo_rows() -> Iterator[tuple[str, dict[str, Any], Arithmetic]]:
    """PPO of four models of a size under every strategy, in small and large batches: a shape, flags, arithmetic."""
    for (i, size), (j, batch), (k, (strategy, world)) in itertools.product(
        enumerate(SIZES), enumerate(BATCHES), enumerate(RUNS)
    ):
        if (i + j + k) % 2:  # half of them: every pair of strategy and size is there
            continue
        rows, micro, prompt, response = batch
        row = {
            "strategy": strategy, "world": world, "batch_size": rows, "micro_batch_size": micro,
            "prompt_length": prompt, "max_new_tokens": response,
        }  # fmt: skip
        yield size, row, ARITHMETIC[(i + k) % 3] if world == 1 else "narrow"


def stage_rows() -> Iterator[tuple[str, dict[str, Any], Arithmetic]]:
    """Every stage in every way, the families in turn."""
    families = itertools.cycle(SHAPES)
    for name, stage in STAGES.items():
        for way in WAYS:
            row = {
                "stage": name.partition(",")[0], "batch_size": 8, "micro_batch_size": 4, "prompt_length": 300,
                "max_new_tokens": 100, **stage, **way,
            }  # fmt: skip
            yield next(families), row, "narrow"
        next(families)  # else each way would meet few of them


def within(setting: Setting, device: int | None) -> Setting:
    """The same with so many bytes of device memory; None: without a limit."""
    return dataclasses.replace(setting, budgets={"device": device, "host": None, "disk": None})


def compare(name: str, asked: dict[str, Any], arithmetic: Arithmetic) -> dict[str, Any]:
    """One configuration."""
    config = PlanConfig(model=SHAPES[name][0], **asked)
    work = workload_of(config, shape_of(name))
    wide = {"num_layers": 2 * LAYERS, "vocab_size": shape_of(name).vocab_size}
    teacher = dataclasses.replace(config_of("m", "--model"), **wide)
    roles = (dataclasses.replace(role, config=teacher) if role.name == "teacher" else role for role in work.roles)
    setting = Setting(
        dataclasses.replace(work, roles=tuple(roles)), config.strategy, config.dtype, config.world,
        recompute=False if config.keep_activations else None, arithmetic=arithmetic,
    )  # fmt: skip
    if config.strategy in STREAMS and config.world == 1:
        least, most = (forecast_of(within(setting, device), timed=False).peak["device"] for device in (1, None))
        setting = within(setting, (least + most) // 2)
    planned, measured = forecast_of(setting), dry_run(setting, iterations=2)
    traffic = measured.pop("traffic")
    keys = ("host_read", "host_written", "disk_read", "disk_written")
    moved = {
        key: (sum(phase[key] for phase in planned.traffic.values()), sum(phase[key] for phase in traffic.values()))
        for key in keys
    }
    return {
        "size": name, "layers": LAYERS, **asked, "budget": setting.budgets["device"], "arithmetic": arithmetic,
        "predicted": planned.peak, "measured": measured,
        "ratio": {tier: planned.peak[tier] / nbytes for tier, nbytes in measured.items() if nbytes},
        "moved": moved, "moved_ratio": {key: plan / engine for key, (plan, engine) in moved.items() if engine},
    }  # fmt: skip


def grid() -> int:
    """All rows; 1 where one of them is outside of the bar."""
    rows = []
    for row in (*ppo_rows(), *stage_rows()):
        rows.append(compare(*row))
        print(json.dumps({key: figure for key, figure in rows[-1].items() if not key.startswith("moved")}), flush=True)
    return report(rows)


def report(rows: list[dict[str, Any]]) -> int:
    """Writes the result; 1 where a row is outside of the bar."""
    ratios = [ratio for row in rows for ratio in row["ratio"].values()]
    moved = [ratio for row in rows for ratio in row["moved_ratio"].values()]
    outside = [row for row in rows if not all(BAR[0] <= ratio <= BAR[1] for ratio in row["ratio"].values())]
    write(
        "planner",
        {
            "configurations": len(rows), "lowest": min(ratios), "highest": max(ratios), "outside": len(outside),
            "moved_lowest": min(moved), "moved_highest": max(moved), "rows": rows,
        },
    )  # fmt: skip
    return int(bool(outside))


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
        return grid()
    dry_runs(*{"175b": ("planner_175b", LARGEST), "one-card": ("planner_one_card", ONE_CARD)}[measure])
    return 0
