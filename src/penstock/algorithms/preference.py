"""Preference learning: a policy learns from comparisons of answers, without a reward model in between (Rafailov et al.
2023, "Direct Preference Optimization", and its kin; the losses are a table in `preference_losses`).

All answers to one prompt are in one micro-batch and each is encoded once. The loss is the mean over the prompt's pairs,
then over the prompts of the whole batch, so neither micro-batches nor ranks change it. The reference is the model's
frozen start: under LoRA it stands on the same weights, and costs a forward pass.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.config import DPOConfig, DPOFlags
from penstock.algorithms.heldout import Best, interval, read_sides
from penstock.algorithms.preference_losses import LOSSES, counts_of, health, preference_loss, summary
from penstock.algorithms.reference import answer_logprobs, precomputed, read_reference, with_reference, workload
from penstock.algorithms.reward import Ranking, Rankings, micro_batches, ranking_of
from penstock.algorithms.setup import placed, read_model, reserve_activations, strategy_of
from penstock.config import OptimFlags
from penstock.data.batching import Shuffle
from penstock.errors import DataError, UserError
from penstock.memory.strategy import StepStats, Strategy
from penstock.memory.stream import Losses, Stream
from penstock.models.roles import Actor
from penstock.run.session import Session


def dpo(config: DPOConfig, *, resume: bool = False) -> Path:
    """Trains as `config` says and returns the run directory. With `resume`, goes on from its newest checkpoint."""
    config = dataclasses.replace(config, run=placed(config.run))
    optim, flags, strategy = config.optim, config.dpo, strategy_of(config.run)
    check_flags(config)
    session = Session("dpo", config, strategy.world, resume=resume)
    models, train, heldout = read_inputs(session.config, strategy, session)
    total = optim.steps or math.ceil(optim.epochs * len(train) / optim.batch_size)
    every = interval(config, total, len(heldout), optim.batch_size, session)

    with session:
        if config.precompute_reference:
            known = precomputed(session, models, [*train, *heldout])
            train, heldout = known[: len(train)], known[len(train) :]
        reserve_activations(strategy, workload(models, [*train, *heldout], optim))
        streams = dict(zip(models, strategy.prepare_all(*models.values(), **optim.adamw), strict=True))
        stream, reference = streams["model"], streams.get("reference")
        shuffle, start, best = Shuffle(len(train), config.run.seed), 0, Best(config.early_stopping_patience)
        session.restore({"model": stream})
        if session.state:
            shuffle.load_state_dict(session.state["shuffle"])
            start = session.state["step"]
            best.load(session.state["best"], session.state)
        if reference is not None:
            heldout = with_reference(strategy, reference, heldout, optim)

        def state() -> dict[str, Any]:
            return {"shuffle": shuffle.state_dict(), "step": step, "best": best.value, "stale": best.stale}

        for step in session.steps(start, total):
            rankings = [train[i] for i in shuffle.next(optim.batch_size)]
            if reference is not None:
                rankings = with_reference(strategy, reference, rankings, optim)
            lr = optim.lr * fn.lr_schedule(step - 1, total, optim.warmup, optim.lr_schedule)
            stats = learn(strategy, stream, rankings, optim, flags, lr)
            session.check(stats)
            metrics = {**summary(stats.sums), "grad_norm": stats.grad_norm, "lr": lr, "epoch": shuffle.epochs}
            improved = False
            if heldout and (step % every == 0 or step == total):
                facts = evaluate(strategy, stream, heldout, optim, flags)
                metrics |= {f"heldout/{name}": value for name, value in facts.items()}
                improved = best.better(-facts["loss"])
                best.end_early(session, step)
            session.health(step, health(metrics, flags))
            tokens = sum(len(row) for ranking in rankings for row in ranking.rows)
            session.log(step, metrics, tokens=tokens, timing=strategy.take_seconds())
            session.checkpoint(step, {"model": stream}, state, best=improved)
        return session.finish()


def check_flags(config: DPOConfig) -> None:
    """Raises UserError for flags that do not fit together, or that the loss would not read."""
    flags, loss = config.dpo, LOSSES[config.dpo.loss]
    without = [name for name, row in LOSSES.items() if not row.reference]
    if not loss.reference and (config.reference or config.precompute_reference):
        flag = "--reference" if config.reference else "--precompute-reference"
        raise UserError(f"{flag}: --loss {flags.loss} has no reference ({', '.join(without)} have none); leave it out.")
    if flags.label_smoothing and not loss.smooths:
        names = ", ".join(name for name, row in LOSSES.items() if row.smooths)
        raise UserError(f"--label-smoothing: --loss {flags.loss} has none; {names} have.")
    if flags.length_normalize and loss.averages:
        raise UserError(f"--length-normalize: --loss {flags.loss} always divides by tokens; leave the flag out.")
    if flags.simpo_gamma is not None and flags.loss != "simpo":
        raise UserError(f"--simpo-gamma: --loss {flags.loss} has no margin; it is simpo's.")


def read_inputs(
    config: DPOConfig, strategy: Strategy, session: Session
) -> tuple[dict[str, Actor], list[Ranking], list[Ranking]]:
    """The model and its reference, if the loss has one; the rankings to train on, and those held out."""
    model, encoder = read_model(Actor, config.model, config, strategy, session)
    models = {"model": model}
    if LOSSES[config.dpo.loss].reference:
        with strategy.init():
            models["reference"] = read_reference(config, model, encoder)
    sides = [
        [ranking_of(tokens, record.ranks) for record, tokens in zip(*side, strict=True)]
        for side in read_sides(session, encoder, "comparisons", config)
    ]
    train, heldout = ([ranking for ranking in side if ranking.pairs] for side in sides)
    if not train:
        raise DataError(f"{', '.join(config.data.data)}: every ranking is a tie; nothing can be learned from ties.")
    rows = [row for ranking in [*train, *heldout] for row in ranking.rows]
    cut = sum(row[-1] not in encoder.eos_ids for row in rows)
    if cut > CUT_SHARE * len(rows):
        session.warn(f"cut answers: {cut} of {len(rows)} have no end, and what does not end is preferred too")
    if config.dpo.pairs == "best-worst":
        train, heldout = ([best_and_worst(ranking) for ranking in side] for side in (train, heldout))
        session.say(f"--pairs best-worst: {len(rows) - 2 * (len(train) + len(heldout))} answers between are not read")
    return models, train, heldout


CUT_SHARE = 0.1
"""Of all answers, so many may be cut before it is a warning."""


def best_and_worst(ranking: Ranking) -> Ranking:
    """The first of the best answers and the last of the worst, which are not equal."""
    chosen, rejected = max(ranking.pairs, key=lambda pair: (ranking.ranks[pair[1]] - ranking.ranks[pair[0]], pair[1]))
    kept = (chosen, rejected)
    return Ranking([ranking.rows[i] for i in kept], (0, 1), tuple(ranking.response_lengths[i] for i in kept))


def learn(
    strategy: Strategy, stream: Stream, rankings: Sequence[Ranking], optim: OptimFlags, flags: DPOFlags, lr: float
) -> StepStats:
    """One optimizer step on a batch that every rank holds: each takes its share."""
    world, counts = strategy.world, counts_of(rankings)

    def loss_of(hidden: Tensor, batch: Rankings) -> Losses:
        return preference_loss(answer_logprobs(stream.model, hidden, batch), batch.rankings, flags, counts)

    batches = micro_batches(world.share_of(list(rankings)), optim.micro_batch_size, world.device)
    with strategy.phase("train"):
        return strategy.step(stream, batches, loss_of, lr=lr, max_grad_norm=optim.max_grad_norm)


def evaluate(
    strategy: Strategy, stream: Stream, rankings: Sequence[Ranking], optim: OptimFlags, flags: DPOFlags
) -> dict[str, float]:
    """The metrics of rankings that are not learned from; as many of them are read at a time as a step has."""
    world, counts = strategy.world, counts_of(rankings)
    sums: Counter[str] = Counter()

    def read(hidden: Tensor, batch: Rankings) -> None:
        sums_of_answers = answer_logprobs(stream.model, hidden, batch)
        loss, stats = preference_loss(sums_of_answers, batch.rankings, flags, counts)
        sums.update({name: float(value) for name, value in {"loss": loss, **stats}.items()})

    with strategy.phase("score"):
        for start in range(0, len(rankings), optim.batch_size):
            share = world.share_of(list(rankings[start : start + optim.batch_size]))
            strategy.evaluate(stream, micro_batches(share, optim.micro_batch_size, world.device), read)
    total: Counter[str] = Counter()
    for part in world.gather(dict(sums)):
        total.update(part)
    return summary(total)
