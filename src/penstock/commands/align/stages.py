"""Runs that begin from one another: the one way in which `penstock align` and `penstock demo` chain training commands.

Each stage is an ordinary run in a directory of its own, with the flags that its command has; what began goes on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from penstock.algorithms.config import DPOConfig, GRPOConfig, KTOConfig
from penstock.algorithms.grpo import grpo
from penstock.algorithms.kto import kto
from penstock.algorithms.ppo import ppo
from penstock.algorithms.preference import dpo
from penstock.algorithms.reward import reward
from penstock.algorithms.sft import sft
from penstock.config import PPOConfig, RewardConfig, SFTConfig
from penstock.errors import UserError
from penstock.flags import flags_of, from_dict
from penstock.run.directory import RunDirectory


class Trainer(NamedTuple):
    """A training command."""

    config: Any
    train: Callable[..., Path]
    model: str = "model"
    """The flag that names what it begins from."""


TRAINERS = {
    "sft": Trainer(SFTConfig, sft),
    "reward": Trainer(RewardConfig, reward),
    "ppo": Trainer(PPOConfig, ppo, "actor"),
    "grpo": Trainer(GRPOConfig, grpo),
    "dpo": Trainer(DPOConfig, dpo),
    "kto": Trainer(KTOConfig, kto),
}


@dataclass(frozen=True)
class Stage:
    """One run. Example: Stage("ppo", {"data": ["prompts.jsonl"]}, begins="sft", judge="reward")."""

    command: str
    flags: Mapping[str, Any]
    """The command's, flat, but for --out and those below."""
    begins: str | None = None
    """The stage whose model it begins from. None: `flags` name one."""
    judge: str | None = None
    """The stage whose reward model scores."""
    name: str = ""
    """Of its run directory. Default: the command."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Flags that a person gave for this stage alone, as text."""

    @property
    def directory(self) -> str:
        return self.name or self.command

    def config(self, root: Path, **changes: Any) -> Any:
        """The command's config for a run in `root`; earlier stages are there too. Raises UserError for a bad flag."""
        trainer = TRAINERS[self.command]
        flags = {**self.flags, **parsed(self.command, self.settings), **changes, "out": str(root / self.directory)}
        if self.begins:
            flags[trainer.model] = str(root / self.begins)
        if self.judge:
            flags["reward"] = str(root / self.judge)
        return trainer.config.of(**{name: value for name, value in flags.items() if value is not None})


def parsed(command: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Settings of one stage, several values apart at their commas. Raises UserError for what is no flag of it."""
    flags = {flag.name: flag for flag in flags_of(TRAINERS[command].config)}
    for name in settings:
        if name not in flags or name in ("out", "resume_if_present"):
            raise UserError(f"--set {command}.{name}: {command} has no such flag; penstock {command} --help shows all.")
    return {name: text.split(",") if flags[name].several else text for name, text in settings.items()}


def run_stage(stage: Stage, root: Path, **changes: Any) -> Path:
    """Runs a stage, or goes on with the run that is there: with its own flags, but for `changes`."""
    trainer, path = TRAINERS[stage.command], root / stage.directory
    if (path / "config.toml").exists():
        saved = RunDirectory.peek(path)
        if (command := saved.pop("command")) != stage.command:
            raise UserError(f"{path}: is a run of penstock {command}, not of {stage.command}; choose another --out.")
        return trainer.train(from_dict(trainer.config, {**saved, **changes, "out": str(path)}), resume=True)
    return trainer.train(stage.config(root, **changes))
