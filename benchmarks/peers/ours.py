"""The other side of every race: the same work by penstock's engine, all weights or an adapter's.

`benchmarks speed` runs it on two versions of penstock: it uses names that versions share.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.commands.bench.work import Four, fill_quickly
from penstock.config import OptimFlags
from penstock.memory.strategy import Strategy
from penstock.models import presets, surgery
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.roles import Actor
from penstock.rollout.engine import Engine
from penstock.rollout.sampling import Sampling


def actor_of(strategy: Strategy, shape: DecoderConfig, rank: int = 0) -> Actor:
    """The recipe of an actor with random weights; with a rank, adapters of that rank learn."""
    with strategy.init():
        actor = Actor(Decoder(shape))
        if rank:
            surgery.add_adapters(actor.decoder, LoraSpec(rank))
    actor.fill = fill_quickly
    return actor


def sft(strategy: Strategy, stream: Any, lr: float = 1e-5) -> Callable[[list[Rows]], object]:
    """One call is one supervised step on micro-batches."""

    def step(batches: list[Rows]) -> object:
        count = sum(int(batch.trained.sum()) for batch in batches)

        def loss_of(hidden: torch.Tensor, batch: Rows) -> tuple:
            return fn.sft_loss(response_logprobs(stream.model, hidden, batch), count), {}

        return strategy.step(stream, batches, loss_of, lr=lr)

    return step


def grpo(strategy: Strategy, shape: DecoderConfig, options: Any, prompts: list[list[int]]) -> Callable[[], object]:
    """One call is one step on a group of answers to each prompt: KL to a reference in the loss, one update on all."""
    from turns import reward_of  # of this folder

    from penstock.algorithms.config import GRPOFlags
    from penstock.algorithms.experience import Roles
    from penstock.algorithms.grpo import GRPO, with_advantages

    actor, reference = actor_of(strategy, shape), actor_of(strategy, shape)
    reference.eval().requires_grad_(False)
    streams = strategy.prepare_all(actor, reference)
    roles = Roles(*streams, scorer=lambda records, answers: [reward_of(answer.response_ids) for answer in answers])
    optim, flags = OptimFlags(lr=1e-6, micro_batch_size=options.micro), GRPOFlags(group_size=options.group)
    policy, steps = GRPO(strategy, roles, optim, flags, reread=False), itertools.count()

    def step() -> object:
        first = next(steps) * options.rows
        rollout = policy.rollout(
            prompts, range(first, first + options.rows), n=options.group, max_new_tokens=options.new
        )
        with strategy.phase("score"):
            experience = policy.read(rollout, [None] * options.rows, options.group)
        return policy.learn(with_advantages(experience, flags), torch.arange(options.rows))

    return step


def step_of(options: Any, shape: DecoderConfig) -> Callable[[], object]:
    """One step of the work that the flags ask for."""
    prompts = torch.randint(1, options.vocab, (options.rows, options.prompt)).tolist()
    if options.work == "generate":
        decoder = Decoder(shape, dtype=torch.bfloat16).requires_grad_(False)
        engine = Engine(decoder, eos_ids=(), rows=options.rows, length=options.prompt + options.new)
        return lambda: engine.generate(prompts, Sampling(max_new_tokens=options.new, seed=1))
    recompute = options.recompute == "yes" or None
    budget = options.device_memory or None
    strategy = Strategy.named(options.strategy, dtype=options.dtype, device_memory=budget, recompute=recompute)
    if options.work == "ppo":  # all rows in one micro-batch
        four = Four(strategy, shape, options.rows)
        return lambda: list(four.iteration(prompts, options.new))
    if options.work == "grpo":
        return grpo(strategy, shape, options, prompts[: options.rows // options.group])
    actor = actor_of(strategy, shape, options.rank if options.work == "lora" else 0)
    step = sft(strategy, strategy.prepare(actor))
    tokens = torch.randint(1, options.vocab, (options.rows, options.prompt + options.new)).to(strategy.world.device)
    trained = (torch.arange(tokens.shape[1], device=tokens.device) > 0).expand_as(tokens)
    return lambda: step([Rows(tokens, trained)])


def main() -> None:
    """One side of a race."""
    from turns import Turns, flags  # of this folder

    options = flags(
        __doc__ or "", work=["ppo", "grpo", "sft", "lora", "generate"], recompute=["no", "yes"], device_memory=None,
        strategy=["ddp", "ddp_8bit", "zero2_cpu", "gemini_cpu"],
    )  # fmt: skip
    turns = Turns()
    torch.manual_seed(0)
    heads = max(options.width // 64, 1)
    shape = dataclasses.replace(
        presets.named("s"), num_layers=options.layers, d_model=options.width, d_ff=4 * options.width, num_heads=heads,
        num_kv_heads=heads, head_dim=options.width // heads, vocab_size=options.vocab,
    )  # fmt: skip
    turns.take(step_of(options, shape))


if __name__ == "__main__":
    main()
