"""NaiveStrategy, DDPStrategy and ColossalAIStrategy: names for rows of penstock's placement table."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from penstock.distributed.world import World
from penstock.errors import UserError
from penstock.memory import strategy
from penstock.models.roles import Role

POLICIES = {"cuda": "", "cpu": "_cpu", "auto": "_auto", "nvme": "_nvme"}


class Strategy:
    """A penstock strategy under a published name; `engine` is the strategy itself."""

    def __init__(self, name: str, precision: str = "fp32", **budgets: Any) -> None:
        # fp16 asks for two-byte weights: those are bf16 here, where the device multiplies it
        fast = World.join().device.type != "cpu"
        dtype = "bf16" if precision == "bf16" or (precision == "fp16" and fast) else "fp32"
        self.engine = strategy.Strategy.named(name, dtype=dtype, **budgets)

    def model_init_context(self) -> AbstractContextManager[None]:
        """Models made inside are recipes: weights are made chunk by chunk, in their homes, when a trainer begins."""
        return self.engine.init()

    def prepare(self, *models: Any) -> Any:
        """What it was given: the trainer knows all four models, and prepares them together."""
        return models[0] if len(models) == 1 else models

    def save_model(self, model: Role, path: str | Path, only_rank0: bool = True) -> None:
        """A directory that transformers loads, on the first rank; ranks that share weights all call it."""
        model.save_pretrained(Path(path) if self.engine.world.first else None)  # type: ignore[operator]


class NaiveStrategy(Strategy):
    """One process, everything on the device."""

    def __init__(self) -> None:
        super().__init__("naive")


class DDPStrategy(Strategy):
    """Every rank holds everything."""

    def __init__(self, seed: int = 42) -> None:
        super().__init__("ddp")


class ColossalAIStrategy(Strategy):
    """`stage` 1, 2 or 3 of ZeRO; 3 is gemini, where `placement_policy` cuda, cpu, auto or nvme says where weights live.

    `device_memory`, `host_memory` and `disk` are penstock's budgets ("6GB", PATH:200GB).
    """

    def __init__(
        self, stage: int = 3, precision: str = "fp16", seed: int = 42, placement_policy: str = "cuda", **options: Any
    ) -> None:
        if stage not in (1, 2, 3) or placement_policy not in POLICIES:
            raise UserError(
                f"ColossalAIStrategy(stage={stage}, placement_policy={placement_policy!r}): stages are 1, 2 and 3, "
                f"policies {', '.join(POLICIES)}."
            )
        name = "gemini" if stage == 3 else f"zero{stage}"
        suffix = POLICIES[placement_policy]
        if stage < 3 and suffix not in ("", "_cpu"):
            raise UserError(f"ColossalAIStrategy: placement_policy={placement_policy!r} needs stage=3.")
        budgets = {key: options[key] for key in ("device_memory", "host_memory", "disk") if key in options}
        super().__init__(name + suffix, precision, **budgets)
