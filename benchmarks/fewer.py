"""Fewer bytes: the head in tiles, and merged adapters.

    python -m benchmarks fewer [head merged] [--repeats 5]

`head`: log-probabilities of 4 x 1024 tokens of GPT-2's vocabulary, forward and backward, against plain PyTorch: bytes
and seconds. `merged`: tokens per second of a merged adapter, of one beside its base, and of the base.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import timing
from benchmarks.facts import run_measures
from penstock.autochunk.meter import Meter
from penstock.models import log_probs as heads
from penstock.models import lora, presets, surgery
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling


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


def merged(repeats: int = 5, size: str = "s", rows: int = 8, prompt: int = 64, new: int = 64) -> dict[str, Any]:
    """Greedy generation in bf16 by the base, by a separate adapter ("beside"), and by the adapter merged into it."""
    prompts = torch.randint(50257, (rows, prompt)).tolist()
    models = {name: Decoder(presets.named(size), dtype=torch.bfloat16) for name in ("base", "merged", "beside")}
    for name in ("merged", "beside"):
        surgery.add_adapters(models[name], LoraSpec(16))
        with torch.no_grad():
            for adapter in lora.adapters_of(models[name]):
                adapter.b.normal_(std=0.02)
    surgery.merge_adapters(models["merged"], keep=False)
    sampling = Sampling(temperature=0.0, max_new_tokens=new)
    calls = {name: lambda model=model: generate(model, prompts, sampling, eos_ids=()) for name, model in models.items()}
    seconds = timing.in_turns(calls, repeats)
    return {
        "tokens_per_second": timing.rates(seconds, rows * new),
        "merged_over_base": timing.ratio(seconds, "base", "merged"),
        "seconds": seconds,
    }


def main(arguments: list[str]) -> int:
    """Writes fewer_NAME.json."""
    return run_measures(arguments, __doc__, {"head": head, "merged": merged}, "fewer")
