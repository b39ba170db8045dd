"""How much memory is free, by files of /proc and of control groups as the kernel writes them; what else is amiss."""

import socket

import pytest

from penstock.kernels import machine
from penstock.kernels.machine import available_ram

GB = 10**9
MEMINFO = f"MemTotal: {32 * GB // 1024} kB\nMemFree: 1 kB\nMemAvailable:   {16 * GB // 1024} kB\n"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def limited(limit, used=0, cached=0):
    """The files of a group of version 2."""
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cached}\nslab 7"}


def limited_v1(limit, used=0, cached=0):
    names = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used}
    return names | {"memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {cached}"}


@pytest.mark.parametrize(("own", "groups", "left"), [
    ("0::/", {}, 16), ("0::/", {V2: limited("max")}, 16), ("0::/", {V2: limited(4 * GB, 3 * GB)}, 1),
    ("0::/a/b", {f"{V2}/a/b": limited("max"), f"{V2}/a": limited(8 * GB, 3 * GB, 2 * GB)}, 7),
    ("0::/of/the/host", {V2: limited(2 * GB)}, 2), ("0::/", {V2: limited(64 * GB)}, 16),
    ("0::/a", {f"{V2}/a": limited(GB, 2 * GB)}, 0),
    ("4:memory:/a\n1:cpu:/\n0::/", {f"{V1}/a": limited_v1(8 * GB, 6 * GB, GB), V1: limited_v1(2**63 - 4096)}, 3),
])  # fmt: skip
def test_a_containers_limit_is_what_is_left_of_it(tmp_path, own, groups, left):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    (tmp_path / "proc/self/cgroup").write_text(own + "\n")
    for folder, files in groups.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (tmp_path / folder / name).write_text(f"{content}\n")
    assert available_ram(tmp_path) == pytest.approx(left * GB, abs=1024)


def test_on_this_machine_it_is_some_memory():
    assert 0 < available_ram() < 2**50


def test_a_machine_where_others_compute_is_said(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (6.94, 0.0, 0.0))
    assert str(machine.busy()).startswith("this machine was busy in the last minute (load 6.9 on 2 cores): ")
    monkeypatch.setattr("os.getloadavg", lambda: (0.6, 0.0, 0.0))
    assert machine.busy() is None


@pytest.mark.parametrize("known", ["weir", "pond"])
def test_a_machine_whose_name_has_no_address_is_named(monkeypatch, known):
    def addresses(name, port):
        if name != known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    monkeypatch.setattr(socket, "gethostname", lambda: "weir")
    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    assert (machine.unnamed() is None) is (known == "weir")
    assert known == "weir" or "put a line '127.0.1.1 weir' into /etc/hosts" in machine.unnamed()
