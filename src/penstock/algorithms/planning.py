"""What a training command will need: its models, and what it does with them in one iteration. No torch in here.

`penstock plan` prints it, the commands leave room for activations by it, and the dry run is held against it.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from penstock.config import PlanConfig
from penstock.errors import UserError
from penstock.memory import measured, plan
from penstock.memory.chunks import ITEMSIZE, Chunk, Weight, layout
from penstock.memory.forecast import TIERS, Forecast, Rates, forecast, with_slack
from penstock.memory.passes import Batch, Pass, activations_of
from penstock.memory.placement import AUTO, EIGHT_BIT, NAMES, TierName, bits_of, known, tiers_of
from penstock.memory.units import parse_bytes, show_bytes
from penstock.models import places, shapes, sizes
from penstock.models.config import DecoderConfig
from penstock.models.families import family_of
from penstock.models.places import ALL_LINEAR, Spec

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Role:
    """One model of a stage. Example: Role("critic", config, trained=True, scalar=True)."""

    name: str
    config: DecoderConfig
    trained: bool
    scalar: bool
    spec: Spec | None = None
    """The adapters that it carries; if it is trained, they alone learn."""
    base: Hashable = None
    """What its frozen weights are: roles of equal bases share them. None: nobody else has them."""
    base_dtype: shapes.BaseDtype | None = None
    """What its frozen products are packed in."""
    groups: tuple[tuple[str, tuple[Weight, ...]], ...] | None = None
    """Its weights, where a real model said them; None: as its config has it."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One iteration of a stage, over all ranks."""

    stage: str
    roles: tuple[Role, ...]
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
        spec = Spec(config.lora, targets=config.lora_targets or ALL_LINEAR)
    whose = config.critic_model or config.model

    def role(name: str, trained: bool, scalar_head: bool) -> Role:
        own, base = (scalar, whose) if scalar_head else (model, config.model)
        adapter = None if name == "reference" else spec
        return Role(name, own, trained, scalar_head, adapter, base if spec else None, config.base_dtype)

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
            return sizes.named(name)
        except ValueError as error:
            raise UserError(f"{flag} {name}: {error}, and no such directory with a config.json.") from error
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        return family_of(hf.get("model_type"), str(path)).config_from_hf(hf)
    except (KeyError, ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"{flag} {path}: cannot be planned: {type(error).__name__}: {error}.") from error


def passes(work: Workload, dtype: str, world: int, swap: bool = False) -> dict[str, list[Pass]]:
    """What each phase does with each model, on the rank that has most rows. `swap`: the KV cache is on the host."""
    share = math.ceil(work.batch_size / world)
    phases: dict[str, list[Pass]] = {"rollout": [], "score": [], "train": []}
    response = work.length - work.prompt_length
    if work.stage == "ppo":
        actor = work.roles[0].config
        rows = min(work.rollout_batch_size or share, share)
        groups = shapes.prefills([work.prompt_length] * rows)
        prefill = places.work_of(
            actor, dtype, work.roles[0].spec, Batch(groups[0].stop, work.prompt_length, rows), scalar=False,
            packed=work.roles[0].base_dtype,
        )  # fmt: skip
        cache, token = (shapes.cache_of(actor, dtype, rows, slots) for slots in (work.length, 1))
        phases["rollout"].append(
            Pass(
                "actor", "generate", prefill, times=math.ceil(share / rows), tokens=response - 1,
                flops=_flops(actor, rows, work.prompt_length, rows),
                decode_flops=sum(
                    shapes.flops_of(actor, [(1, work.prompt_length + i)]) + shapes.head_flops(actor, 1)
                    for i in range(1, response)
                ) * rows,
                beside=2 * cache // actor.num_layers if swap else cache,
                sampling=shapes.sampling_of(actor, dtype, rows),
                prefills=len(groups),
                swapped=cache + token if swap else 0,
                swap_writes=(cache, token) if swap else (0, 0),
            )
        )  # fmt: skip
        roles = {role.name: role for role in work.roles}
        for name in ("actor", "reference", "critic", "reward"):  # in the order of algorithms.ppo.score
            if name in roles:  # a --reward-fn is no model
                phases["score"].append(_pass(work, roles[name], dtype, share, response, "evaluate"))
    updates = math.ceil(work.batch_size / work.mini_batch_size) * (work.epochs if work.stage == "ppo" else 1)
    for role in work.roles:
        if role.trained:
            rows = math.ceil(work.mini_batch_size / world)
            phases["train"].append(_pass(work, role, dtype, rows, response, "step", updates))
    return {phase: found for phase, found in phases.items() if found}


def _pass(work: Workload, role: Role, dtype: str, rows: int, response: int, kind: Any, times: int = 1) -> Pass:
    micro = min(work.micro_batch_size, rows)
    once = role.name == "reward" or work.stage == "reward"  # read at the last token alone
    read = micro if once else micro * (work.length if work.stage == "sft" else response)
    whole = rows if once else rows * (work.length if work.stage == "sft" else response)
    return Pass(
        role.name, kind,
        places.work_of(
            role.config, dtype, role.spec, Batch(micro, work.length, read), scalar=role.scalar,
            entropy=work.stage != "sft", packed=role.base_dtype,
        ),
        count=math.ceil(rows / micro), times=times,
        flops=_flops(role.config, rows, work.length, 0 if role.scalar else whole) * (3 if kind == "step" else 1),
    )  # fmt: skip


def _flops(config: DecoderConfig, rows: int, length: int, read: int) -> float:
    return shapes.flops_of(config, [(length, length)]) * rows + shapes.head_flops(config, read)


def forecast_of(
    work: Workload,
    *,
    strategy: str,
    dtype: str,
    world: int,
    budgets: dict[TierName, int | None],
    recompute: bool = False,
    chunk_size: int | None = None,
    rates: Rates | None = None,
    timed: bool = True,
) -> Forecast:
    """The forecast of one iteration under a strategy. `dtype` as the flag says it; `chunk_size` in elements."""
    dtype = DTYPES[dtype]
    laid = [_laid(role, dtype, world, chunk_size) for role in work.roles]
    shared = {
        role.name: {chunk.shared for chunk in chunks} - {None}
        for role, (chunks, _) in zip(work.roles, laid, strict=True)
    }
    shard = max(chunk.nbytes for chunks, _ in laid for chunk in chunks) // world if world > 1 else 0
    device, auto = budgets.get("device"), bits_of(strategy)[0] == AUTO

    def under(moves: bool, again: bool, swap: bool = False) -> Forecast:
        """With room for the activations of models that move, or of models that stay."""
        phases = passes(work, dtype, world, swap)
        fullest = max(
            activations_of([(one, moves) for one in company], again)
            for each in phases.values() for company in _companies(each, shared)
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
            return under(True, True, swap)
        return forecast(models, phases, world=world, device=device, recompute=again, rates=rates, timed=timed)

    found = under(not auto or recompute, recompute)
    if work.stage == "ppo" and device is not None and found.peak["device"] > device:
        swapped = under(not auto or recompute, recompute, swap=True)
        return min(found, swapped, key=lambda one: one.peak["device"])
    return found


def _companies(passes: Sequence[Pass], shared: dict[str, set[Any]]) -> list[list[Pass]]:
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
def _laid(role: Role, dtype: str, world: int, chunk_size: int | None) -> tuple[list[Chunk], list[tuple[str, ...]]]:
    groups: Iterable[tuple[str, Sequence[Weight]]]
    if role.groups is not None:
        groups = role.groups
    elif role.spec or role.base:
        groups = places.groups_of(
            role.config,
            dtype,
            role.spec,
            trained=role.trained,
            scalar=role.scalar,
            base=role.base,
            packed=role.base_dtype,
        )
    else:
        groups = shapes.groups_of(role.config, dtype, trained=role.trained, scalar=role.scalar)
    chunks = layout(groups, world=world, max_numel=chunk_size)
    return chunks, shapes.visits_of(role.config, scalar=role.scalar)


# --- the command ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the plan may change to make a run fit, as the flags say it."""

    strategy: str
    world: int
    micro_batch_size: int
    rollout_batch_size: int | None
    recompute: bool
    budgets: dict[TierName, int | None]


def run(config: PlanConfig) -> int:
    """Prints the plan and returns the exit code: 0 where everything fits, 3 where it does not."""
    setting = Setting(
        known(config.strategy), config.world, config.micro_batch_size, config.rollout_batch_size, config.recompute,
        {
            "device": _bytes(config.device_memory, "--device-memory"),
            "host": _bytes(config.host_memory, "--host-memory"),
            "disk": _bytes((config.disk or "").rpartition(":")[2] or None, "--disk"),
        },
    )  # fmt: skip
    work = workload(config)
    found = _forecast(config, work, setting)
    result = as_dict(config, work, setting, found)
    if config.dry_run:
        from penstock.algorithms.rehearsal import rehearse

        took = rehearse(
            work, strategy=setting.strategy, dtype=config.dtype, world=setting.world, budgets=setting.budgets,
            recompute=setting.recompute, chunk_size=elements_of(config.chunk_size, config.dtype),
        )  # fmt: skip
        result["measured_traffic"] = took.pop("traffic")
        result["measured"] = took
    print(json.dumps(result, indent=2) if config.json else as_text(config, setting, result))
    return 0 if result["fits"] else 3


def as_dict(config: PlanConfig, work: Workload, setting: Setting, found: Forecast) -> dict[str, Any]:
    """What --json prints."""
    lacking = short(found, setting)
    return {
        "fits": not lacking,
        "strategy": setting.strategy,
        "world": setting.world,
        "dtype": config.dtype,
        "parameters": {role.name: shapes.count_of(role.config, scalar=role.scalar) for role in work.roles},
        "budgets": setting.budgets,
        "predicted": found.peak,
        "phases": {phase: {**peaks, "fullest": found.worst[phase]} for phase, peaks in found.phases.items()},
        "objects": found.objects,
        "slots": {"weights": found.slots.weights, "gradients": found.slots.gradients, "ahead": found.ahead},
        "traffic": found.traffic,
        "seconds": {
            **{phase: dataclasses.asdict(seconds) for phase, seconds in found.seconds.items()},
            "total": sum(seconds.total for seconds in found.seconds.values()),
        },
        "lacking": lacking,
        "advice": advice(config, work, setting) if lacking else None,
    }


def short(found: Forecast, setting: Setting) -> dict[TierName, int]:
    """Bytes by which each tier's budget is passed, for those where it is."""
    over = {tier: found.peak[tier] - (setting.budgets[tier] or found.peak[tier]) for tier in TIERS}
    return {tier: nbytes for tier, nbytes in over.items() if nbytes > 0}


def advice(config: PlanConfig, work: Workload, setting: Setting) -> str:
    """The fastest change that fits these budgets: on this machine if there is one, else more of it."""

    def fitting(settings: Iterable[Setting]) -> list[Setting]:
        return [one for one in settings if not short(_forecast(config, work, one, timed=False), one)]

    here = fitting(on_this_machine(setting, work))
    more = here or fitting(dataclasses.replace(setting, world=setting.world * times) for times in (2, 4, 8))
    if more:
        timed = [(_forecast(config, work, one), one) for one in more[:MOST]]
        found, best = min(timed, key=lambda pair: sum(one.total for one in pair[0].seconds.values()))
        seconds = sum(one.total for one in found.seconds.values())
        return f"{difference(setting, best)} fits: {_peaks(found)}, {seconds:.0f} s per iteration."
    others = [dataclasses.replace(setting, strategy=name) for name in _strategies(setting)]
    found, best = min(
        ((_forecast(config, work, one, timed=False), one) for one in others),
        key=lambda pair: sum(short(pair[0], setting).values()),
    )
    flags: dict[TierName, str] = {"device": "--device-memory", "host": "--host-memory", "disk": "--disk"}
    asked: dict[TierName, str] = {}
    while lacking := short(found, best):  # in larger budgets a strategy may place more
        asked |= {tier: _flag(found.peak[tier]) for tier in lacking}
        larger = {tier: parse_bytes(asked[tier], flags[tier]) for tier in lacking}
        best = dataclasses.replace(best, budgets={**best.budgets, **larger})
        found = _forecast(config, work, best, timed=False)
    budgets = " ".join(f"{flags[tier]} {nbytes}" for tier, nbytes in asked.items())
    return f"nothing else fits, up to {setting.world * 8} processes; --strategy {best.strategy} {budgets} would."


MOST = 3
"""Changes whose seconds are compared: the first that fit, and gentle ones come first."""


def on_this_machine(setting: Setting, work: Workload) -> Iterator[Setting]:
    """Changes that ask for no more hardware: another strategy, smaller batches in memory, recomputation."""
    rollout = math.ceil(work.batch_size / setting.world) if work.stage == "ppo" else 1
    for name in _strategies(setting):
        for halvings in range(max(setting.micro_batch_size, rollout).bit_length()):
            micro = max(setting.micro_batch_size >> halvings, 1)
            rows = max(rollout >> halvings, 1) if halvings and work.stage == "ppo" else setting.rollout_batch_size
            yield dataclasses.replace(setting, strategy=name, micro_batch_size=micro, rollout_batch_size=rows)
    if not setting.recompute:
        yield dataclasses.replace(setting, recompute=True)


def _strategies(setting: Setting) -> list[str]:
    """The one that was asked for, then from the one that needs least device memory upward, with moments as exact."""
    moments = EIGHT_BIT if bits_of(setting.strategy)[1] == 8 else ""
    others = [name + moments for name in reversed(NAMES) if name != "naive" or setting.world == 1]
    return [setting.strategy, *(name for name in others if name != setting.strategy)]


def difference(setting: Setting, other: Setting) -> str:
    """The flags that differ."""
    changed = []
    for one in dataclasses.fields(Setting):
        value = getattr(other, one.name)
        if one.name != "budgets" and value != getattr(setting, one.name):
            flag = "--" + one.name.replace("_", "-")
            changed.append(flag if value is True else f"{flag} {value}")
    return " ".join(changed)


def _forecast(config: PlanConfig, work: Workload, setting: Setting, *, timed: bool = True) -> Forecast:
    return forecast_of(
        dataclasses.replace(
            work, micro_batch_size=setting.micro_batch_size, rollout_batch_size=setting.rollout_batch_size
        ),
        timed=timed,
        strategy=setting.strategy, dtype=config.dtype, world=setting.world, budgets=setting.budgets,
        recompute=setting.recompute, chunk_size=elements_of(config.chunk_size, config.dtype),
        rates=_rates(config),
    )  # fmt: skip


def _rates(config: PlanConfig) -> Rates:
    names = ("link", "disk_read", "disk_write", "host_bandwidth", "network")
    given = [float(parse_bytes(getattr(config, name), f"--{name.replace('_', '-')}")) for name in names]
    if config.rates == "measured":
        return measured.rates(config.dtype, network=given[-1])
    return Rates(config.tflops * 1e12, *given)


def as_text(config: PlanConfig, setting: Setting, result: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"{config.stage} of {config.model}"
        + (f" with critic and reward model {config.critic_model}" if config.critic_model else "")
        + f", {config.dtype}, --strategy {setting.strategy}, {setting.world} process{'es' * (setting.world > 1)}, "
        f"{config.batch_size} rows an iteration in micro-batches of {config.micro_batch_size}. Per process:",
        "",
        *_table("peak", result["phases"], result),
        "",
        *_table("what", result["objects"], result),
        "",
        "traffic and time     host read     written   disk read     written   seconds  limit",
    ]
    for phase, moved in result["traffic"].items():
        seconds = result["seconds"][phase]
        limit = max(("compute", "link", "disk", "optimizer", "network"), key=lambda key: seconds[key])
        cells = "".join(f"{show_bytes(moved[key]):>12}" for key in list(moved)[:4])
        lines.append(f"{phase:18}{cells}{seconds['total']:10.1f}  {limit}")
    lines += ["", f"one iteration: {result['seconds']['total']:.1f} s by the {config.rates} rates"]
    if "measured" in result:
        for tier in TIERS:
            got, said = result["measured"][tier], result["predicted"][tier]
            ratio = f"predicted is {said / got:.3f} of it" if got else "nothing there"
            lines.append(f"dry run, {tier} peak: {show_bytes(got)}; {ratio}")
    if result["fits"]:
        lines.append("fits: " + command(config, setting))
    else:
        over = ", ".join(f"{show_bytes(nbytes)} of {tier}" for tier, nbytes in result["lacking"].items())
        lines += [f"does not fit: {over} too little.", f"nearest: {result['advice']}"]
    return "\n".join(lines)


def command(config: PlanConfig, setting: Setting) -> str:
    """The flags of the training command that this plan is of."""
    start = "penstock" if setting.world == 1 else f"torchrun --nproc_per_node {setting.world} -m penstock"
    budgets = [
        f"{flag} {value}"
        for flag, value in (("--device-memory", config.device_memory), ("--host-memory", config.host_memory))
        if value
    ]
    if "disk" in tiers_of(setting.strategy):
        size = (config.disk or "").rpartition(":")[2]
        budgets.append("--disk PATH" + (f":{size}" if size else ""))
    return " ".join([start, config.stage, f"--strategy {setting.strategy}", f"--dtype {config.dtype}", *budgets, "..."])


def _table(head: str, rows: dict[str, dict[str, Any]], result: dict[str, Any]) -> list[str]:
    lines = [f"{head:18}" + "".join(f"{tier:>12}" for tier in TIERS)]
    for name, row in rows.items():
        if any(row.get(tier) for tier in TIERS):
            cells = "".join(f"{show_bytes(row[tier]) if row.get(tier) else '-':>12}" for tier in TIERS)
            lines.append(f"{name:18}{cells}" + (f"  {row['fullest']}" if "fullest" in row else ""))
    if head == "peak" and any(result["budgets"].values()):
        given = [result["budgets"][tier] for tier in TIERS]
        lines.append(f"{'budget':18}" + "".join(f"{show_bytes(one) if one else '-':>12}" for one in given))
    return lines


def _peaks(found: Forecast) -> str:
    return ", ".join(f"{show_bytes(found.peak[tier])} of {tier}" for tier in TIERS if found.peak[tier])


def _flag(nbytes: int) -> str:
    return f"{math.ceil(nbytes / 1e8) / 10:g}GB"


def elements_of(chunk_size: str | None, dtype: str) -> int | None:
    """--chunk-size in elements."""
    nbytes = _bytes(chunk_size, "--chunk-size")
    return nbytes and max(nbytes // ITEMSIZE[DTYPES[dtype]], 1)


def _bytes(text: str | None, flag: str) -> int | None:
    return None if text is None else parse_bytes(text, flag)
