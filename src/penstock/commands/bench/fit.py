"""Whether a benchmark fits, by the plan, before anything is made; and the shape that its flags describe."""

import dataclasses
import os
import shutil
from pathlib import Path

import torch

from penstock.commands import plan
from penstock.commands.bench.config import BenchConfig
from penstock.commands.bench.work import Sizes
from penstock.config import PlanConfig, recompute_of
from penstock.errors import ResourceError, UserError
from penstock.memory.placement import TierName
from penstock.memory.strategy import Strategy
from penstock.models.config import DecoderConfig
from penstock.models.linear import arithmetic_of
from penstock.models.lora_targets import LoraSpec
from penstock.models.presets import GPT2, OPT
from penstock.planner import workload

ALIASES = {size: f"opt-{size}" for size in OPT if size not in GPT2}
"""What the published LoRA benchmark calls its models."""

TRAINED = ("actor", "critic")


def shape_of(config: BenchConfig) -> DecoderConfig:
    """The decoder of all four models: `--layers` deep, its positions as many as the rows need.

    Raises UserError for a size that does not exist, with the nearest ones.
    """
    shape = workload.config_of(ALIASES.get(config.model, config.model), "--model")
    if config.prompt_length >= config.max_length:
        raise UserError(
            f"--prompt-length {config.prompt_length}: leaves no room for a response in --max-length "
            f"{config.max_length}; give less than that."
        )
    layers = config.layers or shape.num_layers
    windows = tuple(shape.windows[i % len(shape.windows)] for i in range(layers)) if shape.windows else ()
    if config.base_dtype is not None and not config.lora_rank:
        raise UserError(
            f"--base-dtype {config.base_dtype}: packed weights cannot learn; give --lora-rank 16 beside it."
        )
    longest = max(shape.max_length, config.max_length)
    return dataclasses.replace(shape, num_layers=layers, windows=windows, max_length=longest)


def sizes_of(config: BenchConfig) -> Sizes:
    """Rows and tokens of one process."""
    micro = min(config.micro_batch_size or config.train_batch_size, config.train_batch_size)
    return Sizes(
        config.experience_batch_size, config.train_batch_size, config.prompt_length,
        config.max_length - config.prompt_length, micro, config.max_epochs,
    )  # fmt: skip


def check(config: BenchConfig, shape: DecoderConfig, strategy: Strategy) -> dict[TierName, int]:
    """The plan's peaks per tier of one process.

    Raises ResourceError, with the plan's table, where the flags' budgets or this machine cannot hold them.
    """
    world, sizes = strategy.world.size, sizes_of(config)
    asked = PlanConfig(
        config.model, strategy=strategy.name, dtype=config.dtype, device_memory=config.device_memory,
        host_memory=config.host_memory, disk=config.disk, world=world, batch_size=sizes.experience * world,
        micro_batch_size=sizes.micro, mini_batch_size=sizes.train * world, epochs=sizes.epochs,
        prompt_length=sizes.prompt, max_new_tokens=sizes.new, recompute=config.recompute,
        keep_activations=config.keep_activations, chunk_size=config.chunk_size,
        lora=config.lora_rank or None, base_dtype=config.base_dtype,
    )  # fmt: skip
    spec = LoraSpec(config.lora_rank) if config.lora_rank else None
    roles = tuple(
        workload.RoleSpec(
            name, shape, trained=name in TRAINED, scalar=name in ("critic", "reward"),
            spec=spec if name in TRAINED else None, base="one base" if spec else None, base_dtype=config.base_dtype,
        )
        for name in ("actor", "critic", "reference", "reward")
    )  # fmt: skip
    work = workload.Workload(
        "ppo", roles, asked.batch_size, sizes.micro, sizes.train * world, sizes.epochs, sizes.prompt, sizes.new
    )
    given: dict[TierName, int | None] = {
        "device": strategy.tiers["device"].budget, "host": strategy.tiers["host"].budget,
        "disk": strategy.tiers["disk"].budget if "disk" in strategy.tiers else None,
    }  # fmt: skip
    setting = plan.Setting(strategy.name, world, sizes.micro, None, recompute_of(config), given)
    found = workload.forecast_of(
        work, strategy=strategy.name, dtype=config.dtype, world=world, budgets=given, recompute=recompute_of(config),
        chunk_size=strategy.chunk_size, arithmetic=arithmetic_of(strategy.world.device.type),
    )  # fmt: skip
    free = room(strategy, found.peak["device"])
    budgets: dict[TierName, int | None] = {
        tier: min((one for one in (given[tier], free[tier]) if one is not None), default=None) for tier in given
    }
    limited = dataclasses.replace(setting, budgets=budgets)
    if plan.short(found, limited):
        table = plan.as_text(asked, limited, plan.as_dict(asked, work, limited, found))
        raise ResourceError(f"these models do not fit here, and nothing was made. The plan:\n\n{table}")
    return found.peak


def room(strategy: Strategy, on_device: int) -> dict[TierName, int | None]:
    """Bytes that this machine has for one process on each tier. On a CPU the device is RAM too, and comes first."""
    ram = available_ram() // ranks_here()
    device = strategy.world.device
    free: dict[TierName, int | None] = {"device": ram, "host": max(ram - on_device, 0), "disk": None}
    if device.type == "cuda":
        free["device"], free["host"] = torch.cuda.mem_get_info(device)[0], ram
    if "disk" in strategy.tiers:
        free["disk"] = shutil.disk_usage(strategy.tiers["disk"].directory).free // ranks_here()  # type: ignore[union-attr]
    return free


def available_ram() -> int:
    """Bytes that programs can still take without swapping."""
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def ranks_here() -> int:
    """Processes of this run on this machine: torchrun says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
