"""The work that is measured: PPO of four models of one shape on random prompts, by `penstock ppo`'s own iteration.

It knows nothing of clocks. `penstock bench` calls rollout, score and learn in the published order; the repository's
benchmarks use `iteration`.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.algorithms.experience import Experience, Roles
from penstock.algorithms.ppo import PPO
from penstock.algorithms.setup import reserve_activations, role_specs
from penstock.config import OptimFlags, PPOFlags
from penstock.memory.strategy import Strategy
from penstock.models import surgery
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.roles import Actor, Critic, RewardModel
from penstock.models.weight_shapes import BaseDtype
from penstock.planner.workload import Workload
from penstock.rollout.engine import Answer


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

    With `sizes` the strategy leaves to activations what that work needs of a device budget; without, a quarter of it.
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
        self.strategy = strategy
        models = roles_of(strategy, shape, lora_rank, base_dtype)
        for model in models.values():
            model.fill = fill_quickly
        optim = OptimFlags(lr=1e-6, micro_batch_size=micro_batch_size)
        swap = None
        if sizes is not None:
            world = strategy.world.size
            work = Workload(
                "ppo", role_specs(models), sizes.experience * world, sizes.micro, sizes.train * world, sizes.epochs,
                sizes.prompt, sizes.new, sampled_of=top_k,
            )  # fmt: skip
            swap = reserve_activations(strategy, work)
        self.streams = dict(zip(models, strategy.prepare_all(*models.values()), strict=True))
        streams = self.streams
        roles = Roles(streams["actor"], streams["reference"], streams["critic"], streams["reward"])
        self.ppo = PPO(strategy, roles, optim, PPOFlags(top_k=top_k), seed, swap=swap)

    def rollout(self, prompts: Sequence[list[int]], new: int, episodes: Sequence[int]) -> list[Answer]:
        """This rank's answers, every one of `new` tokens; `episodes` numbers their random streams."""
        return self.ppo.rollout(prompts, episodes, max_new_tokens=new)

    def score(self, rollout: Sequence[Answer]) -> Experience:
        """The answers of all ranks, seen by all four models, with advantages."""
        return self.ppo.score(rollout, [None] * len(rollout), self.ppo.flags.kl_coef)

    def learn(self, experience: Experience, index: Tensor) -> None:
        """One optimizer step of actor and critic on the episodes of `index`, which are of all ranks."""
        steps = self.ppo.learn(experience, index)
        assert all(stats.applied for stats in steps.values()), "a loss or a gradient of random weights was not finite"

    def iteration(self, prompts: Sequence[list[int]], new: int, seed: int = 0) -> Iterator[str]:
        """One rollout and one optimizer step on all of it; yields the name of the phase that has just ended."""
        world = self.strategy.world
        first = seed * len(prompts) * world.size + world.rank
        rollout = self.rollout(prompts, new, [first + i * world.size for i in range(len(prompts))])
        yield "rollout"
        experience = self.score(rollout)
        yield "score"
        self.learn(experience, torch.arange(len(experience.tokens)))
        yield "train"


def roles_of(
    strategy: Strategy, shape: DecoderConfig, lora_rank: int, base_dtype: BaseDtype | None = None
) -> dict[str, Any]:
    """The recipes of the four models, by role. With a rank: an actor and a critic that learn beside one frozen base."""
    with strategy.init():
        base = Decoder(shape)
        if base_dtype is not None:
            surgery.quantise_base(base, base_dtype)
        if not lora_rank:
            actor, critic = Actor(base), Critic(Decoder(shape))
            reference, reward = Actor(Decoder(shape)), RewardModel(Decoder(shape))
        else:
            actor, critic = Actor(copy.deepcopy(base)), Critic(copy.deepcopy(base))
            reference, reward = Actor(copy.deepcopy(base)), RewardModel(base)
            for seed, model in enumerate((actor, critic)):
                surgery.add_adapters(model.decoder, LoraSpec(lora_rank), seed=seed)
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
        numbers = wide.to(weight.dtype)
        for part in flat.split(count):
            part.copy_(numbers[: part.numel()])
