"""GRPO and its kin: a policy learns from several answers to each prompt, scored and compared; there is no critic
(Shao et al. 2024, "DeepSeekMath").

`grpo()` is the loop; `GRPO` is one iteration of it. What an answer is compared with is a row of
`advantages.BASELINES`, what its tokens' ratios become a `kind` of `functional.policy_loss`. As in PPO, losses are sums
over global counts, so neither micro-batches nor ranks change them.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.advantages import advantages, informative, used_rewards
from penstock.algorithms.config import GRPOConfig, GRPOFlags
from penstock.algorithms.experience import Experience, concatenate, logprobs_of, weighted
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
from penstock.algorithms.policy_inputs import K1_IN_LOSS, Inputs, check_rollout, read_inputs
from penstock.algorithms.policy_metrics import summary
from penstock.algorithms.setup import placed, sample_rows, say_length, strategy_of
from penstock.data.batching import Shuffle
from penstock.errors import UserError
from penstock.memory.strategy import StepStats, Strategy
from penstock.memory.stream import Losses
from penstock.models.roles import Actor
from penstock.rollout.engine import Answer
from penstock.run.session import Session


def grpo(config: GRPOConfig, *, resume: bool = False) -> Path:
    """Trains as `config` says and returns the run directory. With `resume`, goes on from its newest checkpoint.

    `--steps` counts rollout iterations; `--batch-size` answers per iteration over all ranks.
    """
    config = dataclasses.replace(config, run=placed(config.run))
    optim, flags, strategy = config.optim, config.grpo, strategy_of(config.run)
    check_flags(config, strategy.world.size)
    session = Session("grpo", config, strategy.world, resume=resume)
    inputs = read_inputs(session.config, strategy, session)
    total = optim.steps or math.ceil(len(inputs.prompts) * flags.group_size / optim.batch_size)
    mini_batch = config.mini_batch_size or optim.batch_size
    parts = math.ceil(optim.batch_size / mini_batch)  # mini-batches per epoch
    updates = optim.epochs * parts
    if flags.loss == "gspo" and flags.clip > 0.01:
        session.say(f"--loss gspo: answers' ratios stay near 1, and --clip {flags.clip:g} clips few; 3e-4 is usual")
    say_length(config, total * updates, session, per_step=updates)
    every = interval(config, total, len(inputs.heldout[1]), optim.batch_size, session)

    with session:
        state = PolicyState(Shuffle(len(inputs.prompts), config.run.seed), best=Best(config.early_stopping_patience))
        iteration = prepare(config, strategy, inputs, session)
        trained = trained_streams(iteration.roles)
        session.restore(trained)
        if session.state:
            state.load(session.state)
        if state.step == 0 and state.experience is None:
            show(0, session, iteration, inputs, config.samples)

        for step in session.steps(state.step, total):
            with session.may_give_up(state.step, trained, state.save):
                experience = state.experience or gather(step, session, iteration, inputs, state, config)
            teaches = bool(informative(experience, flags).any())
            while state.update < updates and teaches:
                session.pause(state.step, trained, state.save)  # on SIGTERM; the experience is saved too
                epoch, part = divmod(state.update, parts)
                order = permutation(len(experience.tokens), config.run.seed, step, epoch)
                done = (step - 1) * updates + state.update
                state.lr = fn.lr_schedule(done, total * updates, optim.warmup, optim.lr_schedule)
                stats = iteration.learn(experience, order[part * mini_batch : (part + 1) * mini_batch], state.lr)
                session.check(stats, "policy")
                state.sums.append(("policy", stats))
                state.update += 1
                if passed_target_kl(stats, flags.target_kl):
                    break
            state.update = updates

            metrics = metrics_of(experience, state, iteration)
            metrics |= inputs.source.metrics(experience.part_scores)
            metrics |= {"lr": optim.lr * state.lr, "episode": session.episode, "policy/held": float(not teaches)}
            due = step % every == 0 or step == total
            with session.may_give_up(state.step, trained, state.save):
                improved = due and evaluate(step, session, iteration, inputs, state.best, metrics)
            session.health(step, state.examine(config, metrics))
            state.end(step)
            session.log(step, metrics, tokens=int(experience.lengths.sum()), perf=strategy.take_perf())
            if step == session.total:
                show(step, session, iteration, inputs, config.samples)
            session.checkpoint(step, trained, state.save, best=improved)
        return session.finish()


def check_flags(config: GRPOConfig, ranks: int) -> None:
    """Raises UserError for flags that do not fit together."""
    check_rollout("grpo", config, ranks)
    size, group, flags = config.optim.batch_size, config.grpo.group_size, config.grpo
    if size % group or size // group < ranks:
        raise UserError(
            f"--batch-size {size}: counts answers, and must hold whole groups of --group-size {group}, one for each "
            f"of {ranks} ranks at least; give {math.ceil(max(size / group, ranks)) * group}."
        )
    if flags.kl_coef and flags.kl_in == "loss" and flags.kl_estimator == "k1":
        raise UserError(K1_IN_LOSS.format(flag="--kl-in loss"))
    if flags.overlong_buffer > flags.max_new_tokens:
        raise UserError(f"--overlong-buffer {flags.overlong_buffer}: more than --max-new-tokens allows.")


def prepare(config: GRPOConfig, strategy: Strategy, inputs: Inputs, session: Session) -> "GRPO":
    """Gives the models their homes, and leaves the device memory that their activations need."""
    roles, swap = prepare_roles("grpo", config, strategy, inputs, config.grpo.group_size, reread=config.rereads)
    encoder = inputs.encoder
    sampling = (config.run.seed, encoder.eos_ids, swap, encoder.tokenizer)
    return GRPO(strategy, roles, config.optim, config.grpo, *sampling, config.rereads, session.give_up)


def gather(
    step: int, session: Session, iteration: "GRPO", inputs: Inputs, state: PolicyState, config: GRPOConfig
) -> Experience:
    """The experience of a step that begins: groups of answers to fresh prompts, scored and compared.

    Under --dynamic-sampling, groups without a spread of scores give way to those of other prompts.
    """
    flags, share_of = config.grpo, iteration.strategy.world.share_of
    inputs.source.step = step
    wanted, group = config.optim.batch_size // flags.group_size, flags.group_size
    drawn = share_of(state.shuffle.next(wanted))
    experience, rollout = iteration.answer(drawn, inputs, session.episode)
    session.episode += wanted * group
    scores = [score for row in share_of(experience.scores.view(-1, group).tolist()) for score in row]
    rounds = 0
    while flags.dynamic_sampling and rounds < flags.max_resamples:
        if bool(informative(experience, flags).all()):
            break
        more, _ = iteration.answer(share_of(state.shuffle.next(wanted)), inputs, session.episode)
        session.episode += wanted * group
        experience, rounds = refilled(experience, more, flags), rounds + 1
    session.sample(step, sample_rows(inputs.encoder, rollout[: config.samples], scores, kind="rollout"))
    if step == 1:
        cut = int((~experience.ended).sum())
        session.say(f"{cut} of the starting model's {len(experience.ended)} answers exceed --max-new-tokens")
    state.experience, state.update, state.sums = with_advantages(experience, flags), 0, []
    return state.experience


def refilled(experience: Experience, more: Experience, flags: GRPOFlags) -> Experience:
    """The groups of `experience`, those without a spread of scores replaced by the first of `more` that have one."""
    both, group = concatenate([experience, more]), flags.group_size
    teaches = informative(both, flags)
    count = len(experience.tokens) // group
    spare = [count + i for i in teaches[count:].nonzero()[:, 0].tolist()]
    chosen = [i if teaches[i] or not spare else spare.pop(0) for i in range(count)]
    return both.rows((torch.tensor(chosen)[:, None] * group + torch.arange(group)).flatten())


@dataclass
class GRPO(Policy):
    """One iteration over prepared models: `answer`, `learn`, each in its phases. It keeps no state."""

    flags: GRPOFlags = field(default_factory=GRPOFlags)

    def answer(self, prompts: Sequence[int], inputs: Inputs, first: int) -> tuple[Experience, list[Answer]]:
        """Groups of answers to this rank's prompts, indices of `inputs`: those of all ranks as the models see them, and
        its own. first: the number of the first episode of all ranks."""
        world, group = self.strategy.world, self.flags.group_size
        starts = [first + (i * world.size + world.rank) * group for i in range(len(prompts))]
        episodes = [start + j for start in starts for j in range(group)]
        rollout = self.rollout([inputs.prompts[i] for i in prompts], episodes, n=group)
        with self.strategy.phase("score"):
            records = [inputs.records[i] for i in prompts for _ in range(group)]
            return self.read(rollout, records, group), rollout

    def learn(self, experience: Experience, index: Tensor, lr: float = 1.0) -> StepStats:
        """One optimizer step on the answers of `index`; `lr` multiplies the learning rate."""
        world, optim, actor = self.strategy.world, self.optim, self.roles.actor
        tokens, rows = int(experience.lengths[index].sum()), len(index)
        index = index.sort().values  # answers to one prompt side by side: what they share is computed once
        parts = index[world.rank :: world.size].split(optim.micro_batch_size)
        share = [experience.rows(part).to(world.device) for part in parts if len(part)]

        def loss_of(hidden: Tensor, part: Experience) -> Losses:
            return group_loss(actor.model, hidden, part, self.flags, tokens, rows, reread=self.reread)

        with self.strategy.phase("train"):
            return self.strategy.step(actor, share, loss_of, lr=optim.lr * lr, max_grad_norm=optim.max_grad_norm)


def with_advantages(experience: Experience, flags: GRPOFlags) -> Experience:
    """Each answer's advantage at each of its tokens; where KL is in the reward, with it."""
    kl = fn.KL_ESTIMATORS[flags.kl_estimator](experience.logprobs, experience.ref_logprobs)
    penalties = flags.kl_coef * kl if flags.kl_in == "reward" else torch.zeros_like(kl)
    rewards = used_rewards(experience, flags)
    per_token = advantages(flags.advantage, rewards, penalties, experience.mask, flags.group_size)
    return dataclasses.replace(experience, advantages=per_token)


def group_loss(
    actor: Actor, hidden: Tensor, part: Experience, flags: GRPOFlags, tokens: int, rows: int, *, reread: bool = True
) -> Losses:
    """This micro-batch's part of the loss over `rows` answers of `tokens` tokens.

    Without `reread` the policy is still the one that answered: its log-probs are the old ones, and all ratios 1.
    """
    logprobs, entropy = logprobs_of(actor, hidden, part, flags.temperature)
    old = part.logprobs if reread else logprobs.detach()
    how = flags.normalization or ("constant" if flags.advantage == "dr_grpo" else "token")
    weights = fn.token_weights(part.lengths, how, tokens, rows, flags.max_new_tokens)
    clip = (flags.clip, flags.clip if flags.clip_high is None else flags.clip_high)
    advantages = weighted(part.advantages, part, flags)  # in which every surrogate is linear
    loss, stats = fn.policy_loss(logprobs, old, advantages, part.mask, clip, kind=flags.loss, weights=weights)
    gap = fn.clean((old - part.logprobs).abs(), part.mask).max()
    stats |= {"policy": loss, "entropy": entropy.sum(), "tokens": part.lengths.sum(), "max_engine_gap": gap}
    if flags.kl_coef and flags.kl_in == "loss":
        kl = fn.KL_ESTIMATORS[flags.kl_estimator](logprobs, part.ref_logprobs)
        if flags.kl_estimator == "k3":  # whose own gradient is that of KL(reference, policy): docs/align.md
            kl = kl * fn.log_ratio(logprobs, old).exp()
        stats["kl_loss"] = (fn.clean(weighted(kl, part, flags), part.mask) * weights).sum()
        loss = loss + flags.kl_coef * stats["kl_loss"]
    return loss, stats


def metrics_of(experience: Experience, state: PolicyState, iteration: GRPO) -> dict[str, float]:
    """Those of PPO but a critic's, and how much groups differ inside (TRL's names)."""
    flags, has_kl = iteration.flags, iteration.roles.reference is not None
    metrics = summary(experience, state.sums, flags.kl_coef, flags, has_kl=has_kl)
    del metrics["val/explained_variance"]
    if not iteration.reread:  # learning was the first to compare the engine with the trainer
        del metrics["val/engine_logprob_gap"]
        if state.sums:
            metrics["val/engine_logprob_gap"] = state.sums[0][1].sums["max_engine_gap"]
    rewards = used_rewards(experience, flags)
    return metrics | {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.view(-1, flags.group_size).std(dim=1).mean()),
        "frac_reward_zero_std": 1.0 - float(informative(experience, flags).float().mean()),
    }
