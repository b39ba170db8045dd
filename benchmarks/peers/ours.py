"""The other side of every race: the same work by penstock's engine, all weights or an adapter's."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.sft import response_logprobs, rows_of
from penstock.commands.bench.work import Four
from penstock.data.chat import Example
from penstock.memory.strategy import Strategy
from penstock.models import presets, surgery
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.roles import Actor


def sft(strategy: Strategy, shape: DecoderConfig, rank: int = 0) -> Callable[[torch.Tensor], object]:
    """One call is one supervised step on tokens [B, T], all trained; with a rank through adapters of that rank."""
    with strategy.init():
        actor = Actor(Decoder(shape))
        if rank:
            surgery.add_adapters(actor.decoder, LoraSpec(rank))
    stream = strategy.prepare(actor)

    def step(tokens: torch.Tensor) -> object:
        rows = [Example(row, [False] + [True] * (len(row) - 1)) for row in tokens.tolist()]
        count = sum(sum(row.trained) for row in rows)

        def loss_of(hidden: torch.Tensor, part: Any) -> tuple:
            return fn.sft_loss(response_logprobs(actor, hidden, part), count), {}

        return strategy.step(stream, [rows_of(rows, strategy.world.device)], loss_of, lr=1e-5)

    return step


def ppo(strategy: Strategy, shape: DecoderConfig, rows: int) -> Callable[[torch.Tensor, int], object]:
    """One call is one PPO iteration on prompts [B, P] with so many new tokens: all rows in one micro-batch."""
    four = Four(strategy, shape, rows)
    return lambda prompts, new: list(four.iteration(prompts.tolist(), new))


def main() -> None:
    """One side of a race."""
    from turns import Turns, flags  # of this folder

    options = flags(
        __doc__ or "", work=["ppo", "sft", "lora"], strategy=["ddp", "ddp_8bit", "zero2_cpu", "gemini_cpu"],
        recompute=["no", "yes"],
    )  # fmt: skip
    turns = Turns()
    torch.manual_seed(0)
    heads = max(options.width // 64, 1)
    shape = dataclasses.replace(
        presets.named("s"), num_layers=options.layers, d_model=options.width, d_ff=4 * options.width, num_heads=heads,
        num_kv_heads=heads, head_dim=options.width // heads, vocab_size=options.vocab,
    )  # fmt: skip
    strategy = Strategy.named(options.strategy, dtype=options.dtype, recompute=options.recompute == "yes" or None)
    if options.work == "ppo":
        prompts = torch.randint(1, options.vocab, (options.rows, options.prompt))
        iterate = ppo(strategy, shape, options.rows)
        turns.take(lambda: iterate(prompts, options.new))
    else:
        tokens = torch.randint(1, options.vocab, (options.rows, options.prompt + options.new))
        step = sft(strategy, shape, options.rank if options.work == "lora" else 0)
        turns.take(lambda: step(tokens.to(strategy.world.device)))


if __name__ == "__main__":
    main()
