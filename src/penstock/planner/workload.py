"""What a training command will need: its models, and what it does with them in one iteration. No torch at import.

A `Workload` is what is computed; a `Setting` says also where it lives and how it computes. `penstock plan` prints the
forecast of a setting, the commands reserve memory for activations by it, and the dry run is compared with it.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock.memory import plan
from penstock.memory.chunks import Chunk, Weight, layout
from penstock.memory.placement import AUTO, HOST, PYTORCH, SHARD, STRATEGIES, Row, TierName, bits_of, refused
from penstock.models import lora_targets, tiling, weight_shapes
from penstock.models.config import DecoderConfig
from penstock.models.lora_targets import LoraSpec
from penstock.planner import cuda, footprint, sharded
from penstock.planner.activations import Batch, PartWork, Pass, Work
from penstock.planner.forecast import (
    TIERS,
    Forecast,
    bytes_of,
    forecast,
    one_after_the_other,
    sharing_groups,
    with_slack,
)  # fmt: skip
from penstock.planner.traffic import Rates, inside_machine

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class RoleSpec:
    """One model of a stage. Example: RoleSpec("critic", config, trained=True, scalar=True)."""

    name: str
    config: DecoderConfig
    trained: bool
    scalar: bool
    spec: LoraSpec | None = None
    """The adapters that it carries; if it is trained, only they learn."""
    base: Hashable = None
    """Identifies its frozen weights: roles of equal bases share them. None: it shares none."""
    base_dtype: weight_shapes.BaseDtype | None = None
    """The format that its frozen products are packed in."""
    groups: tuple[tuple[str, tuple[Weight, ...]], ...] | None = None
    """The weights of a real model. None: those that follow from its config."""


@dataclass(frozen=True)
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
    """Answers that one process generates together. None: all answers of the process."""
    group_size: int = 1
    """Answers to one prompt, side by side (a comparison has two): it is read once for all of them, and computed once in
    each micro-batch that is learned from."""
    rollout_dtype: weight_shapes.BaseDtype | None = None
    """What the blocks of a copy that answers are packed in. None: the model itself answers."""
    reread: bool = True
    """grpo: whether the actor reads its own answers before it learns from them."""
    temperature: float = 1.0
    """That answers are sampled at."""
    sampled_of: int = 0
    """The likeliest tokens of which each is sampled. 0: all."""
    top_p: float = 1.0
    """The probability that these have together."""
    top_k: int = 0
    """distill: the teacher's tokens that are compared one by one."""
    samples: bool = False
    """distill: whether the student's own answers are learned, and not only given ones."""
    stored: bool = False
    """distill: the teacher reads all answers before the student is in memory."""

    @property
    def rolls_out(self) -> bool:
        """Whether the model answers prompts to learn from."""
        return self.stage in ("ppo", "grpo") or self.samples

    @property
    def length(self) -> int:
        """Tokens of a whole row, no longer than the models' positions."""
        longest = min(role.config.max_length for role in self.roles)
        return min(self.prompt_length + self.max_new_tokens, longest)


@dataclass(frozen=True)
class Setting:
    """A workload, where it lives and how it computes. Example: Setting(work, "gemini_cpu", "bf16", world=4)."""

    workload: Workload
    strategy: str
    dtype: str
    """fp32 or bf16, as the flag has it."""
    world: int = 1
    budgets: dict[TierName, int | None] = field(default_factory=lambda: dict.fromkeys(TIERS))
    """Bytes per tier and process. None: no limit; no entry: no such tier, so gemini_auto places nothing there."""
    recompute: bool | None = None
    """Whether blocks are run again in backward. None: where weights move. An activation budget implies True."""
    chunk_size: int | None = None
    """Most elements of weights that move together."""
    activation_budget: int | None = None
    """Bytes that the activations inside a block may take per micro-batch."""
    arithmetic: tiling.Arithmetic = "narrow"
    rates: Rates = field(default_factory=Rates)
    nodes: int = 1
    """Machines that the ranks are on."""
    blas_workspace: int = 0
    """Bytes of one workspace of a GPU's libraries (cuda.workspace_of). 0: the device is none of NVIDIA's."""


def refusal(setting: Setting) -> str | None:
    """Why a run of this would be refused; see placement.refused."""
    packed = any(role.base_dtype for role in setting.workload.roles)
    limits: Any = {"chunk_size": setting.chunk_size, "activation_budget": setting.activation_budget}
    laid = (_laid(role, DTYPES[setting.dtype], 1, None) for role in setting.workload.roles)
    limits |= {"visits": (visits for _, visits in laid), "copies": setting.workload.rollout_dtype is not None}
    return refused(setting.strategy, setting.world, packed=packed, **limits)


SCORED = ("actor", "reference", "critic", "reward", "teacher")
"""Roles that read answers before they are learned, in the order in which algorithms.experience.score runs them."""


def passes(setting: Setting, *, swap: bool = False, offload: bool = False) -> dict[str, list[Pass]]:
    """What each phase does with each model, on the rank that has most rows; `swap` and `offload` as in `_forecast`."""
    work, world = setting.workload, setting.world
    rows = math.ceil(work.batch_size / world)
    phases: dict[str, list[Pass]] = {}
    if work.rolls_out:
        phases["rollout"] = [_generation(setting, rows, swap)]
    roles = {role.name: role for role in work.roles}  # without "reward" where a --reward-fn scores
    read = [name for name in SCORED if name in roles and (work.reread or name != "actor")]
    if scored := [_pass(setting, roles[name], rows, "evaluate") for name in read]:
        phases["score"] = scored
    if work.stage == "kto":  # the policy reads mismatched pairs, the reference these and the answers
        policy, answers = _pass(setting, roles["model"], rows, "evaluate"), scored[0]
        phases["score"] = [dataclasses.replace(answers, count=2 * answers.count, flops=2 * answers.flops), policy]
    updates = math.ceil(work.batch_size / work.mini_batch_size) * (work.epochs if work.rolls_out else 1)
    rows = math.ceil(work.mini_batch_size / world)
    trained = [role for role in work.roles if role.trained]
    if trained:
        steps = [_pass(setting, role, rows, "step", times=updates) for role in trained]
        phases["train"] = [dataclasses.replace(step, offloaded=step.inputs) for step in steps] if offload else steps
    return phases


def _generation(setting: Setting, answers: int, swap: bool) -> Pass:
    """A rank's rollout: prefills and decoding steps of the actor, as often as its answers need."""
    work, dtype = setting.workload, DTYPES[setting.dtype]
    role, response = work.roles[0], work.length - work.prompt_length
    actor = role.config
    rows = min(work.rollout_batch_size or answers, answers)
    prompts = rows if actor.foreign else math.ceil(rows / work.group_size)  # rows in step share no prefill
    groups = [slice(0, rows)] if actor.foreign else tiling.prefills([work.prompt_length] * prompts)
    batch = Batch(groups[0].stop, work.prompt_length, prompts)
    prefill = footprint.work_of(
        actor, dtype, role.spec, batch, scalar=False, packed=role.base_dtype or work.rollout_dtype,
        arithmetic=setting.arithmetic,
    )  # fmt: skip
    decode_flops = sum(
        footprint.flops_of(actor, [(1, work.prompt_length + i)]) + footprint.head_flops(actor, 1)
        for i in range(1, response)
    )
    cache, token = (footprint.cache_of(actor, dtype, rows, slots) for slots in (work.length, 1))
    if actor.foreign:
        prefill, cache = _in_step(setting, role, rows, prefill, cache)
    copy_bytes, copy_scratch = footprint.copy_of(actor, dtype, role.spec, work.rollout_dtype)
    return Pass(
        role.name,
        "generate",
        prefill,
        copy_bytes=copy_bytes,
        copy_scratch=copy_scratch,
        times=math.ceil(answers / rows),
        tokens=response - 1,
        flops=_flops(actor, prompts, work.prompt_length, prompts),
        decode_flops=decode_flops * rows,
        cache_bytes=2 * cache // actor.num_layers if swap else cache,
        sampling=footprint.sampling_of(
            actor, dtype, rows, temperature=work.temperature, top_k=work.sampled_of, top_p=work.top_p
        ),
        recorded=footprint.recorded_of(actor, dtype, rows, work.prompt_length, work.length),
        prefills=len(groups),
        swapped=cache + token if swap else 0,
        visited_by=((groups[0].stop - groups[0].start) * work.prompt_length, rows),
        swap_writes=(cache, token) if swap else (0, 0),
    )


def _pass(setting: Setting, role: RoleSpec, rows: int, kind: Literal["evaluate", "step"], times: int = 1) -> Pass:
    work, dtype = setting.workload, DTYPES[setting.dtype]
    micro = min(work.micro_batch_size, rows)
    if role.name == "reward" or work.stage == "reward":
        states = 1  # per row: the score is read at the last token alone
    else:
        states = work.length if work.stage == "sft" else work.length - work.prompt_length
    batch = Batch(micro, work.length, micro * states)
    activations = footprint.work_of(
        # what is behind theirs is measured
        dataclasses.replace(role.config, final_norm=False) if role.config.foreign else role.config,
        dtype,
        role.spec,
        batch,
        scalar=role.scalar,
        entropy=work.stage not in ("sft", "dpo", "kto", "distill"),
        packed=role.base_dtype,
        arithmetic=setting.arithmetic,
    )
    if role.config.foreign:
        activations = _measured(setting, role, batch, activations)
    if setting.activation_budget is not None:
        activations = _in_slices(activations, setting, role, micro)
    if work.top_k:
        activations = footprint.with_top_k(activations, role.config, micro * states, work.top_k, setting.arithmetic)
    whole = min(math.ceil(rows / micro) * math.ceil(micro / work.group_size), rows)
    shared = (rows - whole) * (work.prompt_length - 1)  # a row computes its own from the prompt's last token on
    padded = role.config.foreign or setting.activation_budget is not None
    if padded or shared < tiling.LEAST_SHARED * rows * work.length:
        whole = rows
    flops = _flops(role.config, whole, work.length, 0 if role.scalar else rows * states)
    own = work.length - work.prompt_length + 1
    flops += footprint.flops_of(role.config, [(own, work.length)]) * (rows - whole)
    return Pass(
        role.name,
        kind,
        activations,
        count=math.ceil(rows / micro),
        times=times,
        flops=flops * (3 if kind == "step" else 1),
        teacher_bytes=footprint.top_k_bytes(rows * states, work.top_k),
    )


def _measured(setting: Setting, role: RoleSpec, batch: Batch, formula: Work) -> Work:
    """The same of a model whose layers are transformers' own."""
    from penstock.planner.measuring import foreign  # imports torch

    return foreign.measured(_model(setting, role, role.trained), batch, formula)


def _in_step(setting: Setting, role: RoleSpec, rows: int, formula: Work, cache: int) -> tuple[Work, int]:
    """What such a model holds while it generates, and the bytes of its cache."""
    from penstock.planner.measuring import foreign  # imports torch

    work = setting.workload
    bytes_of_rows = foreign.generation(_model(setting, role, False), rows, work.prompt_length, work.length)
    if isinstance(bytes_of_rows, str):
        return dataclasses.replace(formula, note=bytes_of_rows), cache
    whole = PartWork(("tokens", "embed"), 0, 0, bytes_of_rows.passing, 0)
    return Work((whole,), 2 * rows * work.length * footprint.INDEX, 0, 0), bytes_of_rows.cache


def _model(setting: Setting, role: RoleSpec, trained: bool) -> Any:
    from penstock.planner.measuring import foreign

    return foreign.Model(role.config, DTYPES[setting.dtype], role.spec, role.base_dtype, trained, setting.arithmetic)


def notes(setting: Setting) -> list[str]:
    """What there is to say of the plan's numbers, a line each."""
    every = (each.work.note for phase in passes(setting).values() for each in phase)
    return [*dict.fromkeys(note for note in every if note)]


def _in_slices(activations: Work, setting: Setting, role: RoleSpec, rows: int) -> Work:
    """The same with blocks computed in slices: as many bytes as the engine's own planner of slices says."""
    from penstock.models import sliced_blocks  # imports torch

    assert setting.activation_budget is not None
    forward, backward, _ = sliced_blocks.peaks(
        role.config, DTYPES[setting.dtype], rows, setting.workload.length, setting.activation_budget
    )
    blocks = [dataclasses.replace(part, forward=forward, backward=backward) for part in activations.parts[1:]]
    return dataclasses.replace(activations, parts=(activations.parts[0], *blocks))


def _flops(config: DecoderConfig, rows: int, length: int, states: int) -> float:
    return footprint.flops_of(config, [(length, length)]) * rows + footprint.head_flops(config, states)


# [Note: the plan is the engine's own arithmetic]
# memory.plan decides (placements, slots, which chunk leaves a slot), and both the engine and the forecast call it. The
# forecast walks the same passes on ids, and the planner's bytes of a part follow models/decoder.py line by line.
# Nothing is fitted to measurements: where plan and engine disagree, one of them has a mistake.


def forecast_of(setting: Setting, *, timed: bool = True) -> Forecast:
    """The forecast of one iteration. Without `timed` it has no traffic and no seconds, and what fits there stays there.

    What passes a device budget goes to host memory: the KV cache, inputs of blocks that are recomputed. Within a given
    --host-memory these inputs go there too where an iteration gets faster, because more weights stay in slots.
    """
    if setting.workload.stored:
        parts = [forecast_of(part, timed=timed) for part in one_by_one(setting)]
        return one_after_the_other(parts)
    if setting.activation_budget is not None:
        setting = dataclasses.replace(setting, recompute=True)
    device, host = setting.budgets.get("device"), setting.budgets.get("host")
    moves = bits_of(setting.strategy)[0] != AUTO or bool(setting.recompute)
    on_device = _forecast(setting, timed, moves)
    if device is None or (setting.strategy in PYTORCH and setting.world > 1):
        return on_device
    over = {phase for phase, peaks in on_device.phases.items() if peaks["device"] > device}
    stays = any(role.config.foreign for role in setting.workload.roles)  # a cache of transformers' is not swapped
    swap, fits = "rollout" in over and not stays, not over
    offload = ("train" in over or (fits and timed and host is not None)) and _recomputes(setting, True)
    if not (swap or offload):
        return on_device
    on_host = _forecast(setting, timed, moves, swap, offload)
    if fits:
        room = all(limit is None or on_host.peak[tier] <= limit for tier, limit in setting.budgets.items())
        return on_host if room and on_host.total < FASTER * on_device.total else on_device
    return min(on_device, on_host, key=lambda forecast: forecast.peak["device"])


FASTER = 0.95
"""Of an iteration's seconds, at most so many must be left for inputs of blocks to leave a device that holds them."""


def _recomputes(setting: Setting, moves: bool) -> bool:
    """Whether backward runs blocks once more; `moves`: under gemini_auto, whether weights come and go."""
    row = STRATEGIES.get(bits_of(setting.strategy)[0])
    return plan.recomputes(moves if row is None else not plan.resident(row, setting.world), setting.recompute)


def one_by_one(setting: Setting) -> list[Setting]:
    """Of a stored teacher: what it takes alone, and then the student."""
    work = dataclasses.replace(setting.workload, stored=False)
    alone = [dataclasses.replace(work, roles=(role,)) for role in sorted(work.roles, key=lambda role: role.trained)]
    return [dataclasses.replace(setting, workload=part) for part in alone]


def _forecast(setting: Setting, timed: bool, moves: bool, swap: bool = False, offload: bool = False) -> Forecast:
    """With memory reserved for the activations of models whose weights move, or of models whose weights stay.

    `swap`: the KV cache is in host memory; `offload`: inputs of blocks that are recomputed are, until then.
    """
    work, world, recompute = setting.workload, setting.world, setting.recompute
    laid = [_laid(role, DTYPES[setting.dtype], world, setting.chunk_size) for role in work.roles]
    keys = {role.name: plan.shared_keys(chunks) for role, (chunks, _) in zip(work.roles, laid, strict=True)}
    row = Row(SHARD, HOST, HOST, add_up=not plan.recomputes(moves, recompute))
    phases = passes(setting, swap=swap, offload=offload and _recomputes(setting, moves))
    groups = [group for in_phase in phases.values() for group in sharing_groups(in_phase, keys)]
    assumed = {
        role.name: plan.Model(role.name, tuple(plan.Placed(chunk, row) for chunk in chunks), tuple(visits))
        for role, (chunks, visits) in zip(work.roles, laid, strict=True)
    }
    fullest = max(bytes_of(group, assumed, dict.fromkeys(assumed, moves), world, recompute) for group in groups)
    budgets = dict(setting.budgets)
    host, device = budgets.get("host"), budgets.get("device")
    outside = cuda.most(setting.blas_workspace, [chunks for chunks, _ in laid], phases, device)
    if device is not None:
        budgets["device"] = max(device - outside, 0)
    on_device: dict[TierName, int | None] = {"device": budgets.get("device")}
    if host is not None:
        lent = max(sum(each.swapped + each.offloaded for each in group) for group in groups)
        budgets["host"] = max(host - lent, 0)
    placed = plan.place(setting.strategy, laid, world, budgets, with_slack(fullest), recompute)
    models = {
        role.name: plan.Model(
            role.name,
            tuple(chunks),
            tuple(visits),
            weight_shapes.choices_of(role.config),
            role.config.experts_per_token,
        )
        for role, chunks, (_, visits) in zip(work.roles, placed, laid, strict=True)
    }
    if setting.strategy in PYTORCH and world > 1:
        copies = setting.nodes if setting.strategy == "hsdp" else 1
        planned = sharded.forecast(
            models, phases, shards=world // copies, nodes=setting.nodes, copies=copies, budgets=budgets,
            recompute=recompute, rates=setting.rates,
        )  # fmt: skip
        return cuda.besides(planned, models, phases, world, setting.blas_workspace, outside)
    rates = setting.rates if setting.nodes > 1 else inside_machine(setting.rates)
    if not moves and any(model.moving(world) for model in models.values()):
        return _forecast(dataclasses.replace(setting, recompute=recompute is not False), timed, True, swap, offload)
    planned = forecast(
        models, phases, world=world, budgets={**setting.budgets, **on_device}, recompute=recompute, rates=rates,
        timed=timed, update_tile=cuda.UPDATE_TILE if setting.blas_workspace else plan.UPDATE_TILE,
    )  # fmt: skip
    return cuda.besides(planned, models, phases, world, setting.blas_workspace, outside)


@functools.cache
def _laid(role: RoleSpec, dtype: str, world: int, chunk_size: int | None) -> tuple[list[Chunk], list[tuple[str, ...]]]:
    """A role's chunks and the order in which its groups are visited."""
    groups: Iterable[tuple[str, Sequence[Weight]]]
    if role.groups is not None:
        groups = role.groups
    elif role.spec or role.base or role.base_dtype:
        groups = lora_targets.groups_of(
            role.config, dtype, role.spec, trained=role.trained, scalar=role.scalar, base=role.base,
            packed=role.base_dtype
        )  # fmt: skip
    else:
        groups = weight_shapes.groups_of(role.config, dtype, trained=role.trained, scalar=role.scalar)
    chunks = layout(groups, world=world, max_numel=chunk_size)
    return chunks, weight_shapes.visits_of(role.config, scalar=role.scalar)
