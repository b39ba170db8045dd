"""What the flags of `penstock plan` describe: models, work and budgets. No torch at import."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from penstock.config import recompute_of
from penstock.errors import UserError
from penstock.memory.chunks import ITEMSIZE
from penstock.memory.placement import known
from penstock.models import presets, tiling
from penstock.models.config import DecoderConfig
from penstock.models.families import FAMILIES
from penstock.models.families.multimodal import kind_of, text_config
from penstock.models.lora_targets import ALL_LINEAR, LoraSpec
from penstock.planner import cuda, machine
from penstock.planner.config import PlanConfig
from penstock.planner.traffic import Rates
from penstock.planner.workload import DTYPES, RoleSpec, Setting, Workload, refusal
from penstock.units import parse_bytes

ARITHMETIC: dict[str, tiling.Arithmetic] = {"gpu": "narrow", "cpu": "wide sums", "cpu_without_bf16": "wide"}
"""What --arithmetic names."""


def setting_of(config: PlanConfig, shape: DecoderConfig | None = None) -> Setting:
    """What the flags of `penstock plan` describe, parsed; `shape` replaces the decoder that --model names. Raises
    UserError for a flag that cannot be read."""
    if config.world % config.nodes:
        raise UserError(f"--nodes {config.nodes}: does not divide --world {config.world}; give the same ranks to each.")
    device = bytes_of(config.device_memory, "--device-memory")
    disk = (config.disk or "").rpartition(":")[2]
    setting = Setting(
        strategy=known(config.strategy),
        nodes=config.nodes,
        recompute=recompute_of(config),
        arithmetic=ARITHMETIC[config.arithmetic],
        blas_workspace=cuda.workspace_of(device) if config.arithmetic == "gpu" else 0,
        budgets={
            "device": device,
            "host": bytes_of(config.host_memory, "--host-memory"),
            "disk": bytes_of(None if "/" in disk else disk or None, "--disk"),
        },
        workload=workload_of(config, shape),
        dtype=config.dtype,
        world=config.world,
        chunk_size=elements_of(config.chunk_size, config.dtype),
        activation_budget=bytes_of(config.activation_budget, "--activation-budget"),
        rates=_rates(config),
    )
    if reason := refusal(setting):
        raise UserError(reason)
    return setting


def _rates(config: PlanConfig) -> Rates:
    def rate(name: str) -> float:
        return float(parse_bytes(getattr(config, name), f"--{name.replace('_', '-')}"))

    inside = rate("network" if config.network_inside is None else "network_inside")
    if config.rates == "measured":
        return dataclasses.replace(machine.rates(config.dtype, network=rate("network")), network_inside=inside)
    return Rates(
        config.tflops * 1e12, rate("link"), rate("disk_read"), rate("disk_write"), rate("host_bandwidth"),
        rate("network"), rate("device_bandwidth"), inside,
    )  # fmt: skip


ROLES = {  # of each stage: name, whether it is trained, whether it has a scalar head
    "ppo": (("actor", True, False), ("critic", True, True), ("reference", False, False), ("reward", False, True)),
    "grpo": (("actor", True, False), ("reference", False, False), ("reward", False, True)),
    "sft": (("model", True, False),),
    "reward": (("model", True, True),),
    "dpo": (("model", True, False), ("reference", False, False)),
    "kto": (("model", True, False), ("reference", False, False)),
    "distill": (("model", True, False), ("teacher", False, False)),
}


def workload_of(config: PlanConfig, shape: DecoderConfig | None = None) -> Workload:
    """What the flags describe; `shape` replaces the decoder that --model names. Raises UserError for unknown models."""
    model = shape or config_of(config.model, "--model")
    scalar_model = config_of(config.critic_model, "--critic-model") if config.critic_model else model
    if config.base_dtype is not None and config.lora is None:
        raise UserError(f"--base-dtype {config.base_dtype}: packed weights cannot learn; give --lora 16 beside it.")
    if config.rollout_dtype is not None and model.foreign:
        raise UserError(f"--rollout-dtype {config.rollout_dtype}: is for blocks of our own; leave it out.")
    adapters = None if config.lora is None else LoraSpec(config.lora, targets=config.lora_targets or ALL_LINEAR)

    def role(name: str, trained: bool, scalar: bool) -> RoleSpec:
        decoder, source = (scalar_model, config.critic_model or config.model) if scalar else (model, config.model)
        spec, base_dtype = None if name == "reference" else adapters, config.base_dtype
        if name == "teacher":
            source, spec, base_dtype = config.teacher_model or config.model, None, config.teacher_dtype
            decoder = config_of(source, "--teacher-model")
        return RoleSpec(name, decoder, trained, scalar, spec, source if adapters else None, base_dtype)

    if config.prompt_length >= model.max_length:
        raise UserError(
            f"--prompt-length {config.prompt_length}: leaves no room for a response in {config.model}, which holds "
            f"rows of {model.max_length} tokens."
        )
    has_reference = {"dpo": not config.precompute_reference, "kto": True}.get(config.stage, bool(config.kl_coef))
    exists = {"reference": has_reference, "reward": config.reward_model}
    together = {"grpo": config.group_size, "reward": 2, "dpo": 2}.get(config.stage, 1)  # a pair is two rows
    batch_size = config.rows * (1 if config.stage == "grpo" else together)
    return Workload(
        config.stage,
        tuple(role(*row) for row in ROLES[config.stage] if exists.get(row[0], True)),
        batch_size,
        config.micro_batch_size,
        config.mini_batch_size or batch_size,
        config.passes,
        config.prompt_length,
        config.max_new_tokens,
        config.rollout_batch_size,
        together,
        reread=config.stage != "grpo"
        or config.passes > 1
        or (config.mini_batch_size or batch_size) < batch_size
        or config.rollout_dtype is not None,
        rollout_dtype=config.rollout_dtype,
        temperature=config.temperature,
        sampled_of=config.top_k,
        top_p=config.top_p,
        top_k=config.teacher_top_k if config.stage == "distill" else 0,
        samples=config.stage == "distill" and config.on_policy > 0,
        stored=config.stage == "distill" and config.precompute_teacher,
    )


def config_of(name: str, flag: str) -> DecoderConfig:
    """The decoder of a named size, or of a directory's config.json."""
    path = Path(name) / "config.json"
    if name.endswith(".gguf"):
        from penstock.models.formats.gguf_file import local_directory  # which needs torch

        path = local_directory(name) / "config.json"
    if not path.is_file():
        try:
            return presets.named(name)
        except ValueError as error:
            raise UserError(f"{flag} {name}: {error}, and no such directory with a config.json.") from error
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        hf = text_config(whole)
        family: Any = FAMILIES.get(hf.get("model_type", ""))
        if family is None:
            from penstock.models.foreign.family import family_in  # imports torch

            family = family_in(hf, str(path))
        return dataclasses.replace(family.config_from_hf(hf), part_of=kind_of(whole))
    except (KeyError, ValueError, TypeError, ZeroDivisionError, AttributeError, RecursionError) as error:
        raise UserError(f"{flag} {path}: cannot be planned: {type(error).__name__}: {error}.") from error


def elements_of(chunk_size: str | None, dtype: str) -> int | None:
    """--chunk-size in elements."""
    nbytes = bytes_of(chunk_size, "--chunk-size")
    return nbytes and max(nbytes // ITEMSIZE[DTYPES[dtype]], 1)


def bytes_of(text: str | None, flag: str) -> int | None:
    return None if text is None else parse_bytes(text, flag)
