"""C where torch has no operation for it: compiled by this machine's own compiler when first needed, kept in a cache.

It saves time and nothing else: without a compiler torch operations do the same work, slower. `penstock doctor` says
which of the two it will be, and a run that could use it once. Threads come from OpenMP, so torch's own pool is shared.

[Note: code from a cache] A library is loaded into this process, so nobody else may have written it: it and its
directory belong to this user or to root, and others cannot write to them. A library that is not so is made anew; a
directory that is not so is not used.

[Note: one pass of C] torch's fused AdamW refuses mixed dtypes, and around it a split master takes ten passes over
memory; adamw.c takes one, with the same roundings. torch.compile would need the same compiler and 22 seconds, and gives
other bits.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from penstock.kernels import prebuilt
from penstock.kernels.machine import cache_directory, cpu_facts

FLAGS = (*prebuilt.FLAGS, "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native")
SECONDS = 60
"""That the compiler may take."""


@functools.cache
def compiled(*files: Path) -> ctypes.CDLL | str:
    """One library of these C files, compiled for this machine, or else the one that the wheel brought, or why there is
    none; headers are named beside them."""
    library = _compile(files)
    if isinstance(library, str) and (ready := prebuilt.best(files[0].stem)):
        with contextlib.suppress(OSError):  # made for another C library
            return ctypes.CDLL(str(ready))
    return library


def _compile(files: Sequence[Path]) -> ctypes.CDLL | str:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "no C compiler: install gcc or clang as cc, or set CC"
    cache = cache_directory()
    command = [compiler, *FLAGS]
    sources = [str(file) for file in files if file.suffix == ".c"]
    everything = b"".join(file.read_bytes() for file in files)
    stamp = hashlib.sha256(everything + " ".join((*command, cpu_facts())).encode()).hexdigest()[:16]
    library = cache / f"{files[0].stem}-{stamp}.so"
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _trusted(cache):  # see [Note: code from a cache]
            return f"{cache} belongs to others, or they can write to it: chmod 700 it, or set XDG_CACHE_HOME"
        if not library.exists() or not _trusted(library):
            with tempfile.TemporaryDirectory(dir=cache) as temporary:
                fresh = Path(temporary) / library.name
                command += [*sources, "-o", str(fresh), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
                fresh.chmod(0o700)
                fresh.replace(library)  # whole or not at all: ranks may compile side by side
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        return f"{compiler}: {' '.join((error.stderr or 'failed').strip().splitlines()[-1:])}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _trusted(path: Path) -> bool:
    """Whether nobody but this user and root can have written it."""
    facts = path.stat()
    return facts.st_uid in (os.geteuid(), 0) and not facts.st_mode & 0o022


@functools.cache
def warn_slow(reason: str) -> None:
    """Says once why C does not help where it would."""
    warnings.warn(
        f"nothing is compiled for this CPU ({reason}): decoding and optimizer updates take two to five times as long, "
        "with the same results. penstock doctor says when that has changed.",
        stacklevel=3,
    )


def give_back() -> None:
    """Has the C library return what was freed to the system, where it can (glibc): a tenth of a small run's memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def real() -> bool:
    """Whether tensors have memory: in a dry run they have not."""
    return torch._guards.detect_fake_mode() is None
