"""Datasets on the hub: the commit that a name stands for, their files, and their rows through the datasets library.

Both libraries are imported where they are used. What goes wrong in them is a UserError that names both readings of the
text: a path, and a dataset.
"""

import contextlib
import glob
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from penstock.errors import UserError
from penstock.sources import COMMIT, KEPT, STDIN, Hub, Part, Source, chosen_split, hub_of, weighed

HEAD = re.compile(r"([\w.-]+)\[:(\d+)\]")


def pinned(text: str) -> str:
    """With the commit of a dataset on the hub, by which a resumed run reads the same rows; other texts as given."""
    name, _ = weighed(text)
    hub = hub_of(name)
    if hub is None or COMMIT.fullmatch(hub.revision or ""):
        return text
    commit = _commit(name, hub)
    end = text.index(hub.repo) + len(hub.repo)
    rest = re.sub(r"^@[^:/\[\]*]+", "", text[end:])
    return f"{text[:end]}@{commit}{rest}"


def unpinned(text: str, run: str) -> str:
    """As the command line had it: without the commit that `pinned` wrote; `-` for what the run kept of it."""
    name, _ = weighed(text)
    if name == str(Path(run).absolute() / KEPT):
        return STDIN + text[len(name) :]
    hub = hub_of(name)
    return text.replace(f"@{hub.revision}", "", 1) if hub and COMMIT.fullmatch(hub.revision or "") else text


def tables_of(source: Source) -> tuple[Iterator[Any], str]:
    """The rows of a dataset as Arrow tables, and which split they are. A thousand rows at a time are in memory: the
    datasets library has them in its cache, or streams them where only the first are wanted. Raises UserError for what
    the hub, or the cache, does not have."""
    name, hub = source.name, source.hub
    assert hub is not None
    if not COMMIT.fullmatch(hub.revision or ""):
        hub = replace(hub, revision=_commit(name, hub))
    with _naming(name):
        hub = _understood(name, hub)
        builder = _datasets(name).load_dataset_builder(hub.repo, hub.config, revision=hub.revision)
        if builder.hash != hub.revision:
            raise UserError(f"--data {name}: the cache has {builder.hash}, and the hub is not reached; connect once.")
        split, note = hub.split, f"split {hub.split}"
        if head := HEAD.fullmatch(split or ""):  # no more is fetched than is read
            table = builder.as_streaming_dataset(split=head[1]).take(int(head[2]))
        else:
            builder.download_and_prepare()
            if split is None:
                split, note = chosen_split(name, list(builder.info.splits), f"{name}:")
            table = builder.as_dataset(split=split)
        return _guarded(name, table.with_format("arrow").iter(batch_size=1000)), note


def files_of(source: Source) -> tuple[Part, ...]:
    """The files of a dataset's repository that an hf:// address names, in the cache."""
    from huggingface_hub import HfFileSystem, hf_hub_download

    name, hub = source.name, source.hub
    assert hub is not None
    assert hub.path is not None
    options: Any = {"repo_type": "dataset", "revision": hub.revision}
    root = f"datasets/{hub.repo}" + (f"@{quote(hub.revision, safe='')}" if hub.revision else "")
    with _naming(name):
        paths = [hub.path]
        if glob.has_magic(hub.path):
            files = HfFileSystem()
            paths = [files.resolve_path(path).path for path in sorted(files.glob(f"{root}/{hub.path}"))]
        parts = tuple(Part(f"hf://{root}/{path}", Path(hf_hub_download(hub.repo, path, **options))) for path in paths)
    if not parts:
        raise UserError(f"--data {name}: no file on the hub matches; check the pattern.")
    return parts


def _guarded(name: str, tables: Iterator[Any]) -> Iterator[Any]:
    with _naming(name):  # a stream may break in between
        yield from tables


def _understood(name: str, hub: Hub) -> Hub:
    """With the one word behind a name as the configuration or the split that it is."""
    if hub.word is None:
        return hub
    configs = [] if "[" in hub.word else _datasets(name).get_dataset_config_names(hub.repo, revision=hub.revision)
    return replace(hub, config=hub.word) if hub.word in configs else replace(hub, split=hub.word)


def _commit(name: str, hub: Hub) -> str:
    """The commit that a name means now; with HF_HUB_OFFLINE, the one in the cache of the datasets library."""
    if hub.path is None and importlib.util.find_spec("datasets") is None:
        _datasets(name)  # raises; importing it takes seconds, and a path that was misspelt is refused without
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _naming(name):
        try:
            return str(HfApi().dataset_info(hub.repo, revision=hub.revision, timeout=60).sha)
        except OfflineModeIsEnabled:
            if hub.path is not None:
                raise
            return str(_datasets(name).load_dataset_builder(hub.repo, _understood(name, hub).config).hash)


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--data {name}: no such file or folder; as a dataset on the hub it needs the datasets library: "
            "pip install 'penstock[hub]'."
        ) from error
    return datasets


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """What the libraries raise, of many kinds, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else f"{reason[:300]} ..."
        raise UserError(
            f"--data {name}: no such file or folder; and as a dataset on the hub it cannot be read "
            f"({type(error).__name__}: {reason}); check the spelling, or the network."
        ) from error
