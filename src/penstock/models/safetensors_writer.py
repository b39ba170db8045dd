"""Safetensors files written one tensor at a time, so that a model larger than memory can be saved.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, the header as JSON with every
tensor's dtype, shape and place, then the tensors' bytes without gaps. safetensors' own writer wants them all at once.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32"}


@dataclass(frozen=True)
class Entry:
    """A tensor to come. Example: Entry("wte.weight", torch.float32, (50257, 768))."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, entries: Iterable[Entry], tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    """Writes `tensors`, which come in the order of `entries`; each is let go of before the next is asked for.

    Raises OSError with the file's name when the disk refuses.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    entries = list(entries)
    for entry in entries:
        place = [end, end + entry.nbytes]
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for entry, tensor in zip(entries, tensors, strict=True):
                assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
                file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:  # a failed write names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


def shards(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """Cut where the next tensor would pass max_bytes."""
    shards: list[list[Entry]] = [[]]
    nbytes = 0
    for entry in entries:
        if nbytes and nbytes + entry.nbytes > max_bytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(entry)
        nbytes += entry.nbytes
    return shards
