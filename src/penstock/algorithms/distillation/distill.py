"""Distillation: a student learns a teacher's probabilities of the next token (Hinton et al. 2015), on given answers or
on its own samples (GKD: Agarwal et al. 2024, On-Policy Distillation of Language Models, algorithm 1).

The teacher is frozen and lives under the student's strategy, so it may be many times larger than the device.

[Note: k tokens and the rest] The divergence is over the teacher's k likeliest tokens and one event, "any other token".
Both models' distributions are coarsened alike, so it is a divergence of two true distributions: 0 where they agree, and
by the data-processing inequality never more than that over the whole vocabulary, which it is at k = vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.config import DistillConfig, DistillFlags
from penstock.algorithms.distillation.inputs import Inputs, Row, check_flags, read_inputs, say_what_fits, workload
from penstock.algorithms.distillation.teacher import Taught, TeacherStore, read_teacher, stored_teacher
from penstock.algorithms.heldout import Best, interval
from penstock.algorithms.policy import HELDOUT_STREAMS
from penstock.algorithms.setup import placed, reserve_activations, sample_rows, say_length, strategy_of
from penstock.algorithms.sft import micro_batches, prompt_of, trained_tokens
from penstock.config import OptimFlags
from penstock.data.batching import Shuffle
from penstock.data.chat import Example
from penstock.memory.strategy import StepStats, Strategy
from penstock.memory.stream import Losses, Stream
from penstock.memory.tiers import Ram
from penstock.models.roles import Actor
from penstock.rollout.engine import Answer, generate
from penstock.rollout.sampling import Sampling, stream
from penstock.run.session import Session


def distill(config: DistillConfig, *, resume: bool = False) -> Path:
    """Trains as `config` says and returns the run directory. With `resume`, goes on from its newest checkpoint."""
    config = dataclasses.replace(config, run=placed(config.run))
    check_flags(config)
    optim, strategy = config.optim, strategy_of(config.run)
    session = Session("distill", config, strategy.world, resume=resume)
    inputs = read_inputs(session.config, strategy, session)
    total = optim.steps or math.ceil(optim.epochs * len(inputs.train) / optim.batch_size)
    say_length(config, total, session, rows=len(inputs.train))
    every = interval(config, total, len(inputs.heldout), optim.batch_size, session)

    with session:
        store = stored_teacher(config, session, inputs) if config.precompute_teacher else None
        work = prepare(config, session, strategy, inputs, store)
        shuffle, start, best = Shuffle(len(inputs.train), work.seed), 0, Best(config.early_stopping_patience)
        session.restore({"model": work.student})
        if session.state:
            shuffle.load_state_dict(session.state["shuffle"])
            start = session.state["step"]
            best.load(-session.state["best"], session.state)

        def state() -> dict[str, Any]:
            return {"shuffle": shuffle.state_dict(), "step": step, "best": -best.value, "stale": best.stale}

        def before() -> dict[str, Any]:
            return {**state(), "step": step - 1}

        def show(step: int) -> None:
            rows = (inputs.heldout or inputs.train)[: config.samples]
            answers = work.answer(rows, range(len(rows)), temperature=0.0)
            session.sample(step, sample_rows(inputs.encoder, answers, kind="greedy"))

        if start == 0:
            show(0)
        for step in session.steps(start, total):
            on_policy = float(stream(work.seed ^ ON_POLICY, step, 1)) < inputs.flags.on_policy
            with session.may_give_up(step - 1, {"model": work.student}, before):
                rows = [inputs.train[i] for i in shuffle.next(optim.batch_size)]
                rows = work.sample(rows, session.episode) if on_policy else rows
            session.episode += len(rows) if on_policy else 0
            lr = optim.lr * fn.lr_schedule(step - 1, total, optim.warmup, optim.lr_schedule)
            count = trained_tokens(rows)  # of the whole batch, all ranks (PPO.md 15)
            stats, improved = work.learn(work.teach(rows), count, lr, given=not on_policy), False
            session.check(stats)
            metrics = summary(stats, count)
            metrics |= {"lr": lr, "epoch": shuffle.epochs, "episode": session.episode, "on_policy": float(on_policy)}
            if inputs.heldout and (step % every == 0 or step == total):
                metrics["heldout/loss"] = work.heldout_loss(inputs.heldout)
                improved = best.better(-metrics["heldout/loss"])
                best.end_early(session, step)
            session.health(step, health(metrics, inputs.flags))
            session.log(step, metrics, tokens=sum(len(row.tokens) for row in rows), perf=strategy.take_perf())
            if step == session.total:
                show(step)
            session.checkpoint(step, {"model": work.student}, state, best=improved)
        return session.finish()


ON_POLICY = 0x6D5  # in the seed of the choice between given answers and samples
LEAST_MASS = 0.9
"""Of the teacher's probability, what its likeliest tokens should hold."""


def health(metrics: dict[str, float], flags: DistillFlags) -> list[str]:
    """What is wrong at this step."""
    mass, k = metrics["teacher/top_k_mass"], flags.teacher_top_k
    if mass >= LEAST_MASS:
        return []
    return [f"top k: the teacher's {k} likeliest tokens hold {mass:.0%} of its probability; raise --teacher-top-k"]


def summary(stats: StepStats, count: int) -> dict[str, float]:
    """A step's metrics. The entropy is that of k tokens and the rest: a lower bound."""
    sums = stats.sums
    metrics = {"loss": sums["loss"], **stats.metrics, "tokens": count}
    if "sft" in sums:
        metrics |= {"loss/divergence": sums["divergence"], "loss/sft": sums["sft"]}
    return {**metrics, "teacher/top_k_mass": sums["mass"] / count, "student/entropy": sums["entropy"] / count}


# --- models ---------------------------------------------------------------------------------------------------------


def prepare(
    config: DistillConfig, session: Session, strategy: Strategy, inputs: Inputs, store: TeacherStore | None
) -> "Distillation":
    """Gives the student its home, and the teacher where no store speaks for it, beside what activations need."""
    models = {"model": inputs.student} if store else {"model": inputs.student, "teacher": inputs.teacher}
    work, seed, eos_ids = workload(config, inputs, models), config.run.seed, inputs.encoder.eos_ids
    if store is None:
        say_what_fits(strategy, work, session)
    swap = reserve_activations(strategy, work)
    student, *teacher = strategy.prepare_all(*models.values(), **config.optim.adamw)
    own = (config.optim, inputs.flags, seed, eos_ids, swap)
    return Distillation(strategy, student, store or teacher[0], *own, session.give_up)


# --- one step -------------------------------------------------------------------------------------------------------


@dataclass
class Distillation:
    """One step over prepared models: `sample`, `teach`, `learn`. It keeps no state."""

    strategy: Strategy
    student: Stream
    teacher: Stream | TeacherStore
    optim: OptimFlags
    flags: DistillFlags
    seed: int = 0
    """Of the sampled tokens."""
    eos_ids: Sequence[int] = ()
    """Tokens that end an answer."""
    swap: Ram | None = None
    """The host tier that the KV cache is swapped to."""
    between: Callable[[], object] = bool
    """Called before each token, which ends with what it raises (`Session.give_up`)."""

    def answer(self, rows: Sequence[Example], episodes: Sequence[int], **changes: Any) -> list[Answer]:
        """The student's answers to the rows' prompts. `changes` are those of the sampling."""
        names = ("temperature", "max_new_tokens")
        sampling = Sampling(**{name: getattr(self.flags, name) for name in names} | {"seed": self.seed} | changes)
        options: Any = {"batch_size": self.flags.rollout_batch_size, "swap": self.swap, "between": self.between}
        prompts, decoder = [prompt_of(row) for row in rows], self.student.model.decoder
        with self.strategy.phase("rollout"):
            return generate(decoder, prompts, sampling, eos_ids=self.eos_ids, episodes=episodes, **options)

    def sample(self, rows: Sequence[Row], first: int, **changes: Any) -> list[Row]:
        """The rows with answers of the student instead of the given ones, on every rank; `first`: the first episode."""
        world = self.strategy.world
        share = world.share_of(list(enumerate(rows, start=first)))
        answers = self.answer([row for _, row in share], [episode for episode, _ in share], **changes)
        ranks = world.gather([Row.of(answer.prompt_ids, answer.response_ids) for answer in answers])
        return [ranks[i % world.size][i // world.size] for i in range(len(rows))]

    def teach(self, rows: Sequence[Row]) -> list[Taught]:
        """This rank's share of the rows in micro-batches, with what the teacher says of them."""
        size, device, teacher = self.optim.micro_batch_size, self.strategy.world.device, self.teacher
        share = sorted(self.strategy.world.share_of(list(rows)), key=lambda row: len(row.tokens))
        batches = micro_batches(share, size, device)
        if isinstance(teacher, TeacherStore):
            parts = [share[i : i + size] for i in range(0, len(share), size)]
            read = [teacher.read([row.number for row in part]) for part in parts]
        else:
            vocabulary = self.student.model.decoder.config.vocab_size
            read = read_teacher(self.strategy, teacher, batches, self.flags, vocabulary)
        pairs = zip(batches, read, strict=True)
        return [
            Taught(rows.tokens, rows.trained, ids.to(device), logprobs.to(device)) for rows, (ids, logprobs) in pairs
        ]

    def learn(self, taught: Sequence[Taught], count: int, lr: float, *, given: bool = True) -> StepStats:
        """One optimizer step on a batch of `count` trained tokens, of which this rank has a share. given: the answers
        are not the student's own."""

        def loss_of(hidden: Tensor, part: Taught) -> Losses:
            return distillation_loss(self.student.model, hidden, part, self.flags, count, given)

        with self.strategy.phase("train"):
            return self.strategy.step(self.student, taught, loss_of, lr=lr, max_grad_norm=self.optim.max_grad_norm)

    def heldout_loss(self, rows: Sequence[Row]) -> float:
        """The mean divergence per token of given answers, or of samples where there are none."""
        world, student, size = self.strategy.world, self.student.model, self.optim.batch_size
        rows = self.sample(rows, 0, seed=self.seed ^ HELDOUT_STREAMS) if self.flags.on_policy == 1 else rows
        total = torch.zeros((), dtype=torch.float64, device=world.exact)

        def read(hidden: Tensor, part: Taught) -> Tensor:
            states = fn.states_before(hidden, part.trained, part.computed)
            return divergences(student, states, part, self.flags)[0].to(world.exact).double().sum()

        for start in range(0, len(rows), size):
            taught = self.teach(rows[start : start + size])
            with self.strategy.phase("score"):
                total += sum(self.strategy.evaluate(self.student, taught, read), torch.zeros_like(total))
        return float(world.sum(total)) / max(trained_tokens(rows), 1)


def distillation_loss(
    student: Actor, hidden: Tensor, part: Taught, flags: DistillFlags, count: int, given: bool
) -> Losses:
    """This micro-batch's part of the mean over `count` tokens: the divergence, and --sft-coef times the negative
    log-likelihood of given answers."""
    states = fn.states_before(hidden, part.trained, part.computed)
    each, logprobs = divergences(student, states, part, flags)
    loss = each.sum() / count
    entropy = -(logprobs.exp() * logprobs).sum()
    stats = {"divergence": loss, "mass": -part.logprobs[:, -1].expm1().sum(), "entropy": entropy}
    if not (given and flags.sft_coef):
        return loss, stats
    answer = part.tokens[part.trained]
    stats["sft"] = fn.sft_loss(student.decoder.logprobs(states, answer, entropy=False)[0], count)
    return loss + flags.sft_coef * stats["sft"], stats


def divergences(student: Actor, states: Tensor, part: Taught, flags: DistillFlags) -> tuple[Tensor, Tensor]:
    """At each trained token the divergence [N] (see [Note: k tokens and the rest]), and the student's log-probabilities
    [N, k + 1], without gradient."""
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(flags.loss, flags.jsd_beta)
    logprobs, _ = student.decoder.logprobs(states, part.ids, flags.temperature, entropy=False, others=True)
    return generalized_jsd(logprobs, part.logprobs, beta), logprobs.detach()


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Between log-probabilities [N, K] of the same K events: [N] (Agarwal et al. 2024, eq. 1; TRL's GKD has this beta).

    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student; both go to 0 at the
    ends, where it is KL(teacher || student) at 0 and KL(student || teacher) at 1, as in TRL.
    """
    if beta in (0.0, 1.0):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [N, K]: [N]."""
    return (p.exp() * (p - q)).sum(-1)
