"""The memory engine against what it could be at best, each in one run.

python -m benchmarks.engine adamw     the split-master update of 100M weights against a plain copy's bandwidth
python -m benchmarks.engine tax       an SFT step under gemini_cpu against the same step resident, 8192 tokens per visit
python -m benchmarks.engine small     PPO of four GPT2-s, batch 1, 400 + 112 tokens: the most device memory in use
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.facts import write
from penstock.algorithms import functional as fn
from penstock.algorithms.ppo import Experience, actor_loss, critic_loss, score, with_advantages
from penstock.algorithms.reward import score_rows
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.config import DataFlags, OptimFlags, PPOConfig, RunFlags
from penstock.memory.adam import AdamW, states_of
from penstock.memory.meter import Meter
from penstock.memory.strategy import Strategy
from penstock.models import sizes
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor, Critic, RewardModel
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, A B A B ..., after one warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def adamw(repeats: int = 9, numel: int = 100_000_000) -> dict[str, Any]:
    """28 bytes per parameter move at least: weight, remainder, gradient and two moments in, all but the gradient out,
    and 2 for the gradient's own arrival. The copy reads and writes 8."""
    weights, grads = (torch.randn(numel).bfloat16() for _ in range(2))
    states = {name: torch.zeros(numel, dtype=dtype) for name, dtype in states_of(torch.bfloat16).items()}
    x, y = torch.zeros(numel), torch.ones(numel)
    seconds = in_turns(
        {
            "update": lambda: AdamW().update(weights, states, grads, lr=1e-6, scale=0.5, step=1),
            "copy": lambda: x.copy_(y),
        },
        repeats,
    )
    rates = {
        "update": 28 * numel / statistics.median(seconds["update"]),
        "copy": 8 * numel / statistics.median(seconds["copy"]),
    }
    return {"bytes_per_second": rates, "ratio": rates["update"] / rates["copy"], "seconds": seconds}


def tax(repeats: int = 3, rows: int = 16, length: int = 512, layers: int = 3, dtype: str = "fp32") -> dict[str, Any]:
    """GPT2-s with `layers` of its 12 blocks. `resident` recomputes too, as every streamed run does; `kept` is resident
    and keeps all activations of a micro-batch of 4 rows instead."""
    tokens = torch.randint(50257, (rows, length))

    def step_under(name: str, recompute: bool) -> Callable[[], object]:
        budget = "600MB" if name == "gemini_cpu" else None  # the token table and its gradient are half of that
        strategy = Strategy.named(name, dtype=dtype, device="cpu", device_memory=budget, recompute=recompute)
        with strategy.init():
            actor = Actor(Decoder(dataclasses.replace(sizes.named("s"), num_layers=layers)))
        stream = strategy.prepare(actor)
        batches = [Rows(part, torch.arange(length).expand_as(part) >= length - 64) for part in tokens.split(4)]
        count = sum(int(one.trained.sum()) for one in batches)

        def loss_of(hidden: torch.Tensor, one: Rows) -> tuple:
            return fn.sft_loss(response_logprobs(actor, hidden, one), count), {}

        return lambda: strategy.step(stream, batches, loss_of, lr=1e-5)

    calls = {
        "gemini_cpu": step_under("gemini_cpu", True),
        "resident": step_under("gemini", True),
        "kept": step_under("gemini", False),
    }
    seconds = in_turns(calls, repeats)
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    pairs = zip(seconds["gemini_cpu"], seconds["resident"], strict=True)
    return {
        "tokens_per_visit": rows * length,
        "layers": layers,
        "seconds": medians,
        "ratio_to_resident": statistics.median(a / b for a, b in pairs),
        "ratio_to_kept": medians["gemini_cpu"] / medians["kept"],
    }


def small(prompt: int = 400, new: int = 112, device_memory: str = "180MB") -> dict[str, Any]:
    """Two iterations of PPO with batch 1: what lives in the device tier, and what tensors take beside it at most."""
    strategy = Strategy.named("gemini_cpu", dtype="bf16", device="cpu", device_memory=device_memory)
    with strategy.init():
        actor, reference = Actor(Decoder(sizes.named("s"))), Actor(Decoder(sizes.named("s"))).requires_grad_(False)
        critic = Critic(Decoder(sizes.named("s")))
        reward = RewardModel(Decoder(sizes.named("s"))).requires_grad_(False)
    actors, references, critics, rewards = map(strategy.prepare, (actor, reference, critic, reward))
    config = PPOConfig(
        actor="", reward="", data=DataFlags(data=("",)), run=RunFlags(out=""), optim=OptimFlags(lr=1e-6),
        max_new_tokens=new,
    )  # fmt: skip
    peaks: dict[str, int] = {}

    def scorer(records: object, answers: list) -> list[float]:
        return score_rows(strategy, rewards, reward, [one.prompt_ids + one.response_ids for one in answers], 1)

    for _ in range(2):
        meters = {name: Meter() for name in ("rollout", "score", "train")}
        with meters["rollout"], strategy.phase("rollout"):
            prompts = torch.randint(50257, (1, prompt)).tolist()
            rollout = generate(actor.decoder, prompts, Sampling(max_new_tokens=new), eos_ids=())
        with meters["score"], strategy.phase("score"):
            experience = score(strategy, rollout, [None], actors, references, critics, scorer, config, 1)
        experience = with_advantages(experience, config.kl_coef, config)
        count = int(experience.lengths.sum())

        def policy_loss(hidden: torch.Tensor, part: Experience, count: int = count) -> tuple:
            return actor_loss(actor, hidden, part, config, count, 0)

        def value_loss(hidden: torch.Tensor, part: Experience, count: int = count) -> tuple:
            return critic_loss(critic, hidden, part, config, count)

        with meters["train"], strategy.phase("train"):
            strategy.step(actors, [experience], policy_loss, lr=1e-6)
            strategy.step(critics, [experience], value_loss, lr=1e-6)
        peaks = {name: max(meter.peak, peaks.get(name, 0)) for name, meter in meters.items()}
    tier = strategy.tiers["device"].peak
    return {
        "device_peak_bytes": tier + max(peaks.values()),
        "device_tier_bytes": tier,
        "tensors_beside_it_bytes": peaks,
        "host_bytes": strategy.tiers["host"].peak,
    }


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["adamw", "tax", "small"])
    what = parser.parse_args().what
    torch.manual_seed(0)
    found = {"adamw": adamw, "tax": tax, "small": small}[what]()
    print({key: value for key, value in found.items() if key != "seconds" or what != "adamw"})
    write(f"engine_{what}", {"threads": torch.get_num_threads(), **found})


if __name__ == "__main__":
    main()
