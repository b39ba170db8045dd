"""`penstock align` against its own plan: seconds, memory, and the held-out score of the end against the start.

    python -m benchmarks align [SETTING ...] [--seeds 0 1]

The demo's base model with its demonstrations, rankings and prompts; and SmolLM2-135M-Instruct with 200 comparisons of
its own answers to questions about films, the best and the worst of four by a hidden judge. Each on the whole machine,
and as if it were a smaller one. The demo's end is measured by its hidden gold too, which no stage saw.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.real import runs
from penstock.commands.demo_runs import Answering, answer
from penstock.commands.demo_toy import HELDOUT
from penstock.data.filmland import Filmland, gold
from penstock.data.toyland import Toyland
from tests.smollm2 import directory

COMPARISONS = 200
ANSWERING = Answering(tokens=48, max_length=128, batch_size=64, dtype="bf16")
SETTINGS: dict[str, runs.Record] = {
    "demo": {},
    "demo, 30 MB of device memory": {"device_memory": "30MB"},
    "smollm2": {},
    "smollm2, 2 GB of device memory": {"device_memory": "2GB"},
}


def comparisons() -> Path:
    """The file of 200 comparisons, made once."""
    path = runs.RUNS / "align-comparisons.jsonl"
    if not path.exists():
        questions = Filmland().split(0, 10)[0][:COMPARISONS]
        _, answers = answer(directory(), questions, 5, 4, ANSWERING)
        rows = []
        for i, question in enumerate(questions):
            scored = [(gold([question], [text], [ended])[0], text) for text, ended in answers[4 * i : 4 * i + 4]]
            (_, worst), *_, (_, best) = sorted(scored, key=lambda pair: pair[0])
            rows.append({"prompt": question.text, "chosen": best, "rejected": worst})
        runs.write_lines(path, rows)
    return path


def demo() -> tuple[Path, list[Path]]:
    """The demo's base model and its data, made once by the demo itself."""
    out = runs.RUNS / "align-demo"
    if not (out / "report.json").exists():
        runs.penstock("demo", out=out)
    return out / "base", [out / "data" / f"{name}.jsonl" for name in ("demonstrations", "comparisons", "prompts")]


def golds(run: Path) -> float:
    """Mean gold of a model's sampled answers to questions that no stage saw."""
    world = Toyland(0)
    _, heldout = world.split(0, HELDOUT)
    _, answers = answer(run, heldout, 2)
    return statistics.mean(world.gold(q, text, ended) for q, (text, ended) in zip(heldout, answers, strict=True))


def experiment(setting: str, seed: int, steps: int) -> runs.Record:
    """One row."""
    out = runs.RUNS / f"align-{setting.replace(',', '').replace(' ', '-')}-{seed}"
    flags: dict[str, Any] = {"seed": seed, **SETTINGS[setting]}
    state = json.loads((out / "align.json").read_text("utf-8")) if (out / "report.html").exists() else None
    if state is None:  # what has ended is not run again
        if setting.startswith("demo"):
            model, data = demo()
            flags |= {"lora": 16, "set": "reward.batch_size=16"}
        else:
            model, data = directory(), [comparisons()]
        runs.penstock("align", model=model, data=data, out=out, quiet=True, **flags)
        state = json.loads((out / "align.json").read_text("utf-8"))
    taken, measured = state["taken"], state["evaluation"]
    if not all(stage["whole"] for stage in taken.values()):
        raise RuntimeError(f"{out}: a stage was stopped and went on, so its seconds are those of the last start alone")
    row = {
        "stages": " -> ".join(stage["stage"] for stage in state["plan"]),
        "planned_seconds": sum(stage["seconds"] for stage in state["plan"]),
        "seconds": sum(stage["seconds"] for stage in taken.values()),
        "planned_bytes": max(stage["peak"]["process"] for stage in state["plan"]),
        "trial_bytes": max(state["measured_peak"].values()),
        "peak_bytes": max(stage["peak_bytes"] for stage in taken.values()),
        "evaluation": measured,
        "score": [measured.get("score_against", measured.get("start")), measured.get("score", measured.get("end"))],
    }
    row["seconds_ratio"] = row["seconds"] / row["planned_seconds"]
    row["bytes_ratio"] = row["peak_bytes"] / row["trial_bytes"]
    if setting.startswith("demo"):
        row["gold"] = [golds(out / "sft"), golds(Path(state["run"]))]
    return row


def main(arguments: list[str]) -> int:
    """results/align.json gets the rows that it lacks."""
    return runs.collect("align", __doc__, arguments, [*SETTINGS], 0, experiment)
