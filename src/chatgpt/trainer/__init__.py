"""PPOTrainer: the 2023 script's trainer as a loop over the functions of penstock.algorithms.ppo."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from chatgpt.nn import RewardModel
from chatgpt.trainer.strategies import Strategy
from penstock.algorithms import ppo
from penstock.algorithms.experience import Experience, concatenate
from penstock.algorithms.reward import score_rows
from penstock.config import DataFlags, OptimFlags, PPOConfig, RunFlags
from penstock.errors import UserError
from penstock.models.roles import Actor, Critic
from penstock.rollout.engine import Answer, generate
from penstock.rollout.sampling import Sampling, stream

IGNORED = {"use_cache", "pad_token_id", "do_sample", "early_stopping", "bos_token_id"}
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
        self.eos_ids, self.sampling = _sampling(actor, seed, generate_kwargs)
        self._longest: int | None = generate_kwargs.get("max_length")
        lr, decay = _settings(actor_optim, 5e-6)
        critic_lr, _ = _settings(critic_optim, 5e-6)
        self.config = PPOConfig(
            "-", DataFlags(("-",)), RunFlags("-", seed=seed), reward="-",
            optim=OptimFlags(lr, batch_size=experience_batch_size, micro_batch_size=train_batch_size,
                             epochs=max_epochs, weight_decay=decay),
            critic_lr=critic_lr, kl_coef=kl_coef, clip=eps_clip, value_clip=value_clip, missing_eos_score=None,
            temperature=self.sampling.temperature,
        )  # fmt: skip
        models = (actor, critic, reward_model.requires_grad_(False), initial_model.requires_grad_(False))
        prepared = self.engine.prepare_all(*models, weight_decay=decay)
        self._actors, self._critics, self._rewards, self._references = prepared
        self._episodes = self._updates = 0

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
        """Prompts drawn by this trainer's own random stream, answered, scored by all four models."""
        world, count = self.engine.world, self.experience_batch_size * self.engine.world.size
        picks = (stream(self.sampling.seed ^ 0xC0A7, self._episodes, count) * len(rows)).long().tolist()
        mine = list(range(world.rank, count, world.size))
        asked = [rows[picks[i]] for i in mine]
        sampling = self.sampling
        if self._longest is not None:
            room = self._longest - max(map(len, asked))
            if room < 1:
                raise UserError(f"PPOTrainer: max_length={self._longest} leaves no room behind the longest prompt.")
            sampling = dataclasses.replace(sampling, max_new_tokens=room)
        with self.engine.phase("rollout"):
            rollout = generate(
                self.actor.decoder, asked, sampling, eos_ids=self.eos_ids, episodes=[self._episodes + i for i in mine]
            )
        self._episodes += count
        with self.engine.phase("score"):
            local = ppo.score(
                self.engine, rollout, asked, self._actors, self._references, self._critics, self._score, self.config,
                self.train_batch_size,
            )  # fmt: skip
        return ppo.with_advantages(ppo.in_order(world.gather(local)), self.config.kl_coef, self.config)

    def _score(self, prompts: Sequence[Any], answers: Sequence[Answer]) -> list[float]:
        rows = [answer.prompt_ids + answer.response_ids for answer in answers]
        return score_rows(self.engine, self._rewards, self._rewards.model, rows, self.train_batch_size)

    def _learn(self, experience: Experience) -> None:
        size = self.train_batch_size * self.engine.world.size
        sums = []
        for epoch in range(self.max_epochs):
            self._call("on_learn_epoch_start", epoch)
            order = ppo.permutation(len(experience.tokens), self.config.run.seed, self._updates, epoch)
            for index in order.split(size):
                with self.engine.phase("train"):
                    sums += ppo.learn(self.engine, self._actors, self._critics, experience, index, self.config, 1.0)
            self._call("on_learn_epoch_end", epoch)
        self._updates += 1
        self.metrics.append(ppo.summary(experience, sums, self.config.kl_coef, self.config))

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


def _sampling(actor: Actor, seed: int, given: dict[str, Any]) -> tuple[tuple[int, ...], Sampling]:
    """What stops an answer and how it is sampled, from generate's arguments. Raises UserError for unknown ones."""
    names = {"max_length", "max_new_tokens", "temperature", "top_k", "top_p", "eos_token_id"}
    if unknown := sorted(set(given) - names - IGNORED):
        raise UserError(f"PPOTrainer: does not know {', '.join(unknown)}; generation takes {', '.join(sorted(names))}.")
    eos = given.get("eos_token_id")
    eos_ids = actor.decoder.config.eos_ids if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    known = {name: given[name] for name in ("max_new_tokens", "temperature", "top_k", "top_p") if name in given}
    return eos_ids, Sampling(seed=seed, **{"max_new_tokens": 32, **known})
