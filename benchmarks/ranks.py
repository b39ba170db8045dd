"""Two ranks over gloo against the ideal of this machine: two single-threaded processes that do not communicate.

    python -m benchmarks ranks [--model m] [--layers N] [--strategies zero2 gemini] [--rounds 3]

Learning alone: PPO's optimizer steps of actor and critic on a ready-made experience (reference and reward model take no
part in it and are left out, so that two whole copies fit). Each process has --rows episodes per step, alone or as its
share. In turns: alone twice side by side, then each strategy, and again; samples per second of both together, and their
share of the ideal by the medians.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch

from benchmarks import timing
from benchmarks.facts import flags, write
from benchmarks.peers.turns import last_words
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
        torch.zeros(rows), torch.zeros(rows, dtype=torch.bool), advantages, advantages, torch.zeros(rows),
        torch.zeros(rows, 0),
    )  # fmt: skip


def learn(options: argparse.Namespace) -> None:
    """One process of a measurement: prints the seconds of each step, the first of which warms up."""
    torch.set_num_threads(1)
    name = "naive" if options.side == IDEAL else options.side
    name, _, kept = name.partition(", ")  # "gemini, kept" keeps what is inside blocks while weights move
    strategy = Strategy.named(name, dtype=options.dtype, device="cpu", recompute=False if kept else None)
    world = strategy.world
    shape = presets.named(options.model)
    shape = dataclasses.replace(shape, num_layers=options.layers or shape.num_layers)
    with strategy.init():
        actor, critic = Actor(Decoder(shape)), Critic(Decoder(shape))
    for model in (actor, critic):
        model.fill = fill_quickly  # type: ignore[method-assign]
    actors, critics = strategy.prepare_all(actor, critic)
    rows = options.rows * world.size
    optim = OptimFlags(lr=1e-6, batch_size=rows, micro_batch_size=options.rows)
    iteration = PPO(strategy, Roles(actors, actors, critics), optim)
    experience = experience_of(rows, options.prompt, options.new, shape.vocab_size)
    seconds = []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        iteration.learn(experience, torch.arange(rows))
        seconds.append(time.perf_counter() - began)
    if world.first:
        print("seconds", json.dumps(seconds), flush=True)
    world.leave()


def side(name: str, options: argparse.Namespace) -> list[float]:
    """Samples per second of both processes together, step by step. Raises RuntimeError when a process fails."""
    command = ["-m", "benchmarks", "ranks", *sys.argv[2:], "--side", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [] if name == IDEAL else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    processes = [
        subprocess.Popen(
            [sys.executable, *launch, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )
        for _ in range(2 if name == IDEAL else 1)
    ]  # fmt: skip
    outputs = [process.communicate() for process in processes]
    seconds = []
    for process, (out, err) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{name}: {last_words(process.returncode, err)}")
        line = next(line for line in out.splitlines() if line.startswith("seconds "))
        seconds.append(json.loads(line.removeprefix("seconds "))[1:])
    samples = options.rows * (1 if name == IDEAL else 2)
    return [sum(samples / spent for spent in step) for step in zip(*seconds, strict=True)]


def main(arguments: list[str]) -> int:
    """Measures in turns and writes the result."""
    parser = flags(__doc__)
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
    options = parser.parse_args(arguments)
    if options.side:
        learn(options)
        return 0
    sides = {name: partial(side, name, options) for name in (IDEAL, *options.strategies)}
    rounds = timing.alternate(sides, options.rounds)
    rates = {name: [rate for steps in results for rate in steps] for name, results in rounds.items()}
    medians = timing.medians(rates)
    result: dict[str, Any] = {
        "settings": {key: value for key, value in vars(options).items() if key not in ("side", "name")},
        "samples_per_second": medians,
        "samples_per_second_each": rates,
        "share_of_ideal": {name: medians[name] / medians[IDEAL] for name in options.strategies},
    }
    print(json.dumps(result["share_of_ideal"]))
    write(options.name, result)
    return 0
