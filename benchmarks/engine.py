"""The memory engine against what it could be at best, each in one run.

python -m benchmarks engine adamw     the split-master update of 67M weights against a plain copy's bandwidth
python -m benchmarks engine tax       an SFT step under gemini_cpu against the same step resident, 8192 tokens per visit
python -m benchmarks engine head      log-probabilities of 4 x 1024 tokens of GPT-2's vocabulary, and their gradients,
                                      against plain PyTorch: bytes and seconds
python -m benchmarks engine pages     the first touch of 1 GiB that is pinned, against shared pages; 512 MiB from a disk
                                      through the ring to an imagined device, against fresh pages and one copy
python -m benchmarks engine padding   SFT steps on ragged rows of 16 to 1024 tokens, end to end against padded
"""

import dataclasses
import mmap
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

from benchmarks import timing
from benchmarks.facts import run_measures
from benchmarks.peers import ours
from penstock.algorithms.sft import Rows, micro_batches, rows_of
from penstock.autochunk.meter import Meter
from penstock.commands.bench import micro
from penstock.data.chat import Example
from penstock.kernels import compile as compiler
from penstock.memory import plan, tiers
from penstock.memory.adamw import SOURCE
from penstock.memory.strategy import Strategy
from penstock.memory.stream import Stream
from penstock.models import log_probs as heads
from penstock.models import presets

ROWS = 16
"""Of each step of `tax`."""


def adamw(repeats: int = 9) -> dict[str, Any]:
    """Bytes per second as `penstock bench micro` counts them: 28 for each of 67M weights; a copy reads and writes."""
    cpu = torch.device("cpu")
    update = partial(micro.adamw_rate, cpu, 1, False)

    def without_compiler() -> float:
        with mock.patch.object(compiler, "compiled", return_value="not this time"):
            return update()

    copy = lambda: micro.copies(cpu, 1, False)["copy"]  # noqa: E731
    ways = {"update": update, "in_torch_operations": without_compiler, "copy": copy}
    rates = timing.medians(timing.alternate(ways, repeats))
    return {
        "compiled": not isinstance(compiler.compiled(SOURCE), str),
        "bytes_per_second": rates,
        "ratio": rates["update"] / rates["copy"],
        "ratio_in_torch_operations": rates["in_torch_operations"] / rates["copy"],
    }


def tax(
    size: str = "s", layers: int = 3, length: int = 512, micro: int = 4, repeats: int = 7,
    *, device: str = "cpu", dtype: str = "fp32", device_memory: str = "600MB",
) -> dict[str, Any]:  # fmt: skip
    """SFT steps of a GPT-2 with `layers` of its blocks. `resident` recomputes too, as every streamed run does; `kept`
    is resident and keeps what is inside a micro-batch's blocks. Half of 600 MB is the token table and its gradient.
    """
    shape = dataclasses.replace(presets.named(size), num_layers=layers)
    tokens = torch.randint(50257, (ROWS, length), device=device)
    trained = torch.arange(length, device=device) >= max(1, length - 64)
    batches = [Rows(part, trained.expand_as(part)) for part in tokens.split(micro)]

    def step_under(name: str, recompute: bool) -> Callable[[], object]:
        budget = device_memory if name == "gemini_cpu" else None
        strategy = Strategy.named(name, dtype=dtype, device=device, device_memory=budget, recompute=recompute)
        step = ours.sft(strategy, strategy.prepare(ours.actor_of(strategy, shape)))
        return lambda: step(batches)

    calls = {
        "gemini_cpu": step_under("gemini_cpu", True),
        "resident": step_under("gemini", True),
        "kept": step_under("gemini", False),
    }
    seconds = timing.in_turns(calls, repeats, device)
    medians = timing.medians(seconds)
    return {
        "tokens_per_visit": ROWS * length,
        "layers": layers,
        "seconds": medians,
        "ratio_to_resident": timing.ratio(seconds, "gemini_cpu", "resident"),
        "ratios_to_resident": timing.ratios(seconds, "gemini_cpu", "resident"),
        "ratio_to_kept": medians["gemini_cpu"] / medians["kept"],
    }


def head(repeats: int = 5, tokens: int = 4096, vocabulary: int = 50257, width: int = 768) -> dict[str, Any]:
    """Sum of log-probs and its gradients to states and head; peaks are of what is made on the way, gradients of the
    states included."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, width, generator=generator) * 0.02)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: heads.logprobs([(states, weight)], targets, entropy=False)[0],
        "plain": lambda: torch.log_softmax(F.linear(states, weight), dim=-1).gather(1, targets[:, None])[:, 0],
    }

    def run(way: str) -> tuple[torch.Tensor, ...]:
        states.grad, weight.grad = None, torch.zeros_like(weight)  # a sink keeps room for it
        log_probs = ways[way]()
        log_probs.sum().backward()
        return log_probs.detach(), states.grad, weight.grad

    peaks, results = {}, {}
    for way in ways:
        weight.grad = None
        with Meter() as meter:
            results[way] = run(way)
            peaks[way] = meter.peak - weight.nbytes
    gaps = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(results["ours"], results["plain"], strict=True)]
    del results
    seconds = timing.in_turns({way: lambda way=way: run(way) for way in ways}, repeats)
    return {
        "peak_bytes": peaks,
        "memory_ratio": peaks["ours"] / peaks["plain"],
        "largest_gaps": dict(zip(("logprobs", "states", "head"), gaps, strict=True)),
        "seconds": seconds,
        "time_ratio": timing.ratio(seconds, "ours", "plain"),
    }


def pages(repeats: int = 5, directory: str | None = None) -> dict[str, Any]:
    """The imagined device's copies are made by a thread of this machine, with the cores that read."""
    nbytes, cpu = 1 << 30, torch.device("cpu")

    def shared() -> None:
        memory = mmap.mmap(-1, nbytes)
        memory.madvise(mmap.MADV_HUGEPAGE)
        torch.frombuffer(memory, dtype=torch.uint8).fill_(0)

    with mock.patch.object(tiers, "_pin"):
        touch = timing.in_turns(
            {"shared": shared, "ours": lambda: tiers.empty_pages(nbytes, cpu, pinned=True)}, repeats
        )  # fmt: skip
        ring = tiers.Ring(tiers.empty_pages(plan.RING_BYTES, cpu, pinned=True))
    out = torch.zeros(nbytes // 2, dtype=torch.uint8)
    with tempfile.TemporaryDirectory(dir=directory) as folder, ThreadPoolExecutor(1) as stream:
        disk = tiers.Disk(folder)
        disk.ring, home = ring, disk.home(out.numel(), torch.uint8, "weights")
        home.write(torch.randint(256, out.shape, dtype=torch.uint8))

        def fresh() -> None:
            memory = tiers.empty_pages(out.numel(), cpu)
            home.read(memory)
            out.copy_(memory)

        def copy(source: torch.Tensor, target: torch.Tensor) -> Any:
            done: Future = stream.submit(target.copy_, source)
            return mock.Mock(synchronize=done.result, wait=done.result)

        def through_ring() -> None:
            for copied in disk.pass_on(home.offset, out, copy):
                copied.wait()

        read = timing.in_turns({"fresh": fresh, "ours": through_ring, "disk alone": lambda: home.read(out)}, repeats)
        disk.close()
    return {
        "touch_bytes_per_second": timing.rates(touch, nbytes),
        "touch_ratio": timing.ratio(touch, "shared", "ours"),
        "read_bytes_per_second": timing.rates(read, out.numel()),
        "read_ratio": timing.ratio(read, "fresh", "ours"),
    }


def padding(
    rows: int = 32, width: int = 192, layers: int = 2, vocabulary: int = 2048, longest: int = 1024, rounds: int = 5
) -> dict[str, Any]:
    """SFT steps of a Llama in micro-batches of 8 of 32 sorted rows, and of 8 rows as they come, with lengths that are
    uniform (like cut texts) or log-uniform (like chats); and of groups of 8 answers, an eighth as long as log-uniform
    rows, to one prompt of `longest` / 4 tokens. Tokens per second are those of whole rows, without padding."""
    shape = dataclasses.replace(
        presets.named("s"), family="llama", position="rotary", rotary_dim=64, norm="rms", activation="silu", gated=True,
        vocab_size=vocabulary, d_model=width, num_layers=layers, num_heads=width // 64, num_kv_heads=width // 64,
        d_ff=width * 8 // 3, max_length=longest, qkv_bias=False, out_bias=False, mlp_bias=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(rows, generator=generator).tolist()
    lengths = {
        "uniform": [round(16 + (longest - 16) * share) for share in shares],
        "log-uniform": [round(16 * (longest / 16) ** share) for share in shares],
    }
    steps, streams = {}, {}
    for way in ("padded", "end_to_end"):
        torch.manual_seed(0)  # equal weights
        strategy = Strategy.named("ddp", device="cpu", padding_free=way == "end_to_end")
        streams[way] = strategy.prepare(ours.actor_of(strategy, shape))
        steps[way] = ours.sft(strategy, streams[way], lr=0.0)  # the gradients of both ways stay comparable
    result: dict[str, Any] = {"model": f"llama, {layers} blocks of {width}, {vocabulary} words", "runs": {}}

    def draw(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    def eights(examples: Sequence[Example]) -> list[Rows]:
        return [rows_of(examples[i : i + 8], torch.device("cpu")) for i in range(0, rows, 8)]

    works: dict[str, list[Rows]] = {}
    for name, counts in lengths.items():
        examples = [Example(draw(n), [False] + [True] * (n - 1)) for n in counts]
        works[f"{name}, sorted"] = micro_batches(examples, 8, torch.device("cpu"))
        works[f"{name}, as they come"] = eights(examples)
    prompts = [draw(longest // 4) for _ in range(rows // 8)]
    answers = [(prompts[i // 8], draw(2 + n // 8)) for i, n in enumerate(lengths["log-uniform"])]
    works["8 answers to one prompt, as they come"] = eights(
        [Example(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for prompt, answer in answers]
    )
    for name, batches in works.items():
        calls = {way: partial(step, batches) for way, step in steps.items()}
        seconds, tokens = timing.in_turns(calls, rounds), sum(int(batch.valid.sum()) for batch in batches)
        result["runs"][name] = {
            "tokens": tokens,
            "computed": sum(int(batch.computed.sum()) for batch in batches),
            "share_of_padding": 1 - tokens / sum(batch.tokens.numel() for batch in batches),
            "seconds": timing.medians(seconds),
            "tokens_per_second": timing.rates(seconds, tokens),
            "speedup": timing.ratio(seconds, "padded", "end_to_end"),
            "speedups": timing.ratios(seconds, "padded", "end_to_end"),
            "largest_gradient_gap": gradient_gap(streams["padded"], streams["end_to_end"]),
        }
    return result


def gradient_gap(stream: Stream, other: Stream) -> float:
    """The largest difference of two equal models' latest gradients, over the largest gradient of its chunk."""
    pairs = [(a.grads, b.grads) for a, b in zip(stream.homes, other.homes, strict=True)]
    return max(float((b.tensor - a.tensor).abs().max() / a.tensor.abs().max()) for a, b in pairs)


def main(arguments: list[str]) -> int:
    """Writes engine_NAME.json."""
    measures = {"adamw": adamw, "tax": tax, "head": head, "pages": pages, "padding": padding}
    return run_measures(arguments, __doc__, measures, "engine")
