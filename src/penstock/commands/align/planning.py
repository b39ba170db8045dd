"""How each stage fits this machine: strategy, what learns, batches in memory, seconds; all of it by the forecast that
`penstock plan` prints, of the commands that will run.
"""

import dataclasses
import math
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.algorithms.setup import placed, too_short
from penstock.commands.align import choice
from penstock.commands.align.choice import KIND, SAMPLES, Duration, Route
from penstock.commands.align.config import AlignConfig, show_seconds, split_setting
from penstock.commands.align.inventory import Inventory, Lengths
from penstock.commands.align.stages import TRAINERS, Stage, parsed
from penstock.commands.bench.micro import adamw_rate, copies, gemm_peak
from penstock.commands.doctor_model import memory
from penstock.commands.plan import MOST, fitting, larger_budgets, on_this_machine
from penstock.config import ADAPTER_LR
from penstock.distributed.world import device_types
from penstock.errors import ResourceError, UserError
from penstock.kernels.machine import available_ram
from penstock.memory.placement import TierName, tiers_of
from penstock.models.linear import arithmetic_of
from penstock.planner import cuda, machine
from penstock.planner.config import PlanConfig
from penstock.planner.forecast import TIERS, Forecast
from penstock.planner.from_flags import setting_of
from penstock.planner.traffic import Rates
from penstock.planner.workload import Setting, forecast_of
from penstock.run.directory import resolve_model
from penstock.units import parse_bytes

OVERHEAD = 10.0
"""Seconds of a stage beside its steps, before they are measured: loading, checkpoints, a report."""
EVALUATIONS = 0.15
"""Share of a stage's time that its held-out evaluations take, before it is measured."""
LEARNS: dict[str, dict[str, Any]] = {"all": {}, "lora": {"lora": True}, "qlora": {"lora": True, "base_dtype": "nf4"}}


@dataclass(frozen=True)
class Machine:
    """What stages run on."""

    device: str
    strategy: str
    dtype: Any
    budgets: dict[TierName, int | None]
    """Without a tier that is not there; see Setting."""
    rates: Rates
    given: bool
    """Whether --strategy was given, and no other may be taken."""
    base: int = 0
    """Bytes of this process before any model; 0 on a GPU, where its own memory counts."""

    @staticmethod
    def of(config: AlignConfig) -> "Machine":
        """This machine within the budgets that flags give."""
        flags = placed(config)
        kind = (config.device or device_types()[-1]).partition(":")[0]
        free: dict[TierName, int] = memory() if kind == "cuda" else {"device": available_ram()}
        budgets: dict[TierName, int | None] = {**free}
        if config.device_memory:
            budgets = {"host": available_ram()}
            budgets["device"] = parse_bytes(config.device_memory, "--device-memory")
        if config.host_memory:
            budgets["host"] = parse_bytes(config.host_memory, "--host-memory")
        if config.disk:
            limit = config.disk.rpartition(":")[2]
            budgets["disk"] = None if "/" in limit else parse_bytes(limit, "--disk")
        rates = rates_of(kind, flags.dtype or "fp32")
        base = resident_bytes() if kind == "cpu" else 0
        return Machine(kind, flags.strategy or "ddp", flags.dtype, budgets, rates, bool(config.strategy), base)

    def allows(self, setting: Setting) -> bool:
        """Whether all tiers of its strategy are there."""
        if self.given or set(self.budgets) == {"device"}:  # a CPU's host memory is its device's
            return setting.strategy == self.strategy
        return setting.strategy == self.strategy or {*tiers_of(setting.strategy)} <= {*self.budgets}


def resident_bytes() -> int:
    """Physical memory of this process now, where the kernel says it; else 0."""
    file = Path("/proc/self/statm")
    return int(file.read_text(encoding="ascii").split()[1]) * resource.getpagesize() if file.exists() else 0


def rates_of(kind: str, dtype: str) -> Rates:
    """What `penstock bench micro` measured here; else a probe of a second."""
    try:
        return machine.rates(dtype, Rates().network)
    except UserError:
        device = torch.device(kind)
        moved, update = copies(device, 1, quick=True), adamw_rate(device, 1, quick=True)
        own = update if kind == "cpu" else moved["copy"]
        flops = gemm_peak(device, dtype, 1, quick=True)
        return dataclasses.replace(Rates(), flops=flops, link=moved["link"], host=update, device=own)


@dataclass(frozen=True)
class StagePlan:
    """A stage, and what it will take."""

    stage: Stage
    duration: Duration
    peak: dict[str, int]
    """Bytes per tier; `run`: the disk that its run directory takes; `process`: what is compared with a measurement,
    device memory on a GPU, else the whole process."""
    records: int
    why: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage.command, "records": self.records, "steps": self.duration.steps,
            "seconds": self.duration.seconds(), "seconds_per_step": self.duration.per_step, "peak": self.peak,
            "flags": {**self.stage.flags, **self.stage.settings}, "why": self.why,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The stages to run."""

    stages: tuple[StagePlan, ...]
    route: Route
    learns: str

    @property
    def seconds(self) -> float:
        return sum(stage.duration.seconds() for stage in self.stages)


class Planner:
    """Plans routes for one machine and one inventory."""

    def __init__(self, config: AlignConfig, inventory: Inventory, place: Machine) -> None:
        self.config, self.inventory, self.machine = config, inventory, place
        self.lacking = ""
        """Flags with which the last way that did not fit would."""

    def plans(self) -> tuple[list[Plan], list[str]]:
        """Every route that fits, the best first; and what others would need. Raises ResourceError, with the nearest
        possible, where none fits."""
        facts = self.inventory.facts
        possible = [choice.chosen(self.config.stages, facts)] if self.config.stages else choice.routes(facts)
        plans, better = list[Plan](), list[str]()
        for route in possible:
            fits = [*self.fitting(route)]
            plans += fits
            if not fits and not plans:
                better.append(f"{' + '.join(route.stages)} with more memory: {self.lacking}")
        if not plans:
            stages = " + ".join(possible[-1].stages)
            raise ResourceError(f"no way fits this memory; the nearest is {stages} with {self.lacking}.")
        return plans, better

    def fitting(self, route: Route) -> Iterator[Plan]:
        """The plan of a route with as many weights as fit."""
        rank = self.inventory.adapter
        ways = [self.config.learns] if self.config.learns else ["lora"] if rank else [*LEARNS]
        for learns in ways:
            planned = []
            for i, command in enumerate(route.stages):
                of_stage = self.stage(command, route.stages[:i], learns)
                if of_stage is None:
                    break
                planned.append(of_stage)
            else:
                yield Plan(tuple(planned), route, learns)
                return

    def stage(self, command: str, before: Sequence[str], learns: str) -> StagePlan | None:
        """One stage after others, in the fastest way that fits; None where none does."""
        config, inventory = self.config, self.inventory
        records, lengths = inventory.facts.counts[KIND[command]], inventory.lengths[KIND[command]]
        own = {flag: value for of, flag, value in map(split_setting, config.set) if of == command}
        flags = self.flags(command, records, lengths, learns) | parsed(command, own)
        judged = command in SAMPLES and "reward" in before
        models = [name for name in before if name != "reward"]
        stage = Stage(command, flags, models[-1] if models else None, "reward" if judged else None, settings=own)
        built = stage.config(Path("-"), data="-")
        fit = self.fit(command, built, lengths)
        if fit is None:
            return None
        forecast, setting = fit
        work, optim = setting.workload, built.optim
        placement: dict[str, Any] = {"strategy": setting.strategy, "micro_batch_size": work.micro_batch_size}
        placement |= {"rollout_batch_size": work.rollout_batch_size} if work.rollout_batch_size else {}
        placement |= {"recompute": True} if setting.recompute else {}
        stage = dataclasses.replace(stage, flags={**stage.flags, **placement, **parsed(command, own)})
        group = built.grpo.group_size if command == "grpo" else 1
        steps = optim.steps if "steps" in flags else None
        steps = steps or choice.steps_of(command, records, optim.batch_size, optim.epochs, group)
        typical = dataclasses.replace(setting, workload=self.typical(setting, lengths))
        per_step = forecast_of(typical).total
        duration = Duration(steps, per_step, OVERHEAD + EVALUATIONS * per_step * steps)
        peak: dict[str, int] = {tier: forecast.peak[tier] for tier in TIERS}
        on_cpu = forecast.peak["host"] if self.machine.base else 0
        peak |= {"run": self.checkpoints(setting), "process": self.machine.base + peak["device"] + on_cpu}
        return StagePlan(stage, duration, peak, records, self.why(built, setting))

    def flags(self, command: str, records: int, lengths: Lengths, learns: str) -> dict[str, Any]:
        """The flags of a stage but for placement."""
        config, inventory = self.config, self.inventory
        batch = config.batch_size or choice.batch_of(command, records)
        given = {"steps": config.steps, "epochs": config.epochs if command not in SAMPLES else None}
        default = {"epochs": 2 if command == "ppo" else 1 if command == "grpo" else choice.epochs_of(command, records)}
        flags: dict[str, Any] = {
            TRAINERS[command].model: config.model, "seed": config.seed, "quiet": config.quiet, "heldout": 0.0,
            "batch_size": batch, "micro_batch_size": config.micro_batch_size or choice.micro_batch_of(
                batch * math.ceil(lengths.rows), lengths.longest
            ),
            "max_length": config.max_length, "apply_chat_template": inventory.flags.apply_chat_template,
            **default, **{name: value for name, value in given.items() if value is not None},
            "dtype": self.machine.dtype, "strategy": self.machine.strategy, "keep": 1, "log": config.log or None,
        }  # fmt: skip
        for name in ("device", "device_memory", "host_memory", "disk", "chunk_size", "system", "template_args", "eos"):
            flags[name] = getattr(config, name)
        for name in ("recompute", "keep_activations"):
            flags[name] = getattr(config, name) or None
        adapter = LEARNS[learns]
        if adapter:
            flags |= {"lora": inventory.adapter or config.lora, "base_dtype": adapter.get("base_dtype")}
        lr = choice.lr_of(command, TRAINERS[command].config.LR, inventory.parameters)
        flags["lr"] = config.lr or float(f"{lr * (ADAPTER_LR if adapter else 1):g}")
        if command in SAMPLES:
            flags |= {"max_new_tokens": inventory.max_new_tokens}
            names = ("reward", "reward_weights", "reward_timeout", "reward_workers")
            flags |= {name: getattr(config, name) or None for name in names}
            flags["reward_fn"] = config.reward_fn or ((inventory.verifier,) if inventory.verifier else None)
        elif command == "sft":
            flags["max_new_tokens"] = inventory.max_new_tokens
        return flags

    def fit(self, command: str, built: Any, lengths: Lengths) -> tuple[Forecast, Setting] | None:
        """The forecast of a stage and where it lives: as it is, or the fastest change that fits."""
        setting = self.setting(command, built, lengths)
        if fitting([setting]):
            return forecast_of(setting, timed=False), setting
        changes = [change for change in on_this_machine(setting) if self.machine.allows(change)]
        possible = fitting(changes)[:MOST]
        if not possible:
            self.lacking = larger_budgets(setting)
            return None
        best = min(possible, key=lambda change: forecast_of(change).total)
        return forecast_of(best, timed=False), best

    def setting(self, command: str, built: Any, lengths: Lengths) -> Setting:
        """What the planner is asked: the stage's own flags, on rows as long as the longest."""
        config, shape = self.config, self.inventory.shape
        response = min(lengths.longest_response, lengths.longest - 1)
        rows = {"reward": lengths.rows / 2, "dpo": lengths.rows / 2}.get(command, 1)  # the plan counts pairs
        judged = command in SAMPLES and not built.reward_fn
        options: dict[str, Any] = {
            "stage": command, "model": config.model, "strategy": built.run.strategy, "dtype": self.machine.dtype,
            "batch_size": math.ceil(built.optim.batch_size * rows), "micro_batch_size": built.optim.micro_batch_size,
            "mini_batch_size": getattr(built, "mini_batch_size", None),
            "epochs": built.optim.epochs if command in SAMPLES else 1, "lora": built.peft.lora,
            "lora_targets": built.peft.lora_targets, "base_dtype": built.peft.base_dtype,
            "prompt_length": max(lengths.longest - response, 1), "max_new_tokens": max(response, 1),
            "critic_model": self.judge_model(command), "reward_model": judged,
            "recompute": built.run.recompute, "keep_activations": built.run.keep_activations,
            "chunk_size": built.run.chunk_size, "activation_budget": built.run.activation_budget,
        }  # fmt: skip
        if command in SAMPLES:
            options |= {"kl_coef": built.rollout.kl_coef, "rollout_batch_size": built.rollout.rollout_batch_size}
            options |= {"group_size": built.grpo.group_size} if command == "grpo" else {}
        if command == "dpo":
            options["precompute_reference"] = built.precompute_reference or built.dpo.kl_coef is None
        setting = setting_of(PlanConfig(**options), shape)
        kind = self.machine.device
        return dataclasses.replace(
            setting, budgets=dict(self.machine.budgets), rates=self.machine.rates, arithmetic=arithmetic_of(kind),
            blas_workspace=cuda.workspace_of(self.machine.budgets["device"]) if kind == "cuda" else 0,
        )  # fmt: skip

    def judge_model(self, command: str) -> str | None:
        """The directory of --reward, where it is one, for its size."""
        source = resolve_model(self.config.reward) if self.config.reward and command in SAMPLES else ""
        return source if (Path(source) / "config.json").is_file() and source else None

    def typical(self, setting: Setting, lengths: Lengths) -> Any:
        """The workload on rows of mean length, which seconds follow."""
        response = max(round(lengths.mean_response), 1)
        prompt = max(round(lengths.mean) - response, 1)
        return dataclasses.replace(setting.workload, prompt_length=prompt, max_new_tokens=response)

    def checkpoints(self, setting: Setting) -> int:
        """Bytes of a run directory: the weights that learn, with two moments, twice while a checkpoint replaces one."""
        forecast = forecast_of(setting, timed=False)
        states = sum(forecast.objects["optimizer"].get(tier, 0) for tier in TIERS)
        return 2 * (states + states // 2)  # two moments of 4 bytes for weights of 4

    def why(self, built: Any, setting: Setting) -> str:
        """Where weights live and how rows go, in words."""
        work, peft = setting.workload, built.peft
        what = "all weights learn" if peft.lora is None else f"an adapter of rank {peft.lora} learns"
        what += f" on blocks of {peft.base_dtype}" if peft.base_dtype else ""
        return (
            f"{what}, --strategy {setting.strategy} --dtype {setting.dtype} --batch-size {built.optim.batch_size} "
            f"--micro-batch-size {work.micro_batch_size} --lr {built.optim.lr:g}"
        )


def within(plans: Sequence[Plan], seconds: float | None, spent: Sequence[float] = ()) -> tuple[Plan, list[str]]:
    """The first plan that fits into so much time, shortened where need be; and what would be better with more time.

    A better algorithm is kept while half of its steps are. spent: by plan the seconds of the budget that its stages
    have not; default: none. Raises ResourceError with the least time that is possible.
    """
    if seconds is None:
        return plans[0], []
    outside = dict(zip(map(id, plans), spent or [0.0] * len(plans), strict=True))
    cut: list[tuple[float, Plan]] = []
    for plan in plans:
        durations = [stage.duration for stage in plan.stages]
        if (steps := choice.trimmed(durations, seconds - outside[id(plan)])) is not None:
            cut.append((choice.kept_share(durations, steps), shortened(plan, steps)))
    if not cut:
        least = {
            id(plan): choice.least([stage.duration for stage in plan.stages]) + outside[id(plan)] for plan in plans
        }
        nearest = min(plans, key=lambda plan: least[id(plan)])
        each = " each" if len(nearest.stages) > 1 else ""
        trial = outside[id(nearest)]
        of_it = f"; {show_seconds(trial)} of it for the pre-flight (--no-check) and evaluations" if trial else ""
        raise ResourceError(
            f"--budget {show_seconds(seconds)}: too little; the nearest possible is --budget "
            f"{show_seconds(least[id(nearest)])}, for {' + '.join(nearest.route.stages)} with "
            f"{choice.FEWEST_STEPS} steps{each}{of_it}."
        )
    share, best = next((pair for pair in cut if pair[0] >= choice.HALF), max(cut, key=lambda pair: pair[0]))
    better, first = [], plans[0]
    if best.route.stages != first.route.stages:
        better.append(
            f"{' + '.join(first.route.stages)} with --budget {show_seconds(first.seconds + outside[id(first)])}"
        )
    if share < 1:
        whole = next(plan for plan in plans if plan.route.stages == best.route.stages)
        budget = show_seconds(whole.seconds + outside[id(whole)])
        better.append(f"all steps with --budget {budget}: {share:.0%} of them are left")
    return best, better


def short(planned: StagePlan) -> str:
    """What a stage lacks whose updates are too few to change anything; empty for any other."""
    command, steps = planned.stage.command, planned.duration.steps
    config = planned.stage.config(Path("-"), data="-")
    if command not in SAMPLES:
        text = too_short(config, steps, planned.records)
    else:
        mini_batches = math.ceil(config.optim.batch_size / (config.mini_batch_size or config.optim.batch_size))
        per_step = config.optim.epochs * mini_batches
        text = too_short(config, steps * per_step, per_step=per_step)
    return text and f"{command}: {text}"


def shortened(plan: Plan, steps: Sequence[int]) -> Plan:
    """The plan with so many steps of each stage."""
    durations = [
        dataclasses.replace(stage.duration, steps=count) for stage, count in zip(plan.stages, steps, strict=True)
    ]
    return timed(plan, durations)


def timed(plan: Plan, durations: Sequence[Duration]) -> Plan:
    """The plan with other durations of its stages."""
    pairs = zip(plan.stages, durations, strict=True)
    stages = (dataclasses.replace(stage, duration=duration) for stage, duration in pairs)
    return dataclasses.replace(plan, stages=tuple(stages))


def corrected(plans: Sequence[Plan], plan: Plan, measured: Sequence[Duration]) -> list[Plan]:
    """All plans, after the trial of one: its stages take what was measured, others so many times their forecast."""
    known = {stage.stage.command: duration for stage, duration in zip(plan.stages, measured, strict=True)}
    forecast = sum(stage.duration.seconds() for stage in plan.stages)
    ratio = sum(duration.seconds() for duration in measured) / max(forecast, 1e-9)
    new = []
    for each in plans:
        durations = []
        for stage in each.stages:
            own = stage.duration
            seen = known.get(stage.stage.command)
            per_step, fixed = (seen.per_step, seen.fixed) if seen else (own.per_step * ratio, own.fixed * ratio)
            durations.append(Duration(own.steps, per_step, fixed))
        new.append(timed(each, durations))
    return new
