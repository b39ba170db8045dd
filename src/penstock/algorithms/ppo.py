"""PPO for language models: rollout, score, learn (Ziegler et al. 2019; Ouyang et al. 2022, stage 3).

`ppo()` is the loop; `PPO` is one iteration of it, which the dry run, the benchmarks and `chatgpt` use too; `State` is
what a checkpoint holds. Numbers in comments are the lines of docs/ppo.md: what decides whether RLHF converges.

[Note: loss over the global count] Losses are divided by the token count of the whole mini-batch before backward.
Gradients are then plain sums over micro-batches and ranks, and neither number changes them (15).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.experience import Experience, logprobs_of, used_scores, values_of, weighted
from penstock.algorithms.heldout import Best, interval
from penstock.algorithms.policy import (
    Policy,
    PolicyState,
    evaluate,
    passed_target_kl,
    permutation,
    prepare_roles,
    show,
    trained_streams,
)
from penstock.algorithms.policy_inputs import Inputs, check_flags, read_inputs
from penstock.algorithms.policy_metrics import summary
from penstock.algorithms.setup import placed, sample_rows, say_length, strategy_of
from penstock.algorithms.sft import Rows, micro_batches, response_logprobs
from penstock.config import PPOConfig, PPOFlags
from penstock.data.batching import Shuffle
from penstock.data.chat import Example
from penstock.memory.strategy import Step, StepStats, Strategy
from penstock.memory.stream import Losses, Stream
from penstock.models.roles import Actor, ActorCritic, Critic
from penstock.rollout.engine import Answer
from penstock.run.session import Session


def ppo(config: PPOConfig, *, resume: bool = False) -> Path:
    """Trains as `config` says and returns the run directory. With `resume`, goes on from its newest checkpoint.

    `--steps` counts rollout iterations; `--batch-size` episodes per iteration over all ranks.
    """
    config = dataclasses.replace(config, run=placed(config.run))
    optim, flags, strategy = config.optim, config.ppo, strategy_of(config.run)
    world, mini_batch = strategy.world, config.mini_batch_size or optim.batch_size
    check_flags(config, world.size)
    session = Session("ppo", config, world, resume=resume)
    inputs = read_inputs(session.config, strategy, session)
    total = optim.steps or math.ceil(len(inputs.prompts) / optim.batch_size)
    parts = math.ceil(optim.batch_size / mini_batch)  # mini-batches per epoch
    updates = optim.epochs * parts
    say_length(config, total * updates, session, per_step=updates)
    every = interval(config, total, len(inputs.heldout[1]), optim.batch_size, session)

    with session:
        state = State.start(config, inputs, total)
        iteration = prepare(config, strategy, inputs, session)
        trained = restore(session, iteration, state)
        if state.step == 0 and state.experience is None:
            show(0, session, iteration, inputs, config.samples)

        for step in session.steps(state.step, total):
            with session.may_give_up(state.step, trained, state.save):  # there is one from a checkpoint inside a step
                experience = state.experience or gather(step, session, iteration, inputs, state, config)
            hold_actor = state.holds_actor(experience, flags)
            while state.update < updates:
                session.pause(state.step, trained, state.save)  # on SIGTERM; the experience is saved too
                epoch, part = divmod(state.update, parts)
                order = permutation(len(experience.tokens), config.run.seed, step, epoch)  # new each epoch (17)
                index = order[part * mini_batch : (part + 1) * mini_batch]
                done = (step - 1) * updates + state.update
                state.lr = fn.lr_schedule(done, total * updates, optim.warmup, optim.lr_schedule)
                use_ptx = inputs.demonstrations and not hold_actor
                ptx = [inputs.demonstrations[i] for i in state.ptx_shuffle.next(mini_batch)] if use_ptx else []
                steps = iteration.learn(experience, index, state.lr, ptx, hold_actor=hold_actor)
                for name, stats in steps.items():
                    session.check(stats, name)
                state.sums += steps.items()
                state.update += 1
                if passed_target_kl(steps.get("policy"), flags.target_kl):
                    break  # (20) for actor and critic the experience is used up; the next one is fresh
            state.update = updates

            metrics = summary(experience, state.sums, state.kl.beta, flags, has_kl=bool(iteration.roles.reference))
            metrics |= inputs.source.metrics(experience.part_scores)
            metrics |= {"lr": optim.lr * state.lr, "episode": session.episode, "policy/held": float(hold_actor)}
            due = step % every == 0 or step == total
            with session.may_give_up(state.step, trained, state.save):
                improved = due and evaluate(step, session, iteration, inputs, state.best, metrics)
            session.health(step, state.examine(config, metrics))
            state.kl.update(metrics.get("objective/kl", 0.0), optim.batch_size)
            state.end(step)
            session.log(step, metrics, tokens=int(experience.lengths.sum()), perf=strategy.take_perf())
            if step == session.total:
                show(step, session, iteration, inputs, config.samples)
            session.checkpoint(step, trained, state.save, best=improved)
        return session.finish()


def gather(
    step: int, session: Session, iteration: "PPO", inputs: Inputs, state: "State", config: PPOConfig
) -> Experience:
    """The experience of a step that begins: answers to fresh prompts, scored."""
    share_of, flags = iteration.strategy.world.share_of, config.ppo
    inputs.source.step = step
    drawn = share_of(list(enumerate(state.shuffle.next(config.optim.batch_size), start=session.episode)))
    rollout = iteration.rollout([inputs.prompts[i] for _, i in drawn], [episode for episode, _ in drawn])
    experience = iteration.score(rollout, [inputs.records[i] for _, i in drawn], state.kl.beta, state.scale)
    for line in state.begin(experience, flags):
        session.say(f"step {step}: {line}")
    scores = share_of(experience.scores.tolist())
    session.sample(step, sample_rows(inputs.encoder, rollout[: config.samples], scores, kind="rollout"))
    session.episode += config.optim.batch_size
    return experience


def prepare(config: PPOConfig, strategy: Strategy, inputs: Inputs, session: Session) -> "PPO":
    """Gives the models their homes, and leaves the device memory that their activations need."""
    roles, swap = prepare_roles("ppo", config, strategy, inputs)
    source, encoder = inputs.source, inputs.encoder
    critic_scores = source.starts_critic and "critic" in inputs.models and config.critic in (None, config.reward)
    sampling = (config.run.seed, encoder.eos_ids, swap, encoder.tokenizer)
    return PPO(
        strategy, roles, config.optim, config.ppo, *sampling, between=session.give_up, critic_scores=critic_scores
    )


def restore(session: Session, iteration: "PPO", state: "State") -> dict[str, Stream]:
    """Reads the checkpoint of a resumed run. Returns the models that are trained, under their names in checkpoints."""
    trained = trained_streams(iteration.roles)
    session.restore(trained)
    if session.state:
        state.load(session.state)
        if state.scale and state.scale.first:
            iteration.rescale_critic(*state.scale.first)
    return trained


HELD_SHARE = 0.1
"""Of a run's steps, at most so many are spent with the actor held for the critic."""


@dataclass(kw_only=True)
class State(PolicyState):
    """What PPO keeps from one update to the next. A checkpoint holds all of it."""

    ptx_shuffle: Shuffle
    kl: fn.KLController
    warm_up: fn.ValueWarmUp
    """Holds the actor at the start (19)."""
    scale: fn.Moments | None
    """Of all scores so far; None where they are used as they are (10)."""

    @staticmethod
    def start(config: PPOConfig, inputs: "Inputs", steps: int) -> "State":
        """Before the first step, and before the models are prepared."""
        critic, seed = inputs.models.get("critic"), config.run.seed
        starts_blank = config.value_warmup and not (critic and critic.score.any())
        scaled = {"auto": not inputs.source.has_scale, "running": True, "none": False}[config.ppo.scale_rewards]
        return State(
            shuffle=Shuffle(len(inputs.prompts), seed),
            ptx_shuffle=Shuffle(max(len(inputs.demonstrations), 1), seed + 1),
            kl=fn.KLController(config.ppo.kl_coef, config.ppo.kl_target, config.ppo.kl_horizon),
            warm_up=fn.ValueWarmUp(math.ceil(steps * HELD_SHARE) if starts_blank else 0),
            scale=fn.Moments() if scaled else None,
            best=Best(config.early_stopping_patience),
        )

    def begin(self, experience: Experience, flags: PPOFlags) -> list[str]:
        """A step begins: its experience has been scored. Returns what a person must know of it."""
        self.experience, self.update, self.sums = experience, 0, []
        explained = fn.explained_variance(experience.values, experience.returns, experience.mask)
        lines = [self.warm_up.update(float(explained))]
        if self.step == 0:
            cut = f"{int((~experience.ended).sum())} of the starting model's {len(experience.ended)} answers"
            lines.append(f"{cut} exceed --max-new-tokens {flags.max_new_tokens}")
        if self.step == 0 and self.scale is not None:
            lines.append(
                f"scores are normalised by the mean and standard deviation of all so far, now {self.scale.mean:.4g} "
                f"and {self.scale.std:.4g}; --scale-rewards none uses them as they are"
            )
        return [line for line in lines if line]

    def holds_actor(self, experience: Experience, flags: PPOFlags) -> bool:
        """Whether the actor does not learn from this experience: the critic is not ready, or only KL would teach it."""
        return not self.warm_up.over or not fn.has_spread(used_scores(experience, flags))

    def save(self) -> dict[str, Any]:
        return super().save() | {
            "ptx_shuffle": self.ptx_shuffle.state_dict(),
            "beta": self.kl.beta,
            "critic_ready": self.warm_up.over,
            "held": self.warm_up.held,
            "explained": self.warm_up.explained,
            "scale": self.scale and dataclasses.asdict(self.scale),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Inverse of `save`; earlier releases saved no "scale"."""
        super().load(saved)
        self.ptx_shuffle.load_state_dict(saved["ptx_shuffle"])
        self.kl.beta = saved["beta"]
        self.warm_up.over, self.warm_up.held = saved["critic_ready"], saved.get("held", 0)
        self.warm_up.explained = saved.get("explained", 0.0)
        self.scale = fn.Moments(**saved["scale"]) if saved.get("scale") else None


# --- one iteration --------------------------------------------------------------------------------------------------


@dataclass
class PPO(Policy):
    """One iteration over prepared models: `rollout`, `score`, `learn`, each in its phase. It keeps no state.

    Without a critic (`Roles.critic` None and a plain actor) values are zeros and `learn` updates the actor alone.
    """

    flags: PPOFlags = field(default_factory=PPOFlags)
    critic_scores: bool = field(default=False, kw_only=True)
    """The critic starts as the reward model: what it predicts are scores, and follows their scale."""

    def score(
        self, rollout: Sequence[Answer], records: Sequence, beta: float, scale: fn.Moments | None = None
    ) -> Experience:
        """The answers of all ranks, in the order of episodes, with advantages. records: this rank's prompts.

        `scale` first takes in the scores of the answers that ended, in place; then it normalises all (10).
        """
        with self.strategy.phase("score"):
            experience = self.read(rollout, records)
            if scale is not None:
                experience = self._normalise(experience, scale)
            return with_advantages(experience, beta, self.flags)

    def _normalise(self, experience: Experience, scale: fn.Moments) -> Experience:
        flags, values = self.flags, experience.values
        own_count = flags.missing_eos_penalty is None and flags.missing_eos_score is None
        scale.add(experience.scores if own_count else experience.scores[experience.ended])
        if scale.count and not scale.first:
            scale.first = [scale.mean, scale.std or 1.0]
            if self.critic_scores:
                self.rescale_critic(*scale.first)
                values = (values - scale.mean) / scale.first[1]
        return dataclasses.replace(experience, scaled_scores=scale.normalise(experience.scores), values=values)

    def rescale_critic(self, mean: float, std: float) -> None:
        """From now on the critic predicts (what it predicted - mean) / std, without a change of its weights."""
        critic = self.roles.critic
        if self.critic_scores and critic is not None:
            model = critic.model
            model.mean, model.std = model.mean + model.std * mean, model.std * std

    def learn(
        self,
        experience: Experience,
        index: Tensor,
        lr: float = 1.0,
        ptx: Sequence[Example] = (),
        *,
        hold_actor: bool = False,
    ) -> dict[str, StepStats]:
        """One optimizer step on the episodes of `index`: "policy", the actor's, and "value", the critic's statistics.

        `lr` multiplies both learning rates; `ptx` are the demonstrations of the ptx loss; with `hold_actor` only the
        critic learns. An actor with a value head takes one step on both losses.
        """
        world, optim, flags = self.strategy.world, self.optim, self.flags
        size, actor, critic = optim.micro_batch_size, self.roles.actor, self.roles.critic
        count, ptx_count = int(experience.lengths[index].sum()), sum(sum(example.trained) for example in ptx)
        parts = index[world.rank :: world.size].split(size)
        share = [experience.rows(rows).to(world.device) for rows in parts if len(rows)]
        mixed = [*share, *micro_batches(world.share_of(list(ptx)), size, world.device)]

        def policy(hidden: Tensor, part: Part) -> Losses:
            return actor_loss(actor.model, hidden, part, flags, count, ptx_count)

        def value(hidden: Tensor, part: Experience) -> Losses:
            assert critic is not None
            return critic_loss(critic.model, hidden, part, flags, count)

        def both(hidden: Tensor, part: Part) -> Losses:
            return shared_loss(actor.model, hidden, part, flags, count, ptx_count, hold_actor)

        shared = isinstance(actor.model, ActorCritic)
        steps: dict[str, Step] = {}
        if shared:
            steps["both"] = Step(actor, share if hold_actor else mixed, both, optim.lr * lr)
        elif not hold_actor:
            steps["policy"] = Step(actor, mixed, policy, optim.lr * lr)
        if critic is not None:
            steps["value"] = Step(critic, share, value, (flags.critic_lr or 5 * optim.lr) * lr)
        with self.strategy.phase("train"):
            stats = self.strategy.step_all([*steps.values()], max_grad_norm=optim.max_grad_norm)
        return two_sets(stats[0], hold_actor) if shared else dict(zip(steps, stats, strict=True))


def with_advantages(experience: Experience, beta: float, flags: PPOFlags) -> Experience:
    """Rewards shaped by the KL penalty, GAE, returns, whitening: all over the whole batch (7, 8, 10, 13, 14)."""
    scores = used_scores(experience, flags)
    rewards = fn.shape_rewards(
        scores, experience.logprobs, experience.ref_logprobs, experience.lengths, beta, flags.kl_estimator
    )
    if flags.whiten_rewards:
        rewards = fn.whiten(rewards, experience.mask, shift_mean=False)
    advantages, returns = fn.gae(rewards, experience.values, experience.lengths, flags.gamma, flags.lam)
    return dataclasses.replace(experience, advantages=fn.whiten(advantages, experience.mask), returns=returns)


Part = Experience | Rows
"""A micro-batch of episodes, or of demonstrations for the ptx loss."""


def actor_loss(actor: Actor, hidden: Tensor, part: Part, flags: PPOFlags, count: int, ptx_count: int) -> Losses:
    """The clipped policy loss of a micro-batch of episodes, or the ptx loss of one of demonstrations (16, 21)."""
    if isinstance(part, Rows):
        loss = fn.sft_loss(response_logprobs(actor, hidden, part), ptx_count)
        return flags.ptx_coef * loss, {"ptx": loss}
    logprobs, entropy = logprobs_of(actor, hidden, part, flags.temperature)
    advantages = weighted(part.advantages, part, flags)  # in which every surrogate is linear
    loss, stats = fn.policy_loss(logprobs, part.logprobs, advantages, part.mask, flags.clip, count)
    stats |= {"policy": loss, "entropy": entropy.sum(), "tokens": part.lengths.sum()}
    if flags.kl_loss_coef:
        kl = weighted(fn.KL_ESTIMATORS[flags.kl_estimator](logprobs, part.ref_logprobs), part, flags)
        kl = fn.masked_mean(kl, part.mask, count)
        loss, stats["kl_loss"] = loss + flags.kl_loss_coef * kl, kl
    return loss, stats


def critic_loss(critic: Critic | ActorCritic, hidden: Tensor, part: Experience, flags: PPOFlags, count: int) -> Losses:
    """The clipped value loss of a micro-batch; coefficient 1: the critic has its own optimizer (16)."""
    values = values_of(critic, hidden, part)
    loss, stats = fn.value_loss(values, part.values, part.returns, part.mask, flags.value_clip, count)
    return loss, {**stats, "tokens": part.lengths.sum()}


def shared_loss(
    actor: ActorCritic, hidden: Tensor, part: Part, flags: PPOFlags, count: int, ptx_count: int, hold_actor: bool
) -> Losses:
    """Both losses on one trunk, the value's times --vf-coef (16). `hold_actor`: the head learns, the trunk does not.

    The statistics are those of the policy, and the value's three under names of their own; `two_sets` parts them.
    """
    if isinstance(part, Rows):
        return actor_loss(actor, hidden, part, flags, count, ptx_count)
    value, stats = critic_loss(actor, hidden.detach() if hold_actor else hidden, part, flags, count)
    value_stats = {"value_loss": value, "value_clipfrac": stats["clipfrac"], "value_tokens": stats["tokens"]}
    if hold_actor:
        return flags.vf_coef * value, value_stats
    policy, policy_stats = actor_loss(actor, hidden, part, flags, count, ptx_count)
    return policy + flags.vf_coef * value, {**policy_stats, **value_stats}


def two_sets(stats: StepStats, hold_actor: bool) -> dict[str, StepStats]:
    """The statistics of a step on `shared_loss`, as those of a policy step and of a value step."""
    sums = dict(stats.sums)
    value = {name: sums.pop(f"value_{name}") for name in ("clipfrac", "tokens", "loss")}
    steps = {} if hold_actor else {"policy": dataclasses.replace(stats, sums=sums)}
    return {**steps, "value": dataclasses.replace(stats, sums=value)}
