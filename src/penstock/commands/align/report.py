"""What `penstock align` prints and its report: the plan, what the stages took, the end against the start."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.commands.align.config import show_seconds
from penstock.run.checkpoint import write_whole
from penstock.run.report import Figures, RunFiles, Samples, Section, Table, Text, page, sections_of
from penstock.units import show_bytes

TIERS = ("device", "host", "disk", "run")


def plan_text(state: Mapping[str, Any]) -> str:
    """The plan for people."""
    measured = state.get("measured_peak")
    trial = state.get("trial_seconds")
    before = f", before a trial of about {show_seconds(trial)}" if trial else ""
    how = "by a trial of a few steps" if measured else f"by rates of this machine{before}"
    lines = ["what there is:", *(f"  {line}" for line in [*state["lines"], *state["unused"]])]
    lines += ["", f"plan: {' -> '.join(row['stage'] for row in state['plan'])}, {show_seconds(state['seconds'])} {how}"]
    for row in state["plan"]:
        lines.append(
            f"  {row['stage']:7}{row['records']:,} records, {row['steps']} steps, {show_seconds(row['seconds'])}"
        )
        lines.append(f"         {memory_text(row['peak'], (measured or {}).get(row['stage']))}")
        lines.append(f"         {row['why']}")
    lines += ["why:", *(f"  {line}" for line in state["why"])]
    if state["better"]:
        lines += ["better with more:", *(f"  {line}" for line in dict.fromkeys(state["better"]))]
    return "\n".join(lines)


def memory_text(peak: Mapping[str, int], measured: int | None) -> str:
    """Bytes per tier, in words."""
    parts = [f"{name} {show_bytes(peak[name])}" for name in TIERS if peak.get(name)]
    whole = f"; the process takes {show_bytes(peak['process'])}"
    trial = f", and took {show_bytes(measured)} in its trial" if measured else ""
    return "memory: " + ", ".join(parts).replace("run ", "checkpoints ") + whole + trial


def evaluation_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured at the end, a row each."""
    if "win_rate" in result:
        low, high = result["win_rate_interval"]
        rows = [
            ("judged by", result["by"] + (" (made here, and optimised against)" if result.get("own") else "")),
            ("held-out prompts", str(result["prompts"])),
            ("wins against the start", f"{result['win_rate']:.1%} (95 %: {low:.1%} to {high:.1%})"),
            ("at equal lengths", f"{result['win_rate_length_controlled']:.1%}"),
        ]
        return [*rows, ("score, start and end", f"{result['score_against']:.3f} and {result['score']:.3f}")]
    if not result:
        return [("measured", "nothing was held out")]
    low, high = result["gain_interval"]
    return [
        ("measured", result["by"]), ("held-out records", str(result["records"])),
        ("start and end", f"{result['start']:.3f} and {result['end']:.3f}"),
        ("gain", f"{result['gain']:+.3f} (95 %: {low:+.3f} to {high:+.3f})"),
    ]  # fmt: skip


def ending(state: Mapping[str, Any]) -> str:
    """The last lines: what came of it, and what to do with it."""
    lines = [
        "the end against the start:",
        *(f"  {name}: {text}" for name, text in evaluation_rows(state["evaluation"])),
    ]
    todo = [f"{what + ':':8}{line}" for what, line in next_commands(state)]
    return "\n".join([*lines, f"report: {state['report']}", *todo])


def next_commands(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to do with the last run, and the command for it."""
    run, merge = state["run"], " --merge" if state["learns"] != "all" else ""
    commands = [
        ("talk", f"penstock chat {run}"), ("serve", f"penstock serve {run} --port 8000"),
        ("export", f"penstock export {run} --out my-model{merge}"),
    ]  # fmt: skip
    if state.get("answers") and "win_rate" not in state["evaluation"]:
        words = ["penstock", "eval", run, "--against", state["model"]]
        words += ["--data", str(Path(state["out"]) / "data" / "heldout-prompts.jsonl")]
        for name, value in state["answering"].items():
            if value is not False:
                listed = value if isinstance(value, list | tuple) else [value]
                words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, listed))]
        commands.insert(0, ("judge", shlex.join([*words, "--reward-fn", "FILE.py:FUNCTION"])))
    return commands


def write(out: Path, state: Mapping[str, Any]) -> Path:
    """Writes OUT/report.html."""
    runs = {stage["name"] or stage["command"]: stage for stage in state["stages"]}
    header = ("stage", "records", "steps", "planned", "took", "memory planned", "memory taken", "how")
    rows = []
    for planned, (name, taken) in zip(state["plan"], state["taken"].items(), strict=True):
        rows.append((
            name, f"{planned['records']:,}", str(planned["steps"]), show_seconds(planned["seconds"]),
            show_seconds(taken["seconds"]) + ("" if taken["whole"] else ", its last start"),
            show_bytes(planned["peak"]["process"]), show_bytes(taken["peak_bytes"]), planned["why"],
        ))  # fmt: skip
    sections: list[Section] = [
        Figures({name: text.replace(" (", "\n(", 1) for name, text in evaluation_rows(state["evaluation"])}),
        Text("What there was: " + "; ".join(state["lines"]) + "."),
        Text("Why: " + "; ".join(state["why"]) + "."),
        Table("Stages", header, rows),
        Table("What to do with it", ("", "command"), next_commands(state)),
    ]
    if state.get("answers"):
        shown = [(asked, {"start": (start, None), "end": (end, None)}) for asked, start, end in state["answers"]]
        sections.append(Samples("Answers to held-out prompts, start and end", shown))
    if state.get("checked"):
        sections.append(Text("Checked before: " + "; ".join(state["checked"]) + "."))
    if state["better"]:
        sections.append(Text("Better with more: " + "; ".join(dict.fromkeys(state["better"])) + "."))
    files = {name: RunFiles.read(out / name) for name in runs}
    title = f"{' -> '.join(runs)} from {Path(state['model']).name}"
    path = out / "report.html"
    write_whole(path, page("penstock align", title, [*sections, *sections_of(files)]))
    print(f"wrote {path}", file=sys.stderr)
    return path
