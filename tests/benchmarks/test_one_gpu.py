"""The one-GPU benchmark: what its checker lets through, what it refuses and why, and that our rows are the results'."""

import copy
import csv
import json
import re
import statistics

import pytest

from benchmarks.facts import RESULTS, ROOT
from benchmarks.one_gpu import COLUMNS, OUR_ROWS, SUBMISSIONS, TASKS, check, main, provisional, write_rows
from benchmarks.one_gpu_rows import races, rows_of_results, sentiment
from penstock.models import presets

PPO = {
    "task": "ppo-1558m-512", "stack": "penstock", "version": "1.0", "date": "2026-11-30",
    "device": "NVIDIA H100 80GB HBM3", "device_memory_bytes": 85_520_809_984, "machine": "Xeon, 16 cores, 126 GiB",
    "precision": "bf16", "weights": "full", "options": "--strategy ddp", "seconds_per_step": 4.0, "steps": 3,
    "samples_per_second": 16.0, "tokens_per_second": 8192.0, "peak_device_bytes": 57_700_000_000,
    "peak_rss_bytes": 1_700_000_000, "command": "penstock bench --model xl", "evidence": "results/gpu.json",
}  # fmt: skip
SENTIMENT = {
    **PPO, "task": "sentiment-135m", "seconds_per_step": 8.0, "samples_per_second": 8.0, "tokens_per_second": 256.0,
    "peak_device_bytes": 3_000_000_000, "reward": 0.7, "reward_se": 0.02, "kl": 7.5, "seeds": 3,
}  # fmt: skip
CPU = {**PPO, "device": "cpu", "device_memory_bytes": "", "peak_device_bytes": "", "peak_rss_bytes": 40_000_000_000}


def problems_of(tmp_path, *rows):
    write_rows(list(rows), tmp_path / "rows.csv")
    return check(tmp_path / "rows.csv")


def test_good_rows_pass(tmp_path, capsys):
    rows, problems = problems_of(tmp_path, PPO, SENTIMENT, {**CPU, "seconds_per_step": 3.95})
    assert problems == []
    assert [row["task"] for row in rows] == ["ppo-1558m-512", "sentiment-135m", "ppo-1558m-512"]
    assert main([str(tmp_path / "rows.csv")]) == 0
    assert "3 good rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "changes", "says"),
    [
        (PPO, {"task": "ppo-9b"}, "task: 'ppo-9b' is none of sft-124m"),
        (PPO, {"stack": " "}, "stack: is empty; give the software"),
        (PPO, {"date": "30.11.2026"}, "date: '30.11.2026' is no value"),
        (PPO, {"date": "2126-11-30"}, "date: '2126-11-30' is no day between 2020 and today"),
        (PPO, {"precision": "half"}, "precision: 'half' is none of fp32"),
        (PPO, {"seconds_per_step": "4s"}, "seconds_per_step: '4s' is no value"),
        (PPO, {"seconds_per_step": "nan"}, "seconds_per_step: 'nan' must be at least"),
        (PPO, {"seconds_per_step": "inf"}, "seconds_per_step: 'inf' must be at least"),
        (PPO, {"seconds_per_step": "-4"}, "seconds_per_step: '-4' must be at least"),
        (PPO, {"steps": "2.5"}, "steps: '2.5' is no value"),
        (PPO, {"samples_per_second": 17.0}, "samples_per_second: 17, but 64 in 4 s are 16"),
        (PPO, {"tokens_per_second": 1792.0}, "tokens_per_second: 1792, but 32768 in 4 s are 8192"),  # answers alone
        (
            PPO, {"seconds_per_step": 0.1, "samples_per_second": 640.0, "tokens_per_second": 327680.0},
            "no GPU makes 2.5e+15 in it",
        ),
        (PPO, {"precision": "fp32"}, "no GPU makes 1e+14 in it"),
        (PPO, {"peak_device_bytes": 90_000_000_000}, "peak_device_bytes: 90,000,000,000 of a device with"),
        (PPO, {"peak_device_bytes": ""}, "peak_device_bytes: a row of a GPU needs it"),
        (PPO, {"device_memory_bytes": ""}, "peak_device_bytes: a row of a GPU needs it, and device_memory_bytes"),
        (PPO, {"peak_device_bytes": 5_000_000_000}, "all memories together held 6,700,000,000 bytes"),
        (PPO, {"peak_rss_bytes": 1.7}, "peak_rss_bytes: '1.7' is no value"),  # gigabytes
        (PPO, {"joules_per_step": 20_000.0}, "joules_per_step: 5e+03 watts"),
        (PPO, {"reward": 0.9}, "reward: ppo-1558m-512 has no reward"),
        (PPO, {"task": "ppo-6b-512", "weights": "full"}, "weights: ppo-6b-512 is of adapters"),
        (CPU, {"peak_device_bytes": 1_000}, "peak_device_bytes: a CPU has no device memory"),
        (SENTIMENT, {"kl": ""}, "kl: is empty; sentiment-135m ranks reward within 8 nats"),
        (SENTIMENT, {"kl": 9.0}, "kl: '9' must be from -0.5 to 8"),
        (SENTIMENT, {"reward": 1.2}, "reward: '1.2' must be from -1 to 1"),
        (SENTIMENT, {"reward_se": ""}, "reward_se: is empty"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_refused_with_its_reason(tmp_path, row, changes, says, capsys):
    _, problems = problems_of(tmp_path, row, {**row, **changes})
    assert any(problem.startswith(f"{tmp_path / 'rows.csv'}:3: ") and says in problem for problem in problems), problems
    assert not any(problem.startswith(f"{tmp_path / 'rows.csv'}:2: ") for problem in problems)
    assert main([str(tmp_path / "rows.csv")]) == 1
    assert says in capsys.readouterr().out


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    assert "cannot be read" in check(path)[1][0]
    head = ",".join(COLUMNS) + "\n"
    for content, says in (
        (b"", "head: has no task, stack"),
        (head.encode(), "has no row below its head"),
        (head.replace("task,stack", "stack,task").encode(), "columns are in another order"),
        (head.replace("peak_rss_bytes", "rss").encode(), "head: has no peak_rss_bytes; knows no rss"),
        (head.encode() + b"sft-124m,penstock\n", "has 2 cells, not 24"),
        (b"\xff\xfe" + head.encode(), "in UTF-8"),
    ):
        path.write_bytes(content)
        assert says in check(path)[1][0], content


def test_the_same_row_twice_is_refused(tmp_path):
    rows, problems = problems_of(tmp_path, PPO, PPO)
    assert len(rows) == 1
    assert "rows.csv:2 again" in problems[0]


def test_few_steps_and_few_seeds_make_a_row_provisional(tmp_path, capsys):
    (row,), problems = problems_of(tmp_path, {**SENTIMENT, "steps": 2, "seeds": 1, "reward_se": ""})
    assert problems == []
    assert provisional(row) == ["2 of 3 steps", "1 of 3 seeds"]
    assert main([str(tmp_path / "rows.csv")]) == 0
    assert "1 good rows; 1 of them provisional (1 of 3 seeds, 2 of 3 steps)" in capsys.readouterr().out


def test_tasks_have_the_blocks_of_their_models():
    for task, name in {"ppo-124m": "s", "ppo-1558m-512": "xl", "ppo-6b-512": "6b"}.items():
        shape = presets.named(name)
        products = shape.num_layers * 12 * shape.d_model**2  # without norms and biases, which are less than 0.2 %
        assert TASKS[task].blocks == products
    # SmolLM2-135M: 30 blocks of 576, 9 heads over 3, a gated MLP of 1536
    assert TASKS["sentiment-135m"].blocks == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)


def test_a_step_of_ppo_needs_at_least_what_penstock_counts_less_heads_and_attention():
    counted = json.loads((RESULTS / "gpu_h100.json").read_text())["table"]["rows"]["xl, ddp"]["phases"]
    flops = sum(phase["flops_per_rank"] * phase["times_per_iteration"] for phase in counted.values())
    assert 0.6 * flops < TASKS["ppo-1558m-512"].least_flops("full") < flops


@pytest.mark.parametrize("path", sorted(SUBMISSIONS.glob("*")), ids=lambda path: path.name)
def test_every_submission_here_passes(path):
    assert check(path)[1] == []


def test_our_rows_are_those_of_the_results_and_pass():
    rows, problems = check(SUBMISSIONS / OUR_ROWS)
    assert problems == []
    assert {"TRL", "penstock", "DeepSpeed", "peft", "FSDP2"} <= {row["stack"] for row in rows}
    assert {"cpu", "NVIDIA H100 80GB HBM3"} == {row["device"] for row in rows}
    for row in rows:  # no figure that its evidence does not have
        result = json.loads((ROOT / row["evidence"]).read_text())
        assert result["date"] == row["date"].isoformat()
        numbers = {f"{value:.6g}" for value in numbers_of(result)}
        if row["steps"] % 2 or row["evidence"].endswith("h100.json"):  # of two steps the median is between them
            assert f"{row['seconds_per_step']:.6g}" in numbers, row


def numbers_of(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_of(part)
    elif isinstance(value, int | float):
        yield value


def test_a_side_of_several_races_is_one_row():
    peers = json.loads((RESULTS / "peers_amx.json").read_text())
    rows = [*races(peers)]
    ours = [row for row in rows if row.get("options") == "--dtype bf16" and "stack" not in row]
    sides = [race for race in peers["rows"].values() if race.get("ours") == "ours.py --dtype bf16"]
    assert len(sides) > 1
    (row,) = ours
    seconds = [step for race in sides for step in race["ours_seconds_each"]]
    assert (row["task"], row["steps"]) == ("ppo-124m", len(seconds))
    assert row["seconds_per_step"] == statistics.median(seconds)
    assert row["peak_rss_bytes"] == max(race["ours_peak_rss_bytes"] for race in sides)
    changed = copy.deepcopy(peers)
    for race in changed["rows"].values():
        race["why_not"] = "not installed"
    assert [*races(changed)] == []


def test_sentiment_is_the_seeds_end_within_the_kl():
    """Seeds of one kind of processor: their seconds do not mix."""

    def seed(reward, kl, cpu="one", **flags):
        row = {"after": {"mean": reward, "kl": kl}, "step_seconds": 30.0, "steps": 100, "peak_rss_bytes": 3 * 10**9}
        return {**row, "flags": flags, "cpu": cpu, "commit": "0" * 40}

    rows = {
        "start, seed 0": {"before": {}},
        "ppo lora, seed 0": seed(0.6, 6.0, lora=16),
        "ppo lora, seed 1": seed(0.8, 7.0, lora=16),
        "grpo, seed 0": seed(0.95, 20.0),
        "trl grpo lora, seed 0": seed(0.5, 4.0, lora=16),
        "ppo lora, seed 2": seed(0.9, 5.0, cpu="another", lora=16),
    }
    ours, theirs, other = sentiment({"rows": rows, "machine": {"cpu": "another", "cores": 2, "ram_gb": 24}})
    assert (ours["machine"], other["machine"]) == ("one, 2 cores, 24 GiB", "another, 2 cores, 24 GiB")
    assert (other["seeds"], other["reward"]) == (1, 0.9)
    assert (ours["task"], ours["weights"], ours["seeds"], ours["steps"]) == ("sentiment-135m", "adapters", 2, 200)
    assert (ours["reward"], ours["kl"], ours["reward_se"]) == pytest.approx((0.7, 6.5, 0.1))
    assert (theirs["stack"], theirs["precision"], theirs["seeds"]) == ("TRL", "bf16-autocast", 1)


def test_the_page_has_the_tasks_and_columns_of_the_checker():
    page = (ROOT / "docs" / "one_gpu_benchmark.md").read_text(encoding="utf-8")
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]
    tasks = {cells[0].strip("`"): cells[2:] for cells in tables if cells[0].strip("`") in TASKS}
    assert tasks == {
        name: [str(task.samples), str(task.tokens), ", ".join(task.weights)] for name, task in TASKS.items()
    }
    columns = [cells for cells in tables if cells[0].strip("`") in COLUMNS and len(cells) == 3]
    assert columns == [[f"`{n}`", "yes" if c.needed else "", c.says] for n, c in COLUMNS.items()]


def test_the_file_of_our_rows_is_written_as_the_command_writes_it(tmp_path):
    rows = rows_of_results()
    write_rows(rows, tmp_path / "again.csv")
    again = [*csv.DictReader((tmp_path / "again.csv").open(newline="", encoding="utf-8"))]
    assert len(again) == len(rows)
    assert all(re.fullmatch(r"[^\n]*", cell) for row in again for cell in row.values())
    assert check(tmp_path / "again.csv")[1] == []
