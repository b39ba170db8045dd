"""A checkpoint is a promise: written whole or not at all, verified before it is trusted, and enough to go on exactly.

checkpoints/step-000100/manifest.json        size and sha256 of every other file
checkpoints/step-000100/model/ [critic/]     Hugging Face directories
checkpoints/step-000100/state.safetensors    tensors of optimizers, generators, experience in flight
checkpoints/step-000100/state.json           everything else
checkpoints/latest, checkpoints/best         names of checkpoints
"""

import hashlib
import json
import os
import platform
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.errors import PenstockError, UserError

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{6,})")


class Damaged(PenstockError):
    """A checkpoint that does not match its manifest."""


def save(
    parent: Path,
    step: int,
    write: Callable[[Path], None],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
    best: bool = False,
) -> Path:
    """Has `write` fill a directory, then makes it the newest checkpoint in one rename; older ones go only afterwards.

    `meta` goes into the manifest (config digest, world size). With `best` the file `best` names it too, and the one
    named there is never deleted. OSError (a full disk) leaves the earlier checkpoints as they were.
    """
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / f"step-{step:06d}"
    unfinished = parent / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        write(unfinished)
        files = {
            str(path.relative_to(unfinished)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        manifest = {"step": step, "versions": versions, **meta, "files": files}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in [*unfinished.rglob("*"), unfinished]:
            _sync(path)
        if final.exists():  # the same step again, with more in it: a stop in the middle of the step after it
            replaced = parent / f"{final.name}.tmp-old-{os.getpid()}"
            final.rename(replaced)
            unfinished.rename(final)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(final)
        _sync(parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    point(parent / "latest", final.name)
    if best:
        point(parent / "best", final.name)
    _prune(parent, keep)
    return final


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after every file was found there, whole. Raises Damaged with the first thing that is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        listed: dict[str, dict[str, Any]] = manifest["files"]
    except FileNotFoundError as error:
        raise Damaged(f"{path}: has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path / MANIFEST}: is damaged ({error})") from error
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    if odd := sorted(there ^ set(listed)):
        raise Damaged(f"{path / odd[0]}: {'is missing' if odd[0] in listed else 'does not belong there'}")
    for name, facts in listed.items():
        size = (path / name).stat().st_size
        if size != facts["bytes"]:
            raise Damaged(f"{path / name}: has {size} bytes instead of {facts['bytes']}")
        if _digest(path / name) != facts["sha256"]:
            raise Damaged(f"{path / name}: its bytes have changed since they were written (sha256)")
    return manifest


def newest(parent: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; for each damaged one that it had to pass over, one line to `warn`.

    None when there is no checkpoint at all. Raises UserError when there are some and all are damaged.
    """
    damaged = []
    for path in _all(parent)[::-1]:
        try:
            verify(path)
            return path
        except Damaged as error:
            damaged.append(str(error))
            warn(f"checkpoint passed over: {error}")
    if damaged:
        raise UserError(
            f"{parent}: every checkpoint is damaged: {'; '.join(damaged)}. Start the run again, or restore them."
        )
    return None


def trusted(parent: Path, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to use a run's model from: the one `best` names if it verifies, else the newest that does."""
    named = parent / "best"
    if named.exists():
        path = parent / named.read_text(encoding="utf-8").strip()
        try:
            verify(path)
            return path
        except Damaged as error:
            warn(f"the best checkpoint is damaged, using the newest instead: {error}")
    return newest(parent, warn)


def sweep(parent: Path) -> None:
    """Removes what killed writers left unfinished. A kill between two renames of one step is undone first."""
    for old in parent.glob("step-*.tmp-old-*"):
        final = parent / old.name.split(".tmp-", 1)[0]
        if not final.exists():
            old.rename(final)
    for path in parent.glob("*.tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def point(file: Path, text: str) -> None:
    """Writes a small file in one rename."""
    unfinished = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    unfinished.write_text(text + "\n", encoding="utf-8")
    _sync(unfinished)
    unfinished.rename(file)
    _sync(file.parent)


# --- state ----------------------------------------------------------------------------------------------------------


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Nested dicts and lists of tensors and plain values -> PATH.safetensors and PATH.json, exactly (tuples become lists)."""
    tensors: dict[str, Tensor] = {}

    def strip(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous()
            return {"__tensor__": name}
        if isinstance(value, Mapping):
            return {str(key): strip(one, f"{name}.{key}" if name else str(key)) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [strip(one, f"{name}.{i}") for i, one in enumerate(value)]
        return value

    plain = strip(state, "")
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(plain) + "\n", encoding="utf-8")


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote."""
    tensors = load_file(path.with_suffix(".safetensors"))

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return (
                tensors[value["__tensor__"]]
                if "__tensor__" in value
                else {key: fill(one) for key, one in value.items()}
            )
        return [fill(one) for one in value] if isinstance(value, list) else value

    return fill(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


def rng_state() -> dict[str, Any]:
    """Every global generator: python, numpy, torch, and the device's."""
    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)  # type: ignore[misc]
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restores what `rng_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# --- files ----------------------------------------------------------------------------------------------------------


def _all(parent: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in parent.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _prune(parent: Path, keep: int) -> None:
    kept = {path.name for path in _all(parent)[-max(keep, 1) :]}
    if (parent / "best").exists():
        kept.add((parent / "best").read_text(encoding="utf-8").strip())
    for path in _all(parent):
        if path.name not in kept:
            gone = path.with_name(
                f"{path.name}.tmp-gone-{os.getpid()}"
            )  # a kill in the middle must not leave half of one
            path.rename(gone)
            shutil.rmtree(gone)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
