"""What a training command will need: its models, and what it does with them in one iteration. No torch in here.

`penstock plan` prints it, the commands leave room for activations by it, and the dry run is held against it.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from penstock.config import PlanConfig
from penstock.errors import UserError
from penstock.memory import plan
from penstock.memory.chunks import ITEMSIZE, Chunk, Weight, layout
from penstock.memory.placement import AUTO, TierName, bits_of
from penstock.models import lora_targets, presets, weight_shapes
from penstock.models.config import DecoderConfig
from penstock.models.families import family_of
from penstock.models.lora_targets import ALL_LINEAR, LoraSpec
from penstock.planner.activations import Batch, Pass, Work, activations_of
from penstock.planner.forecast import Forecast, Rates, forecast, with_slack
from penstock.units import parse_bytes

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class RoleSpec:
    """One model of a stage. Example: Role("critic", config, trained=True, scalar=True)."""

    name: str
    config: DecoderConfig
    trained: bool
    scalar: bool
    spec: LoraSpec | None = None
    """The adapters that it carries; if it is trained, they alone learn."""
    base: Hashable = None
    """What its frozen weights are: roles of equal bases share them. None: nobody else has them."""
    base_dtype: weight_shapes.BaseDtype | None = None
    """What its frozen products are packed in."""
    groups: tuple[tuple[str, tuple[Weight, ...]], ...] | None = None
    """Its weights, where a real model said them; None: as its config has it."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One iteration of a stage, over all ranks."""

    stage: str
    roles: tuple[RoleSpec, ...]
    batch_size: int
    micro_batch_size: int
    mini_batch_size: int
    epochs: int
    prompt_length: int
    max_new_tokens: int
    rollout_batch_size: int | None = None
    """Answers that one process generates together; None: all of its own."""

    @property
    def length(self) -> int:
        """Tokens of a whole row, no longer than the models' positions."""
        longest = min(role.config.max_length for role in self.roles)
        return min(self.prompt_length + self.max_new_tokens, longest)


def workload(config: PlanConfig) -> Workload:
    """What the flags describe. Raises UserError for a model that does not exist."""
    model = config_of(config.model, "--model")
    scalar = config_of(config.critic_model, "--critic-model") if config.critic_model else model
    spec = None
    if config.base_dtype is not None and config.lora is None:
        raise UserError(f"--base-dtype {config.base_dtype}: packed weights cannot learn; give --lora 16 beside it.")
    if config.lora is not None:
        spec = LoraSpec(config.lora, targets=config.lora_targets or ALL_LINEAR)
    whose = config.critic_model or config.model

    def role(name: str, trained: bool, scalar_head: bool) -> RoleSpec:
        own, base = (scalar, whose) if scalar_head else (model, config.model)
        adapter = None if name == "reference" else spec
        return RoleSpec(name, own, trained, scalar_head, adapter, base if spec else None, config.base_dtype)

    roles = {
        "ppo": (
            role("actor", True, False), role("critic", True, True), role("reference", False, False),
            role("reward", False, True),
        ),
        "sft": (role("model", True, False),),
        "reward": (role("model", True, True),),
    }  # fmt: skip
    if config.prompt_length >= model.max_length:
        raise UserError(
            f"--prompt-length {config.prompt_length}: leaves no room for a response in {config.model}, which holds "
            f"rows of {model.max_length} tokens."
        )
    pairs = 2 if config.stage == "reward" else 1
    return Workload(
        config.stage, roles[config.stage], config.batch_size * pairs, config.micro_batch_size,
        config.mini_batch_size or config.batch_size * pairs, config.epochs, config.prompt_length, config.max_new_tokens,
        config.rollout_batch_size,
    )  # fmt: skip


def config_of(name: str, flag: str) -> DecoderConfig:
    """The decoder of a named size, or of a directory's config.json."""
    path = Path(name) / "config.json"
    if not path.is_file():
        try:
            return presets.named(name)
        except ValueError as error:
            raise UserError(f"{flag} {name}: {error}, and no such directory with a config.json.") from error
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        return family_of(hf.get("model_type"), str(path)).config_from_hf(hf)
    except (KeyError, ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"{flag} {path}: cannot be planned: {type(error).__name__}: {error}.") from error


def passes(
    work: Workload, dtype: str, world: int, swap: bool = False, activation_budget: int | None = None,
    arithmetic: weight_shapes.Arithmetic = "narrow",
) -> dict[str, list[Pass]]:  # fmt: skip
    """What each phase does with each model, on the rank that has most rows. `swap`: the KV cache is on the host."""
    share = math.ceil(work.batch_size / world)
    phases: dict[str, list[Pass]] = {"rollout": [], "score": [], "train": []}
    response = work.length - work.prompt_length
    if work.stage == "ppo":
        actor = work.roles[0].config
        rows = min(work.rollout_batch_size or share, share)
        groups = weight_shapes.prefills([work.prompt_length] * rows)
        prefill = lora_targets.work_of(
            actor, dtype, work.roles[0].spec, Batch(groups[0].stop, work.prompt_length, rows), scalar=False,
            packed=work.roles[0].base_dtype, arithmetic=arithmetic,
        )  # fmt: skip
        cache, token = (weight_shapes.cache_of(actor, dtype, rows, slots) for slots in (work.length, 1))
        phases["rollout"].append(
            Pass(
                "actor", "generate", prefill, times=math.ceil(share / rows), tokens=response - 1,
                flops=_flops(actor, rows, work.prompt_length, rows),
                decode_flops=sum(
                    weight_shapes.flops_of(actor, [(1, work.prompt_length + i)]) + weight_shapes.head_flops(actor, 1)
                    for i in range(1, response)
                ) * rows,
                beside=2 * cache // actor.num_layers if swap else cache,
                sampling=weight_shapes.sampling_of(actor, dtype, rows),
                prefills=len(groups),
                swapped=cache + token if swap else 0,
                swap_writes=(cache, token) if swap else (0, 0),
            )
        )  # fmt: skip
        roles = {role.name: role for role in work.roles}
        for name in ("actor", "reference", "critic", "reward"):  # in the order of algorithms.ppo.score
            if name in roles:  # a --reward-fn is no model
                phases["score"].append(
                    _pass(work, roles[name], dtype, share, response, "evaluate", activation_budget, arithmetic)
                )
    updates = math.ceil(work.batch_size / work.mini_batch_size) * (work.epochs if work.stage == "ppo" else 1)
    for role in work.roles:
        if role.trained:
            rows = math.ceil(work.mini_batch_size / world)
            phases["train"].append(
                _pass(work, role, dtype, rows, response, "step", activation_budget, arithmetic, updates)
            )
    return {phase: found for phase, found in phases.items() if found}


def _pass(
    work: Workload, role: RoleSpec, dtype: str, rows: int, response: int, kind: Any, activation_budget: int | None,
    arithmetic: weight_shapes.Arithmetic, times: int = 1,
) -> Pass:  # fmt: skip
    micro = min(work.micro_batch_size, rows)
    once = role.name == "reward" or work.stage == "reward"  # read at the last token alone
    read = micro if once else micro * (work.length if work.stage == "sft" else response)
    whole = rows if once else rows * (work.length if work.stage == "sft" else response)
    held = lora_targets.work_of(
        role.config, dtype, role.spec, Batch(micro, work.length, read), scalar=role.scalar,
        entropy=work.stage != "sft", packed=role.base_dtype, arithmetic=arithmetic,
    )  # fmt: skip
    if activation_budget is not None:
        held = within(held, role.config, dtype, micro, work.length, activation_budget)
    return Pass(
        role.name, kind, held,
        count=math.ceil(rows / micro), times=times,
        flops=_flops(role.config, rows, work.length, 0 if role.scalar else whole) * (3 if kind == "step" else 1),
    )  # fmt: skip


def within(held: Work, config: DecoderConfig, dtype: str, rows: int, length: int, budget: int) -> Work:
    """The same where blocks are computed in slices: as many bytes as the engine's own planner of slices finds."""
    from penstock.models import sliced_blocks  # torch, in here alone

    forward, backward, _ = sliced_blocks.peaks(config, dtype, rows, length, budget)
    blocks = [dataclasses.replace(part, forward=forward, backward=backward) for part in held.parts[1:]]
    return dataclasses.replace(held, parts=(held.parts[0], *blocks))


def _flops(config: DecoderConfig, rows: int, length: int, read: int) -> float:
    return weight_shapes.flops_of(config, [(length, length)]) * rows + weight_shapes.head_flops(config, read)


def forecast_of(
    work: Workload,
    *,
    strategy: str,
    dtype: str,
    world: int,
    budgets: dict[TierName, int | None],
    recompute: bool | None = None,
    chunk_size: int | None = None,
    rates: Rates | None = None,
    timed: bool = True,
    activation_budget: int | None = None,
    arithmetic: weight_shapes.Arithmetic = "narrow",
) -> Forecast:
    """The forecast of one iteration under a strategy. `dtype` as the flag says it; `chunk_size` in elements."""
    dtype, recompute = DTYPES[dtype], True if activation_budget is not None else recompute
    laid = [_laid(role, dtype, world, chunk_size) for role in work.roles]
    shared = {
        role.name: {chunk.shared for chunk in chunks} - {None}
        for role, (chunks, _) in zip(work.roles, laid, strict=True)
    }
    shard = max(chunk.nbytes for chunks, _ in laid for chunk in chunks) // world if world > 1 else 0
    device, auto = budgets.get("device"), bits_of(strategy)[0] == AUTO

    def under(moves: bool, again: bool | None, swap: bool = False) -> Forecast:
        """With room for the activations of models that move, or of models that stay."""
        phases = passes(work, dtype, world, swap, activation_budget, arithmetic)
        fullest = max(
            activations_of([(one, moves) for one in company], again)
            for each in phases.values() for company in _sharing_groups(each, shared)
        )  # fmt: skip
        left = dict(budgets)
        if swap and (host := budgets.get("host")) is not None:
            left["host"] = max(host - max(one.swapped for one in phases["rollout"]), 0)
        placed = plan.place(strategy, laid, world, left, with_slack(fullest, shard))
        models = {
            role.name: plan.Model(role.name, tuple(one), tuple(visits))
            for role, one, (_, visits) in zip(work.roles, placed, laid, strict=True)
        }
        if auto and not moves and any(model.moving(world) for model in models.values()):
            return under(True, recompute is not False, swap)
        return forecast(models, phases, world=world, device=device, recompute=again, rates=rates, timed=timed)

    found = under(not auto or bool(recompute), recompute)
    if work.stage == "ppo" and device is not None and found.peak["device"] > device:
        swapped = under(not auto or bool(recompute), recompute, swap=True)
        return min(found, swapped, key=lambda one: one.peak["device"])
    return found


def _sharing_groups(passes: Sequence[Pass], shared: dict[str, set[Any]]) -> list[list[Pass]]:
    """Before anything is placed: the passes that go side by side if all weights move; see forecast.companies_of."""
    found: list[list[Pass]] = []
    for one in passes:
        beside = (each for each in found if shared[each[0].model] & shared[one.model])
        company = next(beside, None) if one.kind != "generate" else None
        if company is None:
            found.append([one])
        else:
            company.append(one)
    return found


@functools.cache
def _laid(role: RoleSpec, dtype: str, world: int, chunk_size: int | None) -> tuple[list[Chunk], list[tuple[str, ...]]]:
    groups: Iterable[tuple[str, Sequence[Weight]]]
    if role.groups is not None:
        groups = role.groups
    elif role.spec or role.base:
        groups = lora_targets.groups_of(
            role.config,
            dtype,
            role.spec,
            trained=role.trained,
            scalar=role.scalar,
            base=role.base,
            packed=role.base_dtype,
        )
    else:
        groups = weight_shapes.groups_of(role.config, dtype, trained=role.trained, scalar=role.scalar)
    chunks = layout(groups, world=world, max_numel=chunk_size)
    return chunks, weight_shapes.visits_of(role.config, scalar=role.scalar)


def elements_of(chunk_size: str | None, dtype: str) -> int | None:
    """--chunk-size in elements."""
    nbytes = bytes_of(chunk_size, "--chunk-size")
    return nbytes and max(nbytes // ITEMSIZE[DTYPES[dtype]], 1)


def bytes_of(text: str | None, flag: str) -> int | None:
    return None if text is None else parse_bytes(text, flag)
