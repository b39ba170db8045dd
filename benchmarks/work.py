"""The work that benchmarks do: PPO of four distinct models of one shape, by the functions that `penstock ppo` calls."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.algorithms import ppo
from penstock.algorithms.reward import score_rows
from penstock.config import DataFlags, OptimFlags, PPOConfig, RunFlags
from penstock.memory.strategy import Strategy
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor, Critic, RewardModel
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling


class Four:
    """Actor, critic, reference and reward model, full-parameter, with random weights."""

    def __init__(self, strategy: Strategy, shape: DecoderConfig, micro_batch_size: int = 1) -> None:
        self.strategy, self.micro_batch_size = strategy, micro_batch_size
        with strategy.init():
            self.actor, critic = Actor(Decoder(shape)), Critic(Decoder(shape))
            reference = Actor(Decoder(shape)).eval().requires_grad_(False)
            self.reward = RewardModel(Decoder(shape)).eval().requires_grad_(False)
        models = (self.actor, critic, reference, self.reward)
        for model in models:
            model.fill = fill_quickly  # type: ignore[method-assign,union-attr]
        self.actors, self.critics, self.references, self.rewards = strategy.prepare_all(*models)

    def iteration(self, prompts: Sequence[list[int]], new: int, seed: int = 0) -> Iterator[str]:
        """One rollout, one optimizer step of each trained model; yields the name of the phase that has just ended."""
        strategy, rows = self.strategy, len(prompts)
        optim = OptimFlags(lr=1e-6, batch_size=rows, micro_batch_size=self.micro_batch_size)
        config = PPOConfig("actor", DataFlags(("-",)), RunFlags("-"), reward="-", optim=optim, max_new_tokens=new)
        with strategy.phase("rollout"):
            rollout = generate(self.actor.decoder, list(prompts), Sampling(max_new_tokens=new, seed=seed), eos_ids=())
        yield "rollout"
        with strategy.phase("score"):
            experience = ppo.score(
                strategy, rollout, [None] * rows, self.actors, self.references, self.critics, self._score, config,
                self.micro_batch_size,
            )  # fmt: skip
            experience = ppo.with_advantages(experience, config.kl_coef, config)
        yield "score"
        with strategy.phase("train"):
            steps = ppo.learn(strategy, self.actors, self.critics, experience, torch.arange(rows), config, 1.0)
        assert all(step.applied for _, step in steps)
        yield "train"

    def _score(self, records: Any, answers: Any) -> list[float]:
        rows = [one.prompt_ids + one.response_ids for one in answers]
        return score_rows(self.strategy, self.rewards, self.reward, rows, self.micro_batch_size)


def fill_quickly(weights: dict[str, Tensor]) -> None:
    """The same few random numbers over and over: making billions of them takes longer than what is measured."""
    for weight in weights.values():
        flat = weight.view(-1)
        some = torch.randn(min(flat.numel(), 1 << 20)) * 0.02
        for start in range(0, flat.numel(), some.numel()):
            part = flat[start : start + some.numel()]
            part.copy_(some[: part.numel()])
