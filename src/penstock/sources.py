"""What --data names: a file, a folder, a pattern, standard input, or a dataset on the hub; and how much of it is used.

    talks.jsonl   folder/   'part-*.parquet'   -   USER/NAME[@REVISION][:CONFIG][:SPLIT]   hf://datasets/USER/NAME/FILE

A path that exists is a path, and only then is a text a name. Behind `*` stands a weight: talks.jsonl*0.3. Knows names,
places and digests; what a file holds is not known here.
"""

import atexit
import functools
import glob
import hashlib
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.errors import UserError

STDIN = "-"
KEPT = "stdin"
"""The file of a run that has all that came through standard input."""
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".zst")
"""May stand behind the suffix of a text format."""
WEIGHT = re.compile(r"(.+)\*(\d+\.?\d*|\.\d+)")
PART = r"[\w.+-]+(?:\[[\d:%-]*\])?"
HUB = re.compile(
    rf"(?P<scheme>hf://datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:/\[\]*]+))?(?P<path>/[^:]+)?"
    rf"(?::(?P<first>{PART}))?(?::(?P<second>{PART}))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
SPLIT = re.compile(r"(?:^|[/._-])(train(?:ing)?|test(?:ing)?|eval(?:uation)?|val(?:id(?:ation)?)?|dev)(?=[/._-])")
"""The split that a file's path names, as the datasets library reads such paths."""


@dataclass(frozen=True)
class Hub:
    """A dataset on the hub. Example: Hub("trl-lib/tldr", split="train[:1000]")."""

    repo: str
    revision: str | None = None
    path: str | None = None
    """A file of it, or a pattern for several, as hf:// addresses name them."""
    config: str | None = None
    split: str | None = None
    word: str | None = None
    """The one word behind the name where there is only one: a configuration or a split."""


@dataclass(frozen=True)
class Part:
    """One file of a source."""

    name: str
    """What messages call it."""
    path: Path


@dataclass(frozen=True)
class Source:
    """What one value of --data names. Example: Source("a.jsonl", 0.3, (Part("a.jsonl", Path("a.jsonl")),))."""

    name: str
    """As given, without the weight."""
    weight: float | None = None
    """Records that are used, as a multiple of those that are there."""
    parts: tuple[Part, ...] = ()
    note: str = ""
    """What of a folder is not read, or how a name was understood."""
    hub: Hub | None = None
    """Where it is on the hub, which `penstock.hub` asks for parts or tables."""


def source_of(text: str) -> Source:
    """What a value of --data names. Raises UserError for a folder or pattern without data files. A path at which
    nothing is found is a source like any other, and the hub is not asked."""
    name, weight = weighed(text)
    path = Path(name)
    if name == STDIN:
        source = Source(name, parts=(Part("stdin", standard_input()),))
    elif _exists(path):
        source = _folder(path) if path.is_dir() else Source(name, parts=(Part(name, path),))
    elif hub := hub_of(name):
        source = Source(name, hub=hub)
    elif glob.has_magic(name):
        source = Source(name, parts=_matching(name))
    else:
        source = Source(name, parts=(Part(name, path),))
    return replace(source, weight=weight)


def weighed(text: str) -> tuple[str, float | None]:
    """The name, and the weight behind its last `*`. Raises UserError for a weight of 0."""
    match = None if _exists(Path(text)) else WEIGHT.fullmatch(text)
    if match is None:
        return text, None
    if not float(match[2]):
        raise UserError(f"--data {text}: a weight of 0 uses nothing of it; leave the source out.")
    return match[1], float(match[2])


def hub_of(name: str) -> Hub | None:
    """The dataset on the hub that a name means; None for what is, or looks like, a path."""
    match = None if _exists(Path(name)) else HUB.fullmatch(name)
    if match is None or name.startswith("."):
        return None
    repo, revision, path, first, second = (match[key] for key in ("repo", "revision", "path", "first", "second"))
    is_file = (*FORMATS, *PACKED, ".txt", ".toml", ".py")
    if not match["scheme"] and (path or (first is None and repo.endswith(is_file))):
        return None
    if path and first:
        raise UserError(f"--data {name}: a file on the hub has no configuration or split; name one or the other.")
    hub = Hub(repo, revision and revision.replace("%2F", "/"), path and path[1:])
    return replace(hub, config=first, split=second) if second else replace(hub, word=first)


def absolute(text: str) -> str:
    """The text, so that it means the same from any directory."""
    name, _ = weighed(text)
    if name == STDIN or hub_of(name):
        return text
    if _exists(Path(name)) or (glob.has_magic(name) and glob.glob(name, recursive=True)):
        return str(Path(name).absolute()) + text[len(name) :]
    return text


def digest(text: str) -> str:
    """sha256 of what a source holds: of a file its bytes, of several their names and digests, of a dataset on the hub
    its name, which has its commit."""
    source = source_of(text)
    if source.hub:
        return hashlib.sha256(text.encode()).hexdigest()
    if [part.name for part in source.parts] == [source.name]:
        return file_digest(source.parts[0].path)
    lines = (f"{file_digest(part.path)}  {part.name}\n" for part in source.parts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- on this machine -----------------------------------------------------------------------------------------------


@functools.cache
def standard_input() -> Path:
    """A file with all of standard input, which can be read only once; it goes when the process does."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("--data -: standard input is a terminal; pipe a file into it: zcat data.gz | penstock ...")
    file = tempfile.NamedTemporaryFile(prefix="penstock-stdin-")  # noqa: SIM115  # as long as the process
    atexit.register(file.close)
    shutil.copyfileobj(sys.stdin.buffer, file)
    file.flush()
    return Path(file.name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a disk, say: whoever opens it says so
        return False


def _matching(pattern: str) -> tuple[Part, ...]:
    paths = [path for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
    if not paths:
        raise UserError(
            f"--data {pattern}: no file matches; check the pattern, and quote it so that the shell keeps it."
        )
    return tuple(Part(path, Path(path)) for path in paths)


def _folder(folder: Path) -> Source:
    """All data files below a folder; of one that datasets' save_to_disk wrote, the files of its table in order."""
    name, note = str(folder), ""
    if splits := _listed(folder / "dataset_dict.json", "splits"):
        split, note = chosen_split(name, splits, f"{name}/")
        folder = folder / split
    if tables := _listed(folder / "state.json", "_data_files"):
        return Source(name, parts=_parts([folder / table["filename"] for table in tables]), note=note)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {inside: path for inside, path in files.items() if "/." not in f"/{inside}"}
    read = [inside for inside in files if is_data(inside)]
    if not read:
        raise UserError(f"--data {name}: no data file is in this folder; such files end with {', '.join(FORMATS)}.")
    words = {inside: match[1] for inside in read if (match := SPLIT.search(inside))}
    trains = [inside for inside, word in words.items() if word.startswith("train")]
    others = [inside for inside in words if inside not in trains] if trains else []
    if others:
        names = ", ".join(sorted({words[inside] for inside in others}))
        note = f"not read: {len(others)} of {names}, which stand beside those of train"
    if unknown := len(files) - len(read):
        note += f"{'; ' if note else 'not read: '}{unknown} that are no data"
    return Source(name, parts=_parts([files[inside] for inside in read if inside not in others]), note=note)


def _listed(file: Path, key: str) -> list[Any]:
    """What a file of save_to_disk lists under a key; nothing where there is no such file."""
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))[key]) if file.exists() else []
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--data {file.parent}: {file.name} is damaged ({reason}); save the dataset again.") from error


def _parts(paths: list[Path]) -> tuple[Part, ...]:
    return tuple(Part(str(path), path) for path in paths)


def is_data(name: str) -> bool:
    """Whether a file of a folder holds records, by its name."""
    suffix = Path(Path(name).stem if name.endswith(PACKED) else name).suffix
    return suffix in FORMATS and name not in ("dataset_infos.json", "dataset_info.json")


def chosen_split(name: str, splits: list[str], prefix: str) -> tuple[str, str]:
    """train, or the only split; and what to say of it. Raises UserError where there are others alone."""
    if "train" not in splits and len(splits) != 1:
        raise UserError(f"--data {name}: has the splits {', '.join(splits)}; name one: {prefix}{splits[0]}")
    split = "train" if "train" in splits else splits[0]
    others = ", ".join(other for other in splits if other != split)
    return split, f"split {split}" + (f"; not read: {others}" if others else "")
