"""A rank's share of a machine's cores, on machines that are files in a directory."""

import os

import pytest

from penstock.distributed import cores

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two nodes of 8 cores with a GPU each, and torchrun as this process' parent."""

    def make(node=1, allowed=range(16), started_with=b"PATH=/bin\0HOME=/root\0"):
        bound = {0: set(allowed)}
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: bound.get(pid, set(range(16))))
        monkeypatch.setattr(os, "sched_setaffinity", bound.__setitem__)
        monkeypatch.setattr(os, "getppid", lambda: 77)
        files = {"sys/bus/pci/devices/0000:65:00.0/numa_node": f"{node}\n"}
        files |= {
            "sys/devices/system/node/node0/cpulist": "0-3,8-11\n",
            "sys/devices/system/node/node1/cpulist": "4-7,12-15\n",
        }
        if started_with is not None:
            files["proc/77/environ"] = started_with.decode()
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return make


def test_torchruns_single_thread_becomes_an_equal_share_of_the_cores(machine):
    assert cores.threads(TORCHRUN, machine()) == 4
    assert cores.threads({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, machine()) == 3
    assert cores.threads({**TORCHRUN, "LOCAL_WORLD_SIZE": "99"}, machine()) == 1


def test_what_the_user_has_set_stays(machine):
    assert cores.threads(TORCHRUN, machine(started_with=b"PATH=/bin\0OMP_NUM_THREADS=1\0")) is None
    assert cores.threads({**TORCHRUN, "OMP_NUM_THREADS": "2"}, machine()) is None


def test_where_nothing_says_whose_the_single_thread_is_it_stays(machine, tmp_path):
    assert cores.threads(TORCHRUN, machine(started_with=None)) is None
    assert cores.threads(TORCHRUN, machine(started_with=b"")) is None
    assert cores.threads({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}, machine()) is None


def test_a_process_alone_and_ranks_of_another_launcher(machine):
    assert cores.threads({}, machine()) is None
    assert cores.threads({**TORCHRUN, "LOCAL_WORLD_SIZE": "1"}, machine()) is None
    assert cores.threads({"LOCAL_WORLD_SIZE": "2"}, machine()) == 8


def test_a_rank_that_its_launcher_has_bound_uses_no_more_than_that(machine):
    assert cores.threads(TORCHRUN, machine(allowed=range(2))) == 2
    assert cores.threads(TORCHRUN, machine(allowed=range(8))) == 4  # of 16, as its parent may use: not of these 8


@pytest.mark.parametrize(("limit", "count"), [("800000 100000", 2), ("50000 100000", 1), ("max 100000", 4)])
def test_in_a_container_ranks_share_the_time_that_it_may_use(machine, limit, count):
    system = machine()
    (system / "sys/fs/cgroup").mkdir(parents=True)
    (system / "sys/fs/cgroup/cpu.max").write_text(f"{limit}\n")
    assert cores.threads(TORCHRUN, system) == count


def test_a_rank_is_bound_to_the_cores_beside_its_gpu(machine):
    system = machine(allowed=range(14))
    assert cores.bind("0000:65:00.0", system) == {4, 5, 6, 7, 12, 13}
    assert cores.allowed() == {4, 5, 6, 7, 12, 13}


@pytest.mark.parametrize(
    ("node", "address", "allowed"),
    [(-1, "0000:65:00.0", range(16)), (1, "0000:17:00.0", range(16)), (1, "0000:65:00.0", range(4))],
)
def test_where_the_system_does_not_say_which_these_are_nothing_is_bound(machine, node, address, allowed):
    system = machine(node=node, allowed=allowed)
    assert cores.bind(address, system) == set()
    assert cores.allowed() == set(allowed)
