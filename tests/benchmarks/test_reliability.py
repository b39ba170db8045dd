"""The campaign itself: it sees what it is to find, and each of its parts runs."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.facts import ROOT
from benchmarks.reliability.run import PARTS, main, summary
from benchmarks.reliability.runs import HUNG, Ended, Subject
from tests.conftest import PATIENCE

REFUSAL = "step 1 of 4\npenstock sft: /x: the disk is full. Free some space, and try again.\n"


@pytest.mark.parametrize(("ended", "fault"), [
    (Ended(0, "wrote report.html\n"), None), (Ended(3, REFUSAL), None), (Ended(-9, ""), "killed"),
    (Ended(HUNG, ""), "hung"), (Ended(3, f"Traceback (most recent call last):\n{REFUSAL}"), "traceback"),
    (Ended(5, "penstock sft: internal error (KeyError): please report it.\n"), "traceback"),
    (Ended(4, "penstock sft: /d.jsonl:3: id: no\n/d.jsonl:4: id: no\nMend 2 bad lines, or leave ...\n"), None),
    (Ended(4, "penstock sft: /d.parquet:1: file: cannot be read (bad\n); mend it\n"), "traceback"),
    (Ended(2, "penstock sft: two\nparagraphs\n"), "traceback"), (Ended(1, REFUSAL), "traceback"),
])  # fmt: skip
def test_a_refusal_is_one_paragraph_with_its_exit_code(ended, fault):
    assert ended.fault == fault


@pytest.fixture
def run_of_text(tmp_path):
    """A subject whose run is there: metrics that say what is given, beside a checkpoint."""

    def make(metrics, problem=None):
        run = tmp_path / "run"
        (run / "checkpoints" / "step-000001").mkdir(parents=True)
        (run / "checkpoints" / "latest").write_text("step-000001\n")
        (run / "metrics.jsonl").write_text(metrics)
        expected = {"metrics.jsonl": "1b4f0e9851971998e732078544c96b36c3d01cedf7caa332359d6f1d83567014"}  # of "test1"

        class Resumed(Subject):
            def go_on(self):
                return problem

        return Resumed(tmp_path, [], expected, 0.0)

    return make


@pytest.mark.parametrize(("metrics", "ended", "problem", "verdict"), [
    ("test1", Ended(0, ""), None, "survived"), ("test2", Ended(0, ""), None, "silent"),
    ("test2", Ended(-9, ""), None, "resumed"), ("test2", Ended(-9, ""), "other bytes", "lost"),
    ("test2", Ended(3, REFUSAL), None, "refused"), ("test2", Ended(3, REFUSAL), "3: again", "lost"),
    ("test2", Ended(4, REFUSAL), None, "exit code"), ("test2", Ended(5, "Traceback"), None, "traceback"),
])  # fmt: skip
def test_verdicts(run_of_text, metrics, ended, problem, verdict):
    assert run_of_text(metrics, problem).judged(ended)["verdict"] == verdict


def test_a_summary_counts_and_keeps_what_broke_a_promise(capsys):
    lost = {"name": "sft", "verdict": "lost", "text": "why"}
    rows = [{"name": "sft", "verdict": "resumed", "while writing one": True}, lost, {"name": "x", "verdict": "refused"}]
    part = summary("kills", iter(rows))
    assert (part["trials"], part["resumed"], part["refused"], part["survived"]) == (3, 1, 1, 0)
    assert (part["faults"], part["broken"], part["while writing one"]) == ({"lost": 1}, [lost], 1)
    assert "why" in capsys.readouterr().err


def test_a_part_that_the_result_has_is_not_made_again(tmp_path, monkeypatch):
    made = {"trials": 1, "broken": [{"verdict": "lost"}]}
    (tmp_path / "reliability.json").write_text(json.dumps({"parts": dict.fromkeys(PARTS, made)}))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("benchmarks.reliability.faults.preloaded", lambda arguments: None)
    monkeypatch.setattr("benchmarks.reliability.run.import_all", lambda: None)
    assert main([]) == 1  # what is in the file broke promises


QUICK = ("kills", "disk", "damage", "twice")
SLOW = tuple(part for part in PARTS if part not in QUICK)


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and LD_PRELOAD")
@pytest.mark.parametrize(
    ("parts", "counts"),
    [(QUICK, 2), pytest.param([part for part in PARTS if part not in QUICK], 4, marks=pytest.mark.slow)],
)
def test_no_promise_is_broken(parts, counts, tmp_path):
    command = [sys.executable, "-m", "benchmarks", "reliability", *parts, "--counts", str(counts)]
    environment = {**os.environ, "OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    parts_made = json.loads((tmp_path / "reliability.json").read_text())["parts"]
    assert set(parts_made) == set(parts)
    assert all(part["trials"] >= counts and not part["broken"] for part in parts_made.values())
