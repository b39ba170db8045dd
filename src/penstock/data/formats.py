"""Files of demonstrations, comparisons and prompts: what a line means, and what is wrong with it.

JSON lines (also .gz) and parquet. The format is told from the first good line and said aloud; `keys` overrides it.
Every bad line is named as `file:line: field: what is wrong and how to fix it`.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from penstock.errors import DataError, UserError

Kind = Literal["demonstrations", "comparisons", "prompts"]
Message = dict[str, str]

LONGEST_LINE = 8_000_000
"""Bytes; a longer line is nearly always a whole file without line breaks."""
SHOWN = 10
"""Bad lines printed before "and N more"."""
ROLES = {
    "system": "system", "user": "user", "assistant": "assistant",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked, in one of three forms: text, messages, or token ids."""

    where: str
    """file:line, for messages to people."""
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    """The conversation; of a demonstration the whole of it, answers included."""
    prompt_ids: tuple[int, ...] | None = None

    @property
    def prompt_key(self) -> str:
        """The same for records that ask the same; a conversation counts by all that precedes its first answer."""
        if self.messages is not None:
            first = next((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), len(self.messages))
            return json.dumps(self.messages[:first], sort_keys=True)
        return self.prompt if self.prompt is not None else json.dumps(self.prompt_ids)


@dataclass(frozen=True, kw_only=True)
class Demonstration(Prompt):
    """A prompt and the answer to learn; with `messages`, every assistant turn in it."""

    response: str | None = None
    response_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Prompt):
    """A prompt and K = 2..9 responses with ranks: 0 is the best, equal ranks are ties."""

    responses: tuple[str, ...] | None = None
    response_ids: tuple[tuple[int, ...], ...] | None = None
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """What `read` found."""

    records: list[Any]
    decision: str
    """One sentence: what the files were taken for. Example: "data.jsonl: 900 demonstrations (alpaca)."."""
    bad: list[str] = field(default_factory=list)
    """file:line: field: problem, for every line left out."""


@dataclass(frozen=True)
class Check:
    """The report of `penstock data check`."""

    text: str
    bad: list[str]


class BadField(Exception):
    """One line's problem: the field, and what is wrong with it and how to fix it."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem


def read(
    paths: str | Sequence[str],
    kind: Kind,
    *,
    keys: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """The records of all files, in order.

    `keys` renames fields first (ours -> theirs). Raises UserError for files that cannot be opened and DataError for
    bad lines, or when nothing is left; with `skip_bad` the good lines are kept and the bad ones listed.
    """
    records: list[Any] = []
    bad: list[str] = []
    decisions = []
    ids: dict[str, str] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        found, problems, form = _read_one(Path(path), kind, keys or {}, ids)
        records += found
        bad += problems
        if found:
            decisions.append(f"{path}: {len(found)} {kind} ({form})")
    if bad and not skip_bad:
        raise DataError(_list_bad(bad) + "\nMend these lines, or leave them out with --skip-bad.")
    if not records:
        raise DataError(
            "\n".join([*bad[:SHOWN], f"{_names(paths)}: no {kind} in it; one JSON object per line is expected."])
        )
    return Dataset(records, "; ".join(decisions) + ".", bad)


def check(paths: Sequence[str], kind: Kind | None = None) -> Check:
    """Says what the files are: kind and format, counts, lengths in characters, and each bad line."""
    lines: list[str] = []
    every: list[str] = []
    for path in paths:
        this = kind or _kind_of(Path(path))
        records, bad, form = _read_one(Path(path), this, {}, {})
        every += bad
        lines.append(f"{path}: {len(records)} {this} ({form}), {len(bad)} bad lines")
        if records:
            prompts = Counter(record.prompt_key for record in records)
            lines.append(f"  distinct prompts: {len(prompts)}; most frequent: {prompts.most_common(1)[0][1]} times")
            for name, lengths in _lengths(records).items():
                ordered = sorted(lengths)
                middle, high = ordered[len(ordered) // 2], ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)]
                lines.append(f"  {name}: median {middle}, 95 % below {high}, longest {ordered[-1]}")
        elif not bad:
            every.append(f"{path}:1: file: empty; one JSON object per line is expected.")
    return Check("\n".join([*lines, *every]), every)


# --- lines ----------------------------------------------------------------------------------------------------------


def _read_one(path: Path, kind: Kind, keys: Mapping[str, str], ids: dict[str, str]) -> tuple[list[Any], list[str], str]:
    records: list[Any] = []
    bad: list[str] = []
    form: Form | None = None
    for number, value in _objects(path):
        where = f"{path}:{number}"
        try:
            if isinstance(value, BadField):
                raise value
            item = {ours: value[theirs] for ours, theirs in keys.items() if theirs in value} | {
                name: one for name, one in value.items() if name not in keys.values()
            }
            if form is None or not form.fits(item):
                form = _form_of(item, kind)
            record = form.read(item, where)
            _unique(item, where, ids)
            records.append(record)
        except BadField as problem:
            bad.append(f"{where}: {problem.name}: {problem.problem}")
    return records, bad, form.name if form else "unknown"


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadField]]:
    """Line numbers with JSON objects, or with what kept the line from being one."""
    if not path.exists():
        raise UserError(f"{path}: no such file; check --data.")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name the files in it.")
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
            return
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(LONGEST_LINE)
                    yield number, BadField("line", f"longer than {LONGEST_LINE:,} bytes; put one object on each line.")
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a UTF-8 byte-order mark, as Windows editors write
                if line.strip():
                    yield number, _parse(line)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: file: the gzip stream is damaged or cut short ({error}); fetch it again.") from error
    except PermissionError as error:
        raise UserError(f"{path}: permission denied; make the file readable.") from error


def _parse(line: bytes) -> dict[str, Any] | BadField:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return BadField("line", "UTF-16; save the file as UTF-8.")
        return BadField("line", f"byte {error.start} is not UTF-8; save the file as UTF-8.")
    try:
        value = json.loads(text, parse_constant=_no_nan)
    except BadField as problem:
        return problem
    except RecursionError:
        return BadField("line", "nested too deeply; give flat objects.")
    except ValueError as error:
        if text.lstrip().startswith("["):
            return BadField("line", "a JSON array; write one object per line (jq -c '.[]' FILE).")
        return BadField("line", f"not valid JSON ({error}); is the line cut short?")
    if not isinstance(value, dict):
        return BadField("line", f"{_kind_name(value)}, and an object with named fields is expected.")
    return value


def _no_nan(name: str) -> None:
    raise BadField("line", f"{name} is not JSON; remove it or give a number.")


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install 'penstock[parquet]'.") from error
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: file: not a readable parquet file ({error}).") from error


def _unique(item: Mapping[str, Any], where: str, ids: dict[str, str]) -> None:
    if "id" not in item:
        return
    name = json.dumps(item["id"], sort_keys=True, default=str)
    if name in ids:
        raise BadField("id", f"{name} was used at {ids[name]} already; give each record its own id.")
    ids[name] = where


# --- formats --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One way to write a record: its name, the fields that give it away, and how to read it."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Any]

    def fits(self, item: Mapping[str, Any]) -> bool:
        """All the fields that give it away are there."""
        return all(name in item for name in self.needs)


def _form_of(item: Mapping[str, Any], kind: Kind) -> Form:
    for form in FORMS[kind]:
        if form.fits(item):
            return form
    wanted = " or ".join("+".join(form.needs) for form in FORMS[kind])
    given = ", ".join(list(item)[:8]) or "no fields"
    raise BadField("fields", f"found {given}; {kind} need {wanted}, or name them with --keys ours=theirs.")


def _kind_of(path: Path) -> Kind:
    """The most that the first good line can be read as."""
    kinds: tuple[Kind, ...] = ("comparisons", "demonstrations", "prompts")
    for _, value in _objects(path):
        if not isinstance(value, BadField):
            return next((kind for kind in kinds if any(form.fits(value) for form in FORMS[kind])), "prompts")
    return "prompts"


def _pair(item: Mapping[str, Any], where: str, answer: str = "response") -> Demonstration:
    asked = _asked(item["prompt"], where)
    if asked.messages is not None:
        turns = item[answer]
        if isinstance(turns, str):
            turns = [{"role": "assistant", "content": turns}]
        return _conversation(where, [*asked.messages, *_messages(turns, answer)], answer)
    return Demonstration(where=where, prompt=asked.prompt, response=_text(item[answer], answer, empty=False))


def _ids_pair(item: Mapping[str, Any], where: str) -> Demonstration:
    return Demonstration(
        where=where,
        prompt_ids=_ids(item["prompt_ids"], "prompt_ids"),
        response_ids=_ids(item["response_ids"], "response_ids"),
    )


def _dialogue(item: Mapping[str, Any], where: str, name: str = "messages") -> Demonstration:
    return _conversation(where, _messages(item[name], name), name)


def _conversation(where: str, messages: list[Message], name: str) -> Demonstration:
    if not any(message["role"] == "assistant" for message in messages):
        raise BadField(name, "has no assistant turn; a demonstration needs an answer to learn.")
    while messages[-1]["role"] != "assistant":  # a trailing question teaches nothing
        messages = messages[:-1]
    return Demonstration(where=where, messages=tuple(messages))


def _alpaca(item: Mapping[str, Any], where: str) -> Demonstration:
    asked = _alpaca_prompt(item, where)
    return Demonstration(where=where, prompt=asked.prompt, response=_text(item["output"], "output", empty=False))


def _alpaca_prompt(item: Mapping[str, Any], where: str) -> Prompt:
    """The prompt of Taori et al. 2023, without its preamble."""
    instruction = _text(item["instruction"], "instruction", empty=False)
    given = _text(item.get("input") or "", "input")
    middle = f"\n\n### Input:\n{given}" if given else ""
    return Prompt(where=where, prompt=f"### Instruction:\n{instruction}{middle}\n\n### Response:\n")


def _ranked(item: Mapping[str, Any], where: str) -> Comparison:
    asked = _asked(item["prompt"], where) if "prompt" in item else _ids_prompt(item, where)
    if "response_ids" in item:
        many = _list(item["response_ids"], "response_ids")
        ids = tuple(_ids(one, f"response_ids[{i}]") for i, one in enumerate(many))
        ranks = _ranks(item["ranking"], len(ids))
        return Comparison(where=where, **_as_asked(asked), response_ids=ids, ranks=ranks)
    responses = _list(item["responses"], "responses")
    texts = tuple(_text(one, f"responses[{i}]", empty=False) for i, one in enumerate(responses))
    return Comparison(where=where, **_as_asked(asked), responses=texts, ranks=_ranks(item["ranking"], len(texts)))


def _preferred(item: Mapping[str, Any], where: str) -> Comparison:
    asked = _asked(item["prompt"], where)
    texts = tuple(_last_answer(item[name], name) for name in ("chosen", "rejected"))
    return _two(where, asked, texts)


def _dialogues(item: Mapping[str, Any], where: str) -> Comparison:
    """chosen and rejected are whole dialogues that share their beginning (as in Bai et al. 2022's data)."""
    chosen, rejected = item["chosen"], item["rejected"]
    if isinstance(chosen, list):
        one, two = _messages(chosen, "chosen"), _messages(rejected, "rejected")
        if one[:-1] != two[:-1] or not one[:-1] or one[-1]["role"] != "assistant" or two[-1]["role"] != "assistant":
            raise BadField(
                "rejected", "must share all but the last turn with chosen, and both end with an assistant turn."
            )
        return _two(where, Prompt(where=where, messages=tuple(one[:-1])), (one[-1]["content"], two[-1]["content"]))
    one, two = _text(chosen, "chosen", empty=False), _text(rejected, "rejected", empty=False)
    mark = "\n\nAssistant:"
    cut = one.rfind(mark) + len(mark)
    if cut < len(mark) or not two.startswith(one[:cut]):
        cut = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        cut = max(one.rfind("\n", 0, cut), one.rfind(": ", 0, cut) + 1) + 1
    if cut <= 0:
        raise BadField("rejected", "shares no beginning with chosen; give the prompt as a field of its own.")
    return _two(where, Prompt(where=where, prompt=one[:cut]), (one[cut:], two[cut:]))


def _two(where: str, asked: Prompt, texts: tuple[str, ...]) -> Comparison:
    if texts[0] == texts[1]:
        raise BadField("rejected", "is the same as chosen; a comparison needs two different responses.")
    return Comparison(where=where, **_as_asked(asked), responses=texts, ranks=(0, 1))


def _ids_prompt(item: Mapping[str, Any], where: str) -> Prompt:
    return Prompt(where=where, prompt_ids=_ids(item["prompt_ids"], "prompt_ids"))


def _only_prompt(read_whole: Callable[[Mapping[str, Any], str], Prompt]) -> Callable[[Mapping[str, Any], str], Prompt]:
    def read_prompt(item: Mapping[str, Any], where: str) -> Prompt:
        return Prompt(where=where, **_as_asked(read_whole(item, where)))

    return read_prompt


def _messages_prompt(item: Mapping[str, Any], where: str, name: str = "messages") -> Prompt:
    messages = _messages(item[name], name)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise BadField(name, "has no user turn to answer.")
    return Prompt(where=where, messages=tuple(messages))


def _named(read_one: Callable[..., Any], name: str) -> Callable[[Mapping[str, Any], str], Any]:
    return lambda item, where: read_one(item, where, name)


FORMS: dict[Kind, tuple[Form, ...]] = {
    "demonstrations": (
        Form("token ids", ("prompt_ids", "response_ids"), _ids_pair),
        Form("prompt/response", ("prompt", "response"), _pair),
        Form("prompt/completion", ("prompt", "completion"), _named(_pair, "completion")),
        Form("messages", ("messages",), _dialogue),
        Form("sharegpt", ("conversations",), _named(_dialogue, "conversations")),
        Form("alpaca", ("instruction", "output"), _alpaca),
    ),
    "comparisons": (
        Form("ranked responses", ("prompt", "responses", "ranking"), _ranked),
        Form("ranked token ids", ("prompt_ids", "response_ids", "ranking"), _ranked),
        Form("prompt/chosen/rejected", ("prompt", "chosen", "rejected"), _preferred),
        Form("chosen/rejected dialogues", ("chosen", "rejected"), _dialogues),
    ),
    "prompts": (
        Form("token ids", ("prompt_ids",), _ids_prompt),
        Form("prompt", ("prompt",), lambda item, where: _asked(item["prompt"], where)),
        Form("messages", ("messages",), _messages_prompt),
        Form("sharegpt", ("conversations",), _named(_messages_prompt, "conversations")),
        Form("alpaca", ("instruction",), _alpaca_prompt),
        Form("chosen/rejected dialogues", ("chosen", "rejected"), _only_prompt(_dialogues)),
    ),
}


# --- fields ---------------------------------------------------------------------------------------------------------


def _asked(value: Any, where: str) -> Prompt:
    """A prompt field: text, or a list of messages."""
    if isinstance(value, list):
        return Prompt(where=where, messages=tuple(_messages(value, "prompt")))
    return Prompt(where=where, prompt=_text(value, "prompt"))


def _as_asked(asked: Prompt) -> dict[str, Any]:
    return {"prompt": asked.prompt, "messages": asked.messages, "prompt_ids": asked.prompt_ids}


def _text(value: Any, name: str, empty: bool = True) -> str:
    if not isinstance(value, str):
        raise BadField(name, f"{_kind_name(value)}, and text is expected; put it in quotes.")
    if not empty and not value:
        raise BadField(name, "is empty; write a text or remove the line.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadField(
            name, f"holds half a character (a lone surrogate at {error.start}); re-export the text."
        ) from error
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadField(name, f"{_kind_name(value)}, and a list is expected.")
    return value


def _ids(value: Any, name: str) -> tuple[int, ...]:
    for i, one in enumerate(_list(value, name)):
        if not isinstance(one, int) or isinstance(one, bool) or one < 0:
            raise BadField(f"{name}[{i}]", f"{one!r} is no token id; give whole numbers from 0.")
    if not value:
        raise BadField(name, "is empty; give at least one token id (a BOS, say).")
    return tuple(value)


def _messages(value: Any, name: str) -> list[Message]:
    messages = []
    for i, one in enumerate(_list(value, name)):
        here = f"{name}[{i}]"
        if not isinstance(one, dict):
            raise BadField(here, f"{_kind_name(one)}, and an object with role and content is expected.")
        role, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
        if role not in ROLES:
            raise BadField(f"{here}.role", f"{role!r} is no role; use system, user or assistant.")
        messages.append({"role": ROLES[role], "content": _text(content, f"{here}.content")})
        if messages[-1]["role"] == "system" and i > 0:
            raise BadField(f"{here}.role", "a system message belongs at the start.")
    if not messages:
        raise BadField(name, "is empty; give at least one message.")
    return messages


def _last_answer(value: Any, name: str) -> str:
    """A response given as text or as the messages that end with it."""
    if isinstance(value, list):
        messages = _messages(value, name)
        if messages[-1]["role"] != "assistant":
            raise BadField(name, "must end with an assistant turn.")
        return messages[-1]["content"]
    return _text(value, name, empty=False)


def _ranks(value: Any, count: int) -> tuple[int, ...]:
    """[best, ..., worst] as indices into the responses, ties nested -> a rank per response."""
    if not 2 <= count <= 9:
        raise BadField("responses", f"{count} responses; a ranking has 2 to 9.")
    ranks: dict[int, int] = {}
    for rank, place in enumerate(_list(value, "ranking")):
        for index in place if isinstance(place, list) else [place]:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
                raise BadField("ranking", f"{index!r} is no index of a response; use 0 to {count - 1}, best first.")
            if index in ranks:
                raise BadField("ranking", f"names response {index} twice.")
            ranks[index] = rank
    if len(ranks) != count:
        missing = next(i for i in range(count) if i not in ranks)
        raise BadField("ranking", f"leaves out response {missing}; rank all {count}, ties as nested lists.")
    return tuple(ranks[i] for i in range(count))


def _kind_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _lengths(records: Sequence[Any]) -> dict[str, list[int]]:
    """Lengths by part: characters of texts, tokens of ids."""
    lengths: dict[str, list[int]] = {}
    for record in records:
        parts: list[tuple[str, Any]] = [("prompt characters", record.prompt), ("prompt tokens", record.prompt_ids)]
        if record.messages is not None:
            parts += [(f"{message['role']} characters", message["content"]) for message in record.messages]
        response = getattr(record, "response", None)
        parts += [("response characters", one) for one in getattr(record, "responses", None) or (response,)]
        for name, value in parts:
            if value is not None:
                lengths.setdefault(name, []).append(len(value))
    return lengths


def _list_bad(bad: Sequence[str]) -> str:
    more = [f"... and {len(bad) - SHOWN} more bad lines."] if len(bad) > SHOWN else []
    return "\n".join([*bad[:SHOWN], *more])


def _names(paths: str | Sequence[str]) -> str:
    return paths if isinstance(paths, str) else ", ".join(paths)
