"""Whether a benchmark fits, by the plan, before anything is made; and the shape that its flags describe."""

import dataclasses
import shutil

import torch

from penstock.algorithms.setup import setting_of
from penstock.commands import plan
from penstock.commands.bench.config import BenchConfig
from penstock.commands.bench.work import Sizes
from penstock.errors import ResourceError, UserError
from penstock.kernels.machine import available_ram
from penstock.memory.placement import TierName
from penstock.memory.strategy import Strategy
from penstock.models.config import DecoderConfig
from penstock.models.presets import GPT2, OPT
from penstock.planner import from_flags
from penstock.planner.config import PlanConfig
from penstock.planner.forecast import TIERS
from penstock.planner.from_flags import workload_of
from penstock.planner.workload import forecast_of

ALIASES = {size: f"opt-{size}" for size in OPT if size not in GPT2}
"""What the published LoRA benchmark calls its models."""


def shape_of(config: BenchConfig) -> DecoderConfig:
    """The decoder of all four models: `--layers` deep, its positions as many as the rows need.

    Raises UserError for a size that does not exist, with the nearest ones.
    """
    shape = from_flags.config_of(ALIASES.get(config.model, config.model), "--model")
    if config.prompt_length >= config.max_length:
        raise UserError(
            f"--prompt-length {config.prompt_length}: leaves no room for a response in --max-length "
            f"{config.max_length}; give less than that."
        )
    layers = config.layers or shape.num_layers
    kinds = [shape.kinds[i % shape.num_layers] for i in range(layers)]
    windows = tuple(window for window, _ in kinds) if shape.windows else ()
    rotary = tuple(rotates for _, rotates in kinds) if shape.rotary_layers else ()
    if config.base_dtype is not None and not config.lora_rank:
        raise UserError(
            f"--base-dtype {config.base_dtype}: packed weights cannot learn; give --lora-rank 16 beside it."
        )
    longest = max(shape.max_length, config.max_length)
    return dataclasses.replace(shape, num_layers=layers, windows=windows, rotary_layers=rotary, max_length=longest)


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
        model=config.model, strategy=strategy.name, dtype=config.dtype, device_memory=config.device_memory,
        host_memory=config.host_memory, disk=config.disk, world=world, batch_size=sizes.experience * world,
        micro_batch_size=sizes.micro, mini_batch_size=sizes.train * world, epochs=sizes.epochs,
        prompt_length=sizes.prompt, max_new_tokens=sizes.new, recompute=config.recompute,
        keep_activations=config.keep_activations, chunk_size=config.chunk_size,
        lora=config.lora_rank or None, base_dtype=config.base_dtype, top_k=config.top_k,
    )  # fmt: skip
    work = workload_of(asked, shape)
    # Unlike in training, the reward model is the bare base: it has no adapter.
    roles = tuple(dataclasses.replace(role, spec=None) if role.name == "reward" else role for role in work.roles)
    setting = setting_of(strategy, dataclasses.replace(work, roles=roles))
    planned = forecast_of(setting)
    free = room(strategy, planned.peak["device"])
    limits = {tier: [n for n in (setting.budgets.get(tier), free[tier]) if n is not None] for tier in TIERS}
    limited = dataclasses.replace(setting, budgets={tier: min(limits[tier], default=None) for tier in TIERS})
    if plan.short(planned, limited):
        table = plan.as_text(asked, limited, plan.as_dict(limited, planned))
        raise ResourceError(f"these models do not fit here, and nothing was made. The plan:\n\n{table}")
    return planned.peak


def room(strategy: Strategy, on_device: int) -> dict[TierName, int | None]:
    """Bytes that this machine has for one process on each tier. On a CPU the device is RAM too, and comes first."""
    ranks, device = strategy.world.local_size, strategy.world.device
    ram = available_ram() // ranks
    free: dict[TierName, int | None] = {"device": ram, "host": max(ram - on_device, 0), "disk": None}
    if device.type == "cuda":
        free["device"], free["host"] = torch.cuda.mem_get_info(device)[0], ram
    if "disk" in strategy.tiers:
        free["disk"] = shutil.disk_usage(strategy.tiers["disk"].directory).free // ranks  # type: ignore[union-attr]
    return free
