"""The checks of `benchmarks.gpu` that are tables: `penstock bench`, the plain loop, the largest models, AutoChunk.

Every row runs in a process of its own, so that its memory is its own and its failure too.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import autochunk as blocks
from benchmarks.facts import RESULTS
from benchmarks.peers import plain
from penstock.commands.bench.config import BenchConfig
from penstock.commands.bench.fit import shape_of
from penstock.commands.bench.run import bench
from penstock.errors import PenstockError


@dataclasses.dataclass(frozen=True)
class Place:
    """Where checks run, and whether shapes are cut down to test the checks themselves."""

    device: str
    tiny: bool
    disk: str
    end: float = float("inf")
    """When time is up, by time.monotonic."""
    rows: tuple[str, ...] = ()
    """The rows of a table that are wanted; none: all."""

    @property
    def gpu(self) -> bool:
        """Whether there is memory to reset and to read."""
        return self.device.startswith("cuda")

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def wants(self, name: str) -> bool:
        """Whether this row is to be measured."""
        return not self.rows or name in self.rows

    def keep(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        """Adds a row to gpu_rows.jsonl at once: a check that is cut off loses the rest only."""
        with (Path(os.environ.get("OUT", RESULTS)) / "gpu_rows.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps({name: row}) + "\n")
        return row

    def peak(self) -> int | None:
        """Bytes of device memory in use at most since `forget`, as PyTorch's allocator counts."""
        return torch.cuda.max_memory_allocated() if self.gpu else None

    def forget(self) -> None:
        """Gives everything back and starts counting anew."""
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def settle(self) -> None:
        """Waits until the device has done what it was given."""
        if self.gpu:
            torch.cuda.synchronize()


class Apart:
    """A call in a forked process: `result` waits for what it returned, or why it did not."""

    def __init__(self, call: Callable[[], dict[str, Any]]) -> None:
        self._here, there = multiprocessing.Pipe(duplex=False)
        self._began = time.monotonic()
        self._process = multiprocessing.get_context("fork").Process(target=_told, args=(call, there))
        self._process.start()
        there.close()

    def result(self, seconds: float) -> dict[str, Any]:
        """With `seconds_in_all`; an `error` where it failed or took longer."""
        try:
            found = self._here.recv() if self._here.poll(max(seconds, 0)) else {"error": "no time left"}
        except EOFError:
            found = {"error": "the process ended without a word: killed, most likely for its memory"}
        self._process.kill()
        self._process.join()
        return {**found, "seconds_in_all": time.monotonic() - self._began}


def _told(call: Callable[[], dict[str, Any]], there: Any) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive a check that ran out of time
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        torch.manual_seed(0)
        found = call()
    except PenstockError as error:
        found = {"error": f"{type(error).__name__}: {error}"[:400]}
    except Exception:
        found = {"error": traceback.format_exc()[-1500:]}
    there.send(found)


def apart(call: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What the call returns, made in a process of its own."""
    return Apart(call).result(seconds)


# --- PPO --------------------------------------------------------------------------------------------------------------

PUBLISHED = BenchConfig(iterations=1)
"""1000 prompts of 400 tokens, rows to 512, 8 batches of 8, 3 epochs."""
WIDE = BenchConfig(
    dtype="bf16", experience_batch_size=64, train_batch_size=64, micro_batch_size=8, update_timesteps=1, max_epochs=1,
    iterations=1, top_k=0,
)  # fmt: skip
"""One batch of 64 and one step on it."""
replace = dataclasses.replace
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


def table(place: Place) -> dict[str, Any]:
    """Rows of `penstock bench`, and the plain loop (transformers, AdamW) at the largest batch that it can hold."""
    found = {name: place.keep(name, _ours(config, place)) for name, config in ROWS.items() if place.wants(name)}
    for size, kind in (("s", "published"), ("s", "fair"), ("xl", "published"), ("xl", "fair")):
        if place.wants(f"{size}, plain, {kind}"):
            name = f"{size}, plain, {kind}"
            found[name] = place.keep(name, _plainly(size, kind, place))
    return {"rows": found}


def giants(place: Place) -> dict[str, Any]:
    """One iteration of PPO of the largest models: four roles on one frozen base."""
    wanted = {name: config for name, config in GIANTS.items() if place.wants(name)}
    return {"rows": {name: place.keep(name, _ours(config, place)) for name, config in wanted.items()}}


def _ours(config: BenchConfig, place: Place) -> dict[str, Any]:
    if place.tiny:
        config = replace(
            config, model="s", layers=2, prompt_length=8, max_length=12, experience_batch_size=2, train_batch_size=2,
            micro_batch_size=1, device_memory="2GB" if config.device_memory else None, prompts=4, max_epochs=1,
            update_timesteps=1, host_memory="4GB" if config.host_memory else None,
        )  # fmt: skip
    config = replace(config, device=place.device)
    found = apart(lambda: bench(config), place.left())
    found.pop("profile", None)
    return found


def _plainly(size: str, kind: str, place: Place) -> dict[str, Any]:
    """Samples per second at the most rows that it can hold, from above."""
    shape = shape_of(BenchConfig(size))
    width, new, layers = (8, 4, 2) if place.tiny else (400, 112, shape.num_layers)
    wide, heads = (64, 4) if place.tiny else (shape.d_model, shape.num_heads)

    def timed(rows: int) -> dict[str, Any]:
        with torch.device(place.device):
            dtype = torch.float32 if kind == "published" else torch.bfloat16
            peer = plain.PPO(dtype, kind, n_layer=layers, n_embd=wide, n_head=heads)
            prompts = torch.randint(1, shape.vocab_size, (rows, width))
            seconds = []
            for _ in range(2):  # the first warms up
                place.settle()
                began = time.perf_counter()
                peer.step(prompts, new)
                place.settle()
                seconds.append(time.perf_counter() - began)
        return {"rows": rows, "samples_per_second": rows / seconds[-1], "seconds": seconds, "peak": place.peak()}

    tried = []
    for rows in (2, 1) if place.tiny else PLAIN_ROWS[size, kind]:
        tried.append(apart(lambda rows=rows: timed(rows), place.left()))  # type: ignore[misc]
        if "error" not in tried[-1]:
            break
    return {"tried": tried, "best": tried[-1] if "error" not in tried[-1] else None}


# --- AutoChunk --------------------------------------------------------------------------------------------------------


def autochunk(place: Place) -> dict[str, Any]:
    """AutoChunk's table at its full lengths. Rows are planned side by side; what takes the device goes in turn."""
    transformers.logging.set_verbosity_error()
    device_free = multiprocessing.get_context("fork").Lock()
    asked = [
        (name, attention, (8192 if attention == "eager" else 32768) if not place.tiny else 256, training)
        for name, one in blocks.SHAPES.items()
        for attention in ("eager", "sdpa")[: 1 if one["kind"] == "bloom" else 2]
        for training in (False, True)
    ]
    if place.tiny:
        asked = asked[:2]

    @contextlib.contextmanager
    def turn() -> Any:
        with device_free:
            yield
            place.forget()

    def row(name: str, attention: str, tokens: int, training: bool) -> dict[str, Any]:
        torch.set_num_threads(1)  # many rows at once
        for length in (tokens, tokens // 2):
            try:
                return blocks.measure(name, attention, length, training, 2, place.device, _Again(turn))
            except torch.OutOfMemoryError:
                place.forget()
        return {"error": f"neither {tokens} nor {tokens // 2} tokens fit without slices"}

    running = {
        f"{one[0]}, {one[1]}, {'training' if one[3] else 'forward'}": Apart(lambda one=one: row(*one))  # type: ignore[misc]
        for one in asked
    }
    return {"rows": {name: place.keep(name, one.result(place.left())) for name, one in running.items()}}


class _Again(contextlib.AbstractContextManager):
    """A context manager that can be entered again and again."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._now = self._make()
        self._now.__enter__()

    def __exit__(self, *how: Any) -> Any:
        return self._now.__exit__(*how)
