"""Loggers, read back by their own libraries: a killed and resumed run is one run there, with metrics.jsonl's rows.

wandb and trackio are no part of the tests' environment (pyproject.toml says why); they are tested where they are
installed. Each library writes to a directory of this test, offline.
"""

import dataclasses
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy
import pytest
import torch

from penstock.algorithms.sft import sft
from penstock.commands.config import ResumeConfig
from penstock.config import SFTConfig
from penstock.errors import UserError
from penstock.flags import from_dict, parse, to_dict
from penstock.run import checkpoint, loggers
from penstock.run.metrics import read_lines, to_json
from penstock.run.session import Session
from tests.conftest import PATIENCE, cli, metrics, stage_config

STEPS, KILLED = 8, 5
"""Checkpoints are at 3 and 6."""


def logging_config(directory, *names):
    config = stage_config(directory, "sft", "run", steps=STEPS)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, log=names))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where libraries keep runs of all directories; trackio reads its variable when it is imported."""
    home = tmp_path_factory.mktemp("home")
    settings = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db", "TRACKIO_DIR": str(home / "trackio"),
        "WANDB_MODE": "offline",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        for name, value in settings.items():
            patched.setenv(name, value)
        patched.chdir(home)  # MLflow's samples
        yield home


def names_of(run):
    return json.loads((run / "loggers.json").read_text())


def read_tensorboard(run):
    """As TensorBoard's own server reads: every value is a tensor, and what was purged is gone."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run / "tensorboard"), tensor_size_guidance={"scalars": 0, "text": 0}).Reload()
    values = [(event.step, name, make_ndarray(event.tensor_proto).item())
              for name in events.Tags()["tensors"] for event in events.Tensors(name)]  # fmt: skip
    texts = [(step, name.removesuffix("/text_summary"), value.decode()) for step, name, value in values
             if isinstance(value, bytes)]  # fmt: skip
    (config,) = [text for _, name, text in texts if name == "config"]
    numbers = [value for value in values if isinstance(value[2], float)]
    return numbers, Counter((step, name) for step, name, _ in texts if name != "config"), config


def read_wandb(run):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run / "wandb" / "latest-run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    files = list((run / "wandb").glob("offline-run-*"))
    assert {path.name.split("-")[-1] for path in files} == {names_of(run)["wandb"]["id"]}
    values = [(row["_step"], name, float(value)) for row in rows for name, value in row.items()
              if name[0] != "_" and not name.startswith("samples")]  # fmt: skip
    samples = Counter((row["_step"], name[:-6]) for row in rows for name in row if name.endswith(".nrows"))
    return values, samples, str(next(record["run"] for record in records if record["type"] == "run")["config"])


def read_mlflow(run):
    import mlflow

    client, run_id = mlflow.MlflowClient(), names_of(run)["mlflow"]["run_id"]
    own = client.get_run(run_id)
    assert (own.info.status, own.info.run_name) == ("FINISHED", "run")
    numbers = [(metric.step, name, metric.value) for name in own.data.metrics
               for metric in client.get_metric_history(run_id, name)]  # fmt: skip
    files = [file.path for file in client.list_artifacts(run_id, "samples")]
    return numbers, Counter((int(path[-11:-5]), path[:-12]) for path in files), str(own.data.params)


def read_trackio(run):
    from trackio.sqlite_storage import SQLiteStorage

    name = names_of(run)["trackio"]["name"]
    rows = SQLiteStorage.get_logs("penstock", name)
    numbers = [(row["step"], name, value) for row in rows for name, value in row.items()
               if name not in ("step", "timestamp") and not name.startswith("samples/")]  # fmt: skip
    samples = Counter((row["step"], name) for row in rows for name in row if name.startswith("samples/"))
    return numbers, samples, str(SQLiteStorage.get_run_config("penstock", name))


READ = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}
"""Logger -> a function of the run: its numbers (step, name, value), its samples (step, name), its flags as text."""
SECONDS_BEFORE_THE_KILL = {"trackio": 2}
"""So that some rows have arrived; the others write at once."""


FILE_STORE = {"MLFLOW_TRACKING_URI": "file:mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
"""MLflow's older store, without SQLite."""


@pytest.mark.parametrize(
    ("name", "variables"), [*((name, {}) for name in READ), pytest.param("mlflow", FILE_STORE, id="mlflow-files")]
)
def test_a_killed_and_resumed_run_is_one_run_there(name, variables, tmp_path, home, monkeypatch):
    """Killed with kill -9 two steps after a checkpoint. On a CPU the rows that are made again are the same."""
    pytest.importorskip(name, reason=f"needs {name}")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    config = logging_config(tmp_path, name)
    child = os.fork()
    if child == 0:
        try:
            log = Session.log

            def log_and_die(self, step, *arguments, **timing):
                log(self, step, *arguments, **timing)
                if step == KILLED:
                    time.sleep(SECONDS_BEFORE_THE_KILL.get(name, 0))
                    os.kill(os.getpid(), signal.SIGKILL)

            Session.log = log_and_die
            sft(config)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    second = int(time.time())
    while int(time.time()) == second:  # event files are read in the order of their second, then of their process
        time.sleep(0.05)
    run = sft(config, resume=True)
    assert "WARNING: --log" not in (run / "log.txt").read_text()

    numbers, sampled, flags = READ[name](run)
    counts = Counter((step, key) for step, key, _ in numbers)
    assert set(counts.values()) == {1}
    assert {(step, key): value for step, key, value in numbers if not key.startswith(("perf/", "timing/"))} == {
        (row["step"], key): pytest.approx(value, rel=1e-6 if name == "tensorboard" else 0, abs=0)  # its floats are fp32
        for row in metrics(run) for key, value in row.items() if key != "step"
    }  # fmt: skip
    assert {(row["step"], key) for row in read_lines(run / "perf.jsonl") for key in row if key != "step"} <= set(counts)
    assert sampled == {(0, "samples/greedy"): 1, (STEPS, "samples/greedy"): 1}
    assert "micro_batch_size" in flags
    assert str(run) in flags


def write(path, name, rows):
    (path / f"{name}.jsonl").write_text("".join(to_json(row) + "\n" for row in rows))


def test_a_logger_that_is_new_to_a_run_gets_its_whole_record(tmp_path):
    pytest.importorskip("tensorboard")
    write(tmp_path, "metrics", [{"step": step, "loss": None if step == 2 else 1 / step} for step in (1, 2, 3)])
    write(tmp_path, "perf", [{"step": step, "timing/step_seconds": step} for step in (1, 2, 3)])
    write(tmp_path, "samples", [{"step": step, "kind": "greedy", "prompt": "# p"} for step in (0, 0, 3, 4)])
    for first in (4, 5):  # a kill after the first of these two
        opened = loggers.Loggers(["tensorboard", "tensorboard"], tmp_path, {"lr": 1}, pytest.fail)
        opened.log(first, {"loss": 1 / first, "timing/step_seconds": first})
        write(tmp_path, "metrics", [{"step": step, "loss": None if step == 2 else 1 / step} for step in (1, 2, 3, 4)])
    numbers, sampled, flags = read_tensorboard(tmp_path)
    assert [step for step, name, _ in numbers if name == "timing/step_seconds"] == [1, 2, 3, 4, 5]
    losses = [value for _, name, value in numbers if name == "loss"]
    assert losses == pytest.approx([1, math.nan, 1 / 3, 1 / 4, 1 / 5], nan_ok=True)
    assert sampled == {(step, "samples/greedy"): 1 for step in (0, 3, 4)}  # each step's in one text
    assert flags == '    {\n     "lr": 1\n    }'


class Recorder:
    """A logger that keeps what it gets, and fails at some steps."""

    def __init__(self, steps=(), failing=()):
        self.calls, self.steps, self.failing = [], steps, failing

    def open(self, path, config, names, last):
        return loggers.Logger({}, self.steps, self.log, self.sample, self.calls.append)

    def log(self, values, step):
        if step in self.failing:
            raise ConnectionError("no route to host\nand more")
        self.calls.append((step, values))

    def sample(self, kind, table, step):
        self.calls.append((step, kind, table))


def test_samples_wait_for_the_numbers_of_their_step_and_no_step_is_sent_twice(tmp_path, monkeypatch):
    recorder = Recorder(steps=range(3))
    monkeypatch.setitem(loggers.OPEN, "wandb", recorder.open)
    opened = loggers.Loggers(["wandb"], tmp_path, {}, pytest.fail)
    for step in range(1, 5):
        opened.sample(step, [{"kind": "rollout", "prompt": "a", "score": 1.0}, {"kind": "rollout", "prompt": "b"}])
        opened.log(step, {"loss": float("inf")})
    opened.sample(4, [{"kind": "greedy", "prompt": "late"}])
    opened.close(True)
    table = ("samples/rollout", (["prompt", "score"], [["a", 1.0], ["b", None]]))
    assert str(recorder.calls) == str([
        (3, {"loss": math.nan}), (3, *table), (4, {"loss": math.nan}), (4, *table),
        (4, "samples/greedy", (["prompt"], [["late"]])), True,
    ])  # fmt: skip


def test_a_logger_takes_no_random_number_of_the_run(tmp_path, monkeypatch):
    """trackio draws a name: with it, answers of a --reward-fn that draws differed, and again after a resume."""

    def draw(*_):
        return loggers.Logger({str(random.random()): str(numpy.random.rand())}, (), draw, draw, lambda _: torch.rand(1))

    monkeypatch.setitem(loggers.OPEN, "trackio", draw)
    checkpoint.seed_everything(3)
    expected = random.random(), numpy.random.rand(), torch.rand(1)
    checkpoint.seed_everything(3)
    opened = loggers.Loggers(["trackio"], tmp_path, {}, pytest.fail)
    opened.log(1, {"loss": 1.0})
    opened.close(True)
    assert (random.random(), numpy.random.rand(), torch.rand(1)) == expected


def test_a_logger_that_fails_never_ends_the_run(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise RuntimeError("no key")

    recorder = Recorder(failing=(2, 3))
    monkeypatch.setattr(loggers, "require", lambda names: None)
    monkeypatch.setattr("penstock.run.session.require", lambda names: None)
    monkeypatch.setitem(loggers.OPEN, "wandb", recorder.open)
    monkeypatch.setitem(loggers.OPEN, "mlflow", refuse)
    run = sft(logging_config(tmp_path, "wandb", "mlflow"))
    printed = capsys.readouterr().err
    assert printed.count("WARNING: --log mlflow: RuntimeError: no key; the run goes on") == 1
    assert printed.count("WARNING: --log wandb: ConnectionError: no route to host; the run goes on") == 1
    assert "WARNING: --log wandb: failed 2 times" in (run / "log.txt").read_text()
    assert "WARNING: --log mlflow: has nothing of this run" in (run / "log.txt").read_text()
    assert [call[0] for call in recorder.calls[:-1] if len(call) == 2] == [1, 4, 5, 6, 7, 8]
    assert recorder.calls[-1] is True


def test_names_that_cannot_be_kept_are_no_loggers_fault(tmp_path, monkeypatch):
    recorder, said = Recorder(failing=()), []
    monkeypatch.setitem(loggers.OPEN, "wandb", recorder.open)
    (tmp_path / "loggers.json").mkdir()
    loggers.Loggers(["wandb"], tmp_path, {}, said.append).close(True)
    assert recorder.calls == [True]
    assert [line.split(": ")[:2] for line in said] == [["WARNING", "loggers.json"]] * 2
    assert said[1] == "WARNING: loggers.json: failed 2 times"


def test_a_library_that_is_missing_is_said_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "runs_of_wandb").mkdir()
    with pytest.raises(UserError, match="runs_of_wandb is not installed"):  # a directory is no library
        loggers.require(["runs_of_wandb"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ["--model", "nowhere", "--data", "none.jsonl", "--out", tmp_path / "run", "--log", "tensorboard"]
    assert cli("sft", *arguments) == 2
    assert capsys.readouterr().err == (
        "penstock sft: --log tensorboard: tensorboard is not installed: pip install 'penstock[tensorboard]', or leave "
        "it out.\n"
    )
    assert not (tmp_path / "run").exists()


def test_the_flag_takes_any_of_the_four_names():
    flags = ["--model", "m", "--data", "d", "--out", "o"]
    config = parse(SFTConfig, [*flags, "--log", "tensorboard", "mlflow"])
    assert config.run.log == ("tensorboard", "mlflow")
    assert from_dict(SFTConfig, to_dict(config)) == config
    assert set(loggers.OPEN) == set(READ)
    with pytest.raises(UserError, match="--log aim: there are tensorboard, wandb, mlflow, trackio"):
        parse(SFTConfig, [*flags, "--log", "aim"])
    words = (["r"], ["r", "--log"], ["r", "--log", "wandb"])
    resumed = [to_dict(parse(ResumeConfig, row, positional="run")).get("log") for row in words]
    assert resumed == [None, [], ["wandb"]]
