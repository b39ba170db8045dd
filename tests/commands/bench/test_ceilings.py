"""`penstock bench micro` and the planner that reads it."""

import json

import pytest

from penstock.planner import machine
from penstock.planner.traffic import Rates
from tests.conftest import cli


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "penstock"


def test_ceilings_are_measured_kept_and_planned_with(cache, capsys):
    assert cli("bench", "micro", "--device", "cpu", "--quick", "--repeats", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(machine.path_of("cpu").read_text()) == found
    rates = {"gemm_fp32", "gemm_bf16", "copy", "link", "disk_read", "disk_write", "adamw", "decode_fp32", "decode_bf16"}
    assert all(found[name] > 0 for name in rates)
    assert [path.parent for path in cache.glob("*.json")] == [cache]
    rates = machine.rates("fp32", network=1e9)
    assert (rates.flops, rates.host, rates.network) == (found["gemm_fp32"], found["adamw"], 1e9)

    plan = ["plan", "--model", "s", "--dtype", "fp32", "--json"]
    assert cli(*plan, "--rates", "measured") == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert cli(*plan) == 0
    given = json.loads(capsys.readouterr().out)["seconds"]
    ratio = 200e12 / found["gemm_fp32"]
    assert seconds["score"]["compute"] == pytest.approx(given["score"]["compute"] * ratio)


def test_a_planner_without_measurements_says_how_to_get_them(cache, capsys):
    assert cli("plan", "--model", "s", "--rates", "measured") == 2
    assert "run penstock bench micro first" in capsys.readouterr().err
    machine.save("cpu", {"gemm_fp32": "fast"})
    assert cli("plan", "--model", "s", "--rates", "measured") == 2
    assert "cannot be read" in capsys.readouterr().err


def test_bench_has_no_other_uses(capsys):
    assert cli("bench", "macro") == 2
    assert "penstock bench micro or penstock bench capacity" in capsys.readouterr().err


def test_a_run_takes_the_planners_rates_where_nothing_was_measured_or_the_file_is_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.known_rates("fp32") == Rates()
    machine.path_of("cpu").parent.mkdir(parents=True, exist_ok=True)
    machine.path_of("cpu").write_text("{ broken")
    assert machine.known_rates("fp32") == Rates()
