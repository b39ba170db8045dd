"""benchmarks/README.md, its plots and submissions/penstock.csv, from benchmarks/results/*.json and nothing else.

    python -m benchmarks tables [--results DIR] [--out DIR]

A claim is one section: a table, often a plot, and the command that measured it. What was not measured says so.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from string import Formatter
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from benchmarks.facts import RESULTS, flags
from benchmarks.one_gpu import OUR_ROWS, write_rows
from benchmarks.one_gpu_rows import rows_of_results
from penstock.units import show_bytes

HERE = Path(__file__).parent
Result = dict[str, Any]
Results = dict[str, Result]
"""Contents of result files by name."""
OURS, THEIRS, THIRD = "#1f6f8b", "#b8b8b8", "#d98c3f"
plt.rcParams.update({"svg.hashsalt": "penstock", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


@dataclass(frozen=True)
class Claim:
    """One section. `results`: patterns of the files it is made of; it needs one of them at least."""

    title: str
    says: str
    results: tuple[str, ...]
    command: str
    runs: Callable[[Results], Iterable[Result]]
    """The rows of the table."""
    columns: dict[str, str]
    """Heads, and templates of the cells."""
    plots: dict[str, Callable[[Results, Any], None]] = field(default_factory=dict)
    """By title, what draws on axes."""


class Cells(Formatter):
    """str.format with three more formats: bytes, M (millions), ms. Text in the place of a number stays text."""

    def format_field(self, value: Any, spec: str) -> str:
        """A number in its format."""
        if isinstance(value, str):
            return value
        if spec == "bytes":
            return show_bytes(int(value))
        return f"{value / 1e6:.0f}M" if spec == "M" else f"{1e3 * value:.1f}" if spec == "ms" else format(value, spec)


def cell_of(templates: str, run: Result) -> str:
    """The first of "TEMPLATE|TEMPLATE" whose figures the run has; empty where it has none."""
    for template in templates.split("|"):
        with suppress(KeyError):
            return Cells().vformat(template, (), run).replace("|", "/")
    return ""


def markdown(columns: dict[str, str], runs: Iterable[Result]) -> list[str]:
    """A table's lines."""
    rows = [[cell_of(template, run) for template in columns.values()] for run in runs]
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]


def bars(runs: Iterable[Result], axes: Any, label: str, **keys: str) -> None:
    """A group of bars for each run that was measured: one for each key, in its color."""
    runs = [run for run in runs if all(isinstance(run.get(key), int | float) for key in keys)]
    for i, (key, color) in enumerate(keys.items()):
        heights = [row + 0.4 * i for row in range(len(runs))]
        axes.barh(heights, [run[key] for run in runs], 0.8 / len(keys), color=color)
    axes.set_yticks(range(len(runs)), [run["name"] for run in runs])
    axes.invert_yaxis()
    axes.set_xlabel(label)


# --- capacity ---------------------------------------------------------------------------------------------------------

SIDES = {"ours": "penstock", "published": "plain PyTorch, four fp32 models", "fair": "plain PyTorch, bf16 + masters"}


def capacity_runs(results: Results) -> Iterator[Result]:
    """One per budget and side."""
    for search in results.values():
        figures = {key: search[key] for key in ("layers", "parameters_per_model", "ratios")}
        figures["peak"] = {"ours": search["ours"]["peak_device_bytes"], **search["peak_device_bytes_of_plain"]}
        for side, name in SIDES.items():
            measured = {key: sides[side] for key, sides in figures.items() if sides.get(side) is not None}
            yield {"budget": search["budget_bytes"], "name": name, **measured}


def capacity_plot(results: Results, axes: Any) -> None:
    """Parameters."""
    bars(capacity_runs(results), axes, "parameters in each of four models", parameters_per_model=OURS)


# --- peers ------------------------------------------------------------------------------------------------------------


def peers_runs(results: Results) -> Iterator[Result]:
    """One per race."""
    (peers,) = results.values()
    for name, race in peers["rows"].items():
        yield {**race, "name": name, "pairs": len(race.get("ours_seconds_each", ()))}


def throughput_plot(results: Results, axes: Any) -> None:
    """How many times faster."""
    bars(peers_runs(results), axes, "times faster than the peer, step by step in turns (1: as fast)", times_faster=OURS)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def memory_plot(results: Results, axes: Any) -> None:
    """Peak RSS of both sides."""
    label = "peak RSS, bytes: penstock (dark) and the peer"
    bars(peers_runs(results), axes, label, ours_peak_rss_bytes=OURS, theirs_peak_rss_bytes=THEIRS)


def races(results: str, processor: str, says: str) -> Claim:
    """What one kind of processor makes of the races: seconds, and memory."""
    titles = [f"{subject} against other stacks{processor}" for subject in ("Throughput", "Memory")]
    return Claim(
        titles[0], says, (results,), f"python -m benchmarks peers --name {results}", peers_runs,
        {
            "work and peer": "{name}", "ours, s": "{ours_seconds:.2f}", "theirs, s": "{theirs_seconds:.2f}",
            "times faster": "{times_faster:.2f}|{why_not}", "our RSS": "{ours_peak_rss_bytes:bytes}",
            "their RSS": "{theirs_peak_rss_bytes:bytes}", "share": "{share_of_their_rss:.2f}", "pairs": "{pairs}",
        },
        dict(zip(titles, (throughput_plot, memory_plot), strict=True)),
    )  # fmt: skip


# --- growth -----------------------------------------------------------------------------------------------------------

SERIES = {"sizes": "parameters", "lengths": "length", "depths": "layers"}


def growth_runs(results: Results) -> Iterator[Result]:
    """One per point, then the slopes."""
    growth = results["growth"]
    for series in SERIES:
        yield from growth.get(series, [])
    for series in SERIES:
        for name, slope in growth.get(f"slopes_{series}", {}).items():
            if slope is not None:
                yield {"size": f"slope of {name} ({series})", "seconds_per_token": f"{slope:.2f}"}


def growth_plot(results: Results, axes: Any) -> None:
    """Cost and device memory, in multiples of the smallest point."""
    growth, drawn = results["growth"], []
    for (series, x), color in zip(SERIES.items(), (OURS, THIRD, THEIRS), strict=True):
        points = [point for point in growth.get(series, []) if "why_not" not in point]
        for key, style in (("seconds_per_iteration", "-o"), ("peak_device_bytes", "--s")) if points else ():
            across, up = ([point[name] / points[0][name] for point in points] for name in (x, key))
            axes.plot(across, up, style, color=color, markersize=4, label=f"{key.replace('_', ' ')} by {x}")
            drawn += across
    if drawn:
        axes.plot([1, max(drawn)], [1, max(drawn)], ":", color="black", linewidth=0.8, label="in proportion")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.legend(fontsize=7)
    axes.set_xlabel("times the smallest")
    axes.set_ylabel("times the cost of the smallest")


# --- ranks, GPUs, AutoChunk -------------------------------------------------------------------------------------------


def bench_runs(results: Results) -> Iterator[Result]:
    """One per run of `penstock bench`."""
    for name, run in results.items():
        yield {**run, "name": name, "processes": f"{run['world']} process{'es' if run['world'] > 1 else ''}"}


def ranks_runs(results: Results) -> Iterator[Result]:
    """One per machine and side."""
    for result in results.values():
        for name, rate in result["samples_per_second"].items():
            share = result["share_of_ideal"].get(name, "1: they do not communicate")
            yield {"cpu": result["machine"]["cpu"], "name": name, "rate": rate, "share": share}


def gpu_runs(results: Results) -> Iterator[Result]:
    """One per run on the card: ours by `penstock bench`, plain transformers at the most rows it held."""
    for result in results.values():
        for name, run in result["table"]["rows"].items():
            if "phases" in run:
                rows = run["settings"]["experience_batch_size"] * run["phases"]["rollout"]["times_per_iteration"]
                run["rate"] = rows / run["seconds_per_iteration"]
            yield {**run, "name": name, "why_not": run.get("error", "").split(". The plan")[0]}


def autochunk_runs(results: Results) -> Iterator[Result]:
    """One per block, attention and way of use that was timed; then what was only counted."""
    for name, result in results.items():
        timed = result["autochunk"]["rows"].values() if "autochunk" in result else result["rows"]
        card = ", on the card" if name.startswith("gpu") else ""
        for run in [*timed, *result.get("counted", []), *result.get("longest", [])]:
            way = ("training" if run["training"] else "forward") + (", frozen weights" if run.get("frozen") else "")
            run = {"extra_time": "counted", **run, "block": run["block"] + card, "way": way}
            if "times" in run:
                tokens = f"{run['tokens']['plain']:,} to {run['tokens']['sliced']:,}"
                run["tokens"] = f"longest in {show_bytes(run['budget'])}: {tokens}"
                run["extra_time"] = f"{run['times']:.0f} times"
            yield run


def padding_runs(results: Results) -> Iterator[Result]:
    """Kinds of rows."""
    for name, run in results["engine_padding"]["runs"].items():
        yield {"name": name, "computed_share": run["computed"] / run["tokens"], **run}


def named_rows(results: Results) -> Iterator[Result]:
    """The rows of the files, each with its name."""
    for result in results.values():
        for name, run in result["rows"].items():
            yield {"note": "", **run, "name": name}


def sentiment_curves(results: Results, key: str) -> Iterator[tuple[str, str | None, str, list[list[float]]]]:
    """Of each sentiment run that has this curve: its color, its setting's label the first time, its line (TRL's are
    dashed), and columns: steps, seconds, rewards, KLs. Ours and TRL's of one task share a color."""
    tasks: list[str] = []
    labelled: set[str] = set()
    for name, run in results["sentiment"]["rows"].items():
        if key in run:
            setting = name.partition(", seed")[0]
            task = setting.removeprefix("trl ").removesuffix(" fp32")
            tasks += [task] * (task not in tasks)
            label = None if setting in labelled else setting
            labelled.add(setting)
            line = "-" if setting == task else ":" if setting.endswith("fp32") else "--"
            yield f"C{tasks.index(task) % 10}", label, line, list(zip(*run[key], strict=True))


def frontier_plot(results: Results, axes: Any) -> None:
    """Reward against KL at each evaluation, in colors of settings."""
    for color, label, _, (_, _, rewards, nats) in sentiment_curves(results, "curve"):
        axes.plot(nats, rewards, "o", color=color, markersize=3, label=label)
    axes.set_xlabel("KL from the start, nats per answer")
    axes.set_ylabel("held-out reward")
    axes.legend(frameon=False, fontsize=8)


def learning_plot(results: Results, axes: Any) -> None:
    """Reward against time, TRL's runs dashed, or dotted where they are in fp32."""
    for color, label, line, (_, seconds, rewards, _) in sentiment_curves(results, "trained"):
        axes.plot([at / 60 for at in seconds], rewards, line, color=color, linewidth=1.2, label=label)
    axes.set_xlabel("minutes (dashed, dotted: TRL)")
    axes.set_ylabel("reward of five steps' own answers")
    axes.legend(frameon=False, fontsize=8)


def sentiment_runs(results: Results) -> Iterator[Result]:
    """What was trained, and the model before."""
    yield from (row for row in named_rows(results) if "times_faster" not in row)


def sentiment_turns(results: Results) -> Iterator[Result]:
    """Ours beside TRL's. At the highest reward that both runs of the seed reached: their steps, of so many seconds."""
    rows = results["sentiment"]["rows"]
    for name, row in rows.items():
        if "times_faster" in row:
            seed = name.rpartition(", ")[2]
            sides = [(side, rows.get(f"{row[key]}, {seed}", {}).get("steps_to", {}), row[f"{side}_seconds"])
                     for side, key in (("ours", "setting"), ("theirs", "their_setting"))]  # fmt: skip
            both = sorted(set(sides[0][1]) & set(sides[1][1]), key=float)
            level = {"level": float(both[-1])} if both else {}
            for side, steps, seconds in sides if both else ():
                level |= {f"{side}_steps": steps[both[-1]], f"{side}_to": steps[both[-1]] * seconds}
            if both:
                level["sooner"] = level["theirs_to"] / level["ours_to"]
            yield {**row, **level, "name": name}


def sentiment_samples(results: Results) -> Iterator[Result]:
    """Per held-out prompt, what one seed's model of each setting answered."""
    shown: set[str] = set()
    for name, row in results["sentiment"]["rows"].items():
        setting, samples = name.rpartition(", seed")[0], row.get("after", row.get("before", {})).get("samples", [])
        for sample in samples if setting not in shown else ():
            yield {**sample, "response": " ".join(sample["response"].replace("|", "/").split()), "name": name}
        shown |= {setting} if samples else set()


def real_stages(results: Results) -> Iterator[Result]:
    """One per algorithm over all seeds; the base model's gold first."""
    result = results["demo_real_algorithms"]
    stages = result["stages"]
    base = sum(stage["base_gold"] for stage in stages) / len(stages)
    yield {"name": "the model as it came", "gold": base, "proxy": "", "kl": "", "seconds": "", "model_bytes": ""}
    for name, row in result["over_all_seeds"].items():
        row = {key: "" if figure is None else figure for key, figure in row.items()}
        least = "" if name == "sft" else f"{row['least_standard_errors_of_a_seed']:.1f}"
        yield {**row, "name": name, "gain_shown": "" if name == "sft" else f"{row['gain']:+.2f}", "least": least}


def overdone_rows(results: Results) -> Iterator[Result]:
    """One per run: its warnings in order, and gold where it began, was best and ended."""
    for row in named_rows(results):
        first, last = row["curve"][0], row["curve"][-1]
        best = max(row["curve"], key=lambda point: point["gold"])
        lines = ", ".join(f"{name} {step}" for name, step in sorted(row["warnings"].items(), key=lambda pair: pair[1]))
        yield {
            **row,
            "first": first,
            "best": best,
            "last": last,
            "lines": lines or "none",
            "down": row["down_at"] or "-",
        }


def overdone_plot(results: Results, axes: Any) -> None:
    """Gold of held-out questions by step, and where it has turned down."""
    for i, (name, row) in enumerate(results["overdone"]["rows"].items()):
        steps, golds = zip(*((point["step"], point["gold"]) for point in row["curve"]), strict=True)
        axes.plot(steps, golds, "o-", color=f"C{i}", markersize=3, label=name)
        for point in row["curve"]:
            if point["step"] == row["down_at"]:
                axes.plot(point["step"], point["gold"], "v", color=f"C{i}", markersize=9)
    axes.set_xlabel("step (a triangle: gold is two standard errors below its best)")
    axes.set_ylabel("hidden gold, held-out questions")
    axes.legend(frameon=False, fontsize=8)


def tiers_plot(results: Results, axes: Any) -> None:
    """What each placement held on the device, and the one curve of all."""
    lines = zip(results["tiers"]["rows"].items(), (THEIRS, OURS, THIRD), ("-", "-", "--"), strict=False)
    for (name, run), color, style in lines:
        across = range(1, len(run["device_bytes"]) + 1)
        axes.plot(across, [nbytes / 1e9 for nbytes in run["device_bytes"]], style, color=color, label=name)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("device memory, GB")
    axes.set_xlabel("step")
    reward = axes.twinx()
    reward.plot(*zip(*results["tiers"]["curve"], strict=True), ":", color="black", label="reward, of all three")
    reward.set_ylabel("reward")
    axes.legend(
        handles=[*axes.lines, *reward.lines],
        frameon=False,
        fontsize=8,
        ncols=4,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )


def reliability_runs(results: Results) -> Iterator[Result]:
    """One per part of the campaign, and their sum."""
    parts = results["reliability"]["parts"]
    counts = ("trials", "survived", "resumed", "refused")
    total: Result = {count: sum(part[count] for part in parts.values()) for count in counts}
    total["faults"] = {}
    for part in parts.values():
        for fault, count in part["faults"].items():
            total["faults"][fault] = total["faults"].get(fault, 0) + count
    for name, row in {**parts, "all": total}.items():
        faults = {fault: row["faults"].get(fault, 0) for fault in ("lost", "silent", "traceback")}
        others = ", ".join(f"{count} {fault}" for fault, count in row["faults"].items() if fault not in faults)
        yield {**row, **faults, "name": f"{name}: {RELIABILITY[name]}", "others": others or "0"}


RELIABILITY = {
    "kills": "kill -9 at random moments, every algorithm under every strategy",
    "disk": "a full, failing or read-only disk, or kill -9, at operations on files",
    "clock": "the wall clock jumps",
    "memory": "a tensor finds no memory; a limit of address space",
    "ranks": "one rank of two stopped, killed, or stopped for good",
    "damage": "a changed bit in each file of a run",
    "twice": "two processes on one run directory",
    "data": "data files with mistakes",
    "models": "config.json and safetensors headers with mistakes",
    "all": "every part",
}


CLAIMS = [
    Claim(
        "Capacity", "The deepest model, in steps of one block, that completes a PPO iteration in a device budget.",
        ("capacity_search",), "python -m benchmarks bench capacity_search capacity --device-memory 2GB", capacity_runs,
        {
            "device budget": "{budget:bytes}", "side": "{name}", "blocks": "{layers}",
            "parameters per model": "{parameters_per_model:M}|none fits", "most device memory": "{peak:bytes}|-",
            "ours has": "{ratios:.1f} times as many",
        },
        {"Capacity": capacity_plot},
    ),
    races(
        "peers", "", "Each peer in an environment of its own, step by step in turns with ours; medians, the median "
        "of the paired ratios, and the peak RSS of both sides. Here on a processor without bf16 instructions.",
    ),
    races("peers_avx512", " (AVX512-BF16)", "The same races on a processor that multiplies bf16 in its vectors."),
    races("peers_amx", " (AMX)", "And on one with a matrix unit."),
    Claim(
        "The published benchmark", "`penstock bench` as it was recorded, run by run.",
        ("bench_*",),
        "python -m benchmarks bench bench_s_ddp --model s --strategy ddp --experience_batch_size 1 "
        "--train_batch_size 1", bench_runs,
        {
            "run": "{name}: {settings[model]}, {settings[strategy]}, {settings[dtype]}, {processes}",
            "device, most in use": "{peak_device_bytes:bytes}", "planned": "{planned[device]:bytes}",
            "host homes": "{peak_host_bytes:bytes}", "disk": "{peak_disk_bytes:bytes}", "RSS": "{peak_rss_bytes:bytes}",
            "seconds per iteration": "{seconds_per_iteration:.1f}",
        },
    ),
    Claim(
        "How cost grows", "With model size, row length and depth. A slope is that of a line through logarithms: 1 is "
        "in proportion, 0 does not grow.",
        ("growth",), "python -m benchmarks growth", growth_runs,
        {
            "size": "{size}", "blocks": "{layers}", "length": "{length}", "parameters": "{parameters:M}|{why_not}",
            "ms per token": "{seconds_per_token:ms}", "device, most in use": "{peak_device_bytes:bytes}",
            "largest block": "{block_bytes:bytes}",
        },
        {"How cost grows": growth_plot},
    ),
    Claim(
        "One GPU", "PPO of four models of one shape, 400 + 112 tokens, on an H100. `plain` is transformers with "
        "PyTorch's Adam(W), four models resident, at the most rows that it held; hydra is LoRA with four roles on one "
        "base.",
        ("gpu_*",), "make gpu-check", gpu_runs,
        {
            "run": "{name}", "rows at once": "{settings[experience_batch_size]}|{best[rows]}",
            "s per iteration": "{seconds_per_iteration:.2f}|{best[seconds][1]:.2f}",
            "samples per second": "{rate:.2f}|{best[samples_per_second]:.2f}|{why_not}",
            "learning, share of GEMM rate": "{phases[train][share_of_gemm_peak]:.0%}",
            "device, most in use": "{peak_device_bytes:bytes}|{best[peak]:bytes}", "planned": "{planned[device]:bytes}",
        },
    ),
    Claim(
        "Rows of different lengths", "SFT steps on 32 rows of 16 to 1024 tokens in micro-batches of 8, in turns: end "
        "to end (`--padding-free`, the default) against padded. `sorted`: as the commands have the rows of a step. "
        "Tokens are those of whole rows, no padding, `computed` those that rows do not share; the gap is the largest "
        "of a gradient, over the largest gradient.",
        ("engine_padding",), "python -m benchmarks engine padding", padding_runs,
        {
            "lengths, order": "{name}", "padding": "{share_of_padding:.0%}", "computed": "{computed_share:.0%}",
            "tokens/s, padded": "{tokens_per_second[padded]:.0f}",
            "tokens/s, end to end": "{tokens_per_second[end_to_end]:.0f}", "times faster": "{speedup:.2f}",
            "gap of gradients": "{largest_gradient_gap:.1e}",
        },
    ),
    Claim(
        "AutoChunk", "One block of transformers, with and without slices; training is a recomputed block. `counted`: "
        "lengths that this machine cannot hold, on tensors without memory.",
        ("autochunk_*", "gpu_*"), "python -m benchmarks autochunk", autochunk_runs,
        {
            "block": "{block}", "attention": "{attention}", "tokens": "{tokens:,}", "": "{way}",
            "peak": "{peak_before:bytes}", "in slices": "{peak_after:bytes}", "cut": "{cut:.1%}",
            "more time": "{extra_time:.1%}", "largest difference": "{difference:.1e}",
        },
    ),
    Claim(
        "Two ranks", "Learning by two ranks over gloo against two single-threaded processes that do not communicate.",
        ("ranks", "ranks_*"), "python -m benchmarks ranks --layers 12", ranks_runs,
        {
            "two processes on two cores": "{cpu}", "": "{name}", "samples per second, both": "{rate:.3f}",
            "share of the ideal": "{share:.2f}",
        },
    ),
    Claim(
        "Losses, advantages and gradients against TRL", "The largest differences between a step of ours and the "
        "trainers of TRL 1.16.0 on the same rows, tiny models of GPT-2's and Llama's kind in fp32: of an answer's "
        "log-probability, KL (KTO) or advantage, loss, and as a share the gradient's norm.",
        ("losses",), "python -m benchmarks losses", named_rows,
        {
            "loss": "{name}", "log-probability": "{logps:.0e}", "KL, advantage": "{kl:.0e}|{advantages:.0e}",
            "loss's value": "{loss:.0e}", "gradient": "{grad_norm:.0e}", "what differs by definition": "{note}",
        },
    ),
    Claim(
        "Reliability", "Runs that are killed, starved, interrupted and lied to. Survived: it ended with an undisturbed "
        "run's bytes, or read a file as it is. Resumed: killed, and `penstock resume` ended with these bytes. Refused: "
        "one paragraph with its exit code, and where a run had begun it went on to the same bytes once the cause was "
        "gone. Lost: it did not. Silent: other bytes, and nothing was said.",
        ("reliability",), "python -m benchmarks reliability", reliability_runs,
        {
            "part": "{name}", "trials": "{trials}", "survived": "{survived}", "resumed": "{resumed}",
            "refused": "{refused}", "lost": "{lost}", "silent": "{silent}", "traceback": "{traceback}",
            "other faults": "{others}",
        },
    ),
    Claim(
        "The reward's scale", "PPO on one task under nine rewards, offset + scale * the task's score, 3 seeds: "
        "final score in units of the task with its standard error, its distance to that of offset 0, scale 1 in "
        "standard errors, and the length of answers in tokens and relative to that one's.",
        ("reward_scale",), "python -m benchmarks reward_scale", named_rows,
        {
            "offset, scale": "{name}", "score": "{score:.2f} +- {standard_error:.2f}",
            "distance": "{from_plain_in_standard_errors:.2f}", "length": "{length:.2f}",
            "relative": "{length_of_plain:.2f}",
        },
    ),
    Claim(
        "Sentiment on a real model", "SmolLM2-135M-Instruct writes about films in at most 32 tokens; the reward is "
        "VADER's compound score (-1 to 1), on 200 prompts about other films. KL and perplexity are those of its "
        "answers under the start; distinct-2 is the share of different pairs of words. Answers are the last "
        "weights'; the curve is of 64 of the prompts. Seconds: until the mean of five steps' own answers is "
        "there, our evaluations and checkpoints included. One thread each; 64 answers a step (longer: 128), eight to "
        "each prompt of about 46 tokens, which ours computes once per group; activations are kept on both sides. "
        "Ours has a base in bf16 and adapters in fp32, as `trl grpo lora` has; `fp32` is TRL's default.",
        ("sentiment",), "python -m benchmarks sentiment", sentiment_runs,
        {
            "run": "{name}",
            "reward": "{after[mean]:+.2f} +- {after[standard_error]:.2f}|{before[mean]:+.2f} +- "
            "{before[standard_error]:.2f}, best of 16 {best_of_16[mean]:+.2f}",
            "KL, nats": "{after[kl]:.1f}|0", "distinct-2": "{after[distinct_2]:.2f}|{before[distinct_2]:.2f}",
            "perplexity": "{after[reference_perplexity]:.1f}|{before[reference_perplexity]:.1f}",
            "tokens": "{after[tokens]:.0f}|{before[tokens]:.0f}",
            "s to +0.5": "{seconds_to[0.5]:.0f}", "s to +0.6": "{seconds_to[0.6]:.0f}",
            "s to +0.7": "{seconds_to[0.7]:.0f}",
            "steps": "{steps}", "s a step": "{step_seconds:.0f}", "peak RSS": "{peak_rss_bytes:bytes}",
            "processor": "{cpu}",
        },
        {"Reward against KL on a real model": frontier_plot, "Reward against time on a real model": learning_plot},
    ),
    Claim(
        "The same task in TRL, step by step in turns", "Seconds of whole steps of ours and of TRL's, A B A B on one "
        "thread each with the other standing still, none with an evaluation; the median of the paired ratios, and the "
        "peak RSS of both. Sooner: the steps until the mean of five steps' own answers was there, in the runs of the "
        "same seed above, times these seconds.",
        ("sentiment",), "python -m benchmarks sentiment 'trl ppo lora in turns' --seeds 0", sentiment_turns,
        {
            "run": "{name}", "ours, s": "{ours_seconds:.1f}", "theirs, s": "{theirs_seconds:.1f}",
            "times faster": "{times_faster:.2f}", "reward": "{level:+.1f}",
            "our steps to it": "{ours_steps}", "theirs": "{theirs_steps}", "times sooner": "{sooner:.2f}",
            "our RSS": "{ours_peak_rss_bytes:bytes}", "their RSS": "{theirs_peak_rss_bytes:bytes}",
            "share": "{share_of_their_rss:.2f}", "processor": "{cpu}",
        },
    ),
    Claim(
        "What it wrote", "Answers of those models to the first held-out prompts, unchosen, and what the reward says.",
        ("sentiment",), "python -m benchmarks sentiment",
        lambda results: sorted(sentiment_samples(results), key=lambda row: row["prompt"]),
        {"asked": "{prompt}", "run": "{name}", "answer": "{response}", "reward": "{score:+.2f}"},
    ),
    Claim(
        "A task that can be checked, on a real model", "SmolLM2-135M-Instruct and the times table, pairs of factors "
        "that it was not trained on, by the built-in reward `number`: share of right answers with Wilson's interval.",
        ("times",), "python -m benchmarks times", named_rows,
        {
            "run": "{name}", "before": "{before[accuracy]:.0%} ({before[low]:.0%} to {before[high]:.0%})",
            "after": "{after[accuracy]:.0%} ({after[low]:.0%} to {after[high]:.0%})", "steps": "{steps}",
            "s a step": "{step_seconds:.0f}", "peak RSS": "{peak_rss_bytes:bytes}",
        },
    ),
    Claim(
        "Three stages on a real model", "SmolLM2-135M-Instruct (`penstock demo --real --algorithms --scale 2`): SFT on "
        "the best of four of its own answers, noisy rankings of answers, and every algorithm from that SFT model. "
        "Gold, on which nothing is trained, of 200 held-out questions a seed; the last columns: of the seed with the "
        "least gain how many standard errors above SFT, and what models, gradients and moments held.",
        ("demo_real_algorithms",), "python -m benchmarks demo --algorithms --real --seeds 3", real_stages,
        {
            "": "{name}", "gold": "{gold:+.2f}", "above SFT": "{gain_shown}|-", "reward model": "{proxy:+.2f}",
            "KL from SFT, nats": "{kl:.1f}", "s": "{seconds:.0f}", "least seed": "{least}|-",
            "held": "{model_bytes:bytes}",
        },
    ),
    Claim(
        "Trained far too long", "From those models with five times the demo's steps, PPO and GRPO without a penalty on "
        "KL, DPO and KTO over the same labels again and again: hidden gold, the reward model's score of the same "
        "answers and KL at the start, at gold's best and at the end; when gold had fallen by two standard errors, and "
        "the first step of each warning that the run printed.",
        ("overdone",), "python -m benchmarks overdone --seeds 0", overdone_rows,
        {
            "run": "{name}", "start": "{first[gold]:+.2f}", "best": "{best[gold]:+.2f} at step {best[step]}",
            "end": "{last[gold]:+.2f} at step {last[step]}", "down by step": "{down}",
            "reward model": "{first[proxy]:+.1f}, {best[proxy]:+.1f}, {last[proxy]:+.1f}",
            "KL, nats": "{best[kl]:.1f}, {last[kl]:.1f}", "warnings": "{lines}",
        },
        {"Gold of a real model that is trained too long": overdone_plot},
    ),
    Claim(
        "One command against its own plan", "`penstock align` on the demo's data and on SmolLM2-135M-Instruct with 200 "
        "comparisons, on the whole machine and as if it were a smaller one: what it planned after its trial of a few "
        "steps and what it took (beside other work); memory by its plan, where all rows are the longest, in its trial, "
        "and taken; the held-out score of start and end: the reward model's, or the nats per token by which better "
        "answers are likelier.",
        ("align",), "python -m benchmarks align", named_rows,
        {
            "run": "{name}", "stages": "{stages}", "planned": "{planned_seconds:.0f} s",
            "taken": "{seconds:.0f} s, {seconds_ratio:.2f}", "memory at most": "{planned_bytes:bytes}",
            "in its trial": "{trial_bytes:bytes}", "taken in all": "{peak_bytes:bytes}, {bytes_ratio:.2f}",
            "score": "{score[0]:.3f} to {score[1]:.3f}",
            "hidden gold, sft and end": "{gold[0]:.2f} to {gold[1]:.2f}| ",
        },
    ),
    Claim(
        "One run in three places", "GRPO of all weights of SmolLM2-135M-Instruct in bf16, one seed, resident and "
        "streamed through 300 MB of device memory: whether every metric is equal to the last byte, the most that each "
        "tier held, and the process.",
        ("tiers",), "python -m benchmarks tiers", named_rows,
        {
            "weights, gradients, moments": "{name}", "metrics": "{equal}", "device": "{held[device_tier_bytes]:bytes}",
            "host": "{held[host_tier_bytes]:bytes}|-", "disk": "{held[disk_tier_bytes]:bytes}|-",
            "process": "{held[host_peak_bytes]:bytes}", "s a step": "{step_seconds:.0f}",
        },
        {"One curve and three lines of memory": tiers_plot},
    ),
]  # fmt: skip


def main(arguments: list[str]) -> int:
    """Writes README.md, plots/ and our rows of the one-GPU benchmark."""
    parser = flags(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    paths = sorted(options.results.glob("*.json"))
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for folder in ("plots", "submissions"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    write_rows(rows_of_results(options.results), options.out / "submissions" / OUR_ROWS)
    text = [
        "# Benchmarks",
        "",
        "## The field",
        "",
        (HERE / "field.md").read_text(encoding="utf-8").rstrip(),
        "",
        "## How these figures were made",
        "",
        "Written by `python -m benchmarks tables` from [results/](results/); none is typed by hand. `python -m "
        "benchmarks` lists all benchmarks, `python -m benchmarks NAME --help` explains one, and "
        "[docs/benchmark.md](../docs/benchmark.md) tells what each command does. Commands are those of today; a result "
        "file has the command as it was typed at its commit.",
    ]
    for claim in CLAIMS:
        text += section(claim, results, options.out)
    columns = {
        "result": "[{name}](results/{name}.json)", "figures": "{figures}", "command": "`{command}`",
        "commit": "{commit}", "date": "{date}", "torch": "{versions[torch]}|-",
    }  # fmt: skip
    text += ["", "## Every result", "", *markdown(columns, index_of(results)), ""]
    (options.out / "README.md").write_text("\n".join(text), encoding="utf-8")
    print(f"wrote {options.out / 'README.md'}")
    return 0


OLD_WORDS = {"record": "bench", "peers.run": "peers", "fewer": "engine", "streamed": ""}
"""Benchmarks that had another name when a result was measured, and those that are gone."""


def command_of(result: Result) -> str:
    """The command that measures the same today: results of before the runner name a module."""
    words = result["command"].replace("-m benchmarks.", "-m benchmarks ").split(" ")
    return " ".join(filter(None, (OLD_WORDS.get(word, word) for word in words)))


def section(claim: Claim, results: Results, out: Path) -> list[str]:
    """One claim as lines of Markdown; draws its plot."""
    sources = {name: result for name, result in results.items() if any(fnmatch(name, glob) for glob in claim.results)}
    lines = ["", f"## {claim.title}", "", claim.says, ""]
    rows = [*claim.runs(sources)] if sources else []
    if not rows:
        return [*lines, f"Not measured yet: `{claim.command}`"]
    for title, plot in claim.plots.items():
        name = re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
        figure, axes = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
        plot(sources, axes)
        figure.savefig(out / "plots" / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        lines += [f"![{title}](plots/{name}.svg)", ""]
    lines += markdown(claim.columns, rows)
    runs = [
        f"`{command_of(result)}` at {result['commit'][:12]} ([{name}](results/{name}.json))"
        for name, result in sources.items()
    ]
    machine = next(iter(sources.values()))["machine"]
    on = f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB"
    return [*lines, "", f"Last written by {'; '.join(runs)}. {on}."]


def index_of(results: Results) -> Iterator[Result]:
    """All files, with the commands that measure them; figures of those that have no section."""
    for name, result in results.items():
        in_section = any(fnmatch(name, glob) for claim in CLAIMS for glob in claim.results)
        measured = {key: figure for key, figure in result.items() if key not in FACTS and not in_section}
        if "exact" in result:  # the GPU checks: what their section does not show
            runs = result["exact"]["rows"].items()
            for dtype in ("fp32", "bf16"):
                gaps = [row["largest_difference_to_naive"] for run, row in runs if run.endswith(dtype)]
                measured[f"{dtype}, largest difference to naive"] = max(gaps)
            measured |= {"naive fp32": result["exact"]["rows"]["naive fp32"], "small": result.get("small", {})}
        every = [*figures_of(measured)]
        more = [f"{len(every) - MOST_FIGURES} more in the file"] if len(every) > MOST_FIGURES else []
        figures = "; ".join(["above"] * in_section + every[:MOST_FIGURES] + more)
        facts = {"command": command_of(result), "commit": result["commit"][:12]}
        yield {**result, **facts, "name": name, "figures": figures}


FACTS = ("command", "commit", "date", "machine", "versions", "threads", "settings", "model", "seed", "rates", "phases")
MOST_FIGURES = 40
"""Of one file."""
MOST_ROWS = 5
"""Of a list whose figures are shown: mean, lowest and highest."""


def figures_of(measured: Result, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The numbers of a result, as `name: number`; those in short lists of rows with their lowest and highest."""
    for key, figure in measured.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(figure, list) and len(figure) == 1 and isinstance(figure[0], dict):
            figure = figure[0]
        if isinstance(figure, bool | int | float):
            yield f"{name}: {shown(name, figure)}"
        elif isinstance(figure, dict) and depth < 3:
            yield from figures_of(figure, f"{name}, ", depth + 1)
        elif isinstance(figure, list) and 0 < len(figure) <= MOST_ROWS and all(isinstance(row, dict) for row in figure):
            for column, first in figure[0].items():
                if isinstance(first, int | float) and not isinstance(first, bool) and column not in FACTS:
                    numbers = [row[column] for row in figure]
                    spread = (sum(numbers) / len(numbers), min(numbers), max(numbers))
                    mean, lowest, highest = (shown(column, number) for number in spread)
                    yield f"{name}, {column.replace('_', ' ')}: {mean} ({lowest} to {highest})"


def shown(name: str, number: float) -> str:
    """Bytes in units, other numbers with three digits."""
    if isinstance(number, bool):
        return "yes" if number else "no"
    words = re.split("[ _,]+", name)
    if "bytes" in words and "ratio" not in words:
        return show_bytes(int(number))
    return f"{number:,}" if isinstance(number, int) else f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
