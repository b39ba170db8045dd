"""What the demo takes and what it learns: `make demo` as a user runs it, then five seeds.

    python -m benchmarks demo [--seeds 5] [--algorithms [--real]]

Writes docs/demo.png, and demo.json: wall seconds and peak resident bytes of one demo in its own process, then each
seed's gold scores, the reward model's held-out accuracy and the labellers' noise ceiling, and how far each learned.
With --algorithms docs/algorithms.png and demo_algorithms.json: what each algorithm makes of each seed's SFT model.
With --real the same of SmolLM2-135M-Instruct at --scale 2: docs/algorithms_real.png and demo_real_algorithms.json. Its
seeds are kept in .real/, and one that is there is not run again.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.facts import ROOT, flags, write
from benchmarks.real.runs import RUNS


def run(out: Path, seeds: int, *more: str) -> tuple[dict[str, Any], float]:
    """The demo's report.json and its wall seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "penstock", "demo", "--out", str(out), "--seeds", str(seeds), *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    assert (out / "report.html").stat().st_size > 0
    return json.loads((out / "report.json").read_text(encoding="utf-8")), seconds


def picture(report: dict[str, Any]) -> None:
    """docs/demo.png: gold by stage on held-out questions, and what PPO did on the way, each line one seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), dpi=110, layout="constrained")
    stages, *curve_axes = figure.subplots(1, 4)
    for seed in report["seeds"]:
        golds = [seed["base_gold"], seed["sft_gold"], seed["ppo_gold"]]
        stages.plot(["base", "SFT", "PPO"], golds, color="#1f6f8b", marker="o", markersize=4, linewidth=1, alpha=0.7)
    stages.set_title("hidden gold score, held-out questions", fontsize=9)
    for axes, title in zip(curve_axes, report["curves"][0], strict=True):
        for curves in report["curves"]:
            for colour, (name, (xs, ys)) in zip(("#1f6f8b", "#d68a3c"), curves[title].items(), strict=False):
                label = name if curves is report["curves"][0] and len(curves[title]) > 1 else None
                axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.7, label=label)
        if len(curves[title]) > 1:
            axes.legend(frameon=False, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("PPO step", fontsize=8)
    for axes in (stages, *curve_axes):
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "demo.png")


def real_seeds(seeds: int) -> list[dict[str, Any]]:
    """Their facts, those of earlier runs too."""
    facts = []
    for seed in range(seeds):
        out = RUNS / f"demo-{seed}"
        if not (out / "report.json").exists():
            run(out, 1, "--algorithms", "--real", "--scale", "2", "--seed", str(seed))
        facts += json.loads((out / "report.json").read_text(encoding="utf-8"))["seeds"]
    return facts


def algorithms(seeds: int, real: bool) -> int:
    """Returns 1 where an algorithm is not above SFT by three standard errors, over all seeds' held-out questions."""
    if real:
        facts = real_seeds(seeds)
    else:
        with tempfile.TemporaryDirectory() as directory:
            facts = run(Path(directory) / "seeds", seeds, "--algorithms")[0]["seeds"]
    tables = [seed.pop("algorithms") for seed in facts]
    names = [row["name"] for row in tables[0]]
    rows = {name: [row for table in tables for row in table if row["name"] == name] for name in names}
    sft, summary = rows["sft"], {}
    for name in names:
        gains = [row["gold"] - start["gold"] for row, start in zip(rows[name], sft, strict=True)]
        variances = [row["se"] ** 2 + start["se"] ** 2 for row, start in zip(rows[name], sft, strict=True)]
        seconds = [row["seconds"] for row in rows[name] if row["seconds"] is not None]
        summary[name] = {
            "gold": statistics.mean(row["gold"] for row in rows[name]),
            "proxy": statistics.mean(row["proxy"] for row in rows[name]),
            "kl": statistics.mean(row["kl"] for row in rows[name]),
            "gain": statistics.mean(gains),
            "standard_errors_above_sft": sum(gains) / math.sqrt(sum(variances)),
            "least_standard_errors_of_a_seed": min(row["se_above_sft"] for row in rows[name]),
            "seconds": statistics.median(seconds) if seconds else None,
            "model_bytes": rows[name][0]["model_bytes"],
        }
    picture_of_algorithms(rows, ROOT / "docs" / ("algorithms_real.png" if real else "algorithms.png"))
    name = "demo_real_algorithms" if real else "demo_algorithms"
    path = write(name, {"over_all_seeds": summary, "seeds": tables, "stages": facts}, "transformers", "numpy")
    print(path.read_text(encoding="utf-8"))
    return int(any(row["standard_errors_above_sft"] <= 3 for name, row in summary.items() if name != "sft"))


def picture_of_algorithms(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Gold against KL from SFT, each seed a faint dot, each algorithm's mean a full one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for i, (name, seeds) in enumerate(rows.items()):
        kls, golds, colour = [row["kl"] for row in seeds], [row["gold"] for row in seeds], f"C{i}"
        axes.scatter(kls, golds, s=14, color=colour, alpha=0.35, linewidths=0)
        middle = statistics.mean(kls), statistics.mean(golds)
        axes.scatter(*middle, s=60, color=colour, marker="^" if name in OF_LABELS else "o")
        place = (7, -13 if name.endswith("dpo") else 5)  # they end near others
        axes.annotate(name, middle, xytext=place, textcoords="offset points", fontsize=9, color=colour)
    axes.set_xlabel("KL from the SFT model, nats per answer", fontsize=9)
    axes.set_ylabel("hidden gold score, held-out questions", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


OF_LABELS = ("dpo", "kto")
"""Algorithms that learn from the labels themselves; in the picture they are triangles."""


def main(arguments: list[str]) -> int:
    """Returns 1 when a seed did not learn what it should."""
    parser = flags(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--algorithms", action="store_true")
    parser.add_argument("--real", action="store_true")
    parsed = parser.parse_args(arguments)
    seeds = parsed.seeds
    if parsed.algorithms:
        return algorithms(seeds, parsed.real)
    with tempfile.TemporaryDirectory() as directory:
        _, seconds = run(Path(directory) / "single", 1)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report, _ = run(Path(directory) / "seeds", seeds)
    verdicts = [
        {
            "seed": seed["seed"],
            "standard_errors_of_ppo_above_sft": (seed["ppo_gold"] - seed["sft_gold"]) / seed["gold_se"],
            "accuracy_of_attainable": seed["rm_accuracy"] / seed["rm_ceiling"],
            "sft_above_base": seed["sft_gold"] - seed["base_gold"],
        }
        for seed in report["seeds"]
    ]
    picture(report)
    del report["curves"]
    result = {"one_demo": {"seconds": seconds, "peak_rss_bytes": peak}, **report, "verdicts": verdicts}
    path = write("demo", result, "transformers", "numpy")
    print(path.read_text(encoding="utf-8"))
    learned = all(
        verdict["standard_errors_of_ppo_above_sft"] > 3
        and verdict["accuracy_of_attainable"] >= 0.75
        and verdict["sft_above_base"] > 0
        for verdict in verdicts
    )
    return int(not learned)
