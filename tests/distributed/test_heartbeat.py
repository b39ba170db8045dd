"""A rank that dies, hangs or fails is named to the others, who stop; one that is done is not missed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from penstock.distributed import world as world_module
from penstock.errors import ResourceError
from penstock.memory.strategy import Strategy
from penstock.run.session import Session
from tests.conftest import PATIENCE, rank_environments, stage_config

WORKER = """
import os, sys, time, torch
from penstock.errors import PenstockError
from penstock.distributed import heartbeat
from penstock.distributed.world import LARGE, World

case, beat, silence = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
heartbeat.Heartbeat.__init__.__kwdefaults__.update(beat=beat, silence=silence)
world = World.join("cpu")
print("pid", os.getpid(), flush=True)
try:
    for step in range(10_000):
        if case == "one fails" and world.rank == 1 and step == 20:
            raise ValueError("of its own making")
        if case in ("one leaves", "one just ends") and world.rank == 1 and step == 20:
            break
        if case in ("one leaves", "one just ends") and step == 20:
            time.sleep(3 * beat * silence)  # the others write a model, say
            break
        if case == "all run" and step == 100:
            break
        assert world.sum(torch.ones([8, 2 * LARGE][step % 2]))[0] == world.size
        world.gather(step)
        time.sleep(0.02)
except PenstockError as error:
    print("stopped:", error, flush=True)
    world.leave(well=False)
    sys.exit(error.exit_code)
if case != "one just ends":
    world.leave()
print("done", flush=True)
"""


class Ranks:
    """Three processes in one group, without a launcher that would end them."""

    def __init__(self, case, beat=0.2, silence=20):
        command = [
            sys.executable,
            "-c",
            WORKER,
            case,
            str(beat),
            str(silence),
        ]  # how Python itself ends is a part of this
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.processes = [subprocess.Popen(command, env=each, **pipes) for each in rank_environments(3)]
        self.pids = [int(process.stdout.readline().removeprefix("pid ")) for process in self.processes]  # all joined
        time.sleep(1.0)

    def ends(self, *ranks):
        """Exit code and output of these ranks."""
        processes = [self.processes[rank] for rank in ranks]
        return [(*process.communicate(timeout=PATIENCE), process.returncode) for process in processes]


@pytest.fixture
def ranks():
    started = []

    def start(*args, **kwargs):
        started.append(Ranks(*args, **kwargs))
        return started[-1]

    yield start
    for group in started:
        for process in group.processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("victim", [1, 2])
def test_a_killed_rank_is_named_by_all_others(ranks, victim):
    three = ranks("run")
    os.kill(three.pids[victim], signal.SIGKILL)
    for out, err, code in three.ends(*({0, 1, 2} - {victim})):
        assert code == 3, err
        named = re.findall(r"rank (\d) \(([^,]+), process (\d+)\) gave no sign", out + err)
        # where a collective fails while the watcher speaks, both say so
        assert set(named) == {(str(victim), socket.gethostname(), str(three.pids[victim]))}
        assert "penstock resume" in out + err


def test_when_the_rank_with_the_store_is_killed_the_others_still_name_it(ranks):
    three = ranks("run")
    os.kill(three.pids[0], signal.SIGKILL)
    for out, err, code in three.ends(1, 2):
        assert code == 3, err
        assert "rank 0" in out + err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_is_named_and_holds_nobody(ranks, victim):
    """Rank 0 has the store, which then answers nobody."""
    three = ranks("run")
    os.kill(three.pids[victim], signal.SIGSTOP)
    for out, err, code in three.ends(*({0, 1, 2} - {victim})):
        assert code == 3, out + err
        assert re.search(rf"rank {victim}\b.* gave no sign", out + err)
        assert victim == 0 or f"process {three.pids[victim]}) gave no sign" in out + err


def test_a_rank_that_fails_is_named_and_says_itself_why(ranks):
    (_, own_error, code), *survivors = ranks("one fails").ends(1, 0, 2)
    assert code == 1
    assert "of its own making" in own_error
    for out, err, code in survivors:
        assert code == 3, err
        assert f"rank 1 ({socket.gethostname()}" in out + err


def test_a_stop_of_the_whole_job_is_nobodys_silence(ranks):
    three = ranks("all run", beat=0.1, silence=20)
    for pid in three.pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    for pid in reversed(three.pids):
        os.kill(pid, signal.SIGCONT)
    for out, err, code in three.ends(0, 1, 2):
        assert code == 0, err
        assert "done" in out


@pytest.mark.parametrize("case", ["one leaves", "one just ends"])
def test_a_rank_that_is_done_is_not_missed(ranks, case):
    three = ranks(case, beat=0.05, silence=30)
    for out, err, code in three.ends(1, 0, 2):
        assert code == 0, err
        assert "done" in out


@pytest.mark.parametrize("gone", ["rank 1 (host, process 7) gave no sign of life for 5 s", None])
def test_a_collective_of_pytorchs_own_names_the_lost_rank_too(monkeypatch, tmp_path, gone):
    """FSDP2's gathers are no calls of ours, in a phase or in a checkpoint: a killed rank was a traceback of theirs,
    and exit code 5."""
    monkeypatch.setattr(world_module, "_heartbeat", SimpleNamespace(missing=lambda: gone))
    session = Session("sft", stage_config(tmp_path, "sft", "run"), Strategy.named(device="cpu").world)
    with pytest.raises(ResourceError if gone else RuntimeError) as caught, session:
        raise RuntimeError("Connection closed by peer")
    assert (gone or "closed by peer") in str(caught.value)
    assert ("stopped: rank 1" in (tmp_path / "run" / "log.txt").read_text()) == bool(gone)
