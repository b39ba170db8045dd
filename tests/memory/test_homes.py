"""What is gathered for a checkpoint, and how much of it is on the device; updates that several threads wait for."""

from concurrent.futures import Future

import pytest
import torch

from penstock.distributed.world import World
from penstock.memory import plan
from penstock.memory.homes import Pending, gather


class Twin(World):
    """Two ranks that hold the same, and count what they send."""

    largest = 0

    def join_shards(self, shard, out=None):
        Twin.largest = max(Twin.largest, self.size * shard.nbytes)
        return torch.cat([shard] * self.size)


@pytest.mark.parametrize("numel", [1, 1000, 1024, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_shares_are_gathered_in_pieces_and_come_in_rank_order(numel, dtype, monkeypatch):
    monkeypatch.setattr(plan, "GATHER_BYTES", 8192)
    monkeypatch.setattr(Twin, "largest", 0)
    part = torch.arange(numel).to(dtype)
    whole = gather(part, Twin(0, 2, torch.device("cpu")))
    assert whole.equal(torch.cat([part, part]))
    assert 0 < Twin.largest <= 8192


def test_a_thread_that_has_waited_for_an_update_does_not_forget_the_next_one():
    pending, following = Pending(), Future()

    class Late(Future):
        def result(self, timeout=None):
            self.set_result(None)
            pending.future = following  # the main thread was faster

    pending.future = Late()
    pending.wait()
    assert pending.future is following
    assert pending.running
