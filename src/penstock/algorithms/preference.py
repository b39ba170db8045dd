"""Preference learning: a policy learns from comparisons of answers (Rafailov et al. 2023, "Direct Preference
Optimization", and its kin; the losses are a table in `preference_losses`).

Comparisons are those of the data, or of its own answers, ranked by a reward (Guo et al. 2024, OAIF). All answers to one
prompt are in one micro-batch. The loss is the mean over the prompt's pairs, then over the prompts of the whole batch,
so neither micro-batches nor ranks change it. The reference is the frozen start; under LoRA it costs a forward pass.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms import policy, policy_inputs
from penstock.algorithms.config import DPOConfig, DPOFlags
from penstock.algorithms.experience import with_ends
from penstock.algorithms.heldout import Best, interval, read_sides
from penstock.algorithms.preference_losses import check_loss, counts_of, health, preference_loss, summary
from penstock.algorithms.reference import answer_logprobs, evaluate_rankings, precomputed, with_reference, workload
from penstock.algorithms.reward import Ranking, Rankings, micro_batches, ranked, ranking_of
from penstock.algorithms.setup import placed, read_model, reserve_activations, sample_rows, say_length, strategy_of
from penstock.config import AnswerFlags, OptimFlags, RewardFlags
from penstock.data.batching import Shuffle
from penstock.errors import DataError, UserError
from penstock.memory.strategy import StepStats, Strategy
from penstock.memory.stream import Losses, Stream
from penstock.models.roles import Actor
from penstock.run.session import Session


def dpo(config: DPOConfig, *, resume: bool = False) -> Path:
    """Trains as `config` says and returns the run directory. With `resume`, goes on from its newest checkpoint.

    `--batch-size` counts prompts, with all their answers.
    """
    config = dataclasses.replace(config, run=placed(config.run))
    optim, flags, strategy = config.optim, config.dpo, strategy_of(config.run)
    check_flags(config, strategy.world.size)
    session = Session("dpo", config, strategy.world, resume=resume)
    source = (Fresh if config.online else Given)(session.config, strategy, session)
    total = optim.steps or math.ceil(optim.epochs * source.count / optim.batch_size)
    say_length(config, total, session, rows=source.count)
    every = interval(config, total, source.heldout_count, optim.batch_size, session)

    with session:
        stream, reference = source.prepare()
        shuffle, start, best = Shuffle(source.count, config.run.seed), 0, Best(config.early_stopping_patience)
        session.restore({"model": stream})
        if session.state:
            shuffle.load_state_dict(session.state["shuffle"])
            start = session.state["step"]
            best.load(session.state["best"], session.state)
        source.begin(start)

        def state() -> dict[str, Any]:
            return {"shuffle": shuffle.state_dict(), "step": step, "best": best.value, "stale": best.stale}

        def before() -> dict[str, Any]:
            return {**state(), "step": step - 1}

        for step in session.steps(start, total):
            with session.may_give_up(step - 1, {"model": stream}, before):
                rankings, metrics = source.rankings(step, shuffle.next(optim.batch_size))
            if reference is not None:
                rankings = with_reference(strategy, reference, rankings, optim)
            lr = optim.lr * fn.lr_schedule(step - 1, total, optim.warmup, optim.lr_schedule)
            if rankings:
                stats = learn(strategy, stream, rankings, optim, flags, lr)
                session.check(stats)
                metrics |= summary(stats.sums) | stats.metrics
            metrics |= {"lr": lr, "epoch": shuffle.epochs}
            improved = (step % every == 0 or step == total) and source.evaluate(step, best, metrics)
            session.health(step, health(metrics, flags))
            tokens = sum(len(row) for ranking in rankings for row in ranking.rows)
            session.log(step, metrics, tokens=tokens, perf=strategy.take_perf())
            if step == session.total:
                source.end(step)
            session.checkpoint(step, {"model": stream}, state, best=bool(improved))
        return session.finish()


def check_flags(config: DPOConfig, ranks: int) -> None:
    """Raises UserError for flags that do not fit together, or that nothing would read."""
    named = {"--reference": config.reference, "--precompute-reference": config.precompute_reference}
    check_loss(config.dpo, [flag for flag, value in named.items() if value])
    if config.online:
        policy_inputs.check_rollout("dpo --online", config, ranks)
        if config.precompute_reference:
            raise UserError("--precompute-reference: answers of --online are new in each step; leave it out.")
        return
    own = {field.name for group in (AnswerFlags, RewardFlags) for field in dataclasses.fields(group)} | {"group_size"}
    for part in (config, config.dpo):
        for field in dataclasses.fields(part):
            if field.name in own and getattr(part, field.name) != field.default:
                raise UserError(f"--{field.name.replace('_', '-')}: is for answers of --online; give that flag too.")


# --- comparisons of the data ----------------------------------------------------------------------------------------


class Given:
    """Comparisons that the data holds."""

    def __init__(self, config: DPOConfig, strategy: Strategy, session: Session) -> None:
        self.config, self.strategy, self.session = config, strategy, session
        model, encoder = read_model(Actor, config.model, config, strategy, session)
        with strategy.init():
            reference = policy_inputs.read_reference(config, model, encoder, session)
        self.models = {"model": model} if reference is None else {"model": model, "reference": reference}
        sides = [
            [ranking_of(tokens, record.ranks) for record, tokens in zip(*side, strict=True)]
            for side in read_sides(session, encoder, "comparisons", config)
        ]
        self.train, self.heldout = ([ranking for ranking in side if ranking.pairs] for side in sides)
        if not self.train:
            raise DataError(f"{', '.join(config.data.data)}: every ranking is a tie; nothing can be learned from ties.")
        rows = [row for ranking in [*self.train, *self.heldout] for row in ranking.rows]
        cut = sum(row[-1] not in encoder.eos_ids for row in rows)
        if cut > CUT_SHARE * len(rows):
            session.warn(f"cut answers: {cut} of {len(rows)} have no end, and what does not end is preferred too")
        if config.dpo.pairs == "best-worst":
            self.train, self.heldout = (
                [ranking.best_and_worst() for ranking in side] for side in (self.train, self.heldout)
            )
            read = 2 * (len(self.train) + len(self.heldout))
            session.say(f"--pairs best-worst: {len(rows) - read} answers between are not read")
        self.count, self.heldout_count = len(self.train), len(self.heldout)

    def prepare(self) -> tuple[Stream, Stream | None]:
        """Gives the models their homes: the one that learns, and its reference unless that has been read before."""
        optim, rankings = self.config.optim, [*self.train, *self.heldout]
        if self.config.precompute_reference:
            rankings = precomputed(self.session, self.models, rankings)
            self.train, self.heldout = rankings[: self.count], rankings[self.count :]
        reserve_activations(self.strategy, workload(self.models, rankings, optim))
        streams = self.strategy.prepare_all(*self.models.values(), **optim.adamw)
        self.stream, self.reference = streams[0], streams[1] if len(streams) > 1 else None
        return self.stream, self.reference

    def begin(self, step: int) -> None:
        if self.reference is not None:
            self.heldout = with_reference(self.strategy, self.reference, self.heldout, self.config.optim)

    def rankings(self, step: int, indices: Sequence[int]) -> tuple[list[Ranking], dict[str, float]]:
        """The rankings of a step, on every rank, and what is to be known of them."""
        return [self.train[i] for i in indices], {}

    def evaluate(self, step: int, best: Best, metrics: dict[str, float]) -> bool:
        """Adds the metrics of the held-out rankings; True if their loss is the lowest so far."""
        if not self.heldout:
            return False
        facts = evaluate_rankings(self.strategy, self.stream, self.heldout, self.config.optim, self.config.dpo)
        metrics |= {f"heldout/{name}": value for name, value in facts.items()}
        improved = best.better(-facts["loss"])
        best.end_early(self.session, step)
        return improved

    def end(self, step: int) -> None:
        """The last step is made."""


CUT_SHARE = 0.1
"""Of all answers, so many may be cut before it is a warning."""


# --- comparisons of its own answers ---------------------------------------------------------------------------------


class Fresh:
    """Answers of the model as it is, ranked by a reward."""

    def __init__(self, config: DPOConfig, strategy: Strategy, session: Session) -> None:
        self.config, self.strategy, self.session = config, strategy, session
        self.inputs = policy_inputs.read_inputs(config, strategy, session)
        self.count, self.heldout_count = len(self.inputs.prompts), len(self.inputs.heldout[1])

    def prepare(self) -> tuple[Stream, Stream | None]:
        """As `Given.prepare`, and the reward model."""
        optim, group = self.config.optim, self.config.dpo.group_size
        answers, micro = optim.batch_size * group, max(optim.micro_batch_size, group)
        of_answers = dataclasses.replace(optim, batch_size=answers, micro_batch_size=micro)
        config = dataclasses.replace(self.config, optim=of_answers)
        roles, swap = policy.prepare_roles("grpo", config, self.strategy, self.inputs, group)
        encoder = self.inputs.encoder
        sampling = (self.config.run.seed, encoder.eos_ids, swap, encoder.tokenizer)
        flags, between = self.config.dpo, self.session.give_up
        self.policy = policy.Policy(self.strategy, roles, optim, flags, *sampling, between=between)
        return roles.actor, roles.reference

    def begin(self, step: int) -> None:
        if step == 0:
            self.end(0)

    def rankings(self, step: int, indices: Sequence[int]) -> tuple[list[Ranking], dict[str, float]]:
        """As `Given.rankings`; prompts whose answers are alike or score alike are counted, and are no rankings."""
        flags, world, inputs, first = self.config.dpo, self.strategy.world, self.inputs, self.session.episode
        group, own = flags.group_size, world.share_of(list(indices))
        offsets = [(i * world.size + world.rank) * group for i in range(len(own))]
        episodes = [first + offset + j for offset in offsets for j in range(group)]
        rollout = self.policy.rollout([inputs.prompts[i] for i in own], episodes, n=group)
        self.session.episode += len(indices) * group
        inputs.source.step = step
        with self.strategy.phase("score"):
            scores = inputs.source.score_parts([inputs.records[i] for i in own for _ in range(group)], rollout)
        shown = rollout[: self.config.samples]
        self.session.sample(step, sample_rows(inputs.encoder, shown, [row[0] for row in scores], kind="rollout"))
        ranks = world.gather([(rollout[i : i + group], scores[i : i + group]) for i in range(0, len(rollout), group)])
        groups = [ranks[i % world.size][i // world.size] for i in range(len(indices))]  # the inverse of share_of
        given = torch.tensor([rows for _, rows in groups])  # [prompts, group, the score and its parts]
        raw = given[:, :, 0]
        ended = torch.tensor([[answer.finish_reason == "stop" for answer in answers] for answers, _ in groups])
        used = with_ends(raw.flatten(), ended.flatten(), flags).view_as(raw)
        compared = [ranked(answers, row) for (answers, _), row in zip(groups, used.tolist(), strict=True)]
        kept = [ranking for ranking in compared if ranking.pairs]
        if flags.pairs == "best-worst":
            kept = [ranking.best_and_worst() for ranking in kept]
        lengths = [n for ranking in compared for n in ranking.response_lengths]
        metrics = {
            "objective/scores": float(raw.mean()),
            "objective/scores_std": float(raw.std()),
            "objective/response_length": sum(lengths) / len(lengths),
            "val/missing_eos_rate": 1 - float(ended.float().mean()),
            "frac_ties": 1 - len(kept) / len(compared),
            "episode": float(self.session.episode),
        }
        return kept, metrics | inputs.source.metrics(given[:, :, 1:].flatten(0, 1))

    def evaluate(self, step: int, best: Best, metrics: dict[str, float]) -> bool:
        """Adds the metrics of answers to held-out prompts; True if their score is the best so far."""
        return policy.evaluate(step, self.session, self.policy, self.inputs, best, metrics)

    def end(self, step: int) -> None:
        """Greedy answers for the report."""
        policy.show(step, self.session, self.policy, self.inputs, self.config.samples)


# --- an update ------------------------------------------------------------------------------------------------------


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
