"""What is gathered for a checkpoint, and how much of it is on the device at once."""

import pytest
import torch

from penstock.distributed.world import World
from penstock.memory import plan
from penstock.memory.homes import gather


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
