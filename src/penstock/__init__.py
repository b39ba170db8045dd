"""penstock: open, low-cost training of ChatGPT-style assistants. Names load on first use: importing is cheap."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from penstock import autochunk as autochunk
    from penstock.algorithms.config import DistillConfig as DistillConfig
    from penstock.algorithms.config import DPOConfig as DPOConfig
    from penstock.algorithms.config import GRPOConfig as GRPOConfig
    from penstock.algorithms.config import KTOConfig as KTOConfig
    from penstock.algorithms.distillation.distill import distill as distill
    from penstock.algorithms.grpo import grpo as grpo
    from penstock.algorithms.kto import kto as kto
    from penstock.algorithms.ppo import ppo as ppo
    from penstock.algorithms.preference import dpo as dpo
    from penstock.algorithms.reward import reward as reward
    from penstock.algorithms.sft import sft as sft
    from penstock.commands.align.command import align as align
    from penstock.commands.align.config import AlignConfig as AlignConfig
    from penstock.commands.plan import plan as plan
    from penstock.config import PPOConfig as PPOConfig
    from penstock.config import RewardConfig as RewardConfig
    from penstock.config import SFTConfig as SFTConfig
    from penstock.memory.strategy import Strategy as Strategy
    from penstock.models.decoder import Decoder as Decoder
    from penstock.models.roles import Actor as Actor
    from penstock.models.roles import Critic as Critic
    from penstock.models.roles import RewardModel as RewardModel
    from penstock.planner.config import PlanConfig as PlanConfig
    from penstock.rollout.engine import Engine as Engine
    from penstock.rollout.engine import Rollout as Rollout
    from penstock.rollout.sampling import Sampling as Sampling

_HOMES = {
    "sft": "algorithms.sft", "reward": "algorithms.reward", "ppo": "algorithms.ppo",
    "dpo": "algorithms.preference", "DPOConfig": "algorithms.config",
    "grpo": "algorithms.grpo", "GRPOConfig": "algorithms.config",
    "distill": "algorithms.distillation.distill", "DistillConfig": "algorithms.config",
    "kto": "algorithms.kto", "KTOConfig": "algorithms.config",
    "align": "commands.align.command", "AlignConfig": "commands.align.config",
    "plan": "commands.plan", "PlanConfig": "planner.config",
    "SFTConfig": "config", "RewardConfig": "config", "PPOConfig": "config",
    "Strategy": "memory.strategy", "Decoder": "models.decoder",
    "Engine": "rollout.engine", "Rollout": "rollout.engine", "Sampling": "rollout.sampling",
    "Actor": "models.roles", "Critic": "models.roles", "RewardModel": "models.roles",
}  # fmt: skip

__all__ = sorted([*_HOMES, "autochunk", "__version__"])  # pyright: ignore


def __getattr__(name: str) -> Any:
    import importlib

    if name == "autochunk":  # a package that can be called
        return importlib.import_module("penstock.autochunk")
    if name not in _HOMES:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}")
    return getattr(importlib.import_module(f"penstock.{_HOMES[name]}"), name)
