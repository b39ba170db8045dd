"""The races against other stacks, with a peer of ten lines: turns, rows that say why not, and the page they fill."""

import json
import sys

import pytest

from benchmarks import growth, tables
from benchmarks.peers import run
from benchmarks.peers.run import RACES, TINY, Race, Side
from tests.conftest import PATIENCE

PEER = """
import sys, time
print("a library that talks")
sys.path.insert(0, {here!r})
from turns import Turns
turns = Turns()
print("and goes on talking")
turns.take(lambda: time.sleep(0.01))
"""


@pytest.fixture
def peer(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER.format(here=str(run.HERE)))
    return str(script)


def test_a_side_steps_when_it_is_asked_and_ends_when_it_is_not(peer):
    side = Side([sys.executable, peer])
    steps = [side.step() for _ in range(3)]
    assert all(0.01 <= step["seconds"] < PATIENCE for step in steps)
    assert all(step["peak_rss_bytes"] > 1 << 20 for step in steps)
    side.close()
    assert side._process.returncode == 0


@pytest.mark.parametrize("work", ["sft", "grpo --rows 4 --group 2 --micro 2"])
def test_a_race_pairs_the_steps_and_leaves_the_warm_up_out(peer, work):
    race = Race("plain", peer, f"--work {work}")
    found = run.race(race, sys.executable, 2, TINY)
    assert len(found["ours_seconds_each"]) == len(found["theirs_seconds_each"]) == 2
    ratios = sorted(b / a for a, b in zip(found["ours_seconds_each"], found["theirs_seconds_each"], strict=True))
    assert found["times_faster"] == pytest.approx(sum(ratios) / 2)
    assert found["share_of_their_rss"] == found["ours_peak_rss_bytes"] / found["theirs_peak_rss_bytes"]
    assert found["requirements"][0].startswith("torch==")


def test_a_peer_that_cannot_be_installed_has_a_row_that_says_why_and_the_rest_goes_on(tmp_path, peer, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(run, "ENVIRONMENTS", tmp_path / "peers")
    gone = tmp_path / "gone.py"
    gone.write_text("raise ImportError('no such operator')\n")
    races = {"a": Race("nowhere", peer, ""), "b": Race("here", str(gone), "--work sft"),
             "c": Race("here", peer, "--work sft", narrow=True)}  # fmt: skip
    monkeypatch.setattr(run, "RACES", races)
    monkeypatch.setattr(run, "OURS", peer)
    monkeypatch.setattr(run, "slow_in_bf16", lambda device_type: True)  # one of each where theirs is in bf16

    def install(name):
        if name == "nowhere":
            raise RuntimeError("not installed: no matching distribution")
        return sys.executable

    monkeypatch.setattr(run, "environment_of", install)
    monkeypatch.setattr(run, "requirements_of", lambda name: ["torch==0"])
    run.main(["--only", "a", "b", "c", "--tiny", "--repeats", "1"])
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert rows["a"] == {"why_not": "not installed: no matching distribution"}
    assert "no such operator" in rows["b"]["why_not"]
    assert len(rows["c"]["ours_seconds_each"]) == 1


def test_every_race_has_a_script_and_pinned_requirements():
    for race in RACES.values():
        assert (run.HERE / race.theirs.split()[0]).is_file()
        lines = run.requirements_of(race.environment)
        assert lines[0] == "torch==2.13.0"
        assert all("==" in line for line in lines)


def test_a_slope_is_the_power_that_cost_grows_with():
    points = [{"x": x, "y": 3 * x**2, "flat": 7} for x in (1, 2, 4, 8)]
    assert growth.slope(points, "x", "y") == pytest.approx(2)
    assert growth.slope(points, "x", "flat") == pytest.approx(0)
    assert growth.slope(points[:1], "x", "y") is None


FACTS = {
    "command": "python -m benchmarks.x", "commit": "a" * 40, "date": "2026-11-25",
    "machine": {"cpu": "a cpu", "cores": 2, "ram_gb": 24}, "versions": {"torch": "2.13.0"},
}  # fmt: skip
POINT = {"size": "s", "layers": 12, "length": 128, "parameters": 124e6, "seconds_per_token": 0.01, "block_bytes": 14e6,
         "seconds_per_iteration": 1.3, "peak_device_bytes": 2e8}  # fmt: skip
ANSWERS = {
    "mean": 0.1,
    "standard_error": 0.05,
    "kl": 3.0,
    "distinct_2": 0.8,
    "reference_perplexity": 20.0,
    "tokens": 30.0,
}
TAKEN = {"steps": 10, "step_seconds": 20.0, "peak_rss_bytes": 2e9}
MEASURED = {
    "losses": {"rows": {"dpo": {"logps": 2e-6, "loss": 6e-7, "grad_norm": 3e-7},
                        "rloo": {"logps": 2e-6, "advantages": 0.0, "loss": 0.1, "grad_norm": 0.9, "note": "a ratio"}}},
    "reward_scale": {"rows": {"50, 10": {"score": 3.3, "standard_error": 0.15, "from_plain_in_standard_errors": 0.35,
                                         "length": 6.0, "length_of_plain": 1.01}}},
    "capacity_search": {
        "budget_bytes": 2 * 10**9, "layers": {"ours": 60, "published": 1, "fair": 0},
        "parameters_per_model": {"ours": 5.3e8, "published": 4.6e7, "fair": None},
        "ratios": {"published": 11.5, "fair": None}, "ours": {"peak_device_bytes": 1.9e9},
        "peak_device_bytes_of_plain": {"published": 1.8e9, "fair": None},
    },
    "peers": {"rows": {
        "ppo, TRL": {"ours_seconds": 2.0, "theirs_seconds": 5.0, "times_faster": 2.5, "ours_peak_rss_bytes": 2e9,
                     "theirs_peak_rss_bytes": 4e9, "share_of_their_rss": 0.5, "ours_seconds_each": [2.0]},
        "sft, other": {"why_not": "not installed"},
    }},
    "growth": {"sizes": [POINT, {**POINT, "parameters": 355e6}, {"size": "xl", "layers": None, "length": 128,
                                                                  "why_not": "killed"}],
               "slopes_sizes": {"peak_device_bytes by parameters": 0.0}},
    "gpu_x": {
        "table": {"rows": {
            "xl, ddp": {"settings": {"experience_batch_size": 64}, "seconds_per_iteration": 4.0,
                        "phases": {"rollout": {"times_per_iteration": 1}, "train": {"share_of_gemm_peak": 0.74}},
                        "peak_device_bytes": 57e9, "planned": {"device": 58e9}},
            "xl, plain": {"best": {"rows": 4, "seconds": [9.0, 8.0], "samples_per_second": 0.5, "peak": 69e9}},
            "a giant": {"error": "does not fit. The plan: ..."},
        }},
        "autochunk": {"rows": {"one": {"block": "gpt2-xl", "attention": "eager", "tokens": 8192, "training": True,
                                       "peak_before": 10e9, "peak_after": 2e9, "cut": 0.8, "extra_time": 0.03,
                                       "difference": 1e-6}}},
    },
    "sentiment": {"rows": {
        "start, seed 0": {"before": {**ANSWERS, "samples": [{"prompt": "Of Up?", "response": "It |is\nfine.",
                                                            "score": 0.2}]}, "best_of_16": {"mean": 0.9}},
        "grpo lora, seed 0": {"after": {**ANSWERS, "mean": 0.7}, **TAKEN, "best_within_hour": [10, 200.0, 0.7, 3.0],
                              "curve": [[5, 100.0, 0.4, 1.0], [10, 200.0, 0.7, 3.0]],
                              "trained": [[5, 100.0, 0.4, 1.0], [10, 200.0, 0.7, 3.0]],
                              "seconds_to": {"0.5": 130.0, "0.6": 170.0}, "steps_to": {"0.5": 6, "0.6": 9}},
        "trl grpo lora, seed 0": {"after": {**ANSWERS, "mean": 0.6}, **TAKEN, "steps_to": {"0.5": 8}},
        "trl grpo lora in turns, seed 0": {
            "setting": "grpo lora", "their_setting": "trl grpo lora", "ours_seconds": 10.0, "theirs_seconds": 30.0,
            "times_faster": 3.0, "ours_peak_rss_bytes": 1e9, "theirs_peak_rss_bytes": 2e9, "share_of_their_rss": 0.5},
    }},
    "times": {"rows": {"grpo lora, seed 0": {"before": {"accuracy": 0.2, "low": 0.15, "high": 0.26}, **TAKEN,
                                             "after": {"accuracy": 0.5, "low": 0.43, "high": 0.57}}}},
    "demo_real_algorithms": {"stages": [{"base_gold": 0.2}, {"base_gold": 0.3}], "over_all_seeds": {
        "sft": {"gold": 0.3, "proxy": 0.1, "kl": 0.0, "gain": 0.0, "least_standard_errors_of_a_seed": 0.0,
                "seconds": 200.0, "model_bytes": 5e8},
        "ppo": {"gold": 1.5, "proxy": 2.0, "kl": 7.3, "gain": 1.2, "least_standard_errors_of_a_seed": 14.0,
                "seconds": None, "model_bytes": 6e8}}},
    "overdone": {"rows": {"grpo, seed 0": {
        "curve": [{"step": step, "gold": gold, "standard_error": 0.05, "proxy": proxy, "kl": kl}
                  for step, gold, proxy, kl in ((0, 0.3, 0.1, 0.0), (16, 1.6, 2.5, 9.0), (32, 0.9, 3.5, 30.0))],
        "down_at": 32, "warnings": {"kl/high": 20, "length": 8}}}},
    "align": {"rows": {"demo, seed 0": {
        "stages": "sft -> ppo", "planned_seconds": 60.0, "seconds": 66.0, "seconds_ratio": 1.1, "planned_bytes": 2e9,
        "trial_bytes": 9e8,
        "peak_bytes": 1e9, "bytes_ratio": 1.11, "score": [0.1, 2.0], "gold": [0.4, 2.5],
    }}},
    "tiers": {"curve": [[1, 0.2]], "rows": {"disk": {"equal": "equal", "step_seconds": 20.0, "device_bytes": [3e8],
                                "held": {"device_tier_bytes": 3e8, "host_peak_bytes": 1e9}}}},
    "ranks": {"samples_per_second": {"alone": 1.0, "zero2": 0.85}, "share_of_ideal": {"zero2": 0.85}},
}  # fmt: skip


def test_the_page_is_made_of_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "rows_of_results", lambda results: [])  # test_one_gpu.py has them
    results = tmp_path / "results"
    results.mkdir()
    tables.main(["--results", str(results), "--out", str(tmp_path)])
    empty = (tmp_path / "README.md").read_text()
    assert empty.count("Not measured yet") == len(tables.CLAIMS)
    for name, found in MEASURED.items():
        (results / f"{name}.json").write_text(json.dumps({**FACTS, **found}))
    tables.main(["--results", str(results), "--out", str(tmp_path)])
    page = (tmp_path / "README.md").read_text()
    for cell in ("| 11.5 times as many |", "| none fits |", "| 2.50 |", "| not installed |", "| killed |", "| 0.85 |"):
        assert cell in page
    for cell in (
        "| dpo | 2e-06 |  | 6e-07 | 3e-07 |  |",
        "| rloo | 2e-06 | 0e+00 | 1e-01 | 9e-01 | a ratio |",
        "| 3.30 +- 0.15 | 0.35 | 6.00 | 1.01 |",
        "| 16.00 |",
        "| 74% |",
        "| 0.50 |",
        "| does not fit |",
        "| 80.0% |",
        "| 3.0% |",
        "| start, seed 0 | +0.10 +- 0.05, best of 16 +0.90 |",
        "| 130 | 170 |",
        "| Of Up? | start, seed 0 | It /is fine. | +0.20 |",
        "| trl grpo lora in turns, seed 0 | 10.0 | 30.0 | 3.00 | +0.5 | 6 | 8 | 4.00 | 1.00 GB | 2.00 GB | 0.50 |  |",
        "| 50% (43% to 57%) |",
        "| demo, seed 0 | sft -> ppo | 60 s | 66 s, 1.10 | 2.00 GB | 900.00 MB | 1.00 GB, 1.11 | 0.100 to 2.000 |",
        "| disk | equal | 300.00 MB | - | - |",
        "| the model as it came | +0.25 | - |",
        "| ppo | +1.50 | +1.20 | +2.00 | 7.3 |  | 14.0 | 600.00 MB |",
        "| +0.30 | +1.60 at step 16 | +0.90 at step 32 | 32 | +0.1, +2.5, +3.5 | 9.0, 30.0 | length 8, kl/high 20 |",
    ):
        assert cell in page
    unmeasured = 5  # penstock bench, padding, reliability, the races on two other processors
    assert page.count("Not measured yet") == unmeasured
    for plot in ("capacity", "throughput-against-other-stacks", "memory-against-other-stacks", "how-cost-grows"):
        assert (tmp_path / "plots" / f"{plot}.svg").stat().st_size > 1000
        assert f"(plots/{plot}.svg)" in page


def test_the_page_in_the_repository_is_what_its_results_give(tmp_path):
    """Nobody typed a figure into it."""
    tables.main(["--out", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == (tables.HERE / "README.md").read_text()
