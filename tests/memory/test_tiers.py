"""Tiers: bytes that come back as they went, budgets that hold, and disks that refuse."""

import itertools
import os
import re
import resource
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from penstock.errors import ResourceError, UserError
from penstock.memory import tiers
from penstock.memory.tiers import Disk, Ram, empty_pages
from penstock.units import parse_bytes, show_bytes
from tests.zygote import zygotic

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
    assert subprocess.run(zygotic("-c", code, tmp_path), check=False).returncode == -9
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
        self.answer, self.pinned, self.calls, self.pending = answer, {}, 0, 0

    def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
        self.calls += 1
        if self.answer == 0:
            assert address not in self.pinned
            self.pinned[address] = nbytes
        self.pending = self.pending or self.answer
        return self.answer

    def kernel(self, *shape, device="cpu", **options):
        """As any kernel's launch, it raises an earlier call's error and takes it away."""
        pending, self.pending = (self.pending, 0) if device != "cpu" else (0, self.pending)
        if pending:
            raise torch.AcceleratorError(f"CUDA error {pending}")
        return torch.full(shape, 1.0)

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


def refusing(monkeypatch):
    driver = Driver(answer=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch, "ones", driver.kernel)
    return driver


def test_a_driver_that_refuses_to_pin_is_said_aloud_and_nothing_else_changes(monkeypatch):
    refusing(monkeypatch)
    with pytest.warns(UserWarning, match="would not pin 20.00 kB"):
        home = Ram("host", CPU, pins=True).home(5000, torch.float32, "weights", travels=True)
    home.write(torch.arange(5000.0))
    assert home.tensor[4999] == 4999


@pytest.mark.filterwarnings("ignore:the driver would not pin")
def test_the_error_of_a_refused_pin_does_not_meet_the_next_kernel(monkeypatch):
    driver = refusing(monkeypatch)
    Ram("host", CPU, pins=True).home(5000, torch.float32, "weights", travels=True)
    assert driver.calls == 1
    driver.kernel(1, device="cuda")  # somebody else's


def flags_of(tensor):
    """Of the mapping that a tensor lies in, as the kernel names them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(number, 16) for number in match.groups())
            inside = start <= tensor.data_ptr() < end
        if inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="only Linux tells")
@pytest.mark.parametrize("pins", [True, False])
def test_pages_are_no_other_processs_and_large_where_they_are_pinned(monkeypatch, pins):
    """MADV_HUGEPAGE changes nothing on shared memory, and the first touch of small pages is slow."""
    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    flags = flags_of(Ram("host", CPU, pins=pins).home(4 << 20, torch.uint8, "x", travels=True).tensor)
    assert "sh" not in flags
    assert ("hg" in flags) == pins


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="only Linux tells")
def test_pages_cost_nothing_before_they_are_written():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * tiers.PAGE

    before = resident()
    pages = empty_pages(256 << 20, CPU)
    assert resident() - before < 32 << 20
    assert not pages[:: 64 << 20].any()


def test_pages_that_came_back_are_lent_again_pinned_as_they_are(monkeypatch):
    class Borrower:
        pass

    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    host = Ram("host", CPU, budget=100_000, pins=True)
    user = Borrower()
    pages = host.lend(60_000, "a cache", user)
    pages.fill_(7)
    address = pages.data_ptr()
    del user, pages
    assert (host.used, host.pinned, driver.calls) == (60_000, 60_000, 1)  # kept, and counted
    user = Borrower()
    again = host.lend(50_000, "a cache", user)
    assert again.data_ptr() == address
    assert again.numel() == 50_000
    assert not again.any()
    assert (host.used, driver.calls) == (60_000, 1)
    del user, again
    user = Borrower()
    larger = host.lend(70_000, "a larger cache", user)  # not beside the old pages: there is no room
    assert larger.numel() == 70_000
    assert (host.used, host.pinned, list(driver.pinned.values())) == (70_000, 70_000, [70_000])
    with pytest.raises(ResourceError, match=r"weights would bring it to 110\.00 kB"):
        host.home(40_000, torch.uint8, "weights")
    del user, larger
    host.home(40_000, torch.uint8, "weights")  # now the cache's pages make room
    assert host.used == 40_000
    assert not driver.pinned


def test_loans_side_by_side_find_their_pages_whatever_the_order(monkeypatch):
    """A cache, and then two at once that are smaller: the largest pages serve in both, and the smallest that fit go."""
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    host = Ram("host", CPU, budget=200_000, pins=True)
    for sizes in ((100_000,), (60_000, 50_000), (100_000,), (50_000, 60_000), (40_000, 100_000)):
        borrowers = [LateDevice() for _ in sizes]
        for size, borrower in zip(sizes, borrowers, strict=True):
            host.lend(size, "a loan", borrower)
        del borrowers, borrower
    assert driver.calls == 2
    assert host.used == host.peak == 150_000
    borrower = LateDevice()
    host.lend(120_000, "a larger cache", borrower)  # in the place of the largest
    assert host.used == 170_000
    host.make_room(60_000)  # the smallest go first
    assert host.used == 120_000


class LateDevice:
    """Stands in for a device's copy stream: a copy is done when somebody waits for it, and not before."""

    def __init__(self):
        self.pending, self.lock, self.begun = [], threading.RLock(), 0

    def copies_to(self, out):
        return self.copy

    def copy(self, source, out):
        with self.lock:
            self.begun += 1
            self.pending.append((source, out))
            return Late(self, self.begun)


class Late:
    """An event of that stream."""

    def __init__(self, device, number):
        self.device, self.number = device, number

    def synchronize(self):
        with self.device.lock:
            while self.device.begun - len(self.device.pending) < self.number:
                source, out = self.device.pending.pop(0)
                out.copy_(source)

    wait = synchronize


@pytest.mark.parametrize("numel", [2048, 3 * 2048, 100_352])
def test_a_disk_is_read_to_a_device_through_a_ring_of_buffers(tmp_path, monkeypatch, numel):
    """Buffers are used again and again, each when its last copy is done, however late that is."""
    monkeypatch.setattr(tiers, "BLOCK", 4 * tiers.PAGE)
    device, disk = LateDevice(), Disk(tmp_path)
    monkeypatch.setattr(tiers, "copies_to", device.copies_to)
    disk.ring = tiers.Ring(empty_pages(5 * tiers.BLOCK, CPU))
    first, second = (disk.home(numel, torch.float32, name) for name in "ab")
    a, b = torch.randn(numel), torch.randn(numel)
    first.write(a)
    second.write(b)
    with ThreadPoolExecutor(1) as reader:
        outs = [torch.zeros(numel), torch.zeros(numel)]
        landings = [tiers.read_ahead(home, out, reader) for home, out in zip((first, second), outs, strict=True)]
        for land in landings:
            land()
    assert torch.equal(outs[0], a)
    assert torch.equal(outs[1], b)
    assert disk.bytes_read == 2 * a.nbytes
    assert device.begun == 2 * -(-a.nbytes // tiers.BLOCK)


def test_the_next_block_is_read_while_one_is_copied(tmp_path, monkeypatch):
    """A copy that waits for the block behind it does not wait for ever."""
    monkeypatch.setattr(tiers, "BLOCK", 4 * tiers.PAGE)
    monkeypatch.setattr(tiers, "THREADS", 1)
    disk, values, blocks = Disk(tmp_path), torch.randn(5 * tiers.BLOCK // 4), 5
    home = disk.home(values.numel(), torch.float32, "x")
    home.write(values)
    disk.ring, move, changed, read = (
        tiers.Ring(empty_pages(2 * tiers.BLOCK, CPU)),
        disk._move,
        threading.Condition(),
        [],
    )

    def moved(*block):
        move(*block)
        with changed:
            read.append(block)
            changed.notify_all()

    monkeypatch.setattr(disk, "_move", moved)

    def run(number, source, out):
        with changed:
            assert changed.wait_for(lambda: len(read) >= min(number + 1, blocks), timeout=60)
        out.copy_(source)

    numbers = itertools.count(1)
    with ThreadPoolExecutor(1) as stream:

        def copy(source, out):
            done = stream.submit(run, next(numbers), source, out).result
            return mock.Mock(synchronize=done, wait=done)

        out = torch.zeros_like(values)
        for copied in disk.pass_on(home.offset, out, copy):
            copied.wait()
    assert torch.equal(out, values)
