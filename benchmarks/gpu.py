"""Everything that only a GPU can tell, in one call under nine minutes: exactness first, then memory, then time.

    make gpu-check        or: python -m benchmarks gpu [--only exact table ...] [--rows ROW ...] [--seconds 500]

Each check, and each row of one that is a table, is a process of its own, so that its memory is its own and its failure
too, forked from one that has imported everything. A result is added to benchmarks/results/gpu.json ($OUT/gpu.json where
OUT is set) as soon as its check ends, so that running out of time loses nothing. `--device cpu --tiny` runs the same
code on small shapes without a GPU: that tests the checks, and its figures mean nothing.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import autochunk as blocks
from benchmarks import engine, exact, rollout
from benchmarks.facts import flags, result_path, write
from benchmarks.peers import ours, plain
from benchmarks.timing import seconds_of
from penstock.algorithms.sft import Rows
from penstock.commands.bench import micro
from penstock.commands.bench.capacity import capacity as find_capacity
from penstock.commands.bench.config import BenchConfig, CapacityConfig
from penstock.commands.bench.fit import shape_of
from penstock.commands.bench.run import bench
from penstock.errors import PenstockError
from penstock.kernels.cpu_ops import PLAIN, Scores
from penstock.memory.strategy import Strategy
from penstock.models import linear, log_probs, presets, tiling

SETTINGS = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Of the process that the checks are forked from. The last is Hopper's own default; torch requires it to be set where
results must not vary."""
THREADS = "PENSTOCK_BENCHMARK_THREADS"
"""The variable with the threads that a forked process computes on; default: all cores."""


@dataclass(frozen=True)
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

    def table(self, rows: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
        """The rows that are wanted, one after the other; each is added to gpu_rows.jsonl at once, so that a check that
        is cut off keeps its earlier rows."""
        results = {}
        for name, row in rows.items():
            if not self.rows or name in self.rows:
                results[name] = row()
                with result_path("gpu_rows").with_suffix(".jsonl").open("a", encoding="utf-8") as out:
                    out.write(json.dumps({name: results[name]}) + "\n")
        return {"rows": results}


def apart(call: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What a call returns in a forked process, and `seconds_in_all`; an `error` where it fails or takes longer than
    `seconds`. The parent must not have computed on several threads or asked a driver for anything before."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    began = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=_send_result, args=(call, sender))
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(max(seconds, 0)) else {"error": "no time left"}
    except EOFError:
        result = {"error": "the process ended without a result: killed, most likely for its memory"}
    process.kill()
    process.join()
    return {**result, "seconds_in_all": time.monotonic() - began}


def _send_result(call: Callable[[], dict[str, Any]], sender: Any) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with a check that ran out of time
    torch.set_num_threads(int(os.environ.get(THREADS) or len(os.sched_getaffinity(0))))
    try:
        torch.manual_seed(0)
        result = call()
    except PenstockError as error:
        result = {"error": f"{type(error).__name__}: {error}"[:400]}
    except Exception:
        result = {"error": traceback.format_exc()[-1500:]}
    sender.send(result)


def rates(target: Target) -> dict[str, Any]:
    """What the machine can do, as `penstock bench micro` measures it: copies and the link, bytes/s, and FLOP/s."""
    device = torch.device(target.device)
    return {
        **micro.copies(device, 5, target.tiny), "gemm_bf16": micro.gemm_peak(device, "bf16", 5, quick=target.tiny),
        "blas_workspace": _blas_workspace() if target.gpu else 0,
    }  # fmt: skip


def _blas_workspace() -> int:
    """Bytes of the allocator that the libraries keep for products, once a product and one with a bias have been made
    on the main stream; a fresh process's first product takes them."""
    a, bias = torch.randn(64, 64, device="cuda").bfloat16(), torch.zeros(64, device="cuda").bfloat16()
    torch.addmm(bias, a, a)
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    torch.addmm(bias, a, a) @ a
    return torch.cuda.memory_allocated() - before


class _Kernels(TorchDispatchMode):
    """The kernels of attention that were called; `math` writes all scores to memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.__name__ or "softmax" in func.__name__:
            self.names.add("math" if "softmax" in func.__name__ else func.__name__.partition(".")[0].strip("_"))
        return func(*args, **(kwargs or {}))


def attention(target: Target) -> dict[str, Any]:
    """The kernel and the seconds of attention with heads that share keys, forward and, over whole rows, backward."""
    rows, heads, groups, width, length = (2, 4, 2, 16, 32) if target.tiny else (8, 32, 8, 128, 2048)
    where = torch.arange(length, device=target.device)
    hidden = (where[:, None] < where) | (where[:, None] >= where + length // 4)
    windowed = torch.zeros((), device=target.device).masked_fill(hidden, -torch.inf)[None, None]
    sinks = Scores(sinks=torch.randn(heads, device=target.device))
    cases: dict[str, tuple[int, Tensor | None, Scores]] = {
        "whole rows": (length, None, PLAIN), "window": (length, windowed, PLAIN), "sinks": (length, None, sinks),
        "sinks, window": (length, windowed, sinks),
        "one token": (1, windowed[:, :, -1:].expand(rows, 1, 1, length), PLAIN),
    }  # fmt: skip
    results: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for name, (queries, bias, scores) in cases.items():
            q = torch.randn(rows, heads, queries, width, device=target.device, dtype=dtype, requires_grad=queries > 1)
            k, v = (torch.randn(rows, groups, length, width, device=target.device, dtype=dtype) for _ in range(2))
            bias = None if bias is None else bias.to(dtype)

            def run(q: Tensor = q, k: Tensor = k, v: Tensor = v, bias: Any = bias, scores: Scores = scores) -> None:
                mixed = linear.attention(q, k, v, bias, scores)
                if q.requires_grad:
                    mixed.sum().backward()

            with _Kernels() as kernels:
                run()
            results[f"{name}, {str(dtype).removeprefix('torch.')}"] = {
                "kernels": sorted(kernels.names), "seconds": seconds_of(run, target.device)
            }  # fmt: skip
    slow = [name for name, result in results.items() if "math" in result["kernels"]]
    return {"rows": results} | ({"error": f"all scores are written to memory: {slow}"} if target.gpu and slow else {})


def tax(target: Target) -> dict[str, Any]:
    """`engine tax`: an SFT step of XL streamed from host memory against resident, in bf16."""
    tiny, large = {"layers": 1, "length": 16, "micro": 16, "repeats": 1}, {"size": "xl", "layers": 48, "length": 1024}
    settings: Any = tiny if target.tiny else {**large, "repeats": 3, "device_memory": "12GB"}
    return engine.tax(device=target.device, dtype="bf16", **settings)


def head(target: Target) -> dict[str, Any]:
    """Seconds of log-probabilities and their gradients of 8192 states and Llama 3's vocabulary, by the logits that
    exist at once (`tiling.GPU_HEAD_TILE`)."""
    count, width, vocabulary = (64, 32, 500) if target.tiny else (8192, 4096, 128256)
    states, weight = (
        torch.randn(rows, width, device=target.device, dtype=torch.bfloat16, requires_grad=True)
        for rows in (count, vocabulary)
    )
    words = torch.randint(vocabulary, (count,), device=target.device)

    def run() -> None:
        log_probs.logprobs([(states, weight)], words, entropy=False)[0].sum().backward()

    seconds = {}
    for bits in (20, 22, 24, 26):
        with mock.patch.object(tiling, "GPU_HEAD_TILE", 1 << bits):
            seconds[f"2^{bits} logits"] = seconds_of(run, target.device)
    return {"seconds": seconds, "taken": tiling.GPU_HEAD_TILE}


def sft(target: Target) -> dict[str, Any]:
    """Tokens per second of SFT steps that move all weights of Llama 3 8B within 24 GB of device memory."""
    shape, rows, length, micro, memory = presets.named("llama-3-8b"), 64, 2048, 2, "24GB"
    if target.tiny:
        shape = replace(shape, num_layers=2, d_model=64, num_heads=2, num_kv_heads=1, d_ff=64)
        rows, length, micro, memory = 4, 16, 2, "300MB"

    def steps(name: str) -> dict[str, Any]:
        strategy = Strategy.named(name, dtype="bf16", device=target.device, device_memory=memory)
        step = ours.sft(strategy, strategy.prepare(ours.actor_of(strategy, shape)))
        tokens = torch.randint(1, shape.vocab_size, (rows, length), device=target.device)
        trained = torch.arange(length, device=target.device) > 0
        batches = [Rows(part, trained.expand_as(part)) for part in tokens.split(micro)]
        seconds = [seconds_of(lambda: step(batches), target.device) for _ in range(3)][1:]  # the first one warms up
        peak = torch.cuda.max_memory_allocated() if target.gpu else None
        return {"tokens_per_second": tokens.numel() / min(seconds), "seconds": seconds, "peak": peak}

    names = ("gemini_cpu", "gemini_cpu_8bit")
    return target.table({name: lambda name=name: apart(lambda: steps(name), target.left()) for name in names})


def capacity(target: Target) -> dict[str, Any]:
    """The deepest stack of XL's blocks whose PPO iteration completes in 16 GB of device memory, ours and plain."""
    config = CapacityConfig(
        "16GB", model="xl", strategy="gemini_auto_8bit", host_memory="100GB", prompt_length=32, max_length=64
    )
    if target.tiny:
        config = replace(
            config, device_memory="1GB", model="s", host_memory="3GB", prompt_length=4, max_length=8, layers=1
        )
    return find_capacity(config)


# --- PPO --------------------------------------------------------------------------------------------------------------

PUBLISHED = BenchConfig(model="s", iterations=1)
"""1000 prompts of 400 tokens, rows to 512, 8 batches of 8, 3 epochs."""
WIDE = BenchConfig(
    dtype="bf16", experience_batch_size=64, train_batch_size=64, micro_batch_size=8, update_timesteps=1, max_epochs=1,
    iterations=1, top_k=0,
)  # fmt: skip
"""One batch of 64 and one step on it."""
GIANT = BenchConfig(
    dtype="bf16", strategy="gemini_auto", experience_batch_size=4, train_batch_size=4, micro_batch_size=4,
    update_timesteps=1, max_epochs=1, iterations=1, top_k=0, lora_rank=16, prompt_length=400, max_length=404,
    device_memory="70GB", host_memory="100GB", prompts=16,
)  # fmt: skip
"""As many tokens as the published benchmark reads, and few that are generated: every one of them streams the model."""
SMALL = replace(
    WIDE, model="s", strategy="gemini_cpu", device_memory="250MB", experience_batch_size=1, train_batch_size=1,
    micro_batch_size=1,
)  # fmt: skip
"""124M PPO of one row at a time; the reference system needed 1.62 GB."""
ROWS: dict[str, BenchConfig] = {
    "s, ddp, fp32, as published": PUBLISHED,
    "s, gemini_cpu, bf16, as published": replace(
        PUBLISHED, dtype="bf16", strategy="colossalai_gemini_cpu", device_memory="2GB"
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
    "opt-66b, hydra": replace(GIANT, model="opt-66b"),
    "175b, hydra on nf4": replace(GIANT, model="175b", base_dtype="nf4"),
}  # fmt: skip
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


def _ours(config: BenchConfig, target: Target) -> dict[str, Any]:
    if target.tiny:
        config = replace(
            config, model="s", layers=2, prompt_length=8, max_length=12, experience_batch_size=2, train_batch_size=2,
            micro_batch_size=1, device_memory="2GB" if config.device_memory else None, prompts=4, max_epochs=1,
            update_timesteps=1, host_memory="4GB" if config.host_memory else None,
        )  # fmt: skip

    def run() -> dict[str, Any]:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # a small budget sets its own
        return bench(replace(config, device=target.device))

    figures = {key: figure for key, figure in apart(run, target.left()).items() if key != "profile"}
    if target.gpu and "planned" in figures:
        figures["planned_by_peak"] = figures["planned"]["device"] / figures["peak_device_bytes"]  # the bar: within 5 %
    return figures


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
    """AutoChunk's table at its full lengths, or at half of one where the device cannot hold it without slices."""
    transformers.logging.set_verbosity_error()
    rows = {
        f"{name}, {attention}, {'training' if training else 'forward'}": (name, attention, training)
        for name, shape in blocks.SHAPES.items()
        for attention in blocks.attentions(shape)
        for training in (False, True)
    }

    def measured(name: str, attention: str, training: bool) -> dict[str, Any]:
        tokens = 256 if target.tiny else 8192 if attention == "eager" else 32768
        try:
            return blocks.measure(name, attention, tokens, training, 2, target.device)
        except torch.OutOfMemoryError:
            return blocks.measure(name, attention, tokens // 2, training, 2, target.device)

    wanted = list(rows.items())[:2] if target.tiny else rows.items()
    return target.table({name: lambda row=row: apart(lambda: measured(*row), target.left()) for name, row in wanted})


CHECKS: dict[str, Callable[[Target], dict[str, Any]]] = {
    "exact": lambda target: exact.strategies(target.device, target.disk, steps=2 if target.tiny else 10),
    "features": lambda target: exact.features(target.device),
    "rates": rates,
    "attention": attention,
    "small": lambda target: _ours(SMALL, target),
    "table": table,
    "autochunk": autochunk,
    "head": head,
    "tax": tax,
    "sft": sft,
    "capacity": capacity,
    "rollout": lambda target: rollout.on_gpu(target.device, target.tiny),
}


def main(arguments: list[str]) -> int:
    """Runs the checks in order; returns 1 when one of them failed."""
    parser = flags(__doc__)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--disk", default="/tmp/penstock-gpu-check")
    parser.add_argument("--seconds", type=float, default=500, help="for all checks together")
    parser.add_argument("--rows", nargs="*", help="of the checks that are tables: these alone")
    options = parser.parse_args(arguments)
    if THREADS not in os.environ:  # a process whose OpenMP has begun to work must not fork a process that works too
        command = [sys.executable, "-m", "benchmarks", "gpu", *arguments]
        threads = "1" if options.tiny else str(len(os.sched_getaffinity(0)))
        return subprocess.run(command, env={**os.environ, **SETTINGS, THREADS: threads}).returncode
    if options.device == "cuda" and not apart(lambda: {"available": torch.cuda.is_available()}, 60)["available"]:
        print("this machine has no CUDA device; --device cpu --tiny tests the checks without one")
        return 2
    end = time.monotonic() + options.seconds
    target = Target(options.device, options.tiny, options.disk, end, tuple(options.rows or ()))
    results: dict[str, Any] = {}
    for name in options.only:
        if target.left() < 5:
            print(f"{name}: no time left")
            continue
        results[name] = apart(lambda name=name: CHECKS[name](target), target.left())
        print(name, json.dumps(results[name], indent=1), flush=True)
        apart(lambda: {"path": str(write("gpu", results, "transformers"))}, 60)  # it asks the driver for the GPU's name
    return int(any("error" in result for result in results.values()))
