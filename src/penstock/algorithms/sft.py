"""Supervised fine-tuning: a language model learns to answer from demonstrations (Ouyang et al. 2022, stage 1).

The loss is on response tokens only, EOS included; every conversation is its own right-padded row, so none sees
another; the best checkpoint is the one with the lowest held-out loss (PPO.md 24).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.setup import (
    adapter_options,
    check_adapter_learns,
    encoder_of,
    keep_tokenizer,
    read,
    reserve_activations,
    sample_rows,
    strategy_of,
)
from penstock.config import SFTConfig
from penstock.data.batching import Shuffle, pad, split_by_prompt
from penstock.data.chat import Example
from penstock.memory.strategy import Strategy
from penstock.memory.stream import Stream
from penstock.models.roles import Actor
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling
from penstock.run.directory import resolve_model
from penstock.run.session import Session


def sft(config: SFTConfig, *, resume: bool = False) -> Path:
    """Trains as `config` says and returns the run directory. With `resume`, goes on from its newest checkpoint.

    Raises UserError, DataError or ResourceError, each with the fix; what the last checkpoint holds stays.
    """
    optim, run = config.optim, config.run
    strategy = strategy_of(run)
    world = strategy.world
    session = Session("sft", config, world, resume=resume)
    source = resolve_model(config.model)
    with strategy.init():
        actor = Actor.from_pretrained(
            source, allow_pickle=config.data.allow_pickle, **adapter_options(config.peft, run.seed)
        )
    check_adapter_learns(actor, config.peft)
    encoder = encoder_of(source, actor.decoder.config, config.data)
    keep_tokenizer(session, source)
    records, encoded = read(session.say, encoder, config.data.data, "demonstrations", config.data)
    train, heldout = split_by_prompt([record.prompt_key for record in records], config.heldout, run.seed)
    examples, heldout_examples = [encoded[i] for i in train], [encoded[i] for i in heldout]

    with session:
        longest = max(len(example.tokens) for example in encoded)
        reserve_activations(strategy, "sft", {"model": actor}, optim, longest=longest)
        stream = strategy.prepare(actor, weight_decay=optim.weight_decay)
        shuffle = Shuffle(len(examples), run.seed)
        total = optim.steps or math.ceil(optim.epochs * len(examples) / optim.batch_size)
        done, best = 0, math.inf
        session.restore({"model": stream})
        if session.state:
            shuffle.load_state_dict(session.state["shuffle"])
            done, best = session.state["step"], session.state["best"]

        probes = [prompt_of(example) for example in (heldout_examples or examples)[: config.samples]]
        sampling = Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)

        def show(step: int) -> None:
            answers = generate(actor.decoder, probes, sampling, eos_ids=encoder.eos_ids)
            session.sample(step, sample_rows(encoder, answers, kind="greedy"))

        if done == 0:
            show(0)

        def loss_of(hidden: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
            return fn.sft_loss(response_logprobs(actor, hidden, rows), count), {}

        def state() -> dict[str, Any]:
            return {"shuffle": shuffle.state_dict(), "step": step, "best": best}

        for step in session.steps(done, total):
            rows = [examples[i] for i in shuffle.next(optim.batch_size)]
            count = sum(sum(row.trained) for row in rows)  # of the whole batch, all ranks (PPO.md 15)
            lr = optim.lr * fn.lr_schedule(step - 1, total, optim.warmup)
            with strategy.phase("train"):
                stats = strategy.step(
                    stream,
                    micro_batches(world.share_of(rows), optim.micro_batch_size, world.device),
                    loss_of,
                    lr=lr,
                    max_grad_norm=optim.max_grad_norm,
                )
            session.check(stats)
            metrics = {"loss": stats.sums["loss"], "grad_norm": stats.grad_norm, "lr": lr, "epoch": shuffle.epochs}
            metrics["tokens"] = count
            improved = False
            if heldout_examples and (step % config.eval_every == 0 or step == total):
                with strategy.phase("score"):
                    metrics["heldout/loss"] = heldout_loss(
                        strategy, stream, actor, heldout_examples, optim.micro_batch_size
                    )
                improved = metrics["heldout/loss"] < best
                best = min(best, metrics["heldout/loss"])
            session.log(step, metrics, tokens=sum(len(row.tokens) for row in rows), timing=strategy.take_seconds())
            if step == total:
                show(step)
            session.checkpoint(step, {"model": stream}, state, best=improved)
        return session.finish()


@dataclass(frozen=True)
class Rows:
    """A micro-batch of demonstrations."""

    tokens: Tensor
    """[B, T] int64, right-padded."""
    trained: Tensor
    """[B, T] bool: the tokens that the loss is on."""


def micro_batches(examples: Sequence[Example], size: int, device: torch.device) -> list[Rows]:
    """Rows in groups of `size`, neighbours in length, so that little of a batch is padding."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    return [rows_of(ordered[i : i + size], device) for i in range(0, len(ordered), size)]


def rows_of(examples: Sequence[Example], device: torch.device) -> Rows:
    """These demonstrations as one micro-batch."""
    tokens, _ = pad([example.tokens for example in examples])
    trained, _ = pad([[int(flag) for flag in example.trained] for example in examples])
    return Rows(tokens.to(device), trained.bool().to(device))


def prompt_of(example: Example) -> list[int]:
    """What precedes a demonstration's last answer."""
    last = len(example.trained) - example.trained[::-1].index(False)
    return example.tokens[:last]


def response_logprobs(actor: Actor, hidden: Tensor, rows: Rows) -> Tensor:
    """Log-probabilities of every trained token of the rows, packed: hidden [B, T, D] -> [N] fp32."""
    states = fn.states_before(hidden, rows.trained)
    logprobs, _ = actor.decoder.logprobs(states, rows.tokens[rows.trained], entropy=False)
    return logprobs


def heldout_loss(strategy: Strategy, stream: Stream, actor: Actor, examples: Sequence[Example], size: int) -> float:
    """Mean negative log-likelihood per trained token over all ranks' examples."""
    world = strategy.world

    def read(hidden: Tensor, rows: Rows) -> Tensor:
        return response_logprobs(actor, hidden, rows).double().sum()

    sums = strategy.evaluate(stream, micro_batches(world.share_of(list(examples)), size, world.device), read)
    total = -sum(sums, torch.zeros((), dtype=torch.float64, device=world.device))
    return float(world.sum(total)) / max(sum(sum(example.trained) for example in examples), 1)
