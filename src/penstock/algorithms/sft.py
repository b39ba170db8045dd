"""Supervised fine-tuning: a language model learns to answer from demonstrations (Ouyang et al. 2022, stage 1).

The loss is on response tokens only, EOS included; every conversation is its own right-padded row, so none sees
another; the best checkpoint is the one with the lowest held-out loss (PPO.md 24).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.heldout import Best, interval, read_sides
from penstock.algorithms.setup import placed, prepare, read_model, sample_rows, say_length, strategy_of
from penstock.config import OptimFlags, SFTConfig
from penstock.data.batching import Shuffle, pad
from penstock.data.chat import Encoder, Example
from penstock.memory.strategy import StepStats, Strategy
from penstock.memory.stream import Losses, Stream
from penstock.models.roles import Actor
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling
from penstock.run.session import Session


def sft(config: SFTConfig, *, resume: bool = False) -> Path:
    """Trains as `config` says and returns the run directory. With `resume`, goes on from its newest checkpoint.

    Raises UserError, DataError or ResourceError, each with the fix; the last checkpoint stays.
    """
    config = dataclasses.replace(config, run=placed(config.run))
    optim, run, strategy = config.optim, config.run, strategy_of(config.run)
    session = Session("sft", config, strategy.world, resume=resume)
    actor, encoder, train, heldout = read_inputs(session.config, strategy, session)
    total = optim.steps or math.ceil(optim.epochs * len(train) / optim.batch_size)
    say_length(config, total, session, rows=len(train))
    every = interval(config, total, len(heldout), optim.batch_size, session)

    with session:
        longest = max(len(example.tokens) for example in [*train, *heldout])
        stream = prepare("sft", actor, strategy, optim, optim.batch_size, longest)
        shuffle, start, best = Shuffle(len(train), run.seed), 0, Best(config.early_stopping_patience)
        session.restore({"model": stream})
        if session.state:
            shuffle.load_state_dict(session.state["shuffle"])
            start = session.state["step"]
            best.load(-session.state["best"], session.state)

        def state() -> dict[str, Any]:
            return {"shuffle": shuffle.state_dict(), "step": step, "best": -best.value, "stale": best.stale}

        def show(step: int) -> None:
            prompts = [prompt_of(example) for example in (heldout or train)[: config.samples]]
            greedy = Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)
            answers = generate(actor.decoder, prompts, greedy, eos_ids=encoder.eos_ids)
            session.sample(step, sample_rows(encoder, answers, kind="greedy"))

        if start == 0:
            show(0)
        for step in session.steps(start, total):
            examples = [train[i] for i in shuffle.next(optim.batch_size)]
            lr = optim.lr * fn.lr_schedule(step - 1, total, optim.warmup, optim.lr_schedule)
            stats = learn(strategy, stream, examples, optim, lr)
            session.check(stats)
            metrics = {"loss": stats.sums["loss"], **stats.metrics, "lr": lr, "epoch": shuffle.epochs}
            metrics["tokens"], improved = trained_tokens(examples), False
            if heldout and (step % every == 0 or step == total):
                with strategy.phase("score"):
                    loss = heldout_loss(strategy, stream, heldout, optim.micro_batch_size)
                metrics["heldout/loss"], improved = loss, best.better(-loss)
                best.end_early(session, step)
            tokens = sum(len(example.tokens) for example in examples)
            session.log(step, metrics, tokens=tokens, perf=strategy.take_perf())
            if step == session.total:
                show(step)
            session.checkpoint(step, {"model": stream}, state, best=improved)
        return session.finish()


def read_inputs(
    config: SFTConfig, strategy: Strategy, session: Session
) -> tuple[Actor, Encoder, list[Example], list[Example]]:
    """The model, its encoder, and the demonstrations to train on and those held out."""
    actor, encoder = read_model(Actor, config.model, config, strategy, session)
    (_, train), (_, heldout) = read_sides(session, encoder, "demonstrations", config)
    return actor, encoder, train, heldout


def learn(strategy: Strategy, stream: Stream, examples: Sequence[Example], optim: OptimFlags, lr: float) -> StepStats:
    """One optimizer step on a batch that every rank holds: each takes its share."""
    count, world = trained_tokens(examples), strategy.world  # of the whole batch, all ranks (PPO.md 15)

    def loss_of(hidden: Tensor, rows: Rows) -> Losses:
        return fn.sft_loss(response_logprobs(stream.model, hidden, rows), count), {}

    batches = micro_batches(world.share_of(list(examples)), optim.micro_batch_size, world.device)
    with strategy.phase("train"):
        return strategy.step(stream, batches, loss_of, lr=lr, max_grad_norm=optim.max_grad_norm)


def trained_tokens(examples: Sequence[Example]) -> int:
    """Tokens that the loss is on."""
    return sum(sum(example.trained) for example in examples)


@dataclass(frozen=True)
class Rows:
    """A micro-batch of demonstrations."""

    tokens: Tensor
    """[B, T] int64, right-padded."""
    trained: Tensor
    """[B, T] bool: the tokens that the loss is on."""

    @property
    def valid(self) -> Tensor:
        """[B, T] bool: up to each row's last token that the loss is on."""
        return self.trained.flip(1).cumsum(1).flip(1) > 0

    @property
    def computed(self) -> Tensor:
        """[B, T] bool: the tokens whose states are not those of the row before."""
        return fn.computed(self.tokens, self.valid, self.trained.int().argmax(dim=1) - 1)


def micro_batches(examples: Sequence[Example], size: int, device: torch.device) -> list[Rows]:
    """Rows in groups of `size`, neighbours in length, so that little of a micro-batch is padding."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    return [rows_of(ordered[i : i + size], device) for i in range(0, len(ordered), size)]


def rows_of(examples: Sequence[Example], device: torch.device) -> Rows:
    tokens, _ = pad([example.tokens for example in examples])
    trained, _ = pad([[int(flag) for flag in example.trained] for example in examples])
    return Rows(tokens.to(device), trained.bool().to(device))


def prompt_of(example: Example) -> list[int]:
    """What precedes a demonstration's last answer."""
    last = len(example.trained) - example.trained[::-1].index(False)
    return example.tokens[:last]


def response_logprobs(actor: Actor, hidden: Tensor, rows: Rows) -> Tensor:
    """Log-probabilities of every trained token of the rows, packed: hidden [B, T, D] -> [N] fp32."""
    states = fn.states_before(hidden, rows.trained, rows.computed)
    return actor.decoder.logprobs(states, rows.tokens[rows.trained], entropy=False)[0]


def heldout_loss(strategy: Strategy, stream: Stream, examples: Sequence[Example], size: int) -> float:
    """Mean negative log-likelihood per trained token over all ranks' examples."""
    world = strategy.world

    def read(hidden: Tensor, rows: Rows) -> Tensor:
        return response_logprobs(stream.model, hidden, rows).to(world.exact).double().sum()

    sums = strategy.evaluate(stream, micro_batches(world.share_of(list(examples)), size, world.device), read)
    total = -sum(sums, torch.zeros((), dtype=torch.float64, device=world.exact))
    return float(world.sum(total)) / max(trained_tokens(examples), 1)
