"""Every trained weight's fp32 master and moments, by name: any strategy and world size can resume from them.

Where one rank has all, or can gather them, they are one safetensors file. Shards of FSDP2, and those of other rows
above GATHERED bytes, are a directory of torch.distributed.checkpoint, which every rank writes its part of: all ranks
see one file system.

[Note: saved beside training] FSDP2's shards are copied to host memory, which keeps training waiting, and written from
there by a thread, which does not. One thread per rank writes all models' files, in a process group of its own, and goes
on to publish the checkpoint: `async_save` would start a thread for each model, whose collectives mix.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from penstock.memory.sink import SAVED
from penstock.memory.stream import Stream
from penstock.models import safetensors_writer

GATHERED = 10 * 10**9
"""Bytes of states up to which the first rank writes one file that it gathers."""


def stager(device: torch.device) -> Any:
    """What copies states to host memory, which it keeps for the next checkpoint; pinned beside a GPU."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    return DefaultStager(StagingOptions(device.type == "cuda", False, False, False))


def write_optimizer(path: Path | None, stream: Stream, staging: Any = None) -> Callable[[], None]:
    """Writes PATH.safetensors, or the directory PATH. All ranks call it; path: None on those but the first.

    Returns what is left to do: with `staging` (a `stager`) FSDP2's shards are written by it, in any thread.
    """
    sink = stream.sink
    assert sink is not None
    shards = sink.shards()
    if shards or (sink.collective and sum(weight.numel for weight in sink.weights) * len(SAVED) * 4 > GATHERED):
        directory = stream.world.broadcast(str(path))
        if not shards:
            from penstock.run.shares import Shares

            _write_parts({}, directory, planner=Shares(sink))
        elif staging is None:
            _write_parts(shards, directory)
        else:
            group = stream.world.background()
            return partial(_write_parts, staging.stage(shards), directory, process_group=group)
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
    return _nothing


FORMAT = {"format": "pt"}


def _nothing() -> None:
    """All is written."""


def _write_parts(shards: dict[str, Tensor], directory: str, **options: Any) -> None:
    """Every rank's part. Raises what the writing of any rank raised."""
    import torch.distributed.checkpoint as dcp  # slow to import

    writer = dcp.FileSystemWriter(directory, per_thread_copy_ahead=0)  # else a GPU's are sorted by size
    try:
        dcp.save(shards, storage_writer=writer, **options)
    except dcp.CheckpointException as error:  # no Exception, but an error on some rank
        raise next(iter(error.failures.values()))[0] from error


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

    reader: Any = dcp.FileSystemReader(path)
    metadata = reader.read_metadata()
    reader.read_metadata = lambda *_, **__: metadata  # it lists every rank's blocks: a second for each tensor

    def read(weight: str, kind: str) -> Tensor:
        name = f"{weight}.{kind}"
        whole = torch.empty(metadata.state_dict_metadata[name].size)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it reads alone
            dcp.load({name: whole}, storage_reader=reader, no_dist=True)
        return whole

    yield read
