"""Sources of demonstrations, comparisons, votes and prompts: what a line means, and what is wrong with it.

The fields of a line show its format, and the result says which was chosen; explicit keys override it. Every bad line is
listed as `file:line: field: what is wrong and how to fix it`. A field that changes what a record means is read, or the
line is bad; all others are counted as ignored.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.data import field_checks, records
from penstock.data.files import opened
from penstock.data.jsonl import FieldError, Item
from penstock.data.records import CHAT, FORMS, KINDS, Form, Kind
from penstock.data.tables import Cells
from penstock.errors import DataError, UserError
from penstock.sources import source_of

AS_CHAT = " as a chat"
SHOWN = 10
"""Bad lines printed before "and N more"."""
ALIASES = {"system_prompt": "system"}
"""Other names of our fields (OpenOrca's)."""
MEANING = (
    *CHAT, "context", *field_checks.REASONING, "image", "images", "video", "videos", "audio", "audios",
    "chat_template_kwargs",
)  # fmt: skip
"""Fields without which a record means something else: a format that has no place for one refuses it."""
READ_TOO: dict[Kind, set[str]] = {
    "demonstrations": {"id", "label", "weight", "finish_reason"},
    "comparisons": {"id", "weight", "finish_reason"},
    "votes": {"id", "weight", "finish_reason"},
    "prompts": {"id", "response", "completion", "output", "responses", "ranking", "chosen", "rejected", "response_ids"},
}
"""Beside the fields of its format; answers say nothing about a prompt."""
EMPTY: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True)
class Dataset:
    """The records that `read` returns."""

    records: list[Any]
    decision: str
    """One sentence: the format of each source, what was left out, the fields that were not read.
    Example: "data.jsonl: 900 demonstrations (alpaca; ignored fields: source (900))."."""
    bad: list[str] = field(default_factory=list)
    """file:line: field: problem, for every line left out."""


Reads = Callable[[str], bool]
"""Whether a field of prompts is read by somebody else than the format: a reward function."""


def reads_none(name: str) -> bool:
    """Where no reward function does."""
    return False


def read(
    sources: str | Sequence[str],
    kind: Kind,
    *,
    keys: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    reads: Reads = reads_none,
) -> Dataset:
    """The records of all sources, in order; what a source is, `penstock.sources` says.

    `keys` maps our field names to those in the files, and wins over fields with our names. Fields that `reads`
    knows are not ignored. Raises UserError for sources
    that cannot be opened, and DataError for bad lines or when no line is good; with `skip_bad` bad lines are only
    listed.
    """
    good: list[Any] = []
    bad: list[str] = []
    decisions = []
    for text in [sources] if isinstance(sources, str) else sources:
        lines = read_source(text, kind, keys or {}, reads)
        good += lines.records
        bad += lines.bad
        decisions.append(f"{text}: {len(lines.records)} {kind} ({lines.how})")
    if bad and not skip_bad:
        raise DataError(f"{list_bad(bad)}\nMend {bad_lines(len(bad))}, or leave out what is bad with --skip-bad.")
    if not good:
        problems = f"{list_bad(bad)}\n" if bad else ""
        raise DataError(f"{problems}No good line is left: {'; '.join(decisions)}; mend them.")
    return Dataset(good, "; ".join(decisions) + ".", bad)


# --- lines ----------------------------------------------------------------------------------------------------------


@dataclass
class Lines:
    """What `read_source` made of one source."""

    records: list[Any] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    """How many records of each format."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many good lines say themselves that they are not to be learned, by what says so."""
    ignored: Counter[str] = field(default_factory=Counter)
    """In how many records a field was not read."""
    unread: str = "ignored fields"
    """What such fields are called."""
    repeated_ids: int = 0
    """Records whose id an earlier one has: ids mean nothing here, but a file may have been joined with itself."""
    nulls: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    """Fields of a chat that are null in some row; those that are not in some row."""
    notes: list[str] = field(default_factory=list)
    """What of the source was read, where that is not all of one file."""

    @property
    def how(self) -> str:
        """In words. Example: "3 alpaca, 1 messages; 2 bad lines left out; ignored fields: source (4)"."""
        several = [f"{count} {name}" for name, count in self.forms.most_common()]
        parts = [", ".join(several) if len(several) > 1 else next(iter(self.forms), "unknown")]
        parts += [f"{bad_lines(len(self.bad))} left out"] if self.bad else []
        parts += [f"{count} with {name} left out" for name, count in self.left_out.items()]
        parts += [f"{self.repeated_ids} records repeat an earlier one's id, and are read"] if self.repeated_ids else []
        if self.ignored:
            parts.append(f"{self.unread}: " + ", ".join(f"{name} ({n})" for name, n in self.ignored.most_common()))
        parts += self.notes
        return "; ".join(parts)


def read_source(
    text: str, kind: Kind, keys: Mapping[str, str], reads: Reads = reads_none, absent: Collection[str] = ()
) -> Lines:
    """The records of one source, its bad lines, and how it was read. `absent` are names of null columns.

    A table has a column for what no row has: where the fields of a chat are null in every row, they are read again as
    if they were not there. Where some row has a value, all are chats, as they are written for one another.
    """
    source, lines = source_of(text), Lines()
    parts, note = opened(source)
    for name, items in parts:
        before = len(lines.records) + len(lines.bad) + lines.left_out.total()
        _read_part(lines, name, items, kind, keys, reads, absent)
        if before == len(lines.records) + len(lines.bad) + lines.left_out.total():
            lines.bad.append(f"{name}:1: file: empty; one JSON object per line is expected.")
    nulls = lines.nulls - lines.given
    if nulls and any(name.endswith(AS_CHAT) for name in lines.forms):
        return read_source(text, kind, keys, reads, nulls)
    lines.notes = [f"{len(parts)} files"] if len(parts) > 1 else []
    lines.notes += [note] if note else []
    if source.weight is not None:
        count = len(lines.records)
        lines.records = weighted(lines.records, source.weight)
        lines.notes.append(f"weight {source.weight:g}: {len(lines.records)} of {count} records, the same in every run")
    return lines


def _read_part(
    lines: Lines, name: str, items: Iterator[Item], kind: Kind, keys: Mapping[str, str], reads: Reads,
    absent: Collection[str],
) -> None:  # fmt: skip
    """Adds the records and bad lines of one file."""
    ids, candidates = set[str](), _candidates(kind, keys, reads)
    for number, value in items:
        where = f"{name}:{number}"
        try:
            if isinstance(value, FieldError):
                raise value
            item = _renamed(value, keys)
            if isinstance(value, Cells):
                item = field_checks.uncelled(item)
            item = {key: value for key, value in item.items() if key not in absent} if absent else item
            for key in item.keys() & CHAT:
                (lines.nulls if item[key] is None else lines.given).add(key)
            form = _form_of(item, kind, candidates)
            ignored = [name for name in _ignored(item, form, kind) if not reads(name)]
            record = form.read(item, where)
            if kind == "prompts":
                record = replace(record, fields=item)
            else:
                record = replace(record, cut=records.cut_answers(item, record))
            unwanted = _unwanted(item, kind, record)
        except FieldError as problem:
            lines.bad.append(f"{where}: {problem.name}: {problem.problem}")
            continue
        if unwanted is not None:
            lines.left_out[unwanted] += 1
            continue
        if isinstance(item.get("id"), str | int):  # a field of this name with another type is no id
            lines.repeated_ids += repr(item["id"]) in ids  # 1 and "1" are two ids
            ids.add(repr(item["id"]))
        lines.records.append(record)
        lines.ignored.update(ignored)
        is_chat = isinstance(item[form.needs[0]], str) and records.is_chat(item)
        lines.forms[form.name + (AS_CHAT if is_chat else "")] += 1


def weighted(records: Sequence[Any], weight: float) -> list[Any]:
    """`weight` times as many records, in order: whole copies of all, and of the rest each at most once more, drawn.

    A fraction as in alignment-handbook's dataset_mixer (Tunstall et al. 2023). The draw depends on the number of
    records alone, so that runs of other seeds, and resumed ones, read the same.
    """
    count = round(len(records) * weight)
    copies, rest = divmod(count, max(len(records), 1))
    draw = random.Random(0).random  # the one method whose sequence Python promises to keep
    drawn = set(sorted(range(len(records)), key=lambda _: draw())[:rest])
    return [record for i, record in enumerate(records) for _ in range(copies + (i in drawn))]


def _renamed(item: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    used = {*item, *keys} - {*keys.values()}
    keys = {ours: theirs for theirs, ours in ALIASES.items() if theirs in used and ours not in used} | dict(keys)
    unnamed = {name: value for name, value in item.items() if name not in keys and name not in keys.values()}
    return unnamed | {ours: item[theirs] for ours, theirs in keys.items() if theirs in item}


def _unwanted(item: Mapping[str, Any], kind: Kind, record: records.Prompt) -> str | None:
    """Which field says that a record is not to be learned: label (TRL's, of disliked answers) or weight."""
    if kind == "demonstrations" and item.get("label") in (0, False):
        return "label false"
    weight = item.get("weight") if kind != "prompts" else None
    if weight not in (None, 0, 1):
        raise FieldError("weight", f"{field_checks.shown(weight)}; give 0 or 1: a record is learned or it is not.")
    return "weight 0" if weight == 0 or not getattr(record, "teaches", True) else None


def _ignored(item: Mapping[str, Any], form: Form, kind: Kind) -> list[str]:
    """The fields, without the empty ones, that the format does not read. Raises FieldError for one of MEANING."""
    read = {*form.needs, *form.may, *READ_TOO[kind]}
    if item.get("label") not in (0, 1):  # a class, say
        read.discard("label")
    names = [name for name, value in item.items() if name not in read and value not in EMPTY]
    for name in names:
        if name in MEANING:
            problem = f"would change what the record means, and {form.name} has no place for it; take it out."
            raise FieldError(name, problem)
    turns = [(name, turn) for name in form.needs if isinstance(item[name], list) for turn in item[name]]
    unread = {
        f"{name}[].{key}"
        for name, turn in turns
        if isinstance(turn, dict)
        for key, value in turn.items()
        if key not in field_checks.TURN and value not in EMPTY
    }
    return [*names, *sorted(unread)]


def parse_keys(pairs: Sequence[str]) -> dict[str, str]:
    """--keys as a mapping from our names to the files'."""
    keys = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(keys.values()):
        raise UserError(f"--keys {' '.join(pairs)}: give pairs ours=theirs, as in --keys prompt=question.")
    return keys


def _candidates(kind: Kind, keys: Mapping[str, str], reads: Reads) -> tuple[Form, ...]:
    """The formats that read all the fields that --keys names, but those that a reward function reads."""
    names = {name for name in keys if not reads(name)}
    forms = tuple(form for form in FORMS[kind] if names <= {*form.needs, *form.may, "id", "label", "weight"})
    if not forms:
        ours = "; ".join(", ".join(form.needs) for form in FORMS[kind])
        raise UserError(f"--keys {' '.join(keys)}: no format of {kind} has these fields; the formats have {ours}.")
    return forms


def _form_of(item: Mapping[str, Any], kind: Kind, candidates: Sequence[Form]) -> Form:
    filled = _filled(item)
    for fields in (filled, item):
        for form in candidates:
            if form.fits(fields):
                return form
    wanted = " or ".join("+".join(form.needs) for form in candidates)
    names = ", ".join(field_checks.shown(name) for name in list(item)[:8]) or "no fields"
    likely = _likely_kind(item) or kind
    looks = f" (it looks like {likely})" if likely != kind else ""
    raise FieldError("fields", f"found {names}{looks}; {kind} need {wanted}, or name them with --keys ours=theirs.")


def _filled(item: Mapping[str, Any]) -> dict[str, Any]:
    """The item without nulls: a table writes null where a row has no value."""
    return {name: value for name, value in item.items() if value is not None}


def kind_of(text: str, keys: Mapping[str, str] | None = None) -> Kind:
    """The first of KINDS that the first good line of a source can be read as; `keys` as in `read`."""
    for _, items in opened(source_of(text))[0]:
        for _, value in items:
            if not isinstance(value, FieldError):
                with contextlib.suppress(FieldError):
                    value = field_checks.uncelled(value) if isinstance(value, Cells) else value
                return _likely_kind(_renamed(value, keys or {})) or "prompts"
    return "prompts"


def _likely_kind(item: Mapping[str, Any]) -> Kind | None:
    """The first of KINDS that has a format with these fields; a label that is true or false is a vote's."""
    filled = _filled(item)
    if not isinstance(filled.get("label"), bool):
        filled.pop("label", None)
    return next((kind for kind in KINDS if any(form.fits(filled) for form in FORMS[kind])), None)


def list_bad(bad: Sequence[str]) -> str:
    return "\n".join([*bad[:SHOWN], *([f"... and {len(bad) - SHOWN} more."] if len(bad) > SHOWN else [])])


def bad_lines(count: int) -> str:
    return f"{count} bad line{'' if count == 1 else 's'}"
