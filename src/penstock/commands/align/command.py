"""`penstock align`: looks, plans, tries, trains, measures, reports. A second start goes on from OUT/align.json."""

import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from penstock.commands.align import report
from penstock.commands.align.choice import KIND, SAMPLES, unused
from penstock.commands.align.config import AlignConfig, show_seconds, split_setting
from penstock.commands.align.evaluation import Judge, compare, likelihoods, side_by_side
from penstock.commands.align.inventory import Inventory, look
from penstock.commands.align.planning import Machine, Plan, Planner, corrected, short, within
from penstock.commands.align.stages import Stage, run_stage
from penstock.commands.align.trial import expected_seconds, memory_meter, score_sanity, try_stages
from penstock.commands.evaluate import keep, today
from penstock.config import EngineFlags, as_data_flags
from penstock.errors import PenstockError, ResourceError, UserError
from penstock.flags import to_dict, with_absolute_paths
from penstock.kernels.machine import busy
from penstock.run import loggers
from penstock.run.checkpoint import write_whole
from penstock.run.directory import RunDirectory, refused
from penstock.run.session import StoppedError
from penstock.units import show_bytes

STATE = "align.json"
RESIDENT = 5
"""Bytes of device memory for each parameter of a model that answers, in fp32 with a cache of keys and values."""
MAY_CHANGE = ("json", "quiet", "dry_run", "check")
"""Flags with which a second start may differ from the first."""


def align(config: AlignConfig) -> dict[str, Any]:
    """Does all of it, prints what it does, and returns the result that --json prints: `plan`, and but for a dry run
    `run` (the last run directory), `evaluation`, `answers` (prompt, the start's, the end's), `taken` (per stage),
    `checked` (what the trial showed) and `report`.

    Raises UserError, DataError or ResourceError, each with the fix.
    """
    began, out = time.perf_counter(), Path(config.out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("align: chooses for one process; take its plan, and give its stages' commands to torchrun.")
    say, state = speaker(config), saved_state(out, config)
    if state is None:
        state = begin(config, out, began)
    elif config.dry_run and not config.json:
        print(report.plan_text(state))
    elif not config.dry_run:
        say(f"{out}: goes on; done: {', '.join(state['taken']) or 'nothing'}")
    if config.dry_run:
        if config.json:
            print(json.dumps(state))
        return state
    try:
        train(state, out, say)
        measure(config, state, out, say)
    except StoppedError as error:
        raise StoppedError(f"{error}, or with the same penstock align command.", error.exit_code - 128) from error
    state["report"] = str(report.write(out, state))
    save(out, state)
    print(json.dumps(state) if config.json else report.ending(state))
    return state


def speaker(config: AlignConfig) -> Callable[[str], None]:
    """Prints lines on the way to stderr, but under --quiet."""
    return (lambda text: None) if config.quiet else functools.partial(print, file=sys.stderr, flush=True)


def begin(config: AlignConfig, out: Path, began: float) -> dict[str, Any]:
    """Looks, plans and tries; returns the state that the stages begin with."""
    if not (out / STATE).exists():  # else a start that ended before its stages did not begin them
        RunDirectory.refuse_used(out)
    loggers.require(config.log)
    inventory = look(config, speaker(config))
    if note := busy():
        speaker(config)(note)
    machine = Machine.of(config)
    plans, better = Planner(config, inventory, machine).plans()
    trials = [expected_seconds(each.stages) if config.check else 0.0 for each in plans]
    plan, late = within(plans, config.seconds, trials)
    check_settings(config, plan)
    state = described(config, inventory, plan, [*plan.route.better, *better, *late])
    state["trial_seconds"] = expected_seconds(plan.stages) if config.check else 0.0
    if not config.json:
        print(report.plan_text(state), flush=True)
    if config.dry_run:
        return state
    check_disk(plan, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save(out, state)
        inventory.write(out / "data")
    except OSError as error:
        raise refused(f"--out {out}", error) from error
    plan = with_data(plan, out)
    if config.check:
        places = [with_data(each, out) for each in plans]
        plan, late, facts = tried(config, inventory, places, plan, state, began)
        state = described(config, inventory, plan, [*plan.route.better, *better, *late]) | facts
        if not config.json:
            print(report.plan_text(state), flush=True)
    budget = machine.budgets["device"]
    state["resident"] = budget is None or inventory.parameters * RESIDENT <= budget
    state["stages"] = [dataclasses.asdict(stage.stage) | {"steps": stage.duration.steps} for stage in plan.stages]
    save(out, state)
    return state


def check_settings(config: AlignConfig, plan: Plan) -> None:
    """Raises UserError for a --set of a stage that is not run."""
    for text in config.set:
        stage = split_setting(text)[0]
        if stage not in plan.route.stages:
            stages = ", ".join(plan.route.stages)
            raise UserError(
                f"--set {text}: {stage} is no stage of this plan, which has {stages}; --stages names others."
            )


def check_disk(plan: Plan, out: Path) -> None:
    """Raises ResourceError where the runs do not fit on the disk."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    needed, free = sum(stage.peak["run"] for stage in plan.stages), shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            f"--out {out}: checkpoints take {show_bytes(needed)}, and {show_bytes(free)} of the disk are free; free "
            "some space, choose another disk, or train an adapter: --learns lora."
        )


def tried(
    config: AlignConfig, inventory: Inventory, plans: list[Plan], plan: Plan, state: dict[str, Any], began: float
) -> tuple[Plan, list[str], dict[str, Any]]:
    """The plan after its trial, what would be better with more time, and what the trial showed."""
    out, say = Path(config.out), speaker(config)
    say(f"pre-flight: a few steps of every stage, about {show_seconds(state['trial_seconds'])}")
    judge, spent, shown = judge_of(config, state, out), 0.0, list[str]()
    asked = time.perf_counter()
    if judge is not None and not judge.own:
        learns_first = plan.route.stages[0] not in SAMPLES
        shown, count = score_sanity(judge, config.model, learns_first=learns_first)
        rows = judge.prompts.read_text(encoding="utf-8").count("\n")
        spent = (time.perf_counter() - asked) * 2 * rows / count
    peaks: dict[str, int] = {}
    for _ in plans:  # each once at most
        try:
            measured = try_stages(plan.stages, out / "trial", lambda stage: heldout_rows(stage, inventory), say)
        except StoppedError as error:
            text = "stopped in the pre-flight; the same penstock align command begins it again."
            raise StoppedError(text, error.exit_code - 128) from error
        peaks |= {stage.stage.command: each.peak_bytes for stage, each in zip(plan.stages, measured, strict=True)}
        plans = corrected(plans, plan, [each.duration for each in measured])
        elapsed = spent + time.perf_counter() - began
        best, late = within(plans, config.seconds, [elapsed] * len(plans))
        if best.route.stages == plan.route.stages:
            break
        plan = best
    shown += [f"{stage.stage.command}: trained, evaluated, saved and resumed" for stage in plan.stages]
    for line in shown:
        say(f"  {line}")
    return best, late, {"checked": shown, "measured_peak": peaks, "evaluation_seconds": spent}


def described(config: AlignConfig, inventory: Inventory, plan: Plan, better: list[str]) -> dict[str, Any]:
    """What is kept of inventory and plan, as JSON has it."""
    return {
        "command": "align", "flags": comparable(config), "model": config.model, "out": config.out,
        "lines": inventory.lines, "why": list(plan.route.why),
        "better": [*filter(None, map(short, plan.stages)), *better],
        "unused": unused(plan.route, inventory.facts), "learns": plan.learns, "seconds": plan.seconds,
        "plan": [stage.as_dict() for stage in plan.stages], "verifier": inventory.verifier,
        "max_new_tokens": inventory.max_new_tokens, "apply_chat_template": inventory.flags.apply_chat_template,
        "taken": {}, "evaluation": None,
    }  # fmt: skip


def comparable(config: AlignConfig) -> dict[str, Any]:
    """The flags that a second start must have again."""
    flags = with_absolute_paths(to_dict(config))
    return {name: value for name, value in flags.items() if name not in MAY_CHANGE}


def saved_state(out: Path, config: AlignConfig) -> dict[str, Any] | None:
    """What an earlier start left, if it began its stages. Raises UserError where it was another command line."""
    file = out / STATE
    if not file.exists():
        return None
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        before = dict(state["flags"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is damaged ({error}); choose another --out.") from error
    flags = comparable(config)
    for name in sorted({*before, *flags}) if "stages" in state else ():
        if before.get(name) != flags.get(name):
            raise UserError(
                f"--{name.replace('_', '-')}: {out} was begun with {before.get(name, 'none')}; give that to go on, or "
                "another --out."
            )
    return state if "stages" in state else None


def save(out: Path, state: Mapping[str, Any]) -> None:
    """Writes align.json, whole or not at all."""
    write_whole(out / STATE, json.dumps(state, indent=1) + "\n")


def with_data(plan: Plan, out: Path) -> Plan:
    """The plan with the files that its stages read."""
    stages = []
    for planned in plan.stages:
        kind = KIND[planned.stage.command]
        flags = {**planned.stage.flags, "data": [str(out / "data" / f"{kind}.jsonl")]}
        if (held := out / "data" / f"heldout-{kind}.jsonl").exists():
            flags["eval_data"] = [str(held)]
        stages.append(dataclasses.replace(planned, stage=dataclasses.replace(planned.stage, flags=flags)))
    return dataclasses.replace(plan, stages=tuple(stages))


def heldout_rows(stage: Stage, inventory: Inventory) -> int:
    """Rows that a stage is evaluated on."""
    count = len(inventory.heldout.get(KIND[stage.command], ()))
    return min(count, 64) if stage.command in SAMPLES else count


def train(state: dict[str, Any], out: Path, say: Any) -> None:
    """Runs the stages that are not done."""
    for saved in state["stages"]:
        steps, stage = saved["steps"], Stage(**{name: saved[name] for name in saved if name != "steps"})
        if stage.directory in state["taken"]:
            continue
        began = time.perf_counter()
        begun = (out / stage.directory / "config.toml").exists()
        with memory_meter() as peak:
            run_stage(stage, out, **({} if begun else {"steps": steps}))
        seconds = time.perf_counter() - began
        state["taken"][stage.directory] = {"seconds": seconds, "peak_bytes": peak[0], "whole": not begun}
        save(out, state)
        say(f"{stage.directory}: {show_seconds(seconds)}")


def judge_of(config: AlignConfig, state: Mapping[str, Any], out: Path) -> Judge | None:
    """What scores answers to held-out prompts: what was given, or a verifier, or the reward model that is made."""
    prompts = out / "data" / "heldout-prompts.jsonl"
    reward_fn = config.reward_fn or ((state["verifier"],) if state["verifier"] else ())
    own = not (config.reward or reward_fn)
    if not prompts.exists() or (own and "reward" not in (row["stage"] for row in state["plan"])):
        return None
    flags = {name: getattr(config, name) for name in ("reward_weights", "reward_timeout", "reward_workers")}
    flags |= {"reward": str(out / "reward") if own else config.reward, "reward_fn": tuple(reward_fn)}
    return Judge(prompts, flags | answering(config, state), own)


def answering(config: AlignConfig, state: Mapping[str, Any]) -> dict[str, Any]:
    """How held-out prompts are answered, as flags."""
    flags = {name: getattr(config, name) for name in ("system", "template_args", "eos", "device", "seed")}
    flags |= {name: state[name] for name in ("apply_chat_template", "max_new_tokens")}
    return {name: value for name, value in flags.items() if value not in (None, ())}


def measure(config: AlignConfig, state: dict[str, Any], out: Path, say: Any) -> None:
    """The end against the start, on what was held out, and answers of both; kept in the state."""
    if state["evaluation"] is None:
        compare_with_start(config, state, out, say)
        save(out, state)
    prompts = out / "data" / "heldout-prompts.jsonl"
    if "answers" not in state and prompts.exists():
        state["answers"] = []
        try:
            if not state.get("resident"):
                raise ResourceError("the model alone has no room on the device.")
            state["answers"] = side_by_side(prompts, (config.model, state["run"]), state["answering"])
        except PenstockError as error:  # the run is done, and measured
            say(f"answers of start and end are not shown: {error}")
        save(out, state)


def compare_with_start(config: AlignConfig, state: dict[str, Any], out: Path, say: Any) -> None:
    """Puts into the state which run is the last, and what it gained."""
    last = state["stages"][-1]
    end, kind, judge = out / (last["name"] or last["command"]), KIND[last["command"]], judge_of(config, state, out)
    state["run"] = str(end)
    file = out / "data" / f"heldout-{kind}.jsonl"
    if judge is not None:
        result = compare(judge, end, config.model, out / "evaluation.json")
        result["own"] = judge.own
    elif file.exists() and kind != "prompts":
        engine = EngineFlags(**{f.name: getattr(config, f.name) for f in dataclasses.fields(EngineFlags)})
        flags = as_data_flags(config, keys=(), apply_chat_template=state["apply_chat_template"])
        result = likelihoods(kind, file, config.model, end, (flags, engine))
        keep(end, [{"date": today(), "data": str(file), "against": config.model, **result}])
    else:
        result = {}
        say("nothing was held out, so the end is not measured against the start")
    state["evaluation"], state["answering"] = result, answering(config, state)
