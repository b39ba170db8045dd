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
from benchmarks.peers import plain
from penstock.algorithms import functional as fn
from penstock.algorithms.ppo import actor_loss, critic_loss, score, with_advantages
from penstock.algorithms.reward import score_rows
from penstock.algorithms.sft import Rows, response_logprobs, rows_of
from penstock.config import DataFlags, OptimFlags, PPOConfig, RunFlags
from penstock.data.chat import Example
from penstock.memory.strategy import Strategy
from penstock.models import sizes
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor, Critic, RewardModel
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling

ROWS, LENGTH, PROMPT, NEW = 4, 128, 64, 64


def small() -> Decoder:
    """GPT-2 small with random weights, on torch's default device and in its default dtype."""
    return Decoder(sizes.named("s"))


def our_sft(strategy: Strategy) -> Callable[[torch.Tensor], object]:
    """One call = one `sft` step."""
    with strategy.init():
        actor = Actor(small())
    stream = strategy.prepare(actor)

    def step(tokens: torch.Tensor) -> object:
        rows = [Example(row, [False] + [True] * (len(row) - 1)) for row in tokens.tolist()]
        count = sum(sum(row.trained) for row in rows)

        def loss_of(hidden: torch.Tensor, part: Rows) -> tuple:
            return fn.sft_loss(response_logprobs(actor, hidden, part), count), {}

        return strategy.step(stream, [rows_of(rows, strategy.world.device)], loss_of, lr=1e-5)

    return step


def our_ppo(strategy: Strategy) -> Callable[[torch.Tensor], object]:
    """One call = one `ppo` step, put together as in the loop of algorithms/ppo.py."""
    with strategy.init():
        actor = Actor(small())
        reference = actor.frozen()
        critic = Critic(small())
        reward = RewardModel(small()).eval().requires_grad_(False)
    actors, critics = strategy.prepare(actor), strategy.prepare(critic)
    references, rewards = strategy.prepare(reference), strategy.prepare(reward)
    config = PPOConfig(
        actor="", reward="", data=DataFlags(data=("",)), run=RunFlags(out=""), optim=OptimFlags(lr=1e-5),
        max_new_tokens=NEW,
    )  # fmt: skip

    def scorer(records: object, answers: list) -> list[float]:
        return score_rows(strategy, rewards, reward, [a.prompt_ids + a.response_ids for a in answers], ROWS)

    def step(prompts: torch.Tensor) -> object:
        with strategy.phase("rollout"):
            rollout = generate(actor.decoder, prompts.tolist(), Sampling(max_new_tokens=NEW), eos_ids=())
        with strategy.phase("score"):
            experience = score(strategy, rollout, [None] * ROWS, actors, references, critics, scorer, config, ROWS)
        experience = with_advantages(experience, config.kl_coef, config).to(strategy.world.device)
        count = int(experience.lengths.sum())
        with strategy.phase("train"):
            strategy.step(
                actors, [experience], lambda hidden, part: actor_loss(actor, hidden, part, config, count, 0), lr=1e-5
            )
            return strategy.step(
                critics, [experience], lambda hidden, part: critic_loss(critic, hidden, part, config, count), lr=1e-5
            )

    return step


def both(work: str, strategy: Strategy) -> tuple[Callable[[], object], Callable[[], object]]:
    """(our step, the peer's step) of that work, on the same tokens."""
    device = strategy.world.device
    tokens = torch.randint(50257, (ROWS, LENGTH), device=device)
    if work == "sft":
        mine, peer = our_sft(strategy), plain.SFT(strategy.dtype)
        peer.model.to(device)
        return lambda: mine(tokens), lambda: peer.step(tokens)
    mine, four = our_ppo(strategy), plain.PPO(strategy.dtype)
    for model in (four.actor, four.reference, four.critic, four.reward):
        model.to(device)
    return lambda: mine(tokens[:, :PROMPT]), lambda: four.step(tokens[:, :PROMPT], NEW)


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], repeats: int, device: torch.device) -> dict:
    """Medians of A B A B ... after one warm-up of each, and the median of the paired ratios."""
    seconds(ours, device), seconds(theirs, device)
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repeats)]
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
            ours, theirs = both(work, strategy)
            result = in_turns(ours, theirs, arguments.repeats, strategy.world.device)
            if phases := strategy.take_seconds():
                result["our_seconds_per_step"] = {k: v / (arguments.repeats + 1) for k, v in phases.items()}
            measured[f"{work} {dtype}"] = result
            print(f"{work} {dtype}: {json.dumps(result)}", flush=True)
    write(arguments.name, {"threads": torch.get_num_threads(), "steps": measured}, "transformers")


if __name__ == "__main__":
    main()
