"""Shards that ranks of one machine send each other are plain sums and concatenations of what all of them hold."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, rank_environments
from tests.zygote import zygotic

WORKER = """
import os, sys, time, torch
from penstock.distributed import shared_memory, world as ranks

shared_memory.HALF = 1 << 12  # many pieces of few bytes
apart = sys.argv[1] == "apart"
if apart and os.environ["RANK"] == "1":  # as in another container: the number names another process's file
    make = shared_memory._make
    def elsewhere():
        handle, (machine, path, device, inode) = make()
        return handle, (machine, path, device, inode + 1)
    shared_memory._make = elsewhere
world = ranks.World.join("cpu")
assert (ranks._mailboxes is None) == apart
pieces = 0
if ranks._mailboxes is not None:
    turn = ranks._mailboxes._turn
    def counted():
        global pieces
        pieces += 1
        return turn()
    ranks._mailboxes._turn = counted
for case, n in enumerate([1, 7, 512, 1024, 1025, 5000] * 3):
    dtype = [torch.float32, torch.bfloat16, torch.float64][case // 6]
    generator = torch.Generator().manual_seed(case)
    everyone = [torch.randn(n * world.size, generator=generator).to(dtype) for _ in range(world.size)]
    time.sleep(0.002 * ((case + world.rank) % 3))  # somebody is always late
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    want = sum((one.to(wide) for one in everyone[1:]), everyone[0].to(wide)).to(dtype).view(world.size, -1)
    same = torch.equal if ranks._mailboxes is not None else lambda a, b: torch.allclose(a, b, atol=0.1, rtol=0)
    given = everyone[world.rank].clone()
    mine = world.sum_shards(given)
    assert same(mine, want[world.rank]) and torch.equal(given, everyone[world.rank])
    whole = world.join_shards(mine)
    assert same(whole, want.flatten()) and torch.equal(whole.view(world.size, -1)[world.rank], mine)
    place = torch.zeros_like(whole).view(world.size, -1)
    place[world.rank] = mine
    assert torch.equal(world.join_shards(place[world.rank], place.view(-1)), whole)
    assert torch.equal(place.view(-1), whole)
    states = torch.arange(n, dtype=torch.int16) + world.rank
    found = world.join_shards(states).view(world.size, -1)
    assert all(torch.equal(row, states - world.rank + rank) for rank, row in enumerate(found))
large = torch.full((ranks.LARGE + 5,), float(world.rank))
assert torch.equal(world.sum(large), torch.full_like(large, sum(range(world.size))))
if not apart:
    assert pieces > 200
world.leave()
assert ranks._mailboxes is None
"""


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memory without a name")
@pytest.mark.parametrize(("size", "case"), [(2, "together"), (3, "together"), (2, "apart")])
def test_shards_are_those_of_plain_sums_and_concatenations(size, case):
    command = zygotic("-c", WORKER, case)
    environments = rank_environments(size, PYTHONPATH=str(Path(__file__).parents[2] / "src"))
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=each) for each in environments]
    ended = [(rank.communicate(timeout=PATIENCE)[1][-2000:], rank.returncode) for rank in ranks]
    assert ended == [("", 0)] * size
