"""A rank that dies, hangs or fails is named to the others, who stop; one that is done is not missed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import PATIENCE

WORKER = """
import os, sys, time, torch
from penstock.errors import PenstockError
from penstock.distributed import heartbeat
from penstock.distributed.world import LARGE, World

what, beat, silence = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
heartbeat.Heartbeat.__init__.__kwdefaults__.update(beat=beat, silence=silence)
world = World.join("cpu")
print("pid", os.getpid(), flush=True)
try:
    for step in range(10_000):
        if what == "one fails" and world.rank == 1 and step == 20:
            raise ValueError("of its own making")
        if what in ("one leaves", "one just ends") and world.rank == 1 and step == 20:
            break
        if what in ("one leaves", "one just ends") and step == 20:
            time.sleep(3 * beat * silence)  # the others write a model, say
            break
        if what == "all run" and step == 100:
            break
        assert world.sum(torch.ones([8, 2 * LARGE][step % 2]))[0] == world.size
        world.gather(step)
        time.sleep(0.02)
except PenstockError as error:
    print("stopped:", error, flush=True)
    world.leave(well=False)
    sys.exit(error.exit_code)
if what != "one just ends":
    world.leave()
print("done", flush=True)
"""


class Ranks:
    """Three processes in one group, without a launcher that would end them."""

    def __init__(self, what, beat=0.2, silence=20):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, what, str(beat), str(silence)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **common, "RANK": str(rank)},
            )
            for rank in range(3)
        ]  # fmt: skip
        for one in self.processes:  # all have joined
            assert one.stdout.readline().startswith("pid")
        time.sleep(1.0)

    def ends(self, *ranks):
        """Exit code and output of these ranks."""
        return [
            (*self.processes[rank].communicate(timeout=PATIENCE), self.processes[rank].returncode) for rank in ranks
        ]


@pytest.fixture
def ranks():
    started = []

    def start(*args, **kwargs):
        started.append(Ranks(*args, **kwargs))
        return started[-1]

    yield start
    for one in started:
        for process in one.processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("victim", [1, 2])
def test_a_killed_rank_is_named_by_all_others(ranks, victim):
    three = ranks("run")
    three.processes[victim].send_signal(signal.SIGKILL)
    others = [rank for rank in range(3) if rank != victim]
    for out, err, code in three.ends(*others):
        assert code == 3, err
        said = re.findall(r"rank (\d) \(([^,]+), process (\d+)\) gave no sign", out + err)
        # where a collective fails while the watcher speaks, both say so
        assert set(said) == {(str(victim), socket.gethostname(), str(three.processes[victim].pid))}
        assert "penstock resume" in out + err


def test_when_the_rank_with_the_store_is_killed_the_others_still_name_it(ranks):
    three = ranks("run")
    three.processes[0].send_signal(signal.SIGKILL)
    for out, err, code in three.ends(1, 2):
        assert code == 3, err
        assert "rank 0" in out + err


def test_a_rank_that_hangs_is_named_and_holds_nobody(ranks):
    three = ranks("run")
    three.processes[1].send_signal(signal.SIGSTOP)
    for out, err, code in three.ends(0, 2):
        assert code == 3, out + err
        assert f"process {three.processes[1].pid}) gave no sign" in out + err


def test_a_rank_that_fails_is_named_and_says_itself_why(ranks):
    (_, mine, code), *others = ranks("one fails").ends(1, 0, 2)
    assert code == 1
    assert "of its own making" in mine
    for out, err, code in others:
        assert code == 3, err
        assert f"rank 1 ({socket.gethostname()}" in out + err


def test_a_stop_of_the_whole_job_is_nobodys_silence(ranks):
    three = ranks("all run", beat=0.1, silence=20)
    for one in three.processes:
        one.send_signal(signal.SIGSTOP)
    time.sleep(3)
    for one in reversed(three.processes):
        one.send_signal(signal.SIGCONT)
    for out, err, code in three.ends(0, 1, 2):
        assert code == 0, err
        assert "done" in out


@pytest.mark.parametrize("what", ["one leaves", "one just ends"])
def test_a_rank_that_is_done_is_not_missed(ranks, what):
    three = ranks(what, beat=0.05, silence=30)
    for out, err, code in three.ends(1, 0, 2):
        assert code == 0, err
        assert "done" in out
