"""The work that is measured: PPO of four models of one shape on random prompts, by the functions of `penstock ppo`.

It knows nothing of clocks. `penstock bench` drives its two verbs in the published order; the repository's benchmarks
use `iteration`.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.algorithms import ppo
from penstock.algorithms.reward import score_rows
from penstock.algorithms.setup import reserve_activations
from penstock.config import DataFlags, OptimFlags, PPOConfig, RunFlags
from penstock.memory.strategy import StepStats, Strategy
from penstock.models import lora
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.packed import quantise_base
from penstock.models.roles import Actor, Critic, RewardModel
from penstock.models.weight_shapes import BaseDtype
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows and tokens per process. Example: Sizes(experience=8, train=8, prompt=400, new=112)."""

    experience: int
    """Prompts per batch of experience."""
    train: int
    """Episodes per optimizer step."""
    prompt: int
    new: int
    """Tokens of every response."""
    micro: int
    """Rows per forward pass."""
    epochs: int = 1


class Four:
    """Actor, critic, reference and reward model with random weights: four full models, or four roles on one base.

    With `sizes` room is left for what that work needs of a device budget; without, a quarter of it (see Strategy).
    """

    def __init__(
        self,
        strategy: Strategy,
        shape: DecoderConfig,
        micro_batch_size: int = 1,
        *,
        lora_rank: int = 0,
        base_dtype: BaseDtype | None = None,
        top_k: int = 0,
        seed: int = 0,
        sizes: Sizes | None = None,
    ) -> None:
        self.strategy, self.micro_batch_size, self.top_k, self.seed = strategy, micro_batch_size, top_k, seed
        models = roles_of(strategy, shape, lora_rank, base_dtype)
        for model in models.values():
            model.fill = fill_quickly
        self.actor, self.reward = models["actor"], models["reward"]
        self.swap = None
        if sizes is not None:
            optim = OptimFlags(1e-6, micro_batch_size=sizes.micro, epochs=sizes.epochs)
            self.swap = reserve_activations(
                strategy, "ppo", models, optim, longest=sizes.prompt + sizes.new, response=sizes.new,
                rows=sizes.experience * strategy.world.size, mini_batch_size=sizes.train * strategy.world.size,
            )  # fmt: skip
        self.streams = dict(zip(models, strategy.prepare_all(*models.values()), strict=True))
        self.shared = self.streams["actor"].shares(self.streams["reward"])

    def rollout(self, prompts: Sequence[list[int]], new: int, episodes: Sequence[int]) -> list[Any]:
        """This rank's answers, every one of `new` tokens; `episodes` numbers their random streams."""
        sampling = Sampling(max_new_tokens=new, seed=self.seed, top_k=self.top_k)
        with self.strategy.phase("rollout"):
            return generate(
                self.actor.decoder, list(prompts), sampling, eos_ids=(), episodes=list(episodes), swap=self.swap
            )

    def score(self, rollout: Sequence[Any]) -> ppo.Experience:
        """The answers of all ranks, seen by all four models, with advantages."""
        world, config = self.strategy.world, self._config(1, 1)
        with self.strategy.phase("score"):
            local = ppo.score(
                self.strategy, rollout, [None] * len(rollout), self.streams["actor"], self.streams["reference"],
                self.streams["critic"], self._score, config, self.micro_batch_size,
                self.streams["reward"] if self.shared else None,
            )  # fmt: skip
            return ppo.with_advantages(ppo.in_order(world.gather(local)), config.kl_coef, config)

    def learn(self, experience: ppo.Experience, index: Tensor) -> list[tuple[str, StepStats]]:
        """One optimizer step of actor and critic on the episodes of `index`, which are of all ranks."""
        config = self._config(len(index), self.micro_batch_size)
        with self.strategy.phase("train"):
            steps = ppo.learn(
                self.strategy, self.streams["actor"], self.streams["critic"], experience, index, config, 1.0
            )
        assert all(step.applied for _, step in steps), "a loss or a gradient of random weights was not finite"
        return steps

    def iteration(self, prompts: Sequence[list[int]], new: int, seed: int = 0) -> Iterator[str]:
        """One rollout and one optimizer step on all of it; yields the name of the phase that has just ended."""
        first = seed * len(prompts) * self.strategy.world.size + self.strategy.world.rank
        rollout = self.rollout(prompts, new, [first + i * self.strategy.world.size for i in range(len(prompts))])
        yield "rollout"
        experience = self.score(rollout)
        yield "score"
        self.learn(experience, torch.arange(len(experience.tokens)))
        yield "train"

    def _config(self, rows: int, micro: int) -> PPOConfig:
        optim = OptimFlags(lr=1e-6, batch_size=rows, micro_batch_size=micro)
        return PPOConfig("actor", DataFlags(("-",)), RunFlags("-"), reward="-", optim=optim)

    def _score(self, records: Any, answers: Any) -> list[float]:
        rows = [one.prompt_ids + one.response_ids for one in answers]
        return score_rows(self.strategy, self.streams["reward"], self.reward, rows, self.micro_batch_size)


def roles_of(
    strategy: Strategy, shape: DecoderConfig, lora_rank: int, base_dtype: BaseDtype | None = None
) -> dict[str, Any]:
    """The recipes of the four models, by role. With a rank: an actor and a critic that learn beside one frozen base."""
    with strategy.init():
        base = Decoder(shape)
        if base_dtype is not None:
            quantise_base(base, base_dtype)
        if not lora_rank:
            actor, critic = Actor(base), Critic(Decoder(shape))
            reference, reward = Actor(Decoder(shape)), RewardModel(Decoder(shape))
        else:
            actor, critic = Actor(copy.deepcopy(base)), Critic(copy.deepcopy(base))
            reference, reward = Actor(copy.deepcopy(base)), RewardModel(base)
            for seed, model in enumerate((actor, critic)):
                lora.add(model.decoder, LoraSpec(lora_rank), seed=seed)
    for frozen in (reference, reward):
        frozen.eval().requires_grad_(False)
    return {"actor": actor, "critic": critic, "reference": reference, "reward": reward}


def fill_quickly(weights: dict[str, Tensor]) -> None:
    """The same few random numbers over and over: making billions of them takes longer than what is measured.

    Packed weights get random codes; their scales then give numbers of the size that others have.
    """
    for name, weight in weights.items():
        flat = weight.view(-1)
        if ("norm" in name and name.endswith("weight")) or name.endswith("scales"):
            flat.fill_(0.02 if name.endswith("scales") else 1.0)
            continue
        count = min(flat.numel(), 1 << 20)
        wide = torch.randn(count) * 0.02 if weight.is_floating_point() else torch.randint(0, 255, (count,))
        some = wide.to(weight.dtype)
        for start in range(0, flat.numel(), count):
            part = flat[start : start + count]
            part.copy_(some[: part.numel()])
