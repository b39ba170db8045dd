"""Seconds of one training step, ours against the same work in plain transformers, in one process, in turns.

    python -m benchmarks throughput [--dtypes bf16 fp32] [--repeats 7] [--device cpu] [--name throughput]

GPT2-s with random weights. SFT: 4 rows x 128 tokens, all trained. PPO: 4 prompts x 64 tokens + 64 new ones, four
GPT2-s models, one epoch, one update of actor and of critic. A B A B ..., medians; a ratio below 1 says ours is faster.
"""

import json
from collections.abc import Callable

import torch

from benchmarks import timing
from benchmarks.facts import flags, write
from benchmarks.peers import ours, plain
from penstock.memory.strategy import Strategy
from penstock.models import presets

ROWS, LENGTH, PROMPT, NEW = 4, 128, 64, 64


def steps_of(work: str, strategy: Strategy) -> dict[str, Callable[[], object]]:
    """Our step and the peer's step of that work, on the same tokens."""
    device = strategy.world.device
    tokens = torch.randint(50257, (ROWS, LENGTH), device=device)
    if work == "sft":
        step, peer = ours.sft(strategy, presets.named("s")), plain.SFT(strategy.dtype)
        peer.model.to(device)
        return {"ours": lambda: step(tokens), "transformers": lambda: peer.step(tokens)}
    iterate, four = ours.ppo(strategy, presets.named("s"), ROWS), plain.PPO(strategy.dtype)
    for model in (four.actor, four.reference, four.critic, four.reward):
        model.to(device)
    prompts = tokens[:, :PROMPT]
    return {"ours": lambda: iterate(prompts, NEW), "transformers": lambda: four.step(prompts, NEW)}


def main(arguments: list[str]) -> int:
    """Measures every pair and writes the result."""
    parser = flags(__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--work", nargs="+", default=["sft", "ppo"], choices=["sft", "ppo"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default=None)
    parser.add_argument("--name", default="throughput", help="of the file in benchmarks/results/")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    steps = {}
    for dtype in options.dtypes:
        for work in options.work:
            strategy = Strategy.named("ddp", dtype=dtype, device=options.device)
            seconds = timing.in_turns(steps_of(work, strategy), options.repeats, strategy.world.device)
            row = {f"{side}_seconds": median for side, median in timing.medians(seconds).items()}
            row["ratio"] = timing.ratio(seconds, "ours", "transformers")
            row["ratios"] = sorted(round(ratio, 3) for ratio in timing.ratios(seconds, "ours", "transformers"))
            if phases := strategy.take_seconds():
                row["our_seconds_per_step"] = {name: spent / (options.repeats + 1) for name, spent in phases.items()}
            steps[f"{work} {dtype}"] = row
            print(f"{work} {dtype}: {json.dumps(row)}", flush=True)
    write(options.name, {"threads": torch.get_num_threads(), "steps": steps}, "transformers")
    return 0
