"""Checkpoints that a thread writes beside training, on two ranks of FSDP2: whole or not there, one after the other, and
what goes wrong with them ends the run."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.run import checkpoint
from tests.algorithms.test_ranks import command_line
from tests.conftest import PATIENCE, metrics

WORKER = """
import json, os, resource, signal, sys, threading, time
from pathlib import Path
import penstock.algorithms.ppo, penstock.memory.fsdp, torch._dynamo, torch.distributed.checkpoint  # once for all
from penstock.run import checkpoint, optimizer_files, report
from penstock.run.session import Session
from tests.conftest import cli, rank_environments

folder, run = Path(sys.argv[1]), json.loads(sys.argv[2])
publish, write_parts = checkpoint._publish, optimizer_files._write_parts
end_saving, waits = Session._end_saving, threading.Event()
report.run_report = lambda path, _: path  # charts take longer than such a run

def late(shards, directory, **options):
    "Writes when training is a step further, but for the last."
    path = Path(directory)
    step = int(path.parent.name[5:11])
    while step < 3 and (path.parents[2] / "metrics.jsonl").read_bytes().count(b"\\n") <= step:
        time.sleep(0.01)
    write_parts(shards, directory, **options)

def noted(unfinished, final, step, meta):
    for word in ("begin", "end"):
        with (folder / "order").open("a") as file:
            print(word, step, file=file)
        if word == "begin":
            publish(unfinished, final, step, meta)

def killed(unfinished, final, step, meta):
    if step == 2:
        for pid in map(int, (folder / "pids").read_text().split()):
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    publish(unfinished, final, step, meta)

def full(shards, directory, **options):
    "The second rank's disk is full from the second checkpoint on."
    if os.environ["RANK"] == "1" and "step-000002" in directory:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    write_parts(shards, directory, **options)

def stopped(shards, directory, **options):
    "SIGTERM comes while the first checkpoint is written, which is done when the one of the stop waits for it."
    if "step-000001" in directory and not waits.is_set():
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        waits.wait(300)
    write_parts(shards, directory, **options)

def waiting(self):
    if self._saving is not None:
        waits.set()
    end_saving(self)

def ranks(name, *arguments):
    codes = []
    (folder / "pids").unlink(missing_ok=True)
    environments, children = rank_environments(2), []
    for environment in environments:
        if (child := os.fork()) == 0:
            os.environ.update(environment)
            with (folder / "pids").open("a") as file:
                print(os.getpid(), file=file)
            optimizer_files._write_parts = {"full": full, "stopped": stopped}.get(name, late)
            checkpoint._publish = {"beside": noted, "killed": killed}.get(name, publish)
            Session._end_saving = waiting
            sys.stderr.flush()
            code = cli(*arguments)
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    print(json.dumps([name, [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]]), flush=True)

for name in ("beside", "killed", "full", "stopped"):
    ranks(name, *run, "--out", str(folder / name))
ranks("resumed", "resume", str(folder / "killed"))
ranks("continued", "resume", str(folder / "stopped"))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of these runs, their ranks' exit codes, and what they printed."""
    folder = tmp_path_factory.mktemp("runs")
    shared = ["--max-length", "32", "--batch-size", "6", "--micro-batch-size", "2", "--steps", "3", "--lr", "1e-3",
              "--device", "cpu", "--strategy", "fsdp", "--checkpoint-every", "1", "--keep", "9", "--epochs",
              "1"]  # fmt: skip
    run = command_line("ppo", folder, *shared)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, folder, json.dumps(run)], capture_output=True, text=True, timeout=PATIENCE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, dict(map(json.loads, done.stdout.splitlines())), done.stderr


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits_for_it(runs):
    folder, codes, errors = runs
    assert codes["beside"] == [0, 0], errors[-3000:]
    order = [f"{word} {step}" for step in range(1, 4) for word in ("begin", "end")]
    assert (folder / "order").read_text().splitlines() == order
    for step in range(1, 4):
        checkpoint.verify(folder / "beside" / "checkpoints" / f"step-{step:06d}")


def files(run):
    """The sha256 of each file of the last checkpoint, but for those that hold a random name and times."""
    manifest = json.loads((run / "checkpoints" / "step-000003" / "manifest.json").read_text())
    return {
        name: facts["sha256"]
        for name, facts in manifest["files"].items()
        if not name.endswith((".metadata", "state.json"))
    }


def test_a_run_that_was_killed_in_the_middle_of_it_goes_on_from_the_one_before(runs):
    folder, codes, errors = runs
    assert codes["killed"] == [-9, -9], errors[-3000:]
    assert "resumed from step-000001" in errors
    assert codes["resumed"] == [0, 0], errors[-3000:]
    assert not [*(folder / "killed" / "checkpoints").glob("*.tmp-*")]
    assert metrics(folder / "killed") == metrics(folder / "beside")
    assert files(folder / "killed") == files(folder / "beside")
    assert "critic.optimizer/__1_0.distcp" in files(folder / "killed")


def test_a_signal_while_it_is_written_stops_the_run_behind_a_checkpoint_of_its_own(runs):
    folder, codes, errors = runs
    assert codes["stopped"] == [128 + signal.SIGTERM] * 2, errors[-3000:]
    assert f"SIGTERM: stopped after a checkpoint; go on with: penstock resume {folder / 'stopped'}" in errors
    assert codes["continued"] == [0, 0], errors[-3000:]
    assert not [*(folder / "stopped" / "checkpoints").glob("*.tmp-*")]
    assert metrics(folder / "stopped") == metrics(folder / "beside")
    assert files(folder / "stopped") == files(folder / "beside")


def test_a_disk_that_is_full_on_another_rank_ends_the_run_with_its_exit_code(runs):
    folder, codes, errors = runs
    assert codes["full"][0] == 3, errors[-3000:]
    assert "the checkpoint of step 2 could not be finished; step-000001 is intact" in errors
    assert [path.name for path in (folder / "full" / "checkpoints").iterdir() if path.is_dir()] == ["step-000001"]
