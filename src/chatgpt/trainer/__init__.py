"""PPOTrainer: the 2023 script's trainer, a loop over penstock's PPO iteration.

[Note: own loop] Episodes, timesteps and update timesteps are the published trainer's; `penstock ppo` has none of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chatgpt.nn import RewardModel
from chatgpt.trainer.strategies import Strategy
from penstock.algorithms.experience import Experience, Roles, concatenate
from penstock.algorithms.functional import Moments
from penstock.algorithms.policy import permutation
from penstock.algorithms.policy_metrics import summary
from penstock.algorithms.ppo import PPO
from penstock.config import OptimFlags, PPOFlags
from penstock.errors import UserError
from penstock.memory.strategy import StepStats
from penstock.models.roles import Actor, Critic
from penstock.rollout.sampling import stream

IGNORED = {"use_cache", "pad_token_id", "early_stopping", "bos_token_id"}
"""Arguments of `generate` that change nothing here: there is always a cache, and rows need no pad token."""


class PPOTrainer:
    """`PPOTrainer(strategy, actor, critic, reward_model, initial_model, ...).fit(prompts)`.

    The names of the arguments and their defaults are the published ones; `actor_optim` and `critic_optim` may be left
    out, and of those that are given only lr and weight decay are read: the update belongs to the strategy. Keyword
    arguments beyond those named are generate's (max_length or max_new_tokens, temperature, top_k, top_p, eos_token_id).
    """

    def __init__(
        self,
        strategy: Strategy,
        actor: Actor,
        critic: Critic,
        reward_model: RewardModel,
        initial_model: Actor,
        actor_optim: torch.optim.Optimizer | None = None,
        critic_optim: torch.optim.Optimizer | None = None,
        *,
        kl_coef: float = 0.1,
        train_batch_size: int = 8,
        experience_batch_size: int = 8,
        max_epochs: int = 1,
        eps_clip: float = 0.2,
        value_clip: float = 0.4,
        tokenizer: Callable[..., Any] | None = None,
        seed: int = 42,
        callbacks: Sequence[Any] = (),
        **generate_kwargs: Any,
    ) -> None:
        self.strategy, self.engine = strategy, strategy.engine
        self.actor, self.critic, self.reward_model, self.initial_model = actor, critic, reward_model, initial_model
        self.experience_batch_size, self.train_batch_size = experience_batch_size, train_batch_size
        self.max_epochs, self.tokenizer, self.callbacks = max_epochs, tokenizer, list(callbacks)
        self.metrics: list[dict[str, float]] = []
        """One row per learning phase, in the names of penstock's metrics.jsonl."""
        self.scale = Moments()
        """Of all scores so far: a constant or a factor in them changes nothing."""
        self.seed, self._episodes, self._updates = seed, 0, 0
        self._longest: int | None = generate_kwargs.get("max_length")
        eos_ids, sampling = _sampling(actor, generate_kwargs)
        lr, decay = _settings(actor_optim, 5e-6)
        critic_lr, _ = _settings(critic_optim, 5e-6)
        optim = OptimFlags(lr, micro_batch_size=train_batch_size)
        flags = PPOFlags(
            critic_lr=critic_lr, kl_coef=kl_coef, clip=eps_clip, value_clip=value_clip, missing_eos_penalty=None,
            **sampling,
        )  # fmt: skip
        models = (actor, critic, reward_model.requires_grad_(False), initial_model.requires_grad_(False))
        prepared = self.engine.prepare_all(*models, weight_decay=decay)
        roles = Roles(actor=prepared[0], critic=prepared[1], reward=prepared[2], reference=prepared[3])
        self.ppo = PPO(self.engine, roles, optim, flags, seed, eos_ids)

    def fit(
        self, prompts: Sequence[Any], num_episodes: int = 1, max_timesteps: int = 1, update_timesteps: int | None = None
    ) -> list[dict[str, float]]:
        """Makes experience in every timestep and learns every `update_timesteps` (after each one by default).

        prompts: texts (with a tokenizer), or lists or 1-d tensors of token ids. Returns `metrics`.
        """
        rows = [self._ids(prompt) for prompt in prompts]
        if not rows:
            raise UserError("PPOTrainer.fit: there are no prompts.")
        every = update_timesteps or 1
        steps = 0
        kept: list[Experience] = []
        self._call("on_fit_start")
        for episode in range(num_episodes):
            self._call("on_episode_start", episode)
            for _ in range(max_timesteps):
                self._call("on_make_experience_start")
                kept.append(self._experience(rows))
                self._call("on_make_experience_end", kept[-1])
                steps += 1
                if steps % every == 0:
                    self._learn(concatenate(kept))
                    kept = []
            self._call("on_episode_end", episode)
        if kept:
            self._learn(concatenate(kept))
        self._call("on_fit_end")
        return self.metrics

    def _experience(self, rows: list[list[int]]) -> Experience:
        """Prompts drawn by this trainer's own random stream, answered, and scored by all four models."""
        world, count = self.engine.world, self.experience_batch_size * self.engine.world.size
        picks = (stream(self.seed ^ 0xC0A7, self._episodes, count) * len(rows)).long().tolist()
        episodes = range(world.rank, count, world.size)
        prompts = [rows[picks[i]] for i in episodes]
        new = self.ppo.flags.max_new_tokens
        if self._longest is not None:
            new = self._longest - max(map(len, prompts))
            if new < 1:
                raise UserError(f"PPOTrainer: max_length={self._longest} leaves no room behind the longest prompt.")
        rollout = self.ppo.rollout(prompts, [self._episodes + i for i in episodes], max_new_tokens=new)
        self._episodes += count
        return self.ppo.score(rollout, prompts, self.ppo.flags.kl_coef, self.scale)

    def _learn(self, experience: Experience) -> None:
        size = self.train_batch_size * self.engine.world.size
        sums: list[tuple[str, StepStats]] = []
        for epoch in range(self.max_epochs):
            self._call("on_learn_epoch_start", epoch)
            order = permutation(len(experience.tokens), self.seed, self._updates, epoch)
            for index in order.split(size):
                sums += self.ppo.learn(experience, index).items()
            self._call("on_learn_epoch_end", epoch)
        self._updates += 1
        self.metrics.append(summary(experience, sums, self.ppo.flags.kl_coef, self.ppo.flags))

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("PPOTrainer: a prompt is text; give tokenizer=, or prompts as token ids.")
            prompt = self.tokenizer(prompt)
        if hasattr(prompt, "keys"):  # what tokenizers return
            prompt = prompt["input_ids"]
        ids = torch.as_tensor(prompt).flatten().tolist()
        if not ids or max(ids) >= self.actor.decoder.config.vocab_size:
            raise UserError("PPOTrainer: every prompt must have a token, and all tokens must be in the vocabulary.")
        return ids

    def _call(self, name: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name, lambda *_: None)(*arguments)


def _settings(optimizer: torch.optim.Optimizer | None, lr: float) -> tuple[float, float]:
    """Learning rate and weight decay."""
    if optimizer is None:
        return lr, 0.0
    group = optimizer.param_groups[0]
    return float(group["lr"]), float(group.get("weight_decay", 0.0))


def _sampling(actor: Actor, arguments: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """What stops an answer, and flags of its sampling, from generate's arguments. Raises UserError for unknown ones."""
    flags = ("max_new_tokens", "temperature", "top_k", "top_p")
    names = {"max_length", "eos_token_id", "do_sample", *flags}
    if not arguments.get("do_sample", True) or arguments.get("temperature", 1.0) <= 0:
        raise UserError("PPOTrainer: do_sample=False: PPO learns from sampled answers; leave it out, or give True.")
    if unknown := sorted(set(arguments) - names - IGNORED):
        raise UserError(f"PPOTrainer: does not know {', '.join(unknown)}; generation takes {', '.join(sorted(names))}.")
    eos = arguments.get("eos_token_id")
    eos_ids = actor.decoder.config.eos_ids if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return eos_ids, {"max_new_tokens": 32, **{name: arguments[name] for name in flags if name in arguments}}
