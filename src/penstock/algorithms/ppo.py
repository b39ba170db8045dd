"""PPO for language models: rollout, score, learn (Ziegler et al. 2019; Ouyang et al. 2022, stage 3).

Numbers in comments are the lines of docs/ppo.md: what decides whether RLHF converges. The loop is at the end of
`ppo()`; what it calls stands below it in the order it is called.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.experience import Experience, in_order, logprobs_of, score, values_of
from penstock.algorithms.reward_source import check_room, scorer_of
from penstock.algorithms.setup import (
    check_adapter_learns,
    encoder_of,
    keep_tokenizer,
    learns,
    read,
    reserve_activations,
    sample_rows,
    strategy_of,
)
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.algorithms.sft import micro_batches as example_batches
from penstock.config import PPOConfig
from penstock.data.batching import Shuffle
from penstock.data.chat import Encoder, Example
from penstock.distributed.world import World
from penstock.errors import UserError
from penstock.memory.strategy import Step, StepStats, Strategy
from penstock.memory.stream import Losses, Stream
from penstock.models.adapter_files import is_adapter_directory
from penstock.models.roles import Actor, ActorCritic, Critic
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling, stream
from penstock.run.directory import resolve_model
from penstock.run.session import Session


def ppo(config: PPOConfig, *, resume: bool = False) -> Path:
    """Trains as `config` says and returns the run directory. With `resume`, goes on from its newest checkpoint.

    `--steps` counts rollout iterations; `--batch-size` episodes per iteration over all ranks.
    """
    optim, run = config.optim, config.run
    if (config.reward is None) == (config.reward_fn is None):
        raise UserError("ppo needs one score: give either --reward (a reward model) or --reward-fn file.py:name.")
    if config.value_head and config.critic:
        raise UserError("--value-head and --critic: the critic is a head on the actor or a model; give one of the two.")
    if bool(config.ptx_coef) != bool(config.ptx_data):
        raise UserError("--ptx-coef and --ptx-data belong together: give both or neither.")
    if config.temperature <= 0:
        raise UserError("--temperature 0: PPO learns from sampled answers; give a temperature above 0, 1 is usual.")
    strategy = strategy_of(run)
    world = strategy.world
    if optim.batch_size < world.size:
        raise UserError(f"--batch-size {optim.batch_size}: fewer episodes than the {world.size} ranks; give more.")
    session = Session("ppo", config, world, resume=resume)
    source = resolve_model(config.actor)
    pickled, how = config.data.allow_pickle, learns(config.peft, run.seed)
    with strategy.init():
        actor = Actor.from_pretrained(source, allow_pickle=pickled, **how)
    check_adapter_learns(actor, config.peft)
    encoder = encoder_of(source, actor.decoder.config, config.data, reserve=config.max_new_tokens)
    keep_tokenizer(session, source)
    reward, scorer_from, reads_our_tokens = scorer_of(
        config.reward,
        config.reward_fn,
        encoder,
        strategy,
        config.data,
        optim.micro_batch_size,
        session.say,
        config.peft.base_dtype,
    )
    critic_source = config.critic or (config.reward if reads_our_tokens else None)
    with strategy.init():
        if config.reference:
            found = resolve_model(config.reference)
            reference = Actor.from_pretrained(found, allow_pickle=pickled, base_dtype=how["base_dtype"])
            reference.eval().requires_grad_(False)
            check_role("reference", found, reference, encoder, config)
        else:
            reference = actor.frozen()
        critic: Critic | None = None
        if config.value_head:
            actor = ActorCritic(actor.decoder)
        elif critic_source:
            found = resolve_model(critic_source, "critic")
            own = {"adapter": None, "seed": run.seed + 1}
            own |= {"lora": None} if is_adapter_directory(Path(found)) else {}  # its own learns on
            critic = Critic.from_pretrained(found, allow_pickle=pickled, **{**how, **own})
            check_adapter_learns(critic, config.peft)
            check_role("critic", found, critic, encoder, config)
        else:
            critic = Critic(copy.deepcopy(actor.decoder))
    records, prompts = read(session.say, encoder, config.data.data, "prompts", config.data)
    ptx_examples: list[Example] = []
    if config.ptx_coef:
        ptx_examples = read(session.say, encoder, config.ptx_data, "demonstrations", config.data)[1]

    with session:
        critic_ready = bool(critic and critic.score.any()) or not config.value_warmup  # (19)
        roles = {"actor": actor, "reference": reference, "critic": critic, "reward": reward}
        roles = {name: model for name, model in roles.items() if model is not None}
        swap = reserve_activations(
            strategy, "ppo", roles, optim, longest=max(map(len, prompts)) + config.max_new_tokens,
            response=config.max_new_tokens, mini_batch_size=config.mini_batch_size,
            rollout_batch_size=config.rollout_batch_size,
        )  # fmt: skip
        prepared = strategy.prepare_all(*roles.values(), weight_decay=optim.weight_decay)
        streams = dict(zip(roles, prepared, strict=True))
        actors, references, critics, rewards = (
            streams["actor"], streams["reference"], streams.get("critic"), streams.get("reward")
        )  # fmt: skip
        scorer = scorer_from(*[rewards] * (rewards is not None))
        kl = fn.KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        shuffle, ptx_shuffle = Shuffle(len(prompts), run.seed), Shuffle(max(len(ptx_examples), 1), run.seed + 1)
        sampling = Sampling(
            temperature=config.temperature, max_new_tokens=config.max_new_tokens,
            top_k=config.top_k, top_p=config.top_p, seed=run.seed,
        )  # fmt: skip
        if config.top_k or config.top_p < 1:
            session.say(f"rollouts are truncated (top_k={config.top_k}, top_p={config.top_p}): KL may turn negative")
        total = optim.steps or math.ceil(len(prompts) / optim.batch_size)
        done = update = 0
        experience: Experience | None = None
        trained = {"model": actors, **({"critic": critics} if critics else {})}
        session.restore(trained)
        if session.state:
            saved = session.state
            shuffle.load_state_dict(saved["shuffle"])
            ptx_shuffle.load_state_dict(saved["ptx_shuffle"])
            done, update, kl.beta, critic_ready = (saved[key] for key in ("step", "update", "beta", "critic_ready"))
            experience = Experience(**saved["experience"]) if saved["experience"] else None
        sums: list[tuple[str, StepStats]] = saved_sums(session.state)

        def state() -> dict:
            return {
                "shuffle": shuffle.state_dict(), "ptx_shuffle": ptx_shuffle.state_dict(),
                "step": done, "update": update, "beta": kl.beta, "critic_ready": critic_ready,
                "experience": vars(experience) if experience else None,
                "sums": [(name, dataclasses.asdict(one)) for name, one in sums],
            }  # fmt: skip

        def show(step: int) -> None:
            greedy = dataclasses.replace(sampling, temperature=0.0)
            answers = generate(actor.decoder, prompts[: config.samples], greedy, eos_ids=encoder.eos_ids, swap=swap)
            scores = scorer(records[: config.samples], answers)
            session.sample(step, sample_rows(encoder, answers, scores, kind="greedy"))

        if done == 0 and experience is None:
            show(0)

        mini = config.mini_batch_size or optim.batch_size
        updates = optim.epochs * math.ceil(optim.batch_size / mini)
        for step in session.steps(done, total):
            done = step - 1
            if experience is None:  # otherwise a checkpoint was taken in the middle of this step
                chosen = shuffle.next(optim.batch_size)
                mine = world.share_of(list(range(len(chosen))))
                with strategy.phase("rollout"):
                    rollout = generate(
                        actor.decoder, [prompts[chosen[i]] for i in mine], sampling,
                        eos_ids=encoder.eos_ids, episodes=[session.episode + i for i in mine],
                        batch_size=config.rollout_batch_size, swap=swap,
                    )  # fmt: skip
                with strategy.phase("score"):
                    asked = [records[chosen[i]] for i in mine]
                    local = score(
                        strategy, rollout, asked, actors, references, critics, scorer, config, optim.micro_batch_size,
                        rewards if reads_our_tokens else None,
                    )  # fmt: skip
                session.sample(
                    step, sample_rows(encoder, rollout[: config.samples], local.scores.tolist(), kind="rollout")
                )
                experience = in_order(world.gather(local))
                experience = with_advantages(experience, kl.beta, config)
                session.episode += optim.batch_size
                update, sums = 0, []
            if not critic_ready:
                critic_ready = float(fn.explained_variance(experience.values, experience.returns, experience.mask)) > 0

            while update < updates:
                session.pause(done, trained, state)  # SIGTERM arrived: experience in flight
                epoch, part = divmod(update, math.ceil(optim.batch_size / mini))
                order = permutation(len(experience.tokens), run.seed, step, epoch)  # new each epoch (17)
                index = order[part * mini : (part + 1) * mini]
                lr = fn.lr_schedule((step - 1) * updates + update, total * updates, optim.warmup)
                extra = [ptx_examples[i] for i in ptx_shuffle.next(mini)] if ptx_examples and critic_ready else []
                with strategy.phase("train"):
                    steps = learn(
                        strategy, actors, critics, experience, index, config, lr, extra, still=not critic_ready
                    )
                for name, one in steps:
                    session.check(one, name)
                sums += steps
                update += 1
                last_policy = next((s.sums for name, s in reversed(sums) if name == "policy"), None)
                counted = int(experience.lengths[index].sum())
                if config.target_kl and last_policy and last_policy["approxkl"] > 1.5 * config.target_kl * counted:
                    break  # (20) the experience has been used up; the next one is fresh

            metrics = summary(experience, sums, kl.beta, config)
            metrics |= {"lr": optim.lr * lr, "episode": session.episode}
            kl.update(metrics["objective/kl"], optim.batch_size)
            if run.dtype == "fp32" and metrics.get("val/first_ratio_gap", 0.0) > 1e-3:
                session.say(f"step {step}: first ratio is off by {metrics['val/first_ratio_gap']:.2g}; it should be 1")
            tokens = int(experience.lengths.sum())
            experience, done, update, sums = None, step, 0, []
            session.log(step, metrics, tokens=tokens, timing=strategy.take_seconds())
            if step == total:
                show(step)
            session.checkpoint(step, trained, state)
        return session.finish()


def check_role(flag: str, source: str, role: Actor | Critic, encoder: Encoder, config: PPOConfig) -> None:
    """Raises UserError when a model does not read the actor's tokens, or not so many of them."""
    check_room(flag, source, role.decoder.config, encoder)
    own = encoder_of(source, role.decoder.config, config.data)
    if role.decoder.config.vocab_size < encoder.vocab_size or not own.same_tokenizer(encoder):
        raise UserError(f"--{flag} {source}: has another tokenizer than the actor, and the two must share one.")


# --- learn ----------------------------------------------------------------------------------------------------------


def with_advantages(experience: Experience, beta: float, config: PPOConfig) -> Experience:
    """Rewards shaped by the KL penalty, GAE, returns, whitening: all over the whole batch (7, 8, 10, 13, 14)."""
    scores = experience.scores
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    scores = fn.replace_missing_eos(scores, experience.ended, config.missing_eos_score)
    rewards = fn.shape_rewards(scores, experience.logprobs, experience.ref_logprobs, experience.lengths, beta)
    if config.whiten_rewards:
        rewards = fn.whiten(rewards, experience.mask, shift_mean=False)
    advantages, returns = fn.gae(rewards, experience.values, experience.lengths, config.gamma, config.lam)
    return dataclasses.replace(experience, advantages=fn.whiten(advantages, experience.mask), returns=returns)


def permutation(count: int, seed: int, step: int, epoch: int) -> Tensor:
    """The order of the episodes in one epoch over one experience, keyed, so that a resumed epoch goes on in it."""
    return stream(seed ^ 0x5EED, (step << 16) + epoch, count).argsort()


def shares(index: Tensor, world: World, size: int) -> list[Tensor]:
    """This rank's episodes of a mini-batch, in micro-batches."""
    return [part for part in index[world.rank :: world.size].split(size) if len(part)]


def learn(
    strategy: Strategy,
    actors: Stream,
    critics: Stream | None,
    experience: Experience,
    index: Tensor,
    config: PPOConfig,
    lr: float,
    extra: Sequence[Example] = (),
    *,
    still: bool = False,
) -> list[tuple[str, StepStats]]:
    """One optimizer step of the actor (`still`: none) and one of the critic, on the episodes of `index`; one of both
    together where the critic is the actor's value head.

    `lr` scales both learning rates; `extra` are the demonstrations of the ptx loss.
    """
    world, optim = strategy.world, config.optim
    count, ptx_count = int(experience.lengths[index].sum()), sum(sum(example.trained) for example in extra)
    share = [experience.rows(rows).to(world.device) for rows in shares(index, world, optim.micro_batch_size)]
    mixed = [*share, *example_batches(world.share_of(list(extra)), optim.micro_batch_size, world.device)]
    actor = actors.model
    steps: dict[str, Step] = {}

    def policy_loss(hidden: Tensor, part: Experience | Rows) -> Losses:
        return actor_loss(actor, hidden, part, config, count, ptx_count)

    if critics is None:

        def both(hidden: Tensor, part: Experience | Rows) -> Losses:
            return joint_loss(actor, hidden, part, config, count, ptx_count, still)

        step = Step(actors, share if still else mixed, both, optim.lr * lr)
        return apart(strategy.step_all([step], max_grad_norm=optim.max_grad_norm)[0])
    if not still:
        steps["policy"] = Step(actors, mixed, policy_loss, optim.lr * lr)
    critic = critics.model
    steps["value"] = Step(
        critics, share, lambda hidden, part: critic_loss(critic, hidden, part, config, count),
        (config.critic_lr or 5 * optim.lr) * lr,
    )  # fmt: skip
    done = strategy.step_all([*steps.values()], max_grad_norm=optim.max_grad_norm)
    return list(zip(steps, done, strict=True))


def actor_loss(
    actor: Actor, hidden: Tensor, part: Experience | Rows, config: PPOConfig, count: int, ptx_count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss of a micro-batch of episodes, or the ptx loss of one of demonstrations (16, 21)."""
    if isinstance(part, Rows):
        loss = fn.sft_loss(response_logprobs(actor, hidden, part), ptx_count)
        return config.ptx_coef * loss, {"ptx": loss}
    logprobs, entropy = logprobs_of(actor, hidden, part, config.temperature)
    loss, stats = fn.policy_loss(logprobs, part.logprobs, part.advantages, part.mask, config.clip, count)
    return loss, {**stats, "policy": loss, "entropy": entropy.sum(), "tokens": part.lengths.sum()}


def critic_loss(
    critic: Critic | ActorCritic, hidden: Tensor, part: Experience, config: PPOConfig, count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped value loss of a micro-batch; coefficient 1: the critic has its own optimizer (16)."""
    values = values_of(critic, hidden, part)
    loss, stats = fn.value_loss(values, part.values, part.returns, part.mask, config.value_clip, count)
    return loss, {**stats, "tokens": part.lengths.sum()}


VALUE = "value_"
"""Before the names of the value head's statistics, in a step that it shares with the actor."""


def joint_loss(
    actor: ActorCritic,
    hidden: Tensor,
    part: Experience | Rows,
    config: PPOConfig,
    count: int,
    ptx_count: int,
    still: bool,
) -> Losses:
    """Both losses on one trunk, the value's times --vf-coef (16). `still`: the head learns, the trunk does not."""
    if isinstance(part, Rows):
        return actor_loss(actor, hidden, part, config, count, ptx_count)
    value, its = critic_loss(actor, hidden.detach() if still else hidden, part, config, count)
    of_value = {VALUE + name: number for name, number in {**its, "loss": value}.items()}
    if still:
        return config.vf_coef * value, of_value
    policy, stats = actor_loss(actor, hidden, part, config, count, ptx_count)
    return policy + config.vf_coef * value, {**stats, **of_value}


def apart(done: StepStats) -> list[tuple[str, StepStats]]:
    """The statistics of a step that both losses shared, as those of two."""
    of_value = {name.removeprefix(VALUE): number for name, number in done.sums.items() if name.startswith(VALUE)}
    of_policy = {name: number for name, number in done.sums.items() if not name.startswith(VALUE)}
    found = [("value", dataclasses.replace(done, sums=of_value))]
    return [("policy", dataclasses.replace(done, sums=of_policy)), *found] if "ratio" in of_policy else found


# --- numbers --------------------------------------------------------------------------------------------------------


def summary(
    experience: Experience, sums: Sequence[tuple[str, StepStats]], beta: float, config: PPOConfig
) -> dict[str, float]:
    """One step's metrics, in the names people's dashboards know; all over valid tokens of the whole batch."""
    mask, rows = experience.mask, len(experience.tokens)
    logprobs, ref_logprobs = experience.logprobs, experience.ref_logprobs
    kl = float(fn.clean(fn.kl_k1(logprobs, ref_logprobs), mask).sum()) / rows
    scores = fn.replace_missing_eos(experience.scores, experience.ended, config.missing_eos_score)
    metrics = {
        "objective/kl": kl,
        "objective/kl_k3": float(fn.clean(fn.kl_k3(logprobs, ref_logprobs), mask).sum()) / rows,
        "objective/entropy": float(fn.clean(-logprobs, mask).sum()) / rows,
        "objective/scores": float(experience.scores.mean()),
        "objective/scores_std": float(experience.scores.std()) if rows > 1 else 0.0,
        "objective/non_score_reward": -beta * kl,
        "objective/rlhf_reward": float(scores.mean()) - beta * kl,
        "objective/kl_coef": beta,
        "objective/response_length": float(experience.lengths.float().mean()),
        "val/num_eos_tokens": float(experience.ended.sum()),
        "val/missing_eos_rate": 1.0 - float(experience.ended.float().mean()),
        "val/explained_variance": float(fn.explained_variance(experience.values, experience.returns, mask)),
        "val/engine_logprob_gap": float(experience.engine_gap.max()),
    }
    if config.reward_clip is not None:
        metrics["objective/scores_clipfrac"] = float((experience.scores.abs() > config.reward_clip).float().mean())
    policy = [one.sums for name, one in sums if name == "policy"]
    if policy:
        tokens = sum(s["tokens"] for s in policy)
        ratio = sum(s["ratio"] for s in policy) / tokens
        metrics |= {
            "policy/approxkl_avg": sum(s["approxkl"] for s in policy) / tokens,
            "policy/clipfrac_avg": sum(s["clipfrac"] for s in policy) / tokens,
            "policy/entropy_avg": sum(s["entropy"] for s in policy) / tokens,
            "loss/policy_avg": sum(s["policy"] for s in policy) / len(policy),
            "val/ratio": ratio,
            "val/ratio_var": max(sum(s["ratio_sq"] for s in policy) / tokens - ratio**2, 0.0),
            "val/first_ratio_gap": policy[0]["max_ratio_gap"],
            "policy/updates": float(len(policy)),
        }
        if "ptx" in policy[0]:
            metrics["loss/ptx_avg"] = sum(s["ptx"] for s in policy) / len(policy)
        metrics["policy/grad_norm"] = sum(one.grad_norm for name, one in sums if name == "policy") / len(policy)
    value = [one.sums for name, one in sums if name == "value"]
    if value:
        tokens = sum(s["tokens"] for s in value)
        metrics["val/clipfrac_avg"] = sum(s["clipfrac"] for s in value) / tokens
        metrics["loss/value_avg"] = sum(s["loss"] for s in value) / len(value)
    return metrics


def saved_sums(state: dict | None) -> list[tuple[str, StepStats]]:
    """The statistics of the updates that were done before a checkpoint in the middle of a step."""
    return [(name, StepStats(**one)) for name, one in (state or {}).get("sums", [])]
