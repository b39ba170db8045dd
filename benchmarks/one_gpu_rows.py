"""Rows of the one-GPU benchmark from benchmarks/results/: races on CPUs, PPO on an H100, sentiment on SmolLM2.

A side that ran in several races of one file is one row, of all its steps. What has another shape than its task, or was
not measured, has no row.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.facts import RESULTS
from benchmarks.one_gpu import MOST_KL, TASKS, Row
from benchmarks.peers.run import requirements_of
from penstock.units import parse_bytes

Result = dict[str, Any]
STACKS = {
    # a peer's script, or what it runs --by: the stack, and the package whose version counts
    "trl_ppo.py": ("TRL", "trl"), "trl_grpo.py": ("TRL", "trl"), "plain.py": ("plain transformers", "transformers"),
    "peft": ("peft", "peft"), "peft_lora.py": ("peft", "peft"), "deepspeed": ("DeepSpeed", "deepspeed"),
    "deepspeed_zero3.py": ("DeepSpeed", "deepspeed"), "fsdp2": ("FSDP2", "torch"),
    "fsdp2_offload.py": ("FSDP2", "torch"),
}  # fmt: skip
HASH = re.compile(r"^([0-9a-f]{12})[0-9a-f]+$")
MEMORY = {"NVIDIA H100 80GB HBM3": 81_559 << 20}
"""Of devices whose results do not say it: nvidia-smi's total."""
SHAPE = {"prompt_length": 400, "max_length": 512, "max_epochs": 1, "update_timesteps": 1}
"""The settings of `penstock bench` that tasks of 512 tokens have; results that were read from a terminal do not repeat
them, and were of these."""
OF_MODEL = {"s": "ppo-124m-512", "xl": "ppo-1558m-512", "6b": "ppo-6b-512"}


def rows_of_results(results: Path = RESULTS) -> list[Row]:
    """All rows, by task and then as the files are named."""
    rows = []
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for prefix, make in {"peers": races, "gpu": card, "sentiment": sentiment}.items():
            if path.stem.partition("_")[0] == prefix:
                evidence = f"benchmarks/results/{path.name}"
                rows += [{**facts(result), "evidence": evidence, **row} for row in make(result)]
    return sorted(rows, key=lambda row: list(TASKS).index(row["task"]))


def facts(result: Result) -> Row:
    """What every row of a file shares."""
    machine = result["machine"]
    gpu = machine["gpu"]
    memory = {"device_memory_bytes": machine.get("gpu_memory_bytes") or MEMORY[gpu]} if gpu else {}
    return {
        "stack": "penstock",
        "version": HASH.sub(r"\1", result["commit"]),
        "date": result["date"],
        "device": gpu or "cpu",
        "machine": machine_of(machine),
        "command": result["command"],
        **memory,
    }


def machine_of(machine: Result) -> str:
    """Example: "AMD EPYC, 2 cores, 24 GiB"."""
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GiB"


def timed(task: str, seconds: list[float]) -> Row:
    """The columns that follow from the seconds of each step."""
    median = statistics.median(seconds)
    rates = {"samples_per_second": TASKS[task].samples / median, "tokens_per_second": TASKS[task].tokens / median}
    return {"task": task, "seconds_per_step": median, "steps": len(seconds), **rates}


# --- races on CPUs ----------------------------------------------------------------------------------------------------

WORKS = {"ppo": "ppo-124m", "grpo": "grpo-124m", "sft": "sft-124m", "lora": "sft-124m"}


def races(result: Result) -> Iterator[Row]:
    """Both sides of every race, each once."""
    sides: dict[tuple[str, str, str], list[tuple[Result, str]]] = {}
    for name, race in result["rows"].items():
        if "why_not" not in race:
            work = our_flags(race["ours"]).work
            sides.setdefault((race["ours"], work, "penstock"), []).append((race, "ours"))
            package = ",".join(race["requirements"])
            sides.setdefault((race["theirs"], work, package), []).append((race, "theirs"))
            assert TASKS[WORKS[work]].samples == our_flags(race["ours"]).rows, name
    for (command, work, packages), parts in sides.items():
        seconds = [step for race, side in parts for step in race[f"{side}_seconds_each"]]
        yield {
            **timed(WORKS[work], seconds),
            **({} if packages == "penstock" else peer_of(command, packages.split(","))),
            "precision": precision_of(command), "weights": "adapters" if work == "lora" else "full",
            "options": " ".join(command.split()[1:]),
            "peak_rss_bytes": max(race[f"{side}_peak_rss_bytes"] for race, side in parts),
        }  # fmt: skip


def our_flags(command: str) -> argparse.Namespace:
    """Work and rows that a race's command line asks of our side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", default="ppo")
    parser.add_argument("--rows", type=int, default=4)
    return parser.parse_known_args(command.split()[1:])[0]


def precision_of(command: str) -> str:
    """Of a side's command line. Example: "trl_ppo.py --autocast bf16" computes in bf16 from weights in fp32."""
    if match := re.search(r"--autocast (\w+)", command):
        return f"{match[1]}-autocast"
    match = re.search(r"--dtype (\w+)", command)
    return match[1] if match else "fp32"


def peer_of(command: str, requirements: list[str]) -> Row:
    """Stack and version of a peer's side."""
    match = re.search(r"--by (\w+)", command)
    stack, package = STACKS[match[1] if match else command.split()[0]]
    versions = dict(line.split("==") for line in requirements)
    return {"stack": stack, "version": versions[package]}


# --- penstock bench on a GPU ------------------------------------------------------------------------------------------


def card(result: Result) -> Iterator[Row]:
    """Rows of `penstock bench` with 64 answers of 400 + 112 tokens and one update."""
    for row in result.get("table", {"rows": {}})["rows"].values():
        settings = row.get("settings", {})
        shape = {name: settings.get(name, value) for name, value in SHAPE.items()}
        if settings.get("model") not in OF_MODEL or shape != SHAPE or settings["experience_batch_size"] != 64:
            continue
        rss = row.get("peak_rss_bytes") or printed_rss(row["printed"])
        yield {
            **timed(OF_MODEL[settings["model"]], [row["seconds_per_iteration"]] * settings.get("iterations", 1)),
            "precision": settings["dtype"], "weights": "adapters" if settings["lora_rank"] else "full",
            "options": f"--strategy {settings['strategy']}", "peak_device_bytes": int(row["peak_device_bytes"]),
            "peak_rss_bytes": rss,
        }  # fmt: skip


def printed_rss(lines: list[str]) -> int:
    """The line "  RSS    1.71 GB" of what a run printed, in bytes."""
    (size,) = [line.strip().removeprefix("RSS") for line in lines if line.strip().startswith("RSS")]
    return parse_bytes(size, "RSS")


# --- sentiment --------------------------------------------------------------------------------------------------------


def sentiment(result: Result) -> Iterator[Row]:
    """Per setting and processor the ends of its seeds on the held-out prompts, where these are within the KL; ours in
    bf16, TRL under autocast."""
    settings: dict[tuple[str, str], list[Result]] = {}
    for name, row in result["rows"].items():
        if "after" in row:
            settings.setdefault((name.rpartition(", seed ")[0], row["cpu"]), []).append(row)
    for (name, cpu), runs in settings.items():
        kl = statistics.mean(run["after"]["kl"] for run in runs)
        if kl > MOST_KL:
            continue
        rewards = [run["after"]["mean"] for run in runs]
        trl = name.startswith("trl")
        script, environment = ("trl_ppo.py", "trl") if name.startswith("trl ppo") else ("trl_grpo.py", "trl_newest")
        yield {
            **timed("sentiment-135m", [run["step_seconds"] for run in runs]),
            "version": HASH.sub(r"\1", runs[-1]["commit"]),
            **(peer_of(script, requirements_of(environment)) if trl else {}),
            "machine": machine_of({**result["machine"], "cpu": cpu}),
            "command": f"python -m benchmarks sentiment '{name}'",
            "steps": sum(run["steps"] for run in runs), "precision": "bf16-autocast" if trl else "bf16",
            "weights": "adapters" if "lora" in runs[0]["flags"] else "full", "options": name,
            "peak_rss_bytes": int(max(run["peak_rss_bytes"] for run in runs)), "seeds": len(runs),
            "reward": statistics.mean(rewards), "kl": kl,
            **({"reward_se": statistics.stdev(rewards) / len(runs) ** 0.5} if len(runs) > 1 else {}),
        }  # fmt: skip
