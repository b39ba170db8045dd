"""What there is to align with: the records of the data by kind, what the model is, and the prompts that are held out.

[Note: one split for all stages] Each stage could hold out prompts of its own, but then one stage would train on what
another measures. Here prompts are held out once, of all data together, and each kind has some.
"""

import dataclasses
import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.algorithms.reward_functions import RewardFunction
from penstock.algorithms.setup import encode_all, encoder_of
from penstock.algorithms.verifiers import value_of
from penstock.commands.align.choice import Facts, answer_tokens
from penstock.commands.align.config import AlignConfig
from penstock.config import DataFlags, as_data_flags
from penstock.data import formats
from penstock.data.batching import split_by_prompt
from penstock.data.chat import Encoder
from penstock.data.records import KINDS, Comparison, Demonstration, Kind, Prompt, line_of
from penstock.errors import DataError
from penstock.models import pretrained
from penstock.models.config import DecoderConfig
from penstock.run.directory import resolve_model

MEASURED = 128
"""Held-out records of a kind at most: a win rate on so many is known to within 9 %."""
DROPPED = 0.2
"""Share of the records that may be left out because they are too long."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows that are made of records. Example: Lengths(120, 60.5, 64, 30.2)."""

    longest: int
    mean: float
    longest_response: int
    mean_response: float
    rows: float = 1.0
    """Rows of one record: answers of a ranking."""

    @staticmethod
    def of(rows: Sequence[tuple[int, int]], records: int) -> "Lengths":
        """Of (tokens, response tokens) of each row."""
        whole, answers = zip(*rows, strict=True)
        means = statistics.fmean(whole), statistics.fmean(answers)
        return Lengths(max(whole), means[0], max(answers), means[1], len(rows) / records)


@dataclass(frozen=True)
class Inventory:
    """See the module."""

    lines: list[str]
    """What was found, for people."""
    train: dict[Kind, list[Any]]
    heldout: dict[Kind, list[Any]]
    lengths: dict[Kind, Lengths]
    facts: Facts
    shape: DecoderConfig
    parameters: int
    adapter: int | None
    """Rank of the adapter that the model already is."""
    verifier: str | None
    """What checks the records' own answers, where no other score is given."""
    flags: DataFlags
    """How stages read the data."""
    max_new_tokens: int

    def write(self, folder: Path) -> None:
        """Writes KIND.jsonl and heldout-KIND.jsonl for the stages."""
        folder.mkdir(parents=True, exist_ok=True)
        for prefix, sides in (("", self.train), ("heldout-", self.heldout)):
            for kind, records in sides.items():
                lines = (json.dumps(line_of(record), ensure_ascii=False, default=str) + "\n" for record in records)
                text = "".join(lines).encode("utf-8", "backslashreplace")
                (folder / f"{prefix}{kind}.jsonl").write_bytes(text)


def look(config: AlignConfig, say: Callable[[str], None]) -> Inventory:
    """Reads model and data. Raises UserError or DataError for what no stage could read."""
    address = resolve_model(config.model)
    decoder, _ = pretrained.load(address, device="meta")
    sources: dict[Kind, list[str]] = {}
    for text in config.data:
        sources.setdefault(formats.kind_of(text, formats.parse_keys(config.keys)), []).append(text)
    records = {kind: _records(say, texts, kind, config) for kind, texts in sources.items()}
    flags = as_data_flags(config, apply_chat_template=bool(config.apply_chat_template))
    encoder = encoder_of(address, decoder.config, flags)
    plain = [record.prompt for of_kind in records.values() for record in of_kind if record.prompt is not None]
    if config.apply_chat_template is None and speaks(encoder) and plain and not any(map(encoder.spells, plain)):
        say("plain prompts are read as a user's turn: the model has a chat template (--no-apply-chat-template)")
        flags = dataclasses.replace(flags, apply_chat_template=True)
        encoder = encoder_of(address, decoder.config, flags)
    rows: dict[Kind, list[tuple[int, int]]] = {}
    for kind in sources:
        records[kind], rows[kind] = _encoded(say, encoder, records[kind], kind, config)
    lengths = {kind: Lengths.of(rows[kind], len(records[kind])) for kind in records}
    if "prompts" not in records:
        records["prompts"] = prompts_of([record for kind in KINDS for record in records.get(kind, ())])
        rows["prompts"] = [(len(encoder.encode_prompt(record)), 0) for record in records["prompts"]]
    verifier = None if config.reward or config.reward_fn else verifier_of(records["prompts"])
    answers = [tokens for kind, of_kind in rows.items() if kind != "prompts" for _, tokens in of_kind]
    asked = [tokens for tokens, _ in rows["prompts"]]
    fits, new = _with_room(say, records["prompts"], asked, answers, encoder.max_length, config.max_new_tokens)
    records["prompts"], asked = [records["prompts"][i] for i in fits], [asked[i] for i in fits]
    typical = min(statistics.fmean(answers), new) if answers else new
    lengths["prompts"] = Lengths(max(asked) + new, statistics.fmean(asked) + typical, new, typical)
    train, heldout = split(records, config.heldout, config.seed)
    score: Any = "model" if config.reward else "function" if config.reward_fn else "answers" if verifier else None
    facts = Facts({kind: len(train[kind]) for kind in train}, score, chats=speaks(encoder))
    count = sum(parameter.numel() for parameter in decoder.parameters())
    return Inventory(
        [*_found(config, sources, train, heldout, encoder, count), _rows(lengths, encoder), *_checks(verifier)],
        train, heldout, lengths, facts, decoder.config, count, decoder.adapted.spec.rank if decoder.adapted else None,
        verifier, flags, new,
    )  # fmt: skip


def _records(say: Callable[[str], None], texts: Sequence[str], kind: Kind, config: AlignConfig) -> list[Any]:
    """The records of one kind."""
    functions = [RewardFunction.load(address) for address in config.reward_fn] if kind == "prompts" else []
    dataset = formats.read(
        texts, kind, keys=formats.parse_keys(config.keys), skip_bad=config.skip_bad,
        reads=lambda name: name == "answer" or any(function.reads(name) for function in functions),
    )  # fmt: skip
    say(dataset.decision)
    return dataset.records


def _encoded(
    say: Callable[[str], None], encoder: Encoder, records: Sequence[Any], kind: Kind, config: AlignConfig
) -> tuple[list[Any], list[tuple[int, int]]]:
    """The records of one kind that the model can read, and tokens and response tokens of their rows."""
    kept, encoded, bad, long = encode_all(encoder, records, kind)
    for line in encoder.take_notes():
        say(line)
    if bad and not config.skip_bad:
        raise DataError(formats.list_bad(bad))
    if len(long) > DROPPED * len(records):
        raise DataError(
            f"{long[0]} So are {len(long)} of {len(records)} {kind}, too many to leave out: give a larger --max-length "
            f"than {encoder.max_length}, if the model allows, or shorter records."
        )
    if not kept:
        raise DataError(f"no {kind} are left that the model can read; the first: {bad[0]}")
    if left_out := len(bad) + len(long):
        say(f"left out: {left_out} of {len(records)} {kind}, the first: {(bad + long)[0]}")
    rows: list[tuple[int, int]] = []
    for row in encoded:
        if kind == "prompts":
            rows.append((len(row), 0))
        elif kind == "comparisons":
            rows += [(len(row[0]) + len(ids), len(ids)) for ids in row[1] if ids]
        else:
            rows.append((len(row.tokens), sum(row.trained)))
    return list({id(record): record for record in kept}.values()), rows  # some are several rows


def _with_room(
    say: Callable[[str], None], prompts: Sequence[Prompt], lengths: Sequence[int], answers: Sequence[int], limit: int,
    given: int | None,
) -> tuple[list[int], int]:  # fmt: skip
    """Which prompts leave room for an answer, and the tokens of a sampled answer: a few long prompts do not make the
    answers to all others short."""
    usual = sorted(lengths)[int(len(lengths) * 0.95)]
    new = given or answer_tokens(answers, limit - usual)
    fits = [i for i, tokens in enumerate(lengths) if tokens + new <= limit]
    if left_out := [i for i, tokens in enumerate(lengths) if tokens + new > limit]:
        what = f"{len(left_out)} of {len(prompts)} prompts leave no room for {new} new tokens in rows of {limit}"
        if len(left_out) > DROPPED * len(prompts):
            raise DataError(f"{what}; that is too many to leave out: give fewer --max-new-tokens, or shorter prompts.")
        say(f"left out: {what}, the first: {prompts[left_out[0]].where}")
    return fits, new


def speaks(encoder: Encoder) -> bool:
    """Whether the model has a chat template of its own."""
    return encoder.tokenizer is not None and encoder.template.own and encoder.template.chats


def prompts_of(records: Sequence[Any]) -> list[Prompt]:
    """What records that have answers ask, each once."""
    prompts: dict[str, Prompt] = {}
    for record in records:
        messages = record.messages
        if isinstance(record, Demonstration) and messages is not None:
            first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
            messages = messages[:first]
        ids = {"prompt": record.prompt, "messages": messages, "prompt_ids": record.prompt_ids, "tools": record.tools}
        if messages != ():
            prompts.setdefault(same(record), Prompt(where=record.where, **ids))
    return [*prompts.values()]


def verifier_of(prompts: Sequence[Prompt]) -> str | None:
    """The verifier that can check the records' `answer`, where nearly all have one."""
    answers = [str(record.fields["answer"]) for record in prompts if record.fields.get("answer") not in (None, "")]
    if not answers or len(answers) < 0.95 * len(prompts):
        return None
    if any("\\" in text or "$" in text for text in answers) and importlib.util.find_spec("math_verify"):
        return "math"
    return "number" if all(value_of(text) is not None for text in answers) else "exact_match"


def _checks(verifier: str | None) -> list[str]:
    return [f"answers can be checked: --reward-fn {verifier}"] if verifier else []


def _rows(lengths: Mapping[Kind, Lengths], encoder: Encoder) -> str:
    """What encoding has shown of all rows."""
    longest = max(of_kind.longest for of_kind in lengths.values())
    ends = encoder.eos_ids if encoder.tokenizer is None else encoder.tokenizer.convert_ids_to_tokens(encoder.eos_ids)
    room = f"{longest} of {encoder.max_length} tokens"
    return f"every row renders and teaches; the longest has {room}; answers end at {' or '.join(map(str, ends))}"


def split(
    records: Mapping[Kind, Sequence[Any]], fraction: float, seed: int
) -> tuple[dict[Kind, list[Any]], dict[Kind, list[Any]]]:
    """What is trained on and what is held out, by kind. See [Note: one split for all stages]."""
    sides: dict[str, bool] = {}
    for kind in KINDS:
        new = [key for record in records.get(kind, ()) if (key := same(record)) not in sides]
        train, heldout = split_by_prompt(new, fraction, seed, most=MEASURED) if new else ([], [])
        sides |= {new[i]: False for i in train} | {new[i]: True for i in heldout}
    parts = [
        {kind: [r for r in of_kind if sides[same(r)] is side] for kind, of_kind in records.items()}
        for side in (False, True)
    ]
    return parts[0], {kind: of_kind[:MEASURED] for kind, of_kind in parts[1].items() if of_kind}


def same(record: Prompt) -> str:
    """Equal for prompts that differ in blanks and capitals alone."""
    return " ".join(record.prompt_key.casefold().split())


def _found(
    config: AlignConfig, sources: Mapping[Kind, Sequence[str]], train: Mapping[Kind, Sequence[Any]],
    heldout: Mapping[Kind, Sequence[Any]], encoder: Encoder, parameters: int,
) -> list[str]:  # fmt: skip
    template = "a chat template" if speaks(encoder) else "no chat template"
    lines = [f"{config.model}: {parameters:,} parameters, {template}"]
    for kind, texts in sources.items():
        whole, held = len(train[kind]) + len(heldout.get(kind, ())), len(heldout.get(kind, ()))
        repeated = whole - len({same(record) for record in [*train[kind], *heldout.get(kind, ())]})
        tail = f", {repeated} repeat the prompt of another" if repeated and kind != "comparisons" else ""
        lines.append(f"{', '.join(texts)}: {whole:,} {kind}, {held:,} held out{tail}")
        if votes := [record.label for record in train[kind] if hasattr(record, "label")]:
            lines.append(f"votes to train on: {sum(votes)} liked, {len(votes) - sum(votes)} disliked")
        if ties := sum(isinstance(r, Comparison) and len(set(r.ranks)) == 1 for r in train[kind]):
            lines.append(f"{ties} comparisons are ties and teach nothing")
    if "prompts" not in sources:
        lines.append(f"prompts: the {len(train['prompts']):,} of these records, without their answers")
    return lines
