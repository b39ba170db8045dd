"""KTO: a policy learns from single votes, each an answer that was liked or disliked (Ethayarajh et al. 2024).

An answer's value is a sigmoid of its log-ratio to the frozen reference, measured from a point z0 that the policy's KL
sets: liked answers should lie above it, disliked ones below. z0 is the mean log-ratio of mismatched pairs, each prompt
with another row's answer, over the whole batch and all ranks, so neither micro-batches nor ranks change the loss.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.config import KTOConfig, KTOFlags
from penstock.algorithms.heldout import Best, interval, read_sides
from penstock.algorithms.policy_inputs import load_reference
from penstock.algorithms.reference import row_logprobs
from penstock.algorithms.setup import placed, read_model, reserve_activations, role_specs, say_length, strategy_of
from penstock.algorithms.sft import Rows, micro_batches
from penstock.config import OptimFlags
from penstock.data.batching import Shuffle
from penstock.data.chat import Example
from penstock.errors import UserError
from penstock.memory.strategy import StepStats, Strategy, Work
from penstock.memory.stream import Losses, LossOf, Stream
from penstock.models.roles import Actor
from penstock.planner.workload import Workload
from penstock.run.session import Session

MEASURES_KL = {"kto": True, "apo_zero_unpaired": False}
"""Of each --loss: whether z0 is measured. APO-zero is KTO's value around 0 (D'Oosterlinck et al. 2024, eq. 7)."""


def kto(config: KTOConfig, *, resume: bool = False) -> Path:
    """Trains as `config` says and returns the run directory. With `resume`, goes on from its newest checkpoint."""
    config = dataclasses.replace(config, run=placed(config.run))
    optim, strategy = config.optim, strategy_of(config.run)
    if MEASURES_KL[config.kto.loss] and optim.batch_size < 2:
        raise UserError("--batch-size 1: KTO pairs each prompt with another row's answer; give 16 or more, 2 at least.")
    session = Session("kto", config, strategy.world, resume=resume)
    models, train, heldout, work = read_inputs(session.config, strategy, session)
    total = optim.steps or math.ceil(optim.epochs * len(train) / optim.batch_size)
    say_length(config, total, session, rows=len(train))
    every = interval(config, total, len(heldout), optim.batch_size, session)

    with session:
        reserve_activations(strategy, work)
        policy, reference = strategy.prepare_all(*models.values(), **optim.adamw)
        iteration = KTO(strategy, policy, reference, optim, config.kto, work.length)
        shuffle, start, best = Shuffle(len(train), config.run.seed), 0, Best(config.early_stopping_patience)
        session.restore({"model": policy})
        if session.state:
            shuffle.load_state_dict(session.state["shuffle"])
            start = session.state["step"]
            best.load(session.state["best"], session.state)

        def state() -> dict[str, Any]:
            return {"shuffle": shuffle.state_dict(), "step": step, "best": best.value, "stale": best.stale}

        for step in session.steps(start, total):
            votes = [train[i] for i in shuffle.next(optim.batch_size)]
            lr = optim.lr * fn.lr_schedule(step - 1, total, optim.warmup, optim.lr_schedule)
            batch = iteration.score(votes)
            stats = iteration.learn(batch, lr)
            session.check(stats)
            metrics = summary(stats.sums, batch.kl) | stats.metrics | {"lr": lr, "epoch": shuffle.epochs}
            improved = False
            if heldout and (step % every == 0 or step == total):
                facts = iteration.evaluate(heldout)
                metrics |= {f"heldout/{name}": value for name, value in facts.items()}
                improved = best.better(-facts["loss"])
                best.end_early(session, step)
            tokens = sum(len(vote.tokens) for vote in votes)
            session.log(step, metrics, tokens=tokens, perf=strategy.take_perf())
            session.checkpoint(step, {"model": policy}, state, best=improved)
        return session.finish()


@dataclass(frozen=True)
class Judged(Example):
    """A prompt with one answer, whose tokens are marked, and the vote on it."""

    liked: bool

    @property
    def start(self) -> int:  # of the answer
        return self.trained.index(True)


def read_inputs(
    config: KTOConfig, strategy: Strategy, session: Session
) -> tuple[dict[str, Actor], list[Judged], list[Judged], Workload]:
    """The model and its reference; the votes to train on and those held out; what a step is, at most."""
    model, encoder = read_model(Actor, config.model, config, strategy, session)
    with strategy.init():
        reference = model.frozen() if config.reference is None else load_reference(config, encoder)
    train, heldout = (
        [Judged(row.tokens, row.trained, record.label) for record, row in zip(*side, strict=True)]
        for side in read_sides(session, encoder, "votes", config)
    )
    say_balance(train, config.kto, session)
    limit, answer = encoder.max_length, max(sum(vote.trained) for vote in [*train, *heldout])
    longest = max(vote.start for vote in [*train, *heldout]) + answer
    if longest > limit and MEASURES_KL[config.kto.loss]:
        cut = f"mismatched pairs of up to {longest} tokens are cut at {limit} (--max-length)"
        session.say(f"{cut}: KL is measured on what is left of their answers")
    models, rows, longest = {"model": model, "reference": reference}, config.optim.batch_size, min(longest, limit)
    sizes = (rows, config.optim.micro_batch_size, rows, 1, longest - answer, answer)
    return models, train, heldout, Workload("kto", role_specs(models), *sizes)


def say_balance(votes: Sequence[Judged], flags: KTOFlags, session: Session) -> None:
    """Says how many answers were liked and disliked, and the weights that balance them; warns where one kind is all."""
    liked = sum(vote.liked for vote in votes)
    disliked = len(votes) - liked
    session.say(f"{liked} liked and {disliked} disliked answers")
    if not liked or not disliked:
        all_are = "liked, and penstock sft learns from them better" if liked else "disliked, and none says what is good"
        session.warn(f"votes of one kind: all answers were {all_are}; add votes of the other kind")
        return
    wanted, other = disliked * flags.undesirable_weight / liked, liked * flags.desirable_weight / disliked
    ratio = flags.desirable_weight / wanted
    if not 0.999 <= ratio <= 1.334:  # eq. 8 of the paper, as TRL reads it
        desirable, undesirable = f"{wanted:.2f} to {wanted * 4 / 3:.2f}", f"{other * 3 / 4:.2f} to {other:.2f}"
        advice = f"--desirable-weight {desirable} or --undesirable-weight {undesirable}"
        session.say(f"liked answers weigh {ratio:.2f} times the disliked; 1 to 1.33 is advised: {advice}")


# --- one iteration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Votes(Rows):
    """A micro-batch of judged answers."""

    liked: Tensor
    """[B] bool."""
    ref_logps: Tensor
    """[B] fp32, of each whole answer under the reference."""


class Batch(NamedTuple):
    """A rank's share of a batch; and of the whole batch z0, in nats per answer and 0 at least, and its votes."""

    micro_batches: list[Votes]
    kl: float
    total: int


@dataclass
class KTO:
    """One iteration over prepared models: `score`, then `learn`. It keeps no state."""

    strategy: Strategy
    policy: Stream
    reference: Stream
    optim: OptimFlags
    flags: KTOFlags = field(default_factory=KTOFlags)
    max_length: int = 1 << 30  # tokens of a mismatched pair

    def score(self, votes: Sequence[Judged]) -> Batch:
        """What the reference thinks of a batch, which every rank holds, and z0 under the policy as it is now."""
        world, size, measures_kl = self.strategy.world, self.optim.micro_batch_size, MEASURES_KL[self.flags.loss]
        share = sorted(world.share_of(list(votes)), key=lambda vote: len(vote.tokens))
        matched = micro_batches(share, size, world.device)  # in the same order
        pairs = world.share_of(mismatched(votes, self.max_length)) if measures_kl else []
        others = micro_batches(pairs, size, world.device)
        works: list[Work] = [(self.reference, [*matched, *others], partial(row_logprobs, self.reference.model))]
        works += [(self.policy, others, partial(row_logprobs, self.policy.model))] if measures_kl else []
        with self.strategy.phase("score"):
            ref_logps, *policy_logps = self.strategy.evaluate_all(works)
        kl = torch.zeros((), dtype=torch.float64, device=world.exact)
        for ours, theirs in zip(policy_logps[0] if measures_kl else [], ref_logps[len(matched) :], strict=True):
            kl += (ours - theirs).to(world.exact).double().sum()
        liked = torch.tensor([vote.liked for vote in share], dtype=torch.bool, device=world.device).split(size)
        rows = [Votes(x.tokens, x.trained, y, z) for x, y, z in zip(matched, liked, ref_logps, strict=False)]
        return Batch(rows, max(float(world.sum(kl)) / len(votes), 0.0), len(votes))

    def learn(self, batch: Batch, lr: float) -> StepStats:
        """One optimizer step."""
        loss_of, norm = self.loss(batch.kl, batch.total), self.optim.max_grad_norm
        with self.strategy.phase("train"):
            return self.strategy.step(self.policy, batch.micro_batches, loss_of, lr=lr, max_grad_norm=norm)

    def evaluate(self, votes: Sequence[Judged]) -> dict[str, float]:
        """Metrics of held-out votes, in parts of a batch at most, each with its own z0."""
        parts = math.ceil(len(votes) / self.optim.batch_size)
        world = self.strategy.world
        sums, kl = torch.zeros(len(SUMS), dtype=torch.float64, device=world.exact), 0.0
        for batch in (self.score(votes[part::parts]) for part in range(parts)):
            kl += batch.kl * batch.total / len(votes)
            with self.strategy.phase("score"):
                losses = self.strategy.evaluate(self.policy, batch.micro_batches, self.loss(batch.kl, len(votes)))
            for loss, stats in losses:
                sums += torch.stack([{"loss": loss, **stats}[name].to(world.exact).double() for name in SUMS])
        return summary(dict(zip(SUMS, world.sum(sums).tolist(), strict=True)), kl)

    def loss(self, kl: float, count: int) -> LossOf:
        """A micro-batch's part of the mean loss over `count` votes, and sums of TRL's metrics by liked and disliked."""
        flags = self.flags

        def loss_of(hidden: Tensor, rows: Votes) -> Losses:
            logps = row_logprobs(self.policy.model, hidden, rows)
            log_ratios = logps - rows.ref_logps
            weights = torch.where(rows.liked, flags.desirable_weight, flags.undesirable_weight)
            loss = (weights * kto_loss(log_ratios, rows.liked, kl, flags.beta)).sum() / count
            stats = {}
            for side, mask in (("chosen", rows.liked), ("rejected", ~rows.liked)):
                stats[f"count/{side}"] = mask.sum()
                stats[f"rewards/{side}"] = flags.beta * fn.clean(log_ratios.detach(), mask).sum()
                stats[f"logps/{side}"] = fn.clean(logps.detach(), mask).sum()
            return loss, stats

        return loss_of


SUMS = ("loss", *(f"{name}/{side}" for name in ("count", "rewards", "logps") for side in ("chosen", "rejected")))
"""What `KTO.loss` sums up."""


def kto_loss(log_ratios: Tensor, liked: Tensor, kl: float, beta: float) -> Tensor:
    """1 - v (Ethayarajh et al. 2024, eq. 7), [B]: v is sigmoid(beta * (log_ratio - kl)) of a liked answer, of another
    sigmoid(beta * (kl - log_ratio)). 1 - sigmoid(x) is sigmoid(-x), which keeps its digits. log_ratios, liked: [B].
    """
    return torch.sigmoid(beta * torch.where(liked, kl - log_ratios, log_ratios - kl))


def mismatched(votes: Sequence[Judged], max_length: int) -> list[Example]:
    """Each prompt with the answer of the row before it, as in TRL, cut at `max_length` tokens."""
    pairs = []
    for vote, other in zip(votes, [*votes[-1:], *votes[:-1]], strict=True):
        tokens = [*vote.tokens[: vote.start], *other.tokens[other.start :]][:max_length]
        pairs.append(Example(tokens, [i >= vote.start for i in range(len(tokens))]))
    return pairs


def summary(sums: dict[str, float], kl: float) -> dict[str, float]:
    """Metrics in TRL's names; means of a kind of vote that the batch has none of are left out."""
    metrics = {"loss": sums["loss"], "kl": kl}
    for side in ("chosen", "rejected"):
        count = metrics[f"count/{side}"] = sums[f"count/{side}"]
        if count:
            metrics |= {f"{name}/{side}": sums[f"{name}/{side}"] / count for name in ("rewards", "logps")}
    if sums["count/chosen"] and sums["count/rejected"]:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics
