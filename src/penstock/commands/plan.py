"""`penstock plan`: what a command will need, as a table or as JSON, and the change that makes it fit. No torch here."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from penstock.config import PlanConfig, recompute_of
from penstock.memory.placement import EIGHT_BIT, NAMES, TierName, bits_of, known, tiers_of
from penstock.models import weight_shapes
from penstock.planner import machine
from penstock.planner.forecast import TIERS, Forecast, Rates
from penstock.planner.workload import (
    DTYPES,
    Workload,
    bytes_of,
    elements_of,
    forecast_of,
    workload,
)
from penstock.units import parse_bytes, show_bytes


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the plan may change to make a run fit, as the flags say it."""

    strategy: str
    world: int
    micro_batch_size: int
    rollout_batch_size: int | None
    recompute: bool | None
    budgets: dict[TierName, int | None]


def run(config: PlanConfig) -> int:
    """Prints the plan and returns the exit code: 0 where everything fits, 3 where it does not."""
    setting = Setting(
        known(config.strategy), config.world, config.micro_batch_size, config.rollout_batch_size, recompute_of(config),
        {
            "device": bytes_of(config.device_memory, "--device-memory"),
            "host": bytes_of(config.host_memory, "--host-memory"),
            "disk": bytes_of((config.disk or "").rpartition(":")[2] or None, "--disk"),
        },
    )  # fmt: skip
    work = workload(config)
    found = _forecast(config, work, setting)
    result = as_dict(config, work, setting, found)
    result["slices"] = slices(config, work, setting)
    if config.dry_run:
        from penstock.commands.dry_run import dry_run

        took = dry_run(
            work, strategy=setting.strategy, dtype=config.dtype, world=setting.world, budgets=setting.budgets,
            recompute=setting.recompute, chunk_size=elements_of(config.chunk_size, config.dtype),
            activation_budget=bytes_of(config.activation_budget, "--activation-budget"),
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
        "parameters": {role.name: weight_shapes.count_of(role.config, scalar=role.scalar) for role in work.roles},
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


def slices(config: PlanConfig, work: Workload, setting: Setting) -> dict[str, str]:
    """Per role, how its blocks are computed within --activation-budget."""
    budget = bytes_of(config.activation_budget, "--activation-budget")
    if budget is None:
        return {}
    from penstock.models import sliced_blocks

    rows = min(setting.micro_batch_size, math.ceil(work.mini_batch_size / setting.world))
    return {
        role.name: sliced_blocks.peaks(role.config, DTYPES[config.dtype], rows, work.length, budget)[2]
        for role in work.roles
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
    if setting.recompute is False:
        yield dataclasses.replace(setting, recompute=None)
    elif setting.recompute is None:
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
            if one.name == "recompute" and value is None:
                flag = "without --keep-activations"
            changed.append(flag if value is True or one.name == "recompute" else f"{flag} {value}")
    return " ".join(changed)


def _forecast(config: PlanConfig, work: Workload, setting: Setting, *, timed: bool = True) -> Forecast:
    return forecast_of(
        dataclasses.replace(
            work, micro_batch_size=setting.micro_batch_size, rollout_batch_size=setting.rollout_batch_size
        ),
        timed=timed,
        strategy=setting.strategy, dtype=config.dtype, world=setting.world, budgets=setting.budgets,
        recompute=setting.recompute, chunk_size=elements_of(config.chunk_size, config.dtype),
        activation_budget=bytes_of(config.activation_budget, "--activation-budget"),
        rates=_rates(config),
    )  # fmt: skip


def _rates(config: PlanConfig) -> Rates:
    names = ("link", "disk_read", "disk_write", "host_bandwidth", "network")
    given = [float(parse_bytes(getattr(config, name), f"--{name.replace('_', '-')}")) for name in names]
    if config.rates == "measured":
        return machine.rates(config.dtype, network=given[-1])
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
    for shown in dict.fromkeys(result.get("slices", {}).values()):
        names = ", ".join(name for name, text in result["slices"].items() if text == shown)
        lines += ["", f"blocks of {names}:", shown]
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
    if config.activation_budget:
        budgets.append(f"--activation-budget {config.activation_budget}")
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
