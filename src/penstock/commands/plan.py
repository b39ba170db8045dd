"""`penstock plan`: what a command will need, as a table or as JSON, and the change that makes it fit. No torch here."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from penstock.memory.placement import EIGHT_BIT, NAMES, PYTORCH, TierName, bits_of, tiers_of
from penstock.models import weight_shapes
from penstock.planner.config import PlanConfig
from penstock.planner.forecast import TIERS, Forecast
from penstock.planner.from_flags import setting_of
from penstock.planner.workload import DTYPES, Setting, forecast_of, notes, refusal
from penstock.units import parse_bytes, show_bytes


def run(config: PlanConfig) -> int:
    """Prints the plan and returns the exit code: 0 where everything fits, 3 where it does not."""
    result = plan(config)
    print(json.dumps(result, indent=2) if config.json else as_text(config, setting_of(config), result))
    return 0 if result["fits"] else 3


def plan(config: PlanConfig) -> dict[str, Any]:
    """What a run needs, moves and takes: the object that `penstock plan --json` prints."""
    setting = setting_of(config)
    result = as_dict(setting, forecast_of(setting))
    result["slices"] = slices(setting)
    if config.dry_run:
        from penstock.commands.dry_run import dry_run

        measured = dry_run(setting)
        result["measured_traffic"] = measured.pop("traffic")  # of the engine alone: result["outside"] is not in it
        result["measured"] = measured
    return result


def as_dict(setting: Setting, forecast: Forecast) -> dict[str, Any]:
    """What --json prints."""
    lacking, roles = short(forecast, setting), setting.workload.roles
    return {
        "fits": not lacking,
        "strategy": setting.strategy,
        "world": setting.world,
        "dtype": setting.dtype,
        "parameters": {role.name: weight_shapes.count_of(role.config, scalar=role.scalar) for role in roles},
        "budgets": setting.budgets,
        "predicted": forecast.peak,
        "outside": forecast.outside,
        "per_machine": per_machine(forecast, setting),
        "phases": {phase: {**peaks, "fullest": forecast.worst[phase]} for phase, peaks in forecast.phases.items()},
        "objects": forecast.objects,
        "active_parameters": {
            role.name: weight_shapes.count_of(role.config, scalar=role.scalar, active=True)
            for role in roles
            if role.config.num_experts
        },
        "few_tokens": forecast.few_tokens,
        "gathers_once": forecast.gathers_once,
        "slots": {"weights": forecast.slots.weights, "gradients": forecast.slots.gradients, "ahead": forecast.ahead},
        "traffic": forecast.traffic,
        "seconds": {
            **{phase: dataclasses.asdict(seconds) for phase, seconds in forecast.seconds.items()},
            "total": forecast.total,
        },
        "notes": [*notes(setting), *_of_copy(setting, forecast), *forecast.notes],
        "lacking": lacking,
        "advice": advice(setting) if lacking else None,
    }


def per_machine(forecast: Forecast, setting: Setting) -> dict[str, int]:
    """Bytes that all processes of one machine take at most of what they share, a checkpoint's copies included. A CPU is
    a device of its own RAM."""
    processes, peak = setting.world // setting.nodes, forecast.peak
    ram = peak["host"] + forecast.objects.get("checkpoint", {}).get("host", 0)
    ram += 0 if setting.arithmetic == "narrow" else peak["device"]
    return {"processes": processes, "host": processes * ram, "disk": processes * peak["disk"]}


def _of_copy(setting: Setting, forecast: Forecast) -> list[str]:
    """A line where a packed copy would answer sooner than an actor whose weights come for every token."""
    work, actor = setting.workload, setting.workload.roles[0]
    possible = work.stage in ("ppo", "grpo") and work.rollout_dtype is None and actor.base_dtype is None
    if not possible or forecast.gathers_once or actor.config.foreign or bits_of(setting.strategy)[0] in PYTORCH:
        return []
    other = dataclasses.replace(setting, workload=dataclasses.replace(work, rollout_dtype="int8", reread=True))
    copied = forecast_of(other)
    if short(copied, other) or copied.total >= forecast.total:
        return []
    before, after = (each.seconds["rollout"].total for each in (forecast, copied))
    return [
        "the actor's weights come for every token: with --rollout-dtype int8 a copy answers, which is made once per "
        f"rollout, in {after:.1f} s instead of {before:.1f}"
    ]


def slices(setting: Setting) -> dict[str, str]:
    """Per role, how its blocks are computed within the activation budget."""
    work, budget = setting.workload, setting.activation_budget
    if budget is None:
        return {}
    from penstock.models import sliced_blocks

    rows = min(work.micro_batch_size, math.ceil(work.mini_batch_size / setting.world))
    return {
        role.name: sliced_blocks.peaks(role.config, DTYPES[setting.dtype], rows, work.length, budget)[2]
        for role in work.roles
    }


def short(forecast: Forecast, setting: Setting) -> dict[TierName, int]:
    """Bytes by which the forecast is over each tier's budget, for the tiers where it is."""
    over = {tier: forecast.peak[tier] - (setting.budgets.get(tier) or forecast.peak[tier]) for tier in TIERS}
    return {tier: nbytes for tier, nbytes in over.items() if nbytes > 0}


FLAGS: dict[TierName, str] = {"device": "--device-memory", "host": "--host-memory", "disk": "--disk"}


def advice(setting: Setting) -> str:
    """The fastest change that fits these budgets: with this hardware if there is one, else with more processes."""
    changes = fitting(on_this_machine(setting)) or fitting(
        dataclasses.replace(setting, world=setting.world * times) for times in (2, 4, 8)
    )
    if changes:
        timed = [(forecast_of(change), change) for change in changes[:MOST]]
        forecast, change = min(timed, key=lambda pair: pair[0].total)
        peaks = ", ".join(f"{show_bytes(forecast.peak[tier])} of {tier}" for tier in TIERS if forecast.peak[tier])
        return f"{difference(setting, change)} fits: {peaks}, {forecast.total:.0f} s per iteration."
    return f"nothing else fits, up to {setting.world * 8} processes; {larger_budgets(setting)} would."


def fitting(changes: Iterable[Setting]) -> list[Setting]:
    """Those that would not be refused and whose peaks are within their budgets."""
    allowed = (change for change in changes if refusal(change) is None)
    return [change for change in allowed if not short(forecast_of(change, timed=False), change)]


def larger_budgets(setting: Setting) -> str:
    """The strategy that lacks the fewest bytes, and the budgets with which it fits, as flags."""
    changes = [dataclasses.replace(setting, strategy=name) for name in _strategies(setting)]
    forecast, change = min(
        ((forecast_of(change, timed=False), change) for change in changes),
        key=lambda pair: sum(short(pair[0], setting).values()),
    )
    sizes: dict[TierName, str] = {}
    while lacking := short(forecast, change):  # in larger budgets a strategy may place more
        sizes |= {tier: f"{math.ceil(forecast.peak[tier] / 1e8) / 10:g}GB" for tier in lacking}
        larger = {tier: parse_bytes(sizes[tier], FLAGS[tier]) for tier in lacking}
        change = dataclasses.replace(change, budgets={**change.budgets, **larger})
        forecast = forecast_of(change, timed=False)
    return " ".join([f"--strategy {change.strategy}", *(f"{FLAGS[tier]} {size}" for tier, size in sizes.items())])


MOST = 3
"""Changes whose seconds are compared: the first that fit, and gentle ones come first."""


def on_this_machine(setting: Setting) -> Iterator[Setting]:
    """Changes that need no more hardware: another strategy, smaller batches in memory, recomputation."""
    work = setting.workload
    micro, answers = work.micro_batch_size, math.ceil(work.batch_size / setting.world) if work.rolls_out else 1
    for name in _strategies(setting):
        for halvings in range(max(micro, answers).bit_length()):
            rollout = max(answers >> halvings, 1) if halvings and work.rolls_out else work.rollout_batch_size
            smaller = dataclasses.replace(work, micro_batch_size=max(micro >> halvings, 1), rollout_batch_size=rollout)
            yield dataclasses.replace(setting, strategy=name, workload=smaller)
            if work.stage == "distill" and not (work.samples or work.stored):
                stored = dataclasses.replace(smaller, stored=True)
                yield dataclasses.replace(setting, strategy=name, workload=stored)
    if setting.recompute is not True:
        yield dataclasses.replace(setting, recompute=None if setting.recompute is False else True)


def _strategies(setting: Setting) -> list[str]:
    """The setting's own, then from the one that needs least device memory upward, with moments of the same bits."""
    moments = EIGHT_BIT if bits_of(setting.strategy)[1] == 8 else ""
    names = [name + moments for name in reversed(NAMES) if name != "naive" or setting.world == 1]
    if moments or setting.world == 1 or setting.workload.rollout_dtype:
        names = [name for name in names if bits_of(name)[0] not in PYTORCH]
    names = [name for name in names if refusal(dataclasses.replace(setting, strategy=name)) is None]
    return [setting.strategy, *(name for name in names if name != setting.strategy)]


def difference(setting: Setting, change: Setting) -> str:
    """The flags that change one setting into the other."""
    flags = []
    if change.strategy != setting.strategy:
        flags.append(f"--strategy {change.strategy}")
    if change.world != setting.world:
        flags.append(f"--world {change.world}")
    for flag, name in (("--micro-batch-size", "micro_batch_size"), ("--rollout-batch-size", "rollout_batch_size")):
        rows = getattr(change.workload, name)
        if rows != getattr(setting.workload, name):
            flags.append(f"{flag} {rows}")
    if change.workload.stored != setting.workload.stored:
        flags.append("--precompute-teacher")
    if change.recompute != setting.recompute:
        flags.append("--recompute" if change.recompute else "without --keep-activations")
    return " ".join(flags)


def as_text(config: PlanConfig, setting: Setting, result: dict[str, Any]) -> str:
    ranks = "       ranks" if setting.world > 1 else ""
    lines = [
        f"{config.stage} of {config.model}"
        + (f" with critic and reward model {config.critic_model}" if config.critic_model else "")
        + (f" with teacher {config.teacher_model}" if config.teacher_model else "")
        + f", {config.dtype}, --strategy {setting.strategy}, {setting.world} process{'es' * (setting.world > 1)}, "
        f"{config.rows} rows an iteration in micro-batches of {config.micro_batch_size}. Per process:",
        "",
        *_table("peak", result["phases"], result),
        "",
        *_table("what", result["objects"], result),
        "",
        "traffic and time     host read     written   disk read     written" + ranks + "   seconds  limit",
    ]
    for phase, moved in result["traffic"].items():
        seconds = result["seconds"][phase]
        limit = max(("compute", "link", "disk", "optimizer", "network"), key=lambda key: seconds[key])
        cells = "".join(f"{show_bytes(moved[key]):>12}" for key in list(moved)[: 5 if ranks else 4])
        lines.append(f"{phase:18}{cells}{seconds['total']:10.1f}  {limit}")
    if result["gathers_once"]:
        lines += ["", "the actor's weights come once for a rollout, and stay until it ends"]
    lines += _of_experts(setting, result)
    for shown in dict.fromkeys(result.get("slices", {}).values()):
        names = ", ".join(name for name, text in result["slices"].items() if text == shown)
        lines += ["", f"blocks of {names}:", shown]
    lines += ["", *result["notes"]] if result["notes"] else []
    if away := result["objects"].get("block_inputs", {}).get("host"):
        lines += ["", f"inputs of blocks wait in host memory from forward to backward: {show_bytes(away)}"]
    lines += ["", f"one iteration: {result['seconds']['total']:.1f} s by the {config.rates} rates"]
    if "measured" in result:
        for tier in TIERS:
            measured, predicted = result["measured"][tier], result["predicted"][tier]
            predicted -= result["outside"] if tier == "device" else 0
            ratio = f"predicted is {predicted / measured:.3f} of it" if measured else "nothing there"
            lines.append(f"dry run, {tier} peak: {show_bytes(measured)}; {ratio}")
    if result["fits"]:
        lines.append("fits: " + command(config, setting))
    else:
        over = ", ".join(f"{show_bytes(nbytes)} of {tier}" for tier, nbytes in result["lacking"].items())
        lines += [f"does not fit: {over} too little.", f"nearest: {result['advice']}"]
    return "\n".join(lines)


def _of_experts(setting: Setting, result: dict[str, Any]) -> list[str]:
    lines = [
        f"{name}: {result['parameters'][name]:,} parameters, of which a token is computed with {active:,}"
        for name, active in result["active_parameters"].items()
    ]
    if few := result["few_tokens"]:
        rows = setting.workload.rollout_batch_size or setting.workload.batch_size // setting.world
        lines.append(
            f"while it generates, a step of up to {few} answers fetches the experts that they choose, and a longer one "
            f"all of them ahead; here {min(rows, setting.workload.batch_size)} answers generate together"
        )
    return ["", *lines] if lines else []


GIVEN = (
    "lora", "lora_targets", "base_dtype", "batch_size", "micro_batch_size", "epochs", "activation_budget",
)  # fmt: skip
"""Flags that every planned command has too, with the plan's defaults."""
ANSWERING = (
    "mini_batch_size", "rollout_batch_size", "rollout_dtype", "max_new_tokens", "temperature", "top_k", "top_p",
)  # fmt: skip
OF_STAGE = {"ppo": ANSWERING, "grpo": ("group_size", *ANSWERING)}
"""Those of commands that learn from their own answers."""


def command(config: PlanConfig, setting: Setting) -> str:
    """The training command that was planned, with its flags."""
    hosts = f"--nnodes {setting.nodes} " if setting.nodes > 1 else ""
    torchrun = f"torchrun {hosts}--nproc_per_node {setting.world // setting.nodes} -m penstock"
    start = "penstock" if setting.world == 1 else torchrun
    budgets = [
        f"{flag} {value}"
        for flag, value in (("--device-memory", config.device_memory), ("--host-memory", config.host_memory))
        if value
    ]
    if "disk" in tiers_of(setting.strategy):
        disk = config.disk or "PATH"
        budgets.append(f"--disk {disk if '/' in disk or disk == 'PATH' else f'PATH:{disk}'}")
    for name in (*GIVEN, *OF_STAGE.get(config.stage, ())):
        value = getattr(config, name)
        if value != PlanConfig.__dataclass_fields__[name].default:
            words = value if isinstance(value, tuple) else (value,)
            budgets.append(" ".join([f"--{name.replace('_', '-')}", *map(str, words)]))
    return " ".join([start, config.stage, f"--strategy {setting.strategy}", f"--dtype {config.dtype}", *budgets, "..."])


def _table(head: str, rows: dict[str, dict[str, Any]], result: dict[str, Any]) -> list[str]:
    lines = [f"{head:18}" + "".join(f"{tier:>12}" for tier in TIERS)]
    for name, row in rows.items():
        if any(row.get(tier) for tier in TIERS):
            lines.append(_row(name, row) + (f"  {row['fullest']}" if "fullest" in row else ""))
    if head == "peak" and any(result["budgets"].values()):
        lines.append(_row("budget", result["budgets"]))
    machine = result["per_machine"]
    if head == "peak" and machine["processes"] > 1 and (machine["host"] or machine["disk"]):
        lines.append(_row(f"{machine['processes']} of a machine", machine))
    return lines


def _row(name: str, sizes: Mapping[str, int | None]) -> str:
    cells = (sizes.get(tier) for tier in TIERS)
    return f"{name:18}" + "".join(f"{show_bytes(nbytes) if nbytes else '-':>12}" for nbytes in cells)
