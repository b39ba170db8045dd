"""What users have said of answers: comparisons and votes, with the version they came with and the side they are on.

[Note: one side for ever] The opening of a conversation, its first turn of a user, is hashed with the seed; the hash
decides whether all votes on that conversation are learned or held out. So it stays in every later round, and two
conversations that open alike are never on both sides.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from penstock.commands.align.inventory import same
from penstock.commands.data import comparisons, single_votes
from penstock.commands.improve.config import ImproveConfig
from penstock.data import formats
from penstock.data.records import Comparison, Kind, Prompt, Vote, line_of
from penstock.errors import UserError
from penstock.run.versions import Versions
from penstock.serve.labelling.export import rankings
from penstock.serve.store import Row, open_store

ARRIVED = "labels.json"
"""In a version's folder: the ids of what came with it, the version that was served then, and when."""
KINDS: tuple[Kind, ...] = ("comparisons", "votes")


@dataclass(frozen=True)
class Label:
    """What was said of one answer (a vote), or of several to one prompt (a comparison)."""

    record: Any
    id: str
    """A hash of its content: a vote that was changed is a new one, and one that was taken back is gone."""
    opening: str
    """Equal for labels of conversations that open alike."""
    heldout: bool
    version: int
    """The round that it came with."""

    @property
    def kind(self) -> Kind:
        return "comparisons" if isinstance(self.record, Comparison) else "votes"


class Gathered(NamedTuple):
    """All labels there are now."""

    labels: list[Label]
    new: list[Label]
    """Those of them that no earlier round has seen."""


def gather(config: ImproveConfig, versions: Versions, folder: Path, number: int) -> Gathered:
    """Reads the page's votes and --data; what is new came with version `number`, in whose folder the page's are kept.
    Raises UserError where there is no place to read from."""
    folder.mkdir(parents=True, exist_ok=True)
    arrived = arrivals(versions)
    labels: dict[str, Label] = {}
    for kind, texts in sources(config, folder).items():
        for record in formats.read(texts, kind).records if texts else ():
            if isinstance(record, Comparison) and len(set(record.ranks)) == 1:
                continue  # a tie teaches nothing
            line = json.dumps(line_of(record), sort_keys=True, default=str)
            digest = hashlib.sha256(line.encode("utf-8", "backslashreplace")).hexdigest()[:16]
            key = opening(record)
            side = held_out(key, config.seed, config.heldout)
            labels[digest] = Label(record, digest, key, side, arrived.get(digest, number))
    return Gathered([*labels.values()], [label for label in labels.values() if label.version == number])


def arrivals(versions: Versions) -> dict[str, int]:
    """The version that each label came with, by its id."""
    arrived: dict[str, int] = {}
    for number in versions.states:
        file = folder_of(versions, number) / ARRIVED
        if file.exists():
            arrived |= dict.fromkeys(json.loads(file.read_text(encoding="utf-8"))["new"], number)
    return arrived


def folder_of(versions: Versions, number: int) -> Path:
    """Where a version's data, runs and figures are."""
    return versions.path / f"version-{number:04d}"


def sources(config: ImproveConfig, folder: Path) -> dict[Kind, list[str]]:
    """The files to read, by kind: the page's votes and the labelling room's rankings, written here, and --data."""
    files: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    for text in config.data:
        kind = formats.kind_of(text)
        if kind not in KINDS:
            raise UserError(f"--data {text}: has {kind}; a round learns from comparisons and votes.")
        files[kind].append(text)
    served = (Path(config.data_dir) / "penstock.db").exists()
    if config.database is None and not served:
        if not config.data:
            raise UserError(
                f"--data-dir {config.data_dir}: there is no penstock.db in it, and no --data; name the directory of "
                "penstock serve, or files of comparisons and votes."
            )
        return files
    store = open_store(config.data_dir, config.database, create=False)
    try:
        lines_of = page_lines(store.votes())
        lines_of["comparisons"] += rankings(store)
    finally:
        store.close()
    for kind, lines in lines_of.items():
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file = folder / f"page-{kind}.jsonl"
            file.write_bytes(text.encode("utf-8", "backslashreplace"))
            files[kind].append(str(file))
    return files


def page_lines(rows: Sequence[Row]) -> dict[Kind, list[dict[str, Any]]]:
    """The page's votes, each once: a pair is a comparison, and so are thumbs up and down on answers to one message."""
    compared = [*comparisons(rows)]
    used = {answer["message_id"] for line in compared if line["kind"] == "thumb" for answer in line["shown"]}
    thumbs = [row for row in rows if row["kind"] == "thumb" and row["message_id"] not in used]
    return {"comparisons": compared, "votes": [*single_votes(thumbs)]}


def opening(record: Prompt) -> str:
    """What a conversation begins with: its first turn of a user, but for blanks and capitals."""
    for message in record.messages or ():
        if message["role"] == "user":
            return " ".join(str(message["content"]).casefold().split())
    return same(record)


def held_out(key: str, seed: int, share: float) -> bool:
    """Whether a conversation's labels are never learned. See [Note: one side for ever]."""
    digest = hashlib.sha256(f"{seed} {key}".encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def single(labels: Sequence[Label]) -> Iterator[Vote]:
    """Labels as votes: of a comparison the first of the best answers was liked, the last of the worst disliked."""
    for label in labels:
        record = label.record
        if isinstance(record, Vote):
            yield record
            continue
        fields = {name: getattr(record, name) for name in ("where", "prompt", "messages", "prompt_ids", "tools")}
        best, worst = record.ranks.index(min(record.ranks)), _last(record.ranks, max(record.ranks))
        for i, liked in ((best, True), (worst, False)):
            text = record.responses[i] if record.responses is not None else None
            ids = record.response_ids[i] if record.response_ids is not None else None
            yield Vote(**fields, response=text, response_ids=ids, label=liked)


def _last(ranks: Sequence[int], rank: int) -> int:
    return max(i for i, value in enumerate(ranks) if value == rank)


def write(file: Path, records: Sequence[Any]) -> Path:
    """Writes records as lines that training reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(line_of(record), ensure_ascii=False, default=str) + "\n" for record in records)
    file.write_bytes("".join(lines).encode("utf-8", "backslashreplace"))
    return file


def digest_of(labels: Sequence[Label]) -> str:
    """A hash of a set of labels."""
    return hashlib.sha256(" ".join(sorted(label.id for label in labels)).encode()).hexdigest()[:16]


def counts(labels: Sequence[Label]) -> dict[str, Any]:
    """How many there are of each kind."""
    return {kind: sum(label.kind == kind for label in labels) for kind in KINDS}
