"""Shards that ranks join ahead, and updates beside what follows: on real ranks, the bits of one after the other."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from penstock.memory import tiers
from penstock.memory.homes import fetch
from penstock.memory.strategy import Strategy
from penstock.memory.tiers import Ram, worker
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from tests.conftest import PATIENCE
from tests.memory.test_gradients import Twins
from tests.memory.test_stream import FAMILIES
from tests.memory.test_tiers import LateDevice

CPU = torch.device("cpu")
SOME = {
    2: ["zero2_cpu fp32", "gemini bf16", "gemini_cpu fp32", "gemini_cpu fp32 kept", "gemini_nvme bf16"],
    4: ["gemini_cpu bf16"],
}
ROWS = ["zero1", "zero1_cpu", "zero2", "zero2_cpu", "gemini", "gemini_cpu", "gemini_cpu_8bit", "gemini_nvme",
        "gemini_nvme_8bit", "auto"]  # fmt: skip
ALL = [*(f"{name} {dtype}" for name in ROWS for dtype in ("fp32", "bf16")), "gemini fp32 kept", "gemini_cpu bf16 kept"]
WORKER = """
import os, sys, time
import torch
import torch.distributed as dist
from penstock.distributed import shared_memory, world
from penstock.memory import prepare, sink
from penstock.memory.adamw import AdamW
from penstock.memory.strategy import Strategy
from penstock.memory.tiers import _AtOnce
from tests.conftest import rank_environments
from tests.memory import test_overlap
from tests.memory.test_stream import batches

torch.set_num_threads(1)
shared_memory.Mailboxes.among = lambda rank, size: None  # as between machines
sink.overlaps = lambda home, device: not (home.whole and home.split)  # as where a GPU computes
update, join_ahead, pool, begin = AdamW.update, world.World.join_ahead, prepare.worker, world.Gathers._start

def late(*args, **kwargs):
    time.sleep(0.002)
    update(*args, **kwargs)

def joined_when_needed(self, arrive, shard, out):
    return lambda: (arrive(), self.join_shards(shard, out))

def learn(case, disk, overlapped):
    name, dtype, *kept = case.split()
    AdamW.update = late if overlapped else update
    world.World.join_ahead = join_ahead if overlapped else joined_when_needed
    prepare.worker = pool if overlapped else (lambda name: _AtOnce())
    size = world.World.join("cpu").size
    budgets = {"device_memory": f"{75 * size}kB", "host_memory": "256.2MB"} if name == "auto" else {}
    on = disk if "nvme" in name or name == "auto" else None
    name = "gemini_auto" if name == "auto" else name
    strategy = Strategy.named(name, dtype=dtype, device="cpu", disk=on, recompute=False if kept else None, **budgets)
    rank = strategy.world.rank
    # none, one or two micro-batches: another number on each rank and in each step
    test_overlap.batches = lambda step: list(batches(step))[: (rank + step) % 3]
    return test_overlap.steps_of_two(strategy, steps=2)

def run(rank, out, disk, cases):
    begun = []
    def recorded(self, arrive, shard, out):
        begun.append(out.numel())
        return begin(self, arrive, shard, out)
    world.Gathers._start = recorded
    ranks = world.World.join("cpu")
    results = {}
    for case in cases:
        ours, expected = (learn(case, disk, overlapped) for overlapped in (True, False))
        same = repr(ours[0]) == repr(expected[0]) and len(ours[1]) == len(expected[1])
        same = same and all(torch.equal(a, b) for a, b in zip(ours[1], expected[1], strict=True))
        orders = ranks.gather(list(begun))
        results[case] = (all(ranks.gather(same)), all(order == orders[0] for order in orders), len(begun))
        begun.clear()
    if rank == 0:
        torch.save(results, out)
    ranks.leave()

out, disk, size, *cases = sys.argv[1:]
children = []
for rank, environment in enumerate(rank_environments(int(size))):
    if (child := os.fork()) == 0:
        os.environ.update(environment)
        try:
            run(rank, out, disk, cases)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitpid(child, 0)[1] for child in children) != 0)
"""


@pytest.mark.parametrize("size", SOME)
def test_on_real_ranks_the_bits_are_those_of_one_thing_after_the_other(size, tmp_path):
    assert_same(size, SOME[size], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", SOME)
def test_so_they_are_under_every_strategy_that_ranks_share(size, tmp_path):
    assert_same(size, ALL, tmp_path)


def assert_same(size, cases, folder):
    """Of ranks with different work, some with none, in steps of two models. They begin gathers in the same order."""
    command = [sys.executable, "-c", WORKER, folder / "out.pt", folder / "disk", str(size), *cases]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(folder / "out.pt")
    assert [*results] == cases
    for case, (same, one_order, begun) in results.items():
        assert same, case
        assert one_order, case
        assert (begun > 0) == case.startswith(("gemini", "auto")), case


class Asked(Twins):
    """Two ranks that hold the same; notes what is joined ahead, and what is waited for."""

    log: ClassVar[list[tuple[str, int]]] = []

    def join_ahead(self, arrive, shard, out):
        self.log.append(("begun", out.numel()))
        join = super().join_ahead(arrive, shard, out)

        def noted():
            self.log.append(("waited", out.numel()))
            join()

        return noted


def test_a_gather_begins_a_visit_before_its_chunk_is_needed():
    tiers_of_rank = {"device": Ram("device", CPU), "host": Ram("host", CPU)}
    strategy = Strategy("gemini_cpu", Asked(0, 2, CPU), torch.float32, tiers=tiers_of_rank)
    model = Actor(Decoder(FAMILIES["gpt2"], generator=torch.Generator().manual_seed(0)))
    stream = strategy.prepare(model)
    numel = {home.chunk.group: home.chunk.numel for home in stream.homes}
    Asked.log.clear()
    seen = []
    for i in range(2):
        with stream.visit(f"blocks.{i}"):
            seen.append(list(Asked.log))
    block = numel["blocks.0"]
    assert seen[0] == [("begun", block), ("waited", block), ("begun", block)]
    assert seen[1][3] == ("waited", block)
    assert seen[1][4][0] == "begun"


def test_a_chunk_that_is_still_updated_leaves_host_memory_when_it_is_done_and_not_when_it_is_needed(monkeypatch):
    """On a device that is no CPU."""
    late = LateDevice()
    monkeypatch.setattr(tiers, "copies_to", late.copies_to)
    strategy = Strategy.named("gemini_cpu", device="cpu")
    stream = strategy.prepare(Actor(Decoder(FAMILIES["gpt2"], generator=torch.Generator().manual_seed(0))))
    home, reader, updates, begun = stream.homes[0], worker("prefetch"), worker("update"), threading.Event()
    out = torch.zeros_like(home.weights.tensor)
    home.update.future = updates.submit(lambda: (begun.wait(PATIENCE), home.weights.tensor.fill_(3.0)))
    arrived = fetch(home, out, reader)
    assert late.begun == 0
    begun.set()
    reader.submit(bool).result()
    assert late.begun == 1  # though nobody has asked for it
    arrived()
    assert bool((out == 3.0).all())
