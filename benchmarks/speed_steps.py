"""One side of `benchmarks speed`: a step of training or generation by the penstock on PYTHONPATH, old or new.

It uses public names; where a version has moved one of the others, the places of both are tried.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import torch
from turns import Turns

import penstock


def first_of(*places: str) -> Any:
    """The first of these module:name that this version has. Raises ImportError where it has none."""
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"this penstock has none of {', '.join(places)}")


shape_named = first_of("penstock.models.presets:named", "penstock.models.sizes:named")
Four = first_of("penstock.commands.bench.work:Four", "penstock.bench.work:Four")
fill_quickly = first_of("penstock.commands.bench.work:fill_quickly", "penstock.bench.work:fill_quickly")
Rows, response_logprobs = (first_of(f"penstock.algorithms.sft:{name}") for name in ("Rows", "response_logprobs"))
sft_loss = first_of("penstock.algorithms.functional:sft_loss")


def sft(shape: Any, rows: int, length: int, strategy: str = "ddp", budget: str | None = None) -> Callable[[], object]:
    """A supervised step in fp32 on rows of `length` tokens, all trained."""
    placement = penstock.Strategy.named(strategy, dtype="fp32", device="cpu", device_memory=budget)
    with placement.init():
        actor = penstock.Actor(penstock.Decoder(shape))
    actor.fill = fill_quickly
    stream = placement.prepare(actor)
    tokens = torch.randint(shape.vocab_size, (rows, length))
    trained = (torch.arange(length) > 0).expand_as(tokens)
    count = int(trained.sum())

    def loss_of(hidden: torch.Tensor, batch: Any) -> tuple:
        return sft_loss(response_logprobs(actor, hidden, batch), count), {}

    return lambda: placement.step(stream, [Rows(tokens, trained)], loss_of, lr=1e-5)


def ppo(shape: Any, rows: int, tokens: int) -> Callable[[], object]:
    """A PPO iteration of four models in fp32: `tokens` per prompt and per response, one update of each."""
    four = Four(penstock.Strategy.named("ddp", dtype="fp32", device="cpu"), shape, rows)
    prompts = torch.randint(shape.vocab_size, (rows, tokens)).tolist()
    return lambda: list(four.iteration(prompts, tokens))


def generate(shape: Any, batch: int, tokens: int) -> Callable[[], object]:
    """Answers of `tokens` to as many prompts of as many tokens, in bf16."""
    decoder = penstock.Decoder(shape, dtype=torch.bfloat16).requires_grad_(False)
    prompts = torch.randint(shape.vocab_size, (batch, tokens)).tolist()
    sampling = penstock.Sampling(max_new_tokens=tokens, seed=1)
    engine = penstock.Engine(decoder, eos_ids=(), rows=batch, length=2 * tokens)
    return lambda: engine.generate(prompts, sampling)


def main() -> None:
    """Does its step in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["sft", "ppo", "generate", "streamed"])
    parser.add_argument("batch", type=int, nargs="?", default=4)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    turns = Turns()
    torch.manual_seed(0)
    small = dataclasses.replace(shape_named("s"), num_layers=3)  # seconds per step: all rows take minutes together
    wide = dataclasses.replace(shape_named("xl"), num_layers=4, vocab_size=8192)
    budget, tokens = "500MB", 64
    if options.tiny:
        cut = {"d_model": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "d_ff": 256, "vocab_size": 300}
        small, wide = (dataclasses.replace(shape, **cut) for shape in (small, wide))
        budget, tokens = "1MB", 8
    if options.work == "sft":
        step = sft(small, options.batch, 2 * tokens)
    elif options.work == "streamed":
        step = sft(wide, options.batch, 2 * tokens, "gemini_cpu", budget)
    elif options.work == "ppo":
        step = ppo(small, options.batch, tokens)
    else:
        step = generate(small, options.batch, tokens)
    turns.take(step)


if __name__ == "__main__":
    main()
