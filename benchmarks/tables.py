"""benchmarks/README.md and its plots, from benchmarks/results/*.json and nothing else.

    python -m benchmarks tables [--results DIR] [--out DIR]

A claim is one section: a table, often a plot, and the command that measured it. What was not measured says so.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from benchmarks.facts import RESULTS, flags
from penstock.units import show_bytes

HERE = Path(__file__).parent
Result = dict[str, Any]
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
    table: Callable[[dict[str, Result]], Table]
    plot: Callable[[dict[str, Result], Any], None] | None = None
    """Draws on the axes."""


# --- capacity ---------------------------------------------------------------------------------------------------------

SIDES = {"ours": "penstock", "published": "plain PyTorch, four fp32 models", "fair": "plain PyTorch, bf16 + masters"}


def capacity_table(results: dict[str, Result]) -> Table:
    """A row per budget and side."""
    rows = [["device budget", "side", "blocks", "parameters per model", "most device memory", "ours has"]]
    for search in results.values():
        for side, name in SIDES.items():
            layers, count = search["layers"][side], search["parameters_per_model"][side]
            peak = search["ours"]["peak_device_bytes"] if side == "ours" else search["peak_device_bytes_of_plain"][side]
            ratio = search["ratios"].get(side)
            size = f"{count / 1e6:.0f}M" if count else "none fits"
            times = f"{ratio:.1f} times as many" if ratio else ""
            memory = show_bytes(peak) if peak else "-"
            rows.append([show_bytes(search["budget_bytes"]), name, str(layers), size, memory, times])
    return rows


def capacity_plot(results: dict[str, Result], axes: Any) -> None:
    """Parameters, of the first budget."""
    search = next(iter(results.values()))
    counts = [(search["parameters_per_model"][side] or 0) / 1e6 for side in SIDES]
    axes.barh(list(SIDES.values()), counts, color=[OURS, THEIRS, THEIRS])
    axes.invert_yaxis()
    axes.set_xlabel(f"million parameters in each of four models, {show_bytes(search['budget_bytes'])} of device memory")


# --- peers ------------------------------------------------------------------------------------------------------------


def peers_table(results: dict[str, Result]) -> Table:
    """A row per race; race that was not run says why."""
    rows = [["work and peer", "ours, s", "theirs, s", "times faster", "our RSS", "their RSS", "share", "pairs"]]
    (peers,) = results.values()
    for name, race in peers["rows"].items():
        if "why_not" in race:
            rows.append([name, "", "", race["why_not"].replace("|", "/"), "", "", "", "0"])
            continue
        rows.append(
            [
                name, f"{race['ours_seconds']:.2f}", f"{race['theirs_seconds']:.2f}", f"{race['times_faster']:.2f}",
                show_bytes(race["ours_peak_rss_bytes"]), show_bytes(race["theirs_peak_rss_bytes"]),
                f"{race['share_of_their_rss']:.2f}", str(len(race["ours_seconds_each"])),
            ]
        )  # fmt: skip
    return rows


def throughput_plot(results: dict[str, Result], axes: Any) -> None:
    """How many times faster."""
    (peers,) = results.values()
    rows = {name: race for name, race in peers["rows"].items() if "why_not" not in race}
    axes.barh(list(rows), [race["times_faster"] for race in rows.values()], color=OURS)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the peer, step by step in turns (1: as fast)")


def memory_table(results: dict[str, Result]) -> Table:
    """A row per run of `penstock bench`."""
    rows = [["run", "device, most in use", "planned", "host homes", "disk", "RSS", "seconds per iteration"]]
    for name, run in results.items():
        rows.append(
            [
                f"{name}: {run['settings']['model']}, {run['settings']['strategy']}, {run['settings']['dtype']}, "
                f"{run['world']} process{'es' if run['world'] > 1 else ''}",
                show_bytes(run["peak_device_bytes"]), show_bytes(run["planned"]["device"]),
                show_bytes(run["peak_host_bytes"]), show_bytes(run["peak_disk_bytes"]),
                show_bytes(run["peak_rss_bytes"]), f"{run['seconds_per_iteration']:.1f}",
            ]
        )  # fmt: skip
    return rows


def memory_plot(results: dict[str, Result], axes: Any) -> None:
    """Peak RSS of both sides."""
    (peers,) = results.values()
    rows = {name: race for name, race in peers["rows"].items() if "why_not" not in race}
    heights = range(len(rows))
    for offset, key, color in ((-0.2, "ours_peak_rss_bytes", OURS), (0.2, "theirs_peak_rss_bytes", THEIRS)):
        axes.barh([i + offset for i in heights], [race[key] / 1e9 for race in rows.values()], 0.4, color=color)
    axes.set_yticks(list(heights), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("peak RSS, GB: penstock (dark) and the peer")


# --- growth -----------------------------------------------------------------------------------------------------------

SERIES = {"sizes": "parameters", "lengths": "length", "depths": "layers"}


def growth_table(results: dict[str, Result]) -> Table:
    """A row per point, then the slopes."""
    growth = results["growth"]
    rows = [["size", "blocks", "length", "parameters", "ms per token", "device, most in use", "largest block"]]
    for series in SERIES:
        for point in growth.get(series, []):
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
        for name, slope in growth.get(f"slopes_{series}", {}).items():
            if slope is not None:
                rows.append([f"slope of {name} ({series})", "", "", "", f"{slope:.2f}", "", ""])
    return rows


def growth_plot(results: dict[str, Result], axes: Any) -> None:
    """Cost and device memory, in multiples of the smallest point."""
    growth, drawn = results["growth"], []
    for (series, x), color in zip(SERIES.items(), (OURS, THIRD, THEIRS), strict=True):
        points = [point for point in growth.get(series, []) if "why_not" not in point]
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


def ranks_table(results: dict[str, Result]) -> Table:
    """A row per machine and side."""
    rows = [["two processes on two cores", "", "samples per second, both", "share of the ideal"]]
    for result in results.values():
        for name, rate in result["samples_per_second"].items():
            share = result["share_of_ideal"].get(name)
            ideal = f"{share:.2f}" if share else "1: they do not communicate"
            rows.append([result["machine"]["cpu"], name, f"{rate:.3f}", ideal])
    return rows


def gpu_table(results: dict[str, Result]) -> Table:
    """A row per run on the card: ours by `penstock bench`, plain transformers at the most rows it held."""
    rows = [["run", "rows at once", "s per iteration", "samples per second", "learning, share of GEMM rate",
             "device, most in use", "planned"]]  # fmt: skip
    for result in results.values():
        for name, run in result["table"]["rows"].items():
            if "error" in run:
                rows.append([name, "", "", run["error"].split(". The plan")[0].replace("|", "/"), *[""] * 3])
            elif "best" in run:
                best = run["best"]
                rows.append(
                    [name, str(best["rows"]), f"{best['seconds'][-1]:.2f}", f"{best['samples_per_second']:.2f}", "",
                     show_bytes(best["peak"]), ""]
                )  # fmt: skip
            else:
                settings, seconds = run["settings"], run["seconds_per_iteration"]
                count = settings["experience_batch_size"] * run["phases"]["rollout"]["times_per_iteration"]
                rows.append(
                    [name, str(settings["experience_batch_size"]), f"{seconds:.2f}", f"{count / seconds:.2f}",
                     f"{run['phases']['train']['share_of_gemm_peak']:.0%}", show_bytes(run["peak_device_bytes"]),
                     show_bytes(run["planned"]["device"])]
                )  # fmt: skip
    return rows


def autochunk_table(results: dict[str, Result]) -> Table:
    """A row per block, attention and way of use that was timed; then what was only counted."""
    rows = [["block", "attention", "tokens", "", "peak", "in slices", "cut", "more time", "largest difference"]]
    for name, result in results.items():
        timed = result["autochunk"]["rows"].values() if "autochunk" in result else result["rows"]
        card = ", on the card" if name.startswith("gpu") else ""
        for run in [*timed, *result.get("counted", [])]:
            rows.append(
                [
                    run["block"] + card, run["attention"], f"{run['tokens']:,}",
                    ("training" if run["training"] else "forward") + (", frozen weights" if run.get("frozen") else ""),
                    show_bytes(run["peak_before"]),
                    show_bytes(run["peak_after"]), f"{run['cut']:.1%}",
                    f"{run['extra_time']:.1%}" if "extra_time" in run else "counted",
                    f"{run['difference']:.1e}" if "difference" in run else "",
                ]
            )  # fmt: skip
        for run in result.get("longest", []):
            way, tokens = "training" if run["training"] else "forward", run["tokens"]
            longest = f"longest in {show_bytes(run['budget'])}: {tokens['plain']:,} to {tokens['sliced']:,}"
            rows.append([run["block"], run["attention"], longest, way, "", "", "", f"{run['times']:.0f} times", ""])
    return rows


def gradients_table(results: dict[str, Result]) -> Table:
    """A row per shape, strategy and micro-batch."""
    rows = [["shape", "strategy", "rows per micro-batch", "before", "its weight", "now", "its weight"]]
    for result in results.values():
        for key, run in result["rows"].items():
            old, new = (f"{run[side]:.2%}" for side in ("old", "new"))
            rows.append([*key.split(", "), old, run["old_weight"], new, run["new_weight"]])
    return rows


def races(results: str, processor: str, says: str) -> list[Claim]:
    """What one kind of processor makes of the races: seconds, and memory."""
    command = f"python -m benchmarks peers --name {results}"
    return [
        Claim(f"Throughput against other stacks{processor}", says, (results,), command, peers_table, throughput_plot),
        Claim(
            f"Memory against other stacks{processor}", "Peak RSS of both sides of these races.", (results,), command,
            lambda results: [], memory_plot,
        ),
    ]  # fmt: skip


def reward_scale_table(results: dict[str, Result]) -> Table:
    """A row per offset and scale."""
    rows = [["offset, scale", "score", "distance", "length", "relative"]]
    for name, row in results["reward_scale"]["rows"].items():
        score = f"{row['score']:.2f} +- {row['standard_error']:.2f}"
        distance, relative = f"{row['from_plain_in_standard_errors']:.2f}", f"{row['length_of_plain']:.2f}"
        rows.append([name, score, distance, f"{row['length']:.2f}", relative])
    return rows


CLAIMS = [
    Claim(
        "Capacity", "The deepest model, in steps of one block, that completes a PPO iteration in a device budget.",
        ("capacity_search",), "python -m benchmarks bench capacity_search capacity --device-memory 2GB",
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
        "python -m benchmarks bench bench_s_ddp --model s --strategy ddp --experience_batch_size 1 "
        "--train_batch_size 1", memory_table,
    ),
    Claim(
        "How cost grows", "With model size, row length and depth. A slope is that of a line through logarithms: 1 is "
        "in proportion, 0 does not grow.",
        ("growth",), "python -m benchmarks growth", growth_table, growth_plot,
    ),
    Claim(
        "One GPU", "PPO of four models of one shape, 400 + 112 tokens, on an H100. `plain` is transformers with "
        "PyTorch's Adam(W), four models resident, at the most rows that it held; hydra is LoRA with four roles on one "
        "base.",
        ("gpu_*",), "make gpu-check", gpu_table,
    ),
    Claim(
        "Gradients of bf16 weights", "The largest error of a weight's gradient against fp32's, 512 rows of 8 tokens, "
        "before gradients added up in fp32 and since. The rest is what a bf16 forward and backward round.",
        ("gradients",), "python -m benchmarks gradients OLD_CHECKOUT", gradients_table,
    ),
    Claim(
        "AutoChunk", "One block of transformers, with and without slices; training is a recomputed block. `counted`: "
        "lengths that this machine cannot hold, on tensors without memory.",
        ("autochunk_*", "gpu_*"), "python -m benchmarks autochunk", autochunk_table,
    ),
    Claim(
        "Two ranks", "Learning by two ranks over gloo against two single-threaded processes that do not communicate.",
        ("ranks", "ranks_*"), "python -m benchmarks ranks --layers 12", ranks_table,
    ),
    Claim(
        "The reward's scale", "PPO on one task under nine rewards, offset + scale * the task's score, 3 seeds: "
        "final score in units of the task with its standard error, its distance to that of offset 0, scale 1 in "
        "standard errors, and the length of answers in tokens and relative to that one's.",
        ("reward_scale",), "python -m benchmarks reward_scale", reward_scale_table,
    ),
]  # fmt: skip


def main(arguments: list[str]) -> int:
    """Writes README.md and plots/."""
    parser = flags(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    paths = sorted(options.results.glob("*.json"))
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    (options.out / "plots").mkdir(parents=True, exist_ok=True)
    text = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks tables` from [results/](results/); nothing here is typed by hand. `python -m "
        "benchmarks` lists all benchmarks, `python -m benchmarks NAME --help` explains one, and "
        "[docs/benchmark.md](../docs/benchmark.md) tells what each command does. Commands are those of today; a result "
        "file has the command as it was typed at its commit.",
    ]
    for claim in CLAIMS:
        text += section(claim, results, options.out)
    text += ["", "## Every result", "", *markdown(index_of(results)), ""]
    (options.out / "README.md").write_text("\n".join(text), encoding="utf-8")
    print(f"wrote {options.out / 'README.md'}")
    return 0


OLD_NAMES = {"record": "bench", "peers.run": "peers"}
"""Benchmarks that had another name when a result was measured."""


def command_of(result: Result) -> str:
    """The command that measures the same today: results of before the runner name a module."""
    match = re.fullmatch(r"python -m benchmarks\.([\w.]+)(.*)", result["command"])
    return f"python -m benchmarks {OLD_NAMES.get(match[1], match[1])}{match[2]}" if match else result["command"]


def section(claim: Claim, results: dict[str, Result], out: Path) -> list[str]:
    """One claim as lines of Markdown; draws its plot."""
    sources = {name: result for name, result in results.items() if any(fnmatch(name, glob) for glob in claim.results)}
    lines = ["", f"## {claim.title}", "", claim.says, ""]
    if not sources:
        return [*lines, f"Not measured yet: `{claim.command}`"]
    if claim.plot is not None:
        name = re.sub("[^a-z0-9]+", "-", claim.title.lower()).strip("-")
        figure, axes = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
        claim.plot(sources, axes)
        figure.savefig(out / "plots" / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        lines += [f"![{claim.title}](plots/{name}.svg)", ""]
    lines += markdown(claim.table(sources))
    runs = [
        f"`{command_of(result)}` at {result['commit'][:12]} ([{name}](results/{name}.json))"
        for name, result in sources.items()
    ]
    machine = next(iter(sources.values()))["machine"]
    return [*lines, "", f"By {'; '.join(runs)}. {machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB."]


def index_of(results: dict[str, Result]) -> Table:
    """All files, with the commands that measure them; figures of those that have no section."""
    rows = [["result", "figures", "command", "commit", "date", "torch"]]
    for name, result in results.items():
        torch = result["versions"].get("torch", "-")
        in_section = any(fnmatch(name, glob) for claim in CLAIMS for glob in claim.results)
        measured = {key: figure for key, figure in result.items() if key not in FACTS and not in_section}
        if "exact" in result:  # the GPU checks: what their section does not show
            strategies = result["exact"]["rows"]
            for dtype in ("fp32", "bf16"):
                gaps = [row["largest_difference_to_naive"] for run, row in strategies.items() if run.endswith(dtype)]
                measured[f"{dtype}, largest difference to naive"] = max(gaps)
            measured["naive fp32"] = strategies["naive fp32"]
            measured["small"] = result.get("small", {})
        figures = "; ".join(["above"] * in_section + list(figures_of(measured))).replace("|", "/")
        link, command = f"[{name}](results/{name}.json)", f"`{command_of(result)}`"
        rows.append([link, figures, command, result["commit"][:12], result["date"], torch])
    return rows


FACTS = ("command", "commit", "date", "machine", "versions", "threads", "settings", "model", "seed", "rates", "phases")
MOST_ROWS = 5
"""Of a list whose figures are shown: mean, lowest and highest."""


def figures_of(measured: dict[str, Any], prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The numbers of a result, as `name: number`; those in short lists of rows with their lowest and highest."""
    for key, figure in measured.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(figure, bool | int | float):
            yield f"{name}: {shown(name, figure)}"
        elif isinstance(figure, dict) and depth < 3:
            yield from figures_of(figure, f"{name}, ", depth + 1)
        elif isinstance(figure, list) and len(figure) == 1 and isinstance(figure[0], dict):
            yield from figures_of(figure[0], f"{name}, ", depth + 1)
        elif isinstance(figure, list) and len(figure) <= MOST_ROWS and all(isinstance(row, dict) for row in figure):
            for column, first in figure[0].items() if figure else ():
                if isinstance(first, int | float) and not isinstance(first, bool) and column not in FACTS:
                    numbers = [row[column] for row in figure]
                    mean, lowest, highest = (
                        shown(column, number) for number in (sum(numbers) / len(numbers), min(numbers), max(numbers))
                    )
                    yield f"{name}, {column.replace('_', ' ')}: {mean} ({lowest} to {highest})"


def shown(name: str, number: float) -> str:
    """Bytes in units, other numbers with three digits."""
    if isinstance(number, bool):
        return "yes" if number else "no"
    if "bytes" in re.split("[ _,]+", name):
        return show_bytes(int(number))
    return f"{number:,}" if isinstance(number, int) else f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def markdown(table: Table) -> list[str]:
    """A table's lines; none for an empty one."""
    if not table:
        return []
    assert all(len(row) == len(table[0]) for row in table)
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return [head, "|" + "---|" * len(table[0]), *rows]
