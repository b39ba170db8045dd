"""What a rank writes of states that ranks share, as torch.distributed.checkpoint wants it: blocks of whole tensors.

A share is a run of a chunk's elements, so it begins and ends anywhere in a weight; a checkpoint names blocks by
their offsets and sizes. One chunk's states are in memory at a time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from penstock.memory.chunks import boxes
from penstock.memory.homes import ChunkHome
from penstock.memory.sink import SAVED, Sink, own_states


class Shares(DefaultSavePlanner):
    """Plans what this rank writes of a sink, and gives it piece by piece."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._pieces: dict[MetadataIndex, tuple[ChunkHome, str, int]] = {}
        """Of each block its chunk, its kind of state, and where it begins in the share."""
        self._chunk: tuple[ChunkHome, dict[str, Tensor]] | None = None
        """The states that were last read."""

    def create_local_plan(self) -> SavePlan:
        """A block is planned by every rank that has it, and written by one of them."""
        items = []
        properties = TensorProperties(dtype=torch.float32)
        for home in self._sink.homes:
            for weight, offset in zip(home.chunk.weights, home.chunk.offsets, strict=True):
                start, stop = max(home.share.start - offset, 0), min(home.share.stop - offset, weight.numel)
                for kind in SAVED:
                    at = offset + start - home.share.start
                    for offsets, sizes in boxes(start, stop, weight.shape):
                        index = MetadataIndex(f"{weight.name}.{kind}", torch.Size(offsets))
                        self._pieces[index] = home, kind, at
                        block = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                        data = TensorWriteData(block, properties, torch.Size(weight.shape))
                        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                        at += block.sizes.numel()
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The block's elements."""
        home, kind, at = self._pieces[write_item.index]
        if self._chunk is None or self._chunk[0] is not home:
            self._chunk = None  # first: one chunk's at a time
            self._chunk = home, own_states(home)
        assert write_item.tensor_data is not None
        sizes = write_item.tensor_data.chunk.sizes
        return self._chunk[1][kind][at : at + sizes.numel()].view(sizes)
