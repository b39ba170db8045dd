"""Checkpoints: written whole or not at all, verified before use, and enough to resume exactly.

checkpoints/step-000100/manifest.json        size and sha256 of every other file
checkpoints/step-000100/model/ [critic/]     Hugging Face directories
checkpoints/step-000100/model.optimizer.safetensors    fp32 masters and moments, by weight name [critic. ...]; of
                        model.optimizer/               ranks' shares: a file of torch.distributed.checkpoint for each
checkpoints/step-000100/state.safetensors    tensors of generators and of experience in flight
checkpoints/step-000100/state.json           everything else
checkpoints/weights-000120/                  as above without optimizer and state: the best, between two checkpoints
checkpoints/latest, checkpoints/best         names of checkpoints; nothing resumes from weights alone

A name with `.tmp-` in it is the unfinished work of a running or killed process: never read, removed by `sweep`.
"""

import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.errors import PenstockError, ResourceError, UserError, disk_trouble
from penstock.sources import file_digest

MANIFEST = "manifest.json"
NAME = re.compile(r"(?:step|weights)-(\d{6,})")


class DamagedError(PenstockError):
    """A checkpoint that does not match its manifest."""


Writer = Callable[[Path], Callable[[], None] | None]
"""Fills a directory; what it returns fills the rest."""


def save(parent: Path, step: int, write: Writer, meta: Mapping[str, Any], **options: Any) -> Path:
    """`begin`, and what is left at once."""
    return begin(parent, step, write, meta, **options)()


def begin(
    parent: Path,
    step: int,
    write: Writer,
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
    best: bool = False,
    whole: bool = True,
) -> Callable[[], Path]:
    """`write` fills a directory. The result, called from any thread, fills the rest; then one rename makes it the
    newest checkpoint, and older ones are removed.

    `meta` goes into the manifest (config digest, world size). With `best` the file `best` names it too; the best
    checkpoint is never deleted. Not `whole`: it has weights alone, and is no checkpoint to resume from. A full or
    failing disk is a ResourceError, and leaves the earlier checkpoints as they were.
    """
    final = parent / f"{'step' if whole else 'weights'}-{step:06d}"
    unfinished = parent / f"{final.name}.tmp-{os.getpid()}"
    with _whole_or_gone(unfinished, step):
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        rest = write(unfinished)

    def publish() -> Path:
        with _whole_or_gone(unfinished, step):
            if rest is not None:
                rest()
            _publish(unfinished, final, step, {**meta, "best": best})
            if whole:
                write_whole(parent / "latest", final.name)
            if best:
                _name_best(parent, final.name)
            _prune(parent, step, keep)
            return final

    return publish


@contextlib.contextmanager
def _whole_or_gone(unfinished: Path, step: int) -> Iterator[None]:
    """No part of the checkpoint stays when something inside raises. Raises ResourceError for a full or failing disk."""
    parent = unfinished.parent
    try:
        yield
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if (trouble := disk_trouble(error)) is None:
            raise
        reason, remedy = trouble
        finished = _all(parent)
        intact = f"{finished[-1].name} is intact" if finished else "there is no earlier one"
        raise ResourceError(
            f"{parent}: {reason}, so the checkpoint of step {step} could not be finished; {intact}. "
            f"{remedy} (with --keep 1 a run needs room for two), then: penstock resume {parent.parent}"
        ) from error


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after a check of every file. Raises DamagedError with the first problem."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        if manifest.pop("sha256") != _digest_of(manifest):
            raise DamagedError(f"{path / MANIFEST}: has changed since it was written (sha256)")
        present = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
        if odd := sorted(present ^ set(files)):
            raise DamagedError(f"{path / odd[0]}: {'is missing' if odd[0] in files else 'does not belong there'}")
        for name, (size, sha256) in files.items():
            actual = (path / name).stat().st_size
            if actual != size:
                raise DamagedError(f"{path / name}: has {actual} bytes instead of {size}")
            if file_digest(path / name) != sha256:
                raise DamagedError(f"{path / name}: its bytes have changed since they were written (sha256)")
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename}: is missing") from error
    except OSError as error:  # a bad sector, no permission
        raise DamagedError(f"{error.filename or path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path / MANIFEST}: is no manifest ({error})") from error
    return manifest


def newest(parent: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; `warn` gets one line for each damaged one that is newer.

    None when there is no checkpoint. Raises UserError when all are damaged.
    """
    damaged = []
    for path in _all(parent)[::-1]:
        try:
            verify(path)
            return path
        except DamagedError as error:
            damaged.append(str(error))
            warn(f"WARNING: damaged checkpoint passed over, looking for an older one: {error}")
    if damaged:
        raise UserError(
            f"{parent}: every checkpoint is damaged: {'; '.join(damaged)}. Restore one from a copy, or start a new run."
        )
    return None


def trusted(parent: Path, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to read a run's model from: the best if it verifies, else the newest that does."""
    try:
        named = _best(parent)
        if named is not None:
            verify(parent / named)
            return parent / named
    except DamagedError as error:
        warn(f"WARNING: the best checkpoint is damaged, using the newest instead: {error}")
    return newest(parent, warn)


def sweep(parent: Path) -> None:
    """Ends what killed processes began: a kill between the two renames of a step is undone, unfinished files go, and
    `latest` and `best` name the last checkpoint where they should."""
    for old in parent.glob("*-*.tmp-old-*"):
        final = parent / old.name.split(".tmp-", 1)[0]
        if not final.exists():
            old.rename(final)
    for path in parent.glob("*.tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    published = [(int(match[1]), path) for path in parent.iterdir() if (match := NAME.fullmatch(path.name))]
    if not published:
        return
    _, last = max(published)
    if last in _all(parent):  # a kill may have come before the two files that name it
        write_whole(parent / "latest", last.name)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # damaged: whoever reads it says so
        if json.loads((last / MANIFEST).read_text(encoding="utf-8")).get("best"):
            _name_best(parent, last.name)


def write_whole(file: Path, text: str) -> None:
    """Writes a small file and a line end in one rename: readers see the old text or the new, never half."""
    unfinished = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        unfinished.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        _sync(unfinished)
        unfinished.rename(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync(file.parent)


# --- state ----------------------------------------------------------------------------------------------------------


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Nested dicts (keys: str) and lists of tensors and plain values, exactly; tuples become lists.

    Writes PATH.safetensors and PATH.json. A tensor that occurs twice is written twice.
    """
    tensors: dict[str, Tensor] = {}
    addresses: set[int] = set()

    def strip(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            if data.untyped_storage().data_ptr() in addresses:  # safetensors refuses two names for one memory
                data = data.clone()
            addresses.add(data.untyped_storage().data_ptr())
            while name in tensors:  # {"a.b": x, "a": {"b": y}}
                name += "'"
            tensors[name] = data
            return {"__tensor__": name}
        if isinstance(value, Mapping):
            if odd := [key for key in value if not isinstance(key, str) or key == "__tensor__"]:
                raise TypeError(f"{name or 'state'}: key {odd[0]!r} would not come back as it is")
            return {key: strip(part, f"{name}.{key}" if name else key) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [strip(part, f"{name}.{i}") for i, part in enumerate(value)]
        return value

    plain = strip(state, "")
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(plain) + "\n", encoding="utf-8")


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote."""
    tensors = load_file(path.with_suffix(".safetensors"))

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            if "__tensor__" in value:
                return tensors[value["__tensor__"]]
            return {key: fill(part) for key, part in value.items()}
        return [fill(part) for part in value] if isinstance(value, list) else value

    return fill(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


def seed_everything(seed: int) -> None:
    """Puts every global generator at the start of a stream: a --reward-fn may draw from any of them."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Every global generator: python, numpy, torch, and the device's."""
    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # a query would start a device that the run never uses
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


def _publish(unfinished: Path, final: Path, step: int, meta: Mapping[str, Any]) -> None:
    """Makes the directory a checkpoint, synced to the disk, in place of one of the same name."""
    replaced = final.with_name(f"{final.name}.tmp-old-{os.getpid()}")
    try:
        files = {
            str(path.relative_to(unfinished)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        manifest = {"step": step, "versions": versions, **meta, "files": files}
        manifest["sha256"] = _digest_of(manifest)
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in [*unfinished.rglob("*"), unfinished]:
            _sync(path)
        if final.exists():  # the same step again: a stop in the middle of the next one, or a damaged one passed over
            final.rename(replaced)
        unfinished.rename(final)
        _sync(final.parent)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _all(parent: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    numbered = [(int(match[1]), path) for path in parent.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def _best(parent: Path) -> str | None:
    """The name in the file `best`, or None when there is no such file. Raises DamagedError when it has changed."""
    if not (parent / "best").exists():
        return None
    try:
        name, *checksum = (parent / "best").read_text(encoding="utf-8").split()  # none in older runs
        if NAME.fullmatch(name) and checksum in ([], [_checksum(name)]):
            return name
    except (OSError, ValueError):
        pass
    raise DamagedError(f"{parent / 'best'}: names no checkpoint, or has changed since it was written")


def _name_best(parent: Path, name: str) -> None:
    write_whole(parent / "best", f"{name} {_checksum(name)}")


def _checksum(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _prune(parent: Path, step: int, keep: int) -> None:
    """Removes all but the newest `keep` up to `step`, which has just been written, and the best.

    Later checkpoints were damaged when this run resumed; they do not count, or `step` itself could be removed.
    """
    past = [path.name for path in _all(parent) if int(path.name.removeprefix("step-")) <= step]
    try:
        kept = {*past[-max(keep, 1) :], _best(parent)}
    except DamagedError:  # any may be the best; the next that is better ends that
        return
    for path in [*_all(parent), *parent.glob("weights-*")]:
        if path.name not in kept and NAME.fullmatch(path.name):
            gone = path.with_name(f"{path.name}.tmp-gone-{os.getpid()}")
            path.rename(gone)  # first: a kill must not leave half a checkpoint under a valid name
            shutil.rmtree(gone)


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
