"""Two ranks over gloo against the ideal of this machine: two single-threaded processes that never talk.

    python -m benchmarks.ranks [--model m] [--layers N] [--strategies zero2 gemini] [--rounds 3]

Learning alone: PPO's optimizer steps of actor and critic on a ready-made experience (reference and reward model take no
part in it and are left out, so that two whole copies fit). Each process has --rows episodes per step, alone or as its
share. In turns: alone twice side by side, then each strategy, and again; samples per second of both together, and their
share of the ideal by the medians.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.facts import write
from penstock.algorithms.experience import Experience, Roles
from penstock.algorithms.ppo import PPO
from penstock.commands.bench.work import fill_quickly
from penstock.config import OptimFlags
from penstock.memory.strategy import Strategy
from penstock.models import presets
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor, Critic

IDEAL = "alone"


def experience_of(rows: int, prompt: int, new: int, vocabulary: int) -> Experience:
    """Random episodes, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (rows, prompt + new), generator=generator)
    per_token = torch.zeros(rows, new)
    lengths = torch.full((rows,), new)
    advantages = torch.randn(rows, new, generator=generator)
    return Experience(
        tokens, torch.full((rows,), prompt), lengths, per_token - 10, per_token - 10, per_token, per_token, per_token,
        torch.zeros(rows), torch.zeros(rows, dtype=torch.bool), advantages, advantages,
    )  # fmt: skip


def learn(asked: argparse.Namespace) -> None:
    """One process of a measurement: prints the seconds of each step, the first of which warms up."""
    torch.set_num_threads(1)
    name = "naive" if asked.side == IDEAL else asked.side
    name, _, kept = name.partition(", ")  # "gemini, kept" keeps what is inside blocks while weights move
    strategy = Strategy.named(name, dtype=asked.dtype, device="cpu", recompute=False if kept else None)
    world = strategy.world
    shape = presets.named(asked.model)
    shape = dataclasses.replace(shape, num_layers=asked.layers or shape.num_layers)
    with strategy.init():
        actor, critic = Actor(Decoder(shape)), Critic(Decoder(shape))
    for model in (actor, critic):
        model.fill = fill_quickly  # type: ignore[method-assign]
    actors, critics = strategy.prepare_all(actor, critic)
    rows = asked.rows * world.size
    optim = OptimFlags(lr=1e-6, batch_size=rows, micro_batch_size=asked.rows)
    iteration = PPO(strategy, Roles(actors, actors, critics), optim)
    experience = experience_of(rows, asked.prompt, asked.new, shape.vocab_size)
    seconds = []
    for _ in range(asked.steps + 1):
        began = time.perf_counter()
        iteration.learn(experience, torch.arange(rows))
        seconds.append(time.perf_counter() - began)
    if world.first:
        print("seconds", json.dumps(seconds), flush=True)
    world.leave()


def side(name: str, asked: argparse.Namespace) -> list[float]:
    """Samples per second of both processes together, step by step. Raises RuntimeError when one fails."""
    flags = ["--side", name]
    for flag in ("model", "layers", "dtype", "rows", "prompt", "new", "steps"):
        if (value := getattr(asked, flag)) is not None:
            flags += [f"--{flag}", str(value)]
    module = ["-m", "benchmarks.ranks", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if name == IDEAL:
        commands = [[sys.executable, *module]] * 2
    else:
        commands = [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *module]]
    started = [
        subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for one in commands
    ]
    ended = [(process, *process.communicate()) for process in started]
    found = []
    for process, out, err in ended:
        if process.returncode:
            words = err.strip().splitlines()
            raise RuntimeError(f"{name}: exit code {process.returncode}: {words[-1] if words else 'killed'}")
        line = next(one for one in out.splitlines() if one.startswith("seconds "))
        found.append(json.loads(line.removeprefix("seconds "))[1:])
    samples = asked.rows * (1 if name == IDEAL else 2)
    return [sum(samples / one for one in each) for each in zip(*found, strict=True)]


def main() -> None:
    """Measures in turns and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--strategies", nargs="+", default=["zero2", "gemini", "gemini, kept"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--name", default="ranks", help="of the file in benchmarks/results/")
    asked = parser.parse_args()
    if asked.side:
        learn(asked)
        return
    rates: dict[str, list[float]] = {name: [] for name in (IDEAL, *asked.strategies)}
    for _ in range(asked.rounds):
        for name, found in rates.items():
            found += side(name, asked)
            print(name, found, flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    result: dict[str, Any] = {
        "settings": {key: value for key, value in vars(asked).items() if key not in ("side", "name")},
        "samples_per_second": medians,
        "samples_per_second_each": rates,
        "share_of_ideal": {name: medians[name] / medians[IDEAL] for name in asked.strategies},
    }
    print(json.dumps(result["share_of_ideal"]))
    write(asked.name, result)


if __name__ == "__main__":
    main()
