"""Tiers: bytes that come back as they went, budgets that hold, and disks that refuse."""

import os
import resource
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from penstock.errors import ResourceError, UserError
from penstock.memory import tiers
from penstock.memory.tiers import Disk, Ram, empty_pages
from penstock.units import parse_bytes, show_bytes

CPU = torch.device("cpu")


@given(steps=st.lists(st.tuples(st.integers(1, 100), st.booleans()), max_size=30), budget=st.integers(1, 500))
def test_no_tier_ever_passes_its_budget(steps, budget):
    tier, held = Ram("host", CPU, budget), []
    for nbytes, back in steps:
        if back and held:
            tier.give(held.pop())
        elif sum(held) + nbytes > budget:
            with pytest.raises(ResourceError, match=rf"--host-memory {budget} bytes: it would .* {sum(held) + nbytes}"):
                tier.take(nbytes, "it")
        else:
            tier.take(nbytes, "it")
            held.append(nbytes)
        assert tier.used == sum(held) <= tier.peak <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("numel", [2048, 3 * 2048, 5_000_192])
def test_a_disk_gives_back_what_it_was_given(tmp_path, dtype, numel):
    disk = Disk(tmp_path)
    first, second = disk.home(numel, dtype, "one"), disk.home(numel, dtype, "two")
    a, b = ((torch.randn(numel) * 1000).to(dtype) for _ in range(2))
    first.write(a)
    second.write(b)
    for home, value in ((first, a), (second, b)):
        out = empty_pages(numel * dtype.itemsize, CPU).view(dtype)  # on a page: straight from the disk
        home.read(out)
        assert torch.equal(out, value)
        odd = torch.empty(numel + 1, dtype=dtype)[1:]  # not on a page: through a buffer
        home.read(odd)
        assert torch.equal(odd, value)
    part = torch.empty(2048, dtype=dtype)
    first.write(b[:2048], start=numel - 2048)
    first.read(part, start=numel - 2048)
    assert torch.equal(part, b[:2048])
    first.read(part)
    assert torch.equal(part, a[:2048]) or numel == 2048
    assert disk.used == 2 * -(-numel * dtype.itemsize // 4096) * 4096
    disk.close()


def test_a_new_extent_reads_as_zeros(tmp_path):
    out = torch.ones(4096)
    Disk(tmp_path).home(4096, torch.float32, "zeros").read(out)
    assert not out.any()


def test_a_file_system_without_direct_access_is_read_through_its_cache(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    disk = Disk(tmp_path)
    assert not disk.direct
    home, x = disk.home(4096, torch.float32, "x"), torch.randn(4096)
    home.write(x)
    out = torch.empty(4096)
    home.read(out)
    assert torch.equal(out, x)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs here")
def test_tmpfs_works(tmp_path):
    home, x = Disk("/dev/shm").home(4096, torch.float32, "x"), torch.randn(4096)
    home.write(x)
    out = torch.empty(4096)
    home.read(out)
    assert torch.equal(out, x)


def test_nothing_is_left_behind_whatever_kills_the_process(tmp_path):
    code = (
        "import os, signal, sys, torch; from penstock.memory.tiers import Disk\n"
        "home = Disk(sys.argv[1]).home(1 << 20, torch.float32, 'x'); home.write(torch.ones(1 << 20))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_met_when_space_is_reserved_never_in_a_step(tmp_path):
    disk = Disk(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"no room for 4.19 MB \(weights\).*free some space"):
            disk.home(1 << 20, torch.float32, "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(ResourceError, match=r"--disk 4\.10 kB: more would bring it to 8\.19 kB; give at least that"):
        Disk(tmp_path, 4096).home(2048, torch.float32, "more")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--disk .*file.*name a directory"):
        Disk(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("6GB", 6 * 10**9), ("512 MiB", 512 << 20), ("1.5e9", 1_500_000_000), ("2kb", 2000), ("1TB", 10**12)],
)  # fmt: skip
def test_byte_counts_are_read_as_people_write_them(text, nbytes):
    assert parse_bytes(text, "--x") == nbytes


@pytest.mark.parametrize("text", ["", "GB", "6 parsecs", "-1GB", "0", "nanGB", "1e999"])
def test_what_is_no_byte_count_is_refused_by_flag(text):
    with pytest.raises(UserError, match="--device-memory"):
        parse_bytes(text, "--device-memory")


def test_bytes_are_shown_with_three_digits():
    assert [show_bytes(x) for x in (5, 1234, 7_890_000, 3.2e9)] == ["5 bytes", "1.23 kB", "7.89 MB", "3.20 GB"]
    assert tiers.BLOCK % tiers.PAGE == 0


class Driver:
    """Stands in for CUDA's runtime, which a machine without a GPU does not have: it books what is pinned."""

    def __init__(self, answer=0):
        self.answer, self.pinned = answer, {}

    def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
        if self.answer == 0:
            assert address not in self.pinned
            self.pinned[address] = nbytes
        return self.answer

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.pinned[address]
        return 0


def test_what_travels_to_a_gpu_is_pinned_for_as_long_as_it_lives(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    host = Ram("host", CPU, pins=True)
    weights = host.home(5000, torch.bfloat16, "weights", travels=True)
    host.home(5000, torch.float32, "moments")
    assert driver.pinned == {weights.tensor.data_ptr(): 10_000}
    view = weights.tensor[10:20]
    del weights
    assert driver.pinned  # somebody still looks at it
    del view
    assert not driver.pinned


def test_a_driver_that_refuses_to_pin_is_said_aloud_and_nothing_else_changes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(answer=2))
    with pytest.warns(UserWarning, match="would not pin 20.00 kB"):
        home = Ram("host", CPU, pins=True).home(5000, torch.float32, "weights", travels=True)
    home.write(torch.arange(5000.0))
    assert home.tensor[4999] == 4999
