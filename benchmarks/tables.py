"""benchmarks/README.md and its plots, from benchmarks/results/*.json and nothing else.

    python -m benchmarks.tables [--results DIR] [--out DIR]

A claim is one section: a table, often a plot, and the command that measured it. What was not measured says so.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from penstock.units import show_bytes

HERE = Path(__file__).parent
Found = dict[str, Any]
Table = list[list[str]]
"""Rows of cells, the first row their heads."""
OURS, THEIRS, THIRD = "#1f6f8b", "#b8b8b8", "#d98c3f"
plt.rcParams.update({"svg.hashsalt": "penstock", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


@dataclass(frozen=True)
class Claim:
    """One section. `results`: patterns of the files it is made of; it needs one of them at least."""

    title: str
    says: str
    results: tuple[str, ...]
    command: str
    table: Callable[[dict[str, Found]], Table]
    plot: Callable[[dict[str, Found], Any], None] | None = None
    """Draws on the axes."""


# --- capacity ---------------------------------------------------------------------------------------------------------

SIDES = {"ours": "penstock", "published": "plain PyTorch, four fp32 models", "fair": "plain PyTorch, bf16 + masters"}


def capacity_table(found: dict[str, Found]) -> Table:
    """A row per budget and side."""
    rows = [["device budget", "side", "blocks", "parameters per model", "most device memory", "ours has"]]
    for one in found.values():
        for side, name in SIDES.items():
            layers, count = one["layers"][side], one["parameters_per_model"][side]
            peak = one["ours"]["peak_device_bytes"] if side == "ours" else one["peak_device_bytes_of_plain"][side]
            ratio = one["ratios"].get(side)
            rows.append(
                [
                    show_bytes(one["budget_bytes"]), name, str(layers), f"{count / 1e6:.0f}M" if count else "none fits",
                    show_bytes(peak) if peak else "-", f"{ratio:.1f} times as many" if ratio else "",
                ]
            )  # fmt: skip
    return rows


def capacity_plot(found: dict[str, Found], axes: Any) -> None:
    """Parameters, of the first budget."""
    one = next(iter(found.values()))
    counts = [(one["parameters_per_model"][side] or 0) / 1e6 for side in SIDES]
    axes.barh(list(SIDES.values()), counts, color=[OURS, THEIRS, THEIRS])
    axes.invert_yaxis()
    axes.set_xlabel(f"million parameters in each of four models, {show_bytes(one['budget_bytes'])} of device memory")


# --- peers ------------------------------------------------------------------------------------------------------------


def peers_table(found: dict[str, Found]) -> Table:
    """A row per race; one that was not run says why."""
    rows = [["work and peer", "ours, s", "theirs, s", "times faster", "our RSS", "their RSS", "share", "pairs"]]
    (peers,) = found.values()
    for name, one in peers["rows"].items():
        if "why_not" in one:
            rows.append([name, "", "", one["why_not"].replace("|", "/"), "", "", "", "0"])
            continue
        rows.append(
            [
                name, f"{one['ours_seconds']:.2f}", f"{one['theirs_seconds']:.2f}", f"{one['times_faster']:.2f}",
                show_bytes(one["ours_peak_rss_bytes"]), show_bytes(one["theirs_peak_rss_bytes"]),
                f"{one['share_of_their_rss']:.2f}", str(len(one["ours_seconds_each"])),
            ]
        )  # fmt: skip
    return rows


def throughput_plot(found: dict[str, Found], axes: Any) -> None:
    """How many times faster."""
    (peers,) = found.values()
    rows = {name: one for name, one in peers["rows"].items() if "why_not" not in one}
    axes.barh(list(rows), [one["times_faster"] for one in rows.values()], color=OURS)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the peer, step by step in turns (1: as fast)")


def memory_table(found: dict[str, Found]) -> Table:
    """A row per run of `penstock bench`."""
    rows = [["run", "device, most in use", "planned", "host homes", "disk", "RSS", "seconds per iteration"]]
    for name, one in found.items():
        rows.append(
            [
                f"{name}: {one['settings']['model']}, {one['settings']['strategy']}, {one['settings']['dtype']}, "
                f"{one['world']} process{'es' * (one['world'] > 1)}",
                show_bytes(one["peak_device_bytes"]), show_bytes(one["planned"]["device"]),
                show_bytes(one["peak_host_bytes"]), show_bytes(one["peak_disk_bytes"]),
                show_bytes(one["peak_rss_bytes"]), f"{one['seconds_per_iteration']:.1f}",
            ]
        )  # fmt: skip
    return rows


def memory_plot(found: dict[str, Found], axes: Any) -> None:
    """Peak RSS of both sides."""
    (peers,) = found.values()
    rows = {name: one for name, one in peers["rows"].items() if "why_not" not in one}
    places = range(len(rows))
    for offset, key, color in ((-0.2, "ours_peak_rss_bytes", OURS), (0.2, "theirs_peak_rss_bytes", THEIRS)):
        axes.barh([i + offset for i in places], [one[key] / 1e9 for one in rows.values()], 0.4, color=color)
    axes.set_yticks(list(places), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("peak RSS, GB: penstock (dark) and the peer")


# --- growth -----------------------------------------------------------------------------------------------------------

SERIES = {"sizes": "parameters", "lengths": "length", "depths": "layers"}


def growth_table(found: dict[str, Found]) -> Table:
    """A row per point, then the slopes."""
    one = found["growth"]
    rows = [["size", "blocks", "length", "parameters", "ms per token", "device, most in use", "largest block"]]
    for series in SERIES:
        for point in one.get(series, []):
            if "why_not" in point:
                rows.append(
                    [point["size"], str(point["layers"] or ""), str(point["length"]), point["why_not"], *[""] * 3]
                )
                continue
            rows.append(
                [
                    point["size"], str(point["layers"]), str(point["length"]), f"{point['parameters'] / 1e6:.0f}M",
                    f"{1e3 * point['seconds_per_token']:.1f}", show_bytes(point["peak_device_bytes"]),
                    show_bytes(point["block_bytes"]),
                ]
            )  # fmt: skip
    for series in SERIES:
        for name, slope in one.get(f"slopes_{series}", {}).items():
            if slope is not None:
                rows.append([f"slope of {name} ({series})", "", "", "", f"{slope:.2f}", "", ""])
    return rows


def growth_plot(found: dict[str, Found], axes: Any) -> None:
    """Cost and device memory, in multiples of the smallest point."""
    one, drawn = found["growth"], []
    for (series, x), color in zip(SERIES.items(), (OURS, THIRD, THEIRS), strict=True):
        points = [point for point in one.get(series, []) if "why_not" not in point]
        if points:
            first = points[0]
            for key, style in (("seconds_per_iteration", "-o"), ("peak_device_bytes", "--s")):
                across = [point[x] / first[x] for point in points]
                up = [point[key] / first[key] for point in points]
                axes.plot(across, up, style, color=color, markersize=4, label=f"{key.replace('_', ' ')} by {x}")
                drawn += across
    if drawn:
        axes.plot([1, max(drawn)], [1, max(drawn)], ":", color="black", linewidth=0.8, label="in proportion")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.legend(fontsize=7)
    axes.set_xlabel("times the smallest")
    axes.set_ylabel("times the cost of the smallest")


def ranks_table(found: dict[str, Found]) -> Table:
    """A row per machine and side."""
    rows = [["two processes on two cores", "", "samples per second, both", "share of the ideal"]]
    for one in found.values():
        for name, rate in one["samples_per_second"].items():
            share = one["share_of_ideal"].get(name)
            rows.append(
                [one["machine"]["cpu"], name, f"{rate:.3f}", f"{share:.2f}" if share else "1: they never talk"]
            )  # fmt: skip
    return rows


def gpu_table(found: dict[str, Found]) -> Table:
    """A row per run on the card: ours by `penstock bench`, plain transformers at the most rows it held."""
    rows = [["run", "rows at once", "s per iteration", "samples per second", "learning, share of GEMM rate",
             "device, most in use", "planned"]]  # fmt: skip
    for one in found.values():
        for name, run in one["table"]["rows"].items():
            if "error" in run:
                rows.append([name, "", "", run["error"].split(". The plan")[0].replace("|", "/"), *[""] * 3])
            elif "best" in run:
                best = run["best"]
                rows.append(
                    [name, str(best["rows"]), f"{best['seconds'][-1]:.2f}", f"{best['samples_per_second']:.2f}", "",
                     show_bytes(best["peak"]), ""]
                )  # fmt: skip
            else:
                asked, seconds = run["settings"], run["seconds_per_iteration"]
                count = asked["experience_batch_size"] * run["phases"]["rollout"]["times_per_iteration"]
                rows.append(
                    [name, str(asked["experience_batch_size"]), f"{seconds:.2f}", f"{count / seconds:.2f}",
                     f"{run['phases']['train']['share_of_gemm_peak']:.0%}", show_bytes(run["peak_device_bytes"]),
                     show_bytes(run["planned"]["device"])]
                )  # fmt: skip
    return rows


def autochunk_table(found: dict[str, Found]) -> Table:
    """A row per block, attention and way of use that was timed; then what was only counted."""
    rows = [["block", "attention", "tokens", "", "peak", "in slices", "cut", "more time", "largest difference"]]
    for name, one in found.items():
        timed = one["autochunk"]["rows"].values() if "autochunk" in one else one["rows"]
        where = ", on the card" if name.startswith("gpu") else ""
        for run in [*timed, *one.get("counted", [])]:
            rows.append(
                [
                    run["block"] + where, run["attention"], f"{run['tokens']:,}",
                    ("training" if run["training"] else "forward") + ", frozen weights" * run.get("frozen", False),
                    show_bytes(run["peak_before"]),
                    show_bytes(run["peak_after"]), f"{run['cut']:.1%}",
                    f"{run['extra_time']:.1%}" if "extra_time" in run else "counted",
                    f"{run['difference']:.1e}" if "difference" in run else "",
                ]
            )  # fmt: skip
        for run in one.get("longest", []):
            way, tokens = "training" if run["training"] else "forward", run["tokens"]
            more = f"longest in {show_bytes(run['budget'])}: {tokens['plain']:,} to {tokens['sliced']:,}"
            rows.append([run["block"], run["attention"], more, way, "", "", "", f"{run['times']:.0f} times", ""])
    return rows


def races(results: str, where: str, says: str) -> list[Claim]:
    """What one kind of processor makes of the races: seconds, and memory."""
    command = f"python -m benchmarks.peers.run --name {results}"
    return [
        Claim(f"Throughput against other stacks{where}", says, (results,), command, peers_table, throughput_plot),
        Claim(
            f"Memory against other stacks{where}", "Peak RSS of both sides of these races.", (results,), command,
            lambda found: [], memory_plot,
        ),
    ]  # fmt: skip


CLAIMS = [
    Claim(
        "Capacity", "The deepest model, in steps of one block, that completes a PPO iteration in a device budget.",
        ("capacity_search",), "python -m benchmarks.record capacity_search capacity --device-memory 2GB",
        capacity_table, capacity_plot,
    ),
    *races(
        "peers", "", "Each peer in an environment of its own, step by step in turns with ours; medians, and the median "
        "of the paired ratios. Here on a processor without bf16 instructions.",
    ),
    *races("peers_avx512", " (AVX512-BF16)", "The same races on a processor that multiplies bf16 in its vectors."),
    *races("peers_amx", " (AMX)", "And on one with a matrix unit."),
    Claim(
        "The published benchmark", "`penstock bench` as it was recorded, run by run.",
        ("bench_*",),
        "python -m benchmarks.record bench_s_ddp --model s --strategy ddp --experience_batch_size 1 "
        "--train_batch_size 1", memory_table,
    ),
    Claim(
        "How cost grows", "With model size, row length and depth. A slope is that of a line through logarithms: 1 is "
        "in proportion, 0 does not grow.",
        ("growth",), "python -m benchmarks.growth", growth_table, growth_plot,
    ),
    Claim(
        "One GPU", "PPO of four models of one shape, 400 + 112 tokens, on an H100. `plain` is transformers with "
        "PyTorch's Adam(W), four models resident, at the most rows that it held; hydra is LoRA with four roles on one "
        "base.",
        ("gpu_*",), "make gpu-check", gpu_table,
    ),
    Claim(
        "AutoChunk", "One block of transformers, with and without slices; training is a recomputed block. `counted`: "
        "lengths that this machine cannot hold, on tensors without memory.",
        ("autochunk_*", "gpu_*"), "python -m benchmarks.autochunk", autochunk_table,
    ),
    Claim(
        "Two ranks", "Learning by two ranks over gloo against two single-threaded processes that never talk.",
        ("ranks", "ranks_*"), "python -m benchmarks.ranks --layers 12", ranks_table,
    ),
]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Writes README.md and plots/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE)
    asked = parser.parse_args(arguments)
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(asked.results.glob("*.json"))}
    (asked.out / "plots").mkdir(parents=True, exist_ok=True)
    text = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.tables` from [results/](results/); nothing here is typed by hand. What each "
        "command does is in [docs/benchmark.md](../docs/benchmark.md) and in the first lines of its file.",
    ]
    for claim in CLAIMS:
        text += section(claim, results, asked.out)
    text += ["", "## Every result", "", *markdown(index_of(results)), ""]
    (asked.out / "README.md").write_text("\n".join(text), encoding="utf-8")
    print(f"wrote {asked.out / 'README.md'}")


def section(claim: Claim, results: dict[str, Found], out: Path) -> list[str]:
    """One claim as lines of Markdown; draws its plot."""
    found = {name: one for name, one in results.items() if any(fnmatch(name, wanted) for wanted in claim.results)}
    lines = ["", f"## {claim.title}", "", claim.says, ""]
    if not found:
        return [*lines, f"Not measured yet: `{claim.command}`"]
    if claim.plot is not None:
        name = re.sub("[^a-z0-9]+", "-", claim.title.lower()).strip("-")
        figure, axes = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
        claim.plot(found, axes)
        figure.savefig(out / "plots" / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        lines += [f"![{claim.title}](plots/{name}.svg)", ""]
    lines += markdown(claim.table(found))
    made = "; ".join(f"`{one['command']}` at {one['commit'][:12]} ([{name}](results/{name}.json))"
                     for name, one in found.items())  # fmt: skip
    machine = next(iter(found.values()))["machine"]
    return [*lines, "", f"By {made}. {machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB."]


def index_of(results: dict[str, Found]) -> Table:
    """All files, with what made them."""
    return [
        ["result", "command", "commit", "date", "torch"],
        *(
            [f"[{name}](results/{name}.json)", f"`{one['command']}`", one["commit"][:12], one["date"],
             one["versions"].get("torch", "-")]
            for name, one in results.items()
        ),
    ]  # fmt: skip


def markdown(table: Table) -> list[str]:
    """A table's lines; none for an empty one."""
    if not table:
        return []
    assert all(len(row) == len(table[0]) for row in table)
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return [head, "|" + "---|" * len(table[0]), *rows]


if __name__ == "__main__":
    main()
