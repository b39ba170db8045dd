"""A launcher that runs the same command line again: torchrun after a rank's death, or a scheduler."""

import dataclasses
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from penstock.distributed.world import World
from penstock.errors import UserError
from penstock.run.session import Session
from tests.conftest import PATIENCE, cli, demonstrations, last_model, metrics, stage_config

DYING = """
import os, signal, sys
from penstock.cli import main
from penstock.distributed import cores
from penstock.distributed.heartbeat import Heartbeat
from penstock.run.session import Session

Heartbeat.__init__.__kwdefaults__.update(beat=0.2)
checkpoint = Session.checkpoint

def dies_once(self, step, *args, **options):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if self.path.name == "harmed" and step == 3 and self.world.rank == 1 and first:
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoint(self, step, *args, **options)

Session.checkpoint = dies_once
assert cores.threads(dict(os.environ)) is not None  # OMP_NUM_THREADS is torchrun's
for out in ("unharmed", "harmed"):
    main([*sys.argv[2:], "--out", f"{sys.argv[1]}/{out}"])
"""


def command(model, data, *more):
    shared = ["--max-length", "32", "--batch-size", "4", "--steps", "5", "--device", "cpu", "--checkpoint-every", "2"]
    return ["sft", "--model", model, "--data", data, *shared, "--resume-if-present", *more]


def test_after_a_ranks_death_torchrun_starts_all_again_and_the_run_ends_as_if_nothing_had_been(
    tmp_path, tiny_model, jsonl
):
    (tmp_path / "dying.py").write_text(DYING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    arguments = command(tiny_model(), jsonl(demonstrations(20)))
    done = subprocess.run(
        [*launch, tmp_path / "dying.py", tmp_path, *arguments], capture_output=True, text=True, timeout=PATIENCE,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from step-000002" in (tmp_path / "harmed" / "log.txt").read_text()
    assert metrics(tmp_path / "harmed") == metrics(tmp_path / "unharmed")
    weights = [(last_model(tmp_path / out) / "model.safetensors").read_bytes() for out in ("harmed", "unharmed")]
    assert weights[0] == weights[1]


def test_the_same_command_line_begins_goes_on_and_ends(tmp_path, tiny_model, jsonl, monkeypatch, capsys):
    arguments = command(tiny_model(), jsonl(demonstrations(20)), "--out", tmp_path / "run")
    log = Session.log

    def stop(self, step, *args, **options):
        log(self, step, *args, **options)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "log", stop)
        assert cli(*arguments) == 128 + signal.SIGTERM
    assert len(metrics(tmp_path / "run")) == 3
    assert cli(*arguments) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert cli(*arguments, "--steps", "7") == 0  # the length is the run's own
    assert "--steps 5, as" in capsys.readouterr().err
    assert len(metrics(tmp_path / "run")) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [(["--lr", "0.5"], "--lr: --resume-if-present goes on"), (["--seed", "3"], "was begun with 0"),
     (["--no-resume-if-present"], "exists and is not empty")],
)  # fmt: skip
def test_a_run_that_was_begun_otherwise_is_refused_by_the_flags_name(
    tmp_path, tiny_model, jsonl, capsys, changes, message
):
    arguments = command(tiny_model(), jsonl(demonstrations(20)), "--out", tmp_path / "run", "--steps", "1")
    assert cli(*arguments) == 0
    assert cli(*arguments, *changes) == 2
    assert message in capsys.readouterr().err


def test_a_run_of_another_command_and_a_directory_that_is_no_run_are_refused(tmp_path, tiny_model, jsonl, capsys):
    data = jsonl(demonstrations(20))
    arguments = command(tiny_model(), data, "--out", tmp_path / "run", "--steps", "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    assert cli(*arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    (tmp_path / "run" / "notes").unlink()
    assert cli(*arguments) == 0
    others = ["kto", *arguments[1:]]
    assert cli(*others) == 2
    assert "is a run of penstock sft, and this is penstock kto" in capsys.readouterr().err


def test_ranks_that_see_different_directories_are_not_let_go_on(tmp_path):
    class Divided(World):
        def gather(self, item):
            return [item, not item]

    config = stage_config(tmp_path, "sft", "run")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume_if_present=True))
    with pytest.raises(UserError, match="it must be one directory"):
        Session("sft", config, Divided(0, 2, torch.device("cpu")))


def test_a_second_sigterm_does_not_cost_the_checkpoint_and_a_second_ctrl_c_stops_at_once(capfd):
    session = Session.__new__(Session)
    session._signal, session._progress = 0, None
    session.world = SimpleNamespace(first=True)
    session.config = SimpleNamespace(run=SimpleNamespace(json=False, quiet=False))
    session._note_signal(signal.SIGTERM, None)
    assert "SIGTERM: stops with a checkpoint, soon" in capfd.readouterr().err
    try:
        session._note_signal(signal.SIGTERM, None)  # Slurm's, and torchrun's
    except KeyboardInterrupt:
        pytest.fail("a second SIGTERM stops at once")
    assert session._signal == signal.SIGTERM
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt):
        session._note_signal(signal.SIGINT, None)
