"""The runner's table, and the flags that measures get from their parameters."""

import json
from importlib import import_module

import pytest

from benchmarks import facts, timing
from benchmarks.__main__ import BENCHMARKS, main


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_imports_and_explains_itself(name, capsys):
    module, function = BENCHMARKS[name][0].split(":")
    module = import_module(f"benchmarks.{module}")
    assert callable(getattr(module, function))
    assert f"python -m benchmarks {name}" in module.__doc__


def test_without_a_name_the_benchmarks_are_listed(capsys):
    assert main([]) == 0
    assert main(["nothing"]) == 1
    assert capsys.readouterr().out.count("planted_bugs") == 2


def test_flags_of_measures_are_their_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))

    def fast(rows: int = 2, kind: str = "a") -> dict:
        return {"rows": rows, "kind": kind}

    def slow(rows: int = 3) -> dict:
        return {"rows": rows}

    measures = {"fast": fast, "slow": slow}
    assert facts.run_measures(["--rows", "5"], "", measures, "x") == 0
    assert json.loads((tmp_path / "x_fast.json").read_text())["kind"] == "a"
    assert json.loads((tmp_path / "x_slow.json").read_text())["rows"] == 5
    for wrong in (["slow", "--kind", "b"], ["medium"]):
        with pytest.raises(SystemExit):
            facts.run_measures(wrong, "", measures, "x")


def test_calls_take_turns_and_warm_ups_are_not_kept():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert timing.alternate(calls, 2, warm_ups=1) == {"a": [3, 5], "b": [4, 6]}
    assert order == list("ababab")
    assert timing.ratios({"a": [4.0, 9.0], "b": [2.0, 3.0]}, "a", "b") == [2.0, 3.0]
