"""Seconds of one training step, ours against the same work in plain transformers, in one process, in turns.

    python -m benchmarks.throughput [--dtypes bf16 fp32] [--repeats 7] [--device cpu] [--name throughput]

GPT2-s with random weights. SFT: 4 rows x 128 tokens, all trained. PPO: 4 prompts x 64 tokens + 64 new ones, four
GPT2-s models, one epoch, one update of actor and of critic. A B A B ..., medians; a ratio below 1 says ours is faster.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.facts import write
from benchmarks.peers import ours, plain
from penstock.memory.strategy import Strategy
from penstock.models import presets

ROWS, LENGTH, PROMPT, NEW = 4, 128, 64, 64


def both(work: str, strategy: Strategy) -> tuple[Callable[[], object], Callable[[], object]]:
    """(our step, the peer's step) of that work, on the same tokens."""
    device = strategy.world.device
    tokens = torch.randint(50257, (ROWS, LENGTH), device=device)
    if work == "sft":
        mine, peer = ours.sft(strategy, presets.named("s")), plain.SFT(strategy.dtype)
        peer.model.to(device)
        return lambda: mine(tokens), lambda: peer.step(tokens)
    iterate, four = ours.ppo(strategy, presets.named("s"), ROWS), plain.PPO(strategy.dtype)
    for model in (four.actor, four.reference, four.critic, four.reward):
        model.to(device)
    return lambda: iterate(tokens[:, :PROMPT], NEW), lambda: four.step(tokens[:, :PROMPT], NEW)


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(mine: Callable[[], object], theirs: Callable[[], object], repeats: int, device: torch.device) -> dict:
    """Medians of A B A B ... after one warm-up of each, and the median of the paired ratios."""
    seconds(mine, device), seconds(theirs, device)
    pairs = [(seconds(mine, device), seconds(theirs, device)) for _ in range(repeats)]
    return {
        "ours_seconds": statistics.median(a for a, _ in pairs),
        "transformers_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "ratios": sorted(round(a / b, 3) for a, b in pairs),
    }


def main() -> None:
    """Measures every pair and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--work", nargs="+", default=["sft", "ppo"], choices=["sft", "ppo"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default=None)
    parser.add_argument("--name", default="throughput", help="of the file in benchmarks/results/")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    measured = {}
    for dtype in arguments.dtypes:
        for work in arguments.work:
            strategy = Strategy.named("ddp", dtype=dtype, device=arguments.device)
            mine, theirs = both(work, strategy)
            result = in_turns(mine, theirs, arguments.repeats, strategy.world.device)
            if phases := strategy.take_seconds():
                result["our_seconds_per_step"] = {k: v / (arguments.repeats + 1) for k, v in phases.items()}
            measured[f"{work} {dtype}"] = result
            print(f"{work} {dtype}: {json.dumps(result)}", flush=True)
    write(arguments.name, {"threads": torch.get_num_threads(), "steps": measured}, "transformers")


if __name__ == "__main__":
    main()
