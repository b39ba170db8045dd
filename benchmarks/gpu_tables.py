"""The checks of `benchmarks gpu` that are tables: `penstock bench`, the plain loop, the largest models, AutoChunk.

Every row runs in a process of its own, so that its memory is its own and its failure too.
"""

import contextlib
import dataclasses
import gc
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers

from benchmarks import autochunk as blocks
from benchmarks.apart import Apart, apart
from benchmarks.facts import result_path
from benchmarks.peers import plain
from benchmarks.timing import seconds_of
from penstock.commands.bench.config import BenchConfig
from penstock.commands.bench.fit import shape_of
from penstock.commands.bench.run import bench


@dataclasses.dataclass(frozen=True)
class Target:
    """The device of the checks, when time is up, and whether shapes are cut down to test the checks themselves."""

    device: str
    tiny: bool
    disk: str
    end: float = float("inf")
    """By time.monotonic."""
    rows: tuple[str, ...] = ()
    """The rows of tables to measure; none: all."""

    @property
    def gpu(self) -> bool:
        """Whether there is memory to reset and to read."""
        return self.device.startswith("cuda")

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def keep(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        """Adds a row to gpu_rows.jsonl at once, so that a check that is cut off keeps its earlier rows."""
        with result_path("gpu_rows").with_suffix(".jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps({name: row}) + "\n")
        return row

    def table(self, rows: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
        """The rows that are wanted, one after the other."""
        return {
            "rows": {name: self.keep(name, row()) for name, row in rows.items() if not self.rows or name in self.rows}
        }


# --- PPO --------------------------------------------------------------------------------------------------------------

PUBLISHED = BenchConfig(iterations=1)
"""1000 prompts of 400 tokens, rows to 512, 8 batches of 8, 3 epochs."""
WIDE = BenchConfig(
    dtype="bf16", experience_batch_size=64, train_batch_size=64, micro_batch_size=8, update_timesteps=1, max_epochs=1,
    iterations=1, top_k=0,
)  # fmt: skip
"""One batch of 64 and one step on it."""
ROWS: dict[str, BenchConfig] = {
    "s, ddp, fp32, as published": replace(PUBLISHED, model="s"),
    "s, gemini_cpu, bf16, as published": replace(
        PUBLISHED, model="s", dtype="bf16", strategy="colossalai_gemini_cpu", device_memory="2GB"
    ),
    "s, ddp": replace(WIDE, model="s"),
    "xl, ddp": replace(WIDE, model="xl", micro_batch_size=16, recompute=True),
    "xl, gemini_cpu": replace(
        WIDE, model="xl", strategy="gemini_cpu", device_memory="20GB", host_memory="100GB", micro_batch_size=16
    ),
    "xl, hydra": replace(WIDE, model="xl", lora_rank=16, micro_batch_size=16),
    "6b, hydra": replace(WIDE, model="6b", lora_rank=16),
    "6b, gemini_auto_8bit": replace(
        WIDE, model="6b", strategy="gemini_auto_8bit", device_memory="70GB", host_memory="105GB", prompts=64,
        recompute=True,
    ),
}  # fmt: skip
GIANT = BenchConfig(
    dtype="bf16", strategy="gemini_auto", experience_batch_size=4, train_batch_size=4, micro_batch_size=4,
    update_timesteps=1, max_epochs=1, iterations=1, top_k=0, lora_rank=16, prompt_length=400, max_length=404,
    device_memory="70GB", host_memory="100GB", prompts=16,
)  # fmt: skip
"""As many tokens as the published benchmark reads, and few that are generated: every one of them streams the model."""
GIANTS: dict[str, BenchConfig] = {
    "opt-66b, hydra": replace(GIANT, model="opt-66b"),
    "175b, hydra on nf4": replace(GIANT, model="175b", base_dtype="nf4"),
}


PLAIN_ROWS = {
    ("s", "published"): (128, 64, 32), ("s", "fair"): (128, 64, 32), ("xl", "published"): (4, 3, 2, 1),
    ("xl", "fair"): (8, 6, 4, 2),
}  # fmt: skip
"""Where the search for the most rows begins."""


def table(target: Target) -> dict[str, Any]:
    """Rows of `penstock bench`, and the plain loop (transformers, AdamW) at the largest batch that it can hold."""
    rows = {name: lambda config=config: _ours(config, target) for name, config in ROWS.items()}
    rows |= {
        f"{size}, plain, {kind}": lambda size=size, kind=kind: _plain(size, kind, target) for size, kind in PLAIN_ROWS
    }
    return target.table(rows)


def giants(target: Target) -> dict[str, Any]:
    """One iteration of PPO of the largest models: four roles on one frozen base."""
    return target.table({name: lambda config=config: _ours(config, target) for name, config in GIANTS.items()})


def _ours(config: BenchConfig, target: Target) -> dict[str, Any]:
    if target.tiny:
        config = replace(
            config, model="s", layers=2, prompt_length=8, max_length=12, experience_batch_size=2, train_batch_size=2,
            micro_batch_size=1, device_memory="2GB" if config.device_memory else None, prompts=4, max_epochs=1,
            update_timesteps=1, host_memory="4GB" if config.host_memory else None,
        )  # fmt: skip
    config = replace(config, device=target.device)
    result = apart(lambda: bench(config), target.left())
    result.pop("profile", None)
    return result


def _plain(size: str, kind: str, target: Target) -> dict[str, Any]:
    """Samples per second at the most rows that it can hold, from above."""
    shape = shape_of(BenchConfig(size))
    length, new, layers = (8, 4, 2) if target.tiny else (400, 112, shape.num_layers)
    width, heads = (64, 4) if target.tiny else (shape.d_model, shape.num_heads)

    def timed(rows: int) -> dict[str, Any]:
        with torch.device(target.device):
            dtype = torch.float32 if kind == "published" else torch.bfloat16
            peer = plain.PPO(dtype, kind, n_layer=layers, n_embd=width, n_head=heads)
            prompts = torch.randint(1, shape.vocab_size, (rows, length))
            seconds = [seconds_of(lambda: peer.step(prompts, new), target.device) for _ in range(2)]  # one warms up
        peak = torch.cuda.max_memory_allocated() if target.gpu else None
        return {"rows": rows, "samples_per_second": rows / seconds[-1], "seconds": seconds, "peak": peak}

    tried = []
    for rows in (2, 1) if target.tiny else PLAIN_ROWS[size, kind]:
        tried.append(apart(lambda rows=rows: timed(rows), target.left()))
        if "error" not in tried[-1]:
            break
    return {"tried": tried, "best": tried[-1] if "error" not in tried[-1] else None}


# --- AutoChunk --------------------------------------------------------------------------------------------------------


def autochunk(target: Target) -> dict[str, Any]:
    """AutoChunk's table at its full lengths. Rows are planned side by side; what takes the device goes in turn."""
    transformers.logging.set_verbosity_error()
    device_lock = multiprocessing.get_context("fork").Lock()
    rows = [
        (name, attention, (8192 if attention == "eager" else 32768) if not target.tiny else 256, training)
        for name, shape in blocks.SHAPES.items()
        for attention in blocks.attentions(shape)
        for training in (False, True)
    ]

    def measured(name: str, attention: str, tokens: int, training: bool) -> dict[str, Any]:
        torch.set_num_threads(1)  # as many rows at once as there are
        for length in (tokens, tokens // 2):
            try:
                return blocks.measure(name, attention, length, training, 2, target.device, DeviceTurn(device_lock))
            except torch.OutOfMemoryError:
                release(target.device)
        return {"error": f"neither {tokens} nor {tokens // 2} tokens fit without slices"}

    running = {
        f"{row[0]}, {row[1]}, {'training' if row[3] else 'forward'}": Apart(lambda row=row: measured(*row))
        for row in (rows[:2] if target.tiny else rows)
    }
    return target.table({name: lambda row=row: row.result(target.left()) for name, row in running.items()})


class DeviceTurn(contextlib.AbstractContextManager):
    """Waits for the device, and gives its memory back at the end; may be entered again and again."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        release("cuda" if torch.cuda.is_initialized() else "cpu")
        self.lock.release()


def release(device: str) -> None:
    """Gives all free memory back to the device and starts counting its peak anew."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
