"""Every trained weight's fp32 master and moments, by name: any strategy and world size can resume from them.

Where one rank has all, or gathers them, they are one safetensors file. Shards of FSDP2 are a directory of
torch.distributed.checkpoint, which every rank writes its part of: all ranks see one file system.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from penstock.memory.sink import SAVED
from penstock.memory.stream import Stream
from penstock.models import safetensors_writer


def write_optimizer(path: Path | None, stream: Stream) -> None:
    """Writes PATH.safetensors, or the directory PATH. All ranks call it; path: None on those but the first."""
    sink = stream.sink
    assert sink is not None
    shards = sink.shards()
    if shards:
        import torch.distributed.checkpoint as dcp  # slow to import

        dcp.save(shards, checkpoint_id=stream.world.broadcast(str(path)), no_dist=False)
    elif path is not None:
        entries = [
            safetensors_writer.Entry(f"{weight.name}.{kind}", torch.float32, weight.shape)
            for weight in sink.weights
            for kind in SAVED
        ]
        safetensors_writer.write(path.with_name(f"{path.name}.safetensors"), entries, sink.saved_states(), FORMAT)
    elif sink.collective:
        for _ in sink.saved_states():
            pass


FORMAT = {"format": "pt"}


def read_optimizer(path: Path, updates: int, stream: Stream) -> None:
    """Loads the masters and moments that `write_optimizer` wrote after that many updates, bit by bit."""
    assert stream.sink is not None
    shards = stream.sink.shards()
    if path.is_dir() and shards:
        import torch.distributed.checkpoint as dcp

        dcp.load(shards, checkpoint_id=path)
        stream.sink.steps = updates
        return
    with saved_states(path) as read:
        stream.restore(updates, read)


@contextlib.contextmanager
def saved_states(path: Path) -> Iterator[Callable[[str, str], Tensor]]:
    """Inside: read(weight name, state name) gives a whole tensor, fp32 on the CPU, of PATH.safetensors or of the
    directory PATH."""
    if not path.is_dir():
        with safetensors.safe_open(path.with_name(f"{path.name}.safetensors"), framework="pt") as file:
            yield lambda weight, kind: file.get_tensor(f"{weight}.{kind}")
        return
    import torch.distributed.checkpoint as dcp

    sizes: Any = dcp.FileSystemReader(path).read_metadata().state_dict_metadata

    def read(weight: str, kind: str) -> Tensor:
        name = f"{weight}.{kind}"
        whole = torch.empty(sizes[name].size)
        dcp.load({name: whole}, checkpoint_id=path, no_dist=True)
        return whole

    yield read
