"""Files of demonstrations, comparisons and prompts: what a line means, and what is wrong with it.

The fields of a line show its format, and the result says which was chosen; explicit keys override it. Every bad line is
listed as `file:line: field: what is wrong and how to fix it`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from penstock.data import field_checks
from penstock.data.field_checks import Message
from penstock.data.jsonl import FieldError, objects
from penstock.errors import DataError, UserError

Kind = Literal["demonstrations", "comparisons", "prompts"]
KINDS: tuple[Kind, ...] = ("comparisons", "demonstrations", "prompts")
"""In the order in which they are tried: a line of each can be read as the next, but not the reverse."""

SAME = "is the same as chosen; a comparison needs two different answers."
SHOWN = 10
"""Bad lines printed before "and N more"."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt in one of three forms: text, messages, or token ids."""

    where: str
    """file:line, for messages."""
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    """The conversation; in a demonstration with its answers."""
    prompt_ids: tuple[int, ...] | None = None

    @property
    def prompt_key(self) -> str:
        """Equal for records with the same question; of a conversation, all that precedes its first answer."""
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
    """The records that `read` returns."""

    records: list[Any]
    decision: str
    """One sentence: the format of each file. Example: "data.jsonl: 900 demonstrations (alpaca)."."""
    bad: list[str] = field(default_factory=list)
    """file:line: field: problem, for every line left out."""


@dataclass(frozen=True)
class Check:
    """The report of `penstock data check`."""

    text: str
    bad: list[str]


def read(
    paths: str | Sequence[str], kind: Kind, *, keys: Mapping[str, str] | None = None, skip_bad: bool = False
) -> Dataset:
    """The records of all files, in order.

    `keys` maps our field names to those in the files, and wins over fields with our names. Raises UserError for files
    that cannot be opened, and DataError for bad lines or when no line is good; with `skip_bad` bad lines are only
    listed.
    """
    records: list[Any] = []
    bad: list[str] = []
    decisions = []
    for path in [paths] if isinstance(paths, str) else paths:
        good, problems, forms = _read_file(Path(path), kind, keys or {})
        records += good
        bad += problems
        left = f"; {_bad_lines(len(problems))} left out" if problems else ""
        decisions.append(f"{path}: {len(good)} {kind} ({forms}{left})")
    if bad and not skip_bad:
        raise DataError(f"{_list_bad(bad)}\nMend {_bad_lines(len(bad))}, or leave out what is bad with --skip-bad.")
    if not records:
        raise DataError(f"{_list_bad(bad)}\nNo good line is left: {_bad_lines(len(bad))}; mend them.")
    return Dataset(records, "; ".join(decisions) + ".", bad)


def check(paths: Sequence[str], kind: Kind | None = None) -> Check:
    """Kind and format of each file, counts, lengths in characters, and each bad line."""
    lines: list[str] = []
    bad_lines: list[str] = []
    for path in paths:
        file_kind = kind or _kind_of(Path(path))
        records, bad, forms = _read_file(Path(path), file_kind, {})
        bad_lines += bad
        lines.append(f"{path}: {len(records)} {file_kind} ({forms}), {_bad_lines(len(bad))}")
        if records:
            prompts = Counter(record.prompt_key for record in records)
            lines.append(f"  distinct prompts: {len(prompts)}; most frequent: {prompts.most_common(1)[0][1]} times")
            for name, lengths in _lengths(records).items():
                ordered = sorted(lengths)
                middle, high = ordered[len(ordered) // 2], ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)]
                lines.append(f"  {name}: median {middle}, 95 % below {high}, longest {ordered[-1]}")
    return Check("\n".join([*lines, *bad_lines]), bad_lines)


# --- lines ----------------------------------------------------------------------------------------------------------


def _read_file(path: Path, kind: Kind, keys: Mapping[str, str]) -> tuple[list[Any], list[str], str]:
    """The records of one file, its bad lines, and how it was written: "alpaca", or "3 alpaca, 1 messages"."""
    records: list[Any] = []
    bad: list[str] = []
    forms: Counter[str] = Counter()
    ids: dict[str, str] = {}
    candidates = _candidates(kind, keys)
    for number, value in objects(path):
        where = f"{path}:{number}"
        try:
            if isinstance(value, FieldError):
                raise value
            item = _renamed(value, keys)
            form = _form_of(item, kind, candidates)
            record = form.read(item, where)
            _unique(item, where, ids)
        except FieldError as problem:
            bad.append(f"{where}: {problem.name}: {problem.problem}")
            continue
        records.append(record)
        forms[form.name] += 1
    if not records and not bad:
        bad.append(f"{path}:1: file: empty; one JSON object per line is expected.")
    if len(forms) < 2:
        return records, bad, next(iter(forms), "unknown")
    return records, bad, ", ".join(f"{count} {name}" for name, count in forms.most_common())


def _renamed(item: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    unnamed = {name: value for name, value in item.items() if name not in keys and name not in keys.values()}
    return unnamed | {ours: item[theirs] for ours, theirs in keys.items() if theirs in item}


def _unique(item: Mapping[str, Any], where: str, ids: dict[str, str]) -> None:
    record_id = item.get("id")
    if not isinstance(record_id, str | int):  # a field of this name with another type is no id
        return
    first = ids.setdefault(repr(record_id), where)  # 1 and "1" are two ids
    if first != where:
        problem = f"{field_checks.shown(record_id)} was used at {first} already; give each record its own id."
        raise FieldError("id", problem)


# --- formats --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One way to write a record: its name, the fields that identify it, and the function that reads it."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Any]
    may: tuple[str, ...] = ("id",)
    """Optional fields that it reads."""

    def fits(self, item: Mapping[str, Any]) -> bool:
        """True where the item has all the fields that identify this format."""
        return all(name in item for name in self.needs)


def _candidates(kind: Kind, keys: Mapping[str, str]) -> tuple[Form, ...]:
    """The formats that read all the fields that --keys names."""
    forms = tuple(form for form in FORMS[kind] if set(keys) <= {*form.needs, *form.may})
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
    likely = next((likely for likely in KINDS if any(form.fits(filled) for form in FORMS[likely])), kind)
    looks = f" (it looks like {likely})" if likely != kind else ""
    raise FieldError("fields", f"found {names}{looks}; {kind} need {wanted}, or name them with --keys ours=theirs.")


def _filled(item: Mapping[str, Any]) -> dict[str, Any]:
    """The item without nulls: a table writes null where a row has no value."""
    return {name: value for name, value in item.items() if value is not None}


def _kind_of(path: Path) -> Kind:
    """The first of KINDS that the first good line can be read as."""
    for _, value in objects(path):
        if not isinstance(value, FieldError):
            item = _filled(value)
            return next((kind for kind in KINDS if any(form.fits(item) for form in FORMS[kind])), "prompts")
    return "prompts"


def _pair(item: Mapping[str, Any], where: str, answer: str = "response") -> Demonstration:
    prompt = _prompt_field(item["prompt"], where)
    if prompt.messages is not None:
        turns = item[answer]
        if isinstance(turns, str):
            turns = [{"role": "assistant", "content": turns}]
        return _conversation(where, [*prompt.messages, *field_checks.messages(turns, answer)], answer)
    response = field_checks.text(item[answer], answer, empty=False)
    return Demonstration(where=where, prompt=prompt.prompt, response=response)


def _ids_pair(item: Mapping[str, Any], where: str) -> Demonstration:
    prompt, response = (field_checks.token_ids(item[name], name) for name in ("prompt_ids", "response_ids"))
    return Demonstration(where=where, prompt_ids=prompt, response_ids=response)


def _dialogue(item: Mapping[str, Any], where: str, name: str = "messages") -> Demonstration:
    return _conversation(where, field_checks.messages(item[name], name), name)


def _conversation(where: str, messages: list[Message], name: str) -> Demonstration:
    if not any(message["role"] == "assistant" for message in messages):
        raise FieldError(name, "has no assistant turn; a demonstration needs an answer to learn.")
    while messages[-1]["role"] != "assistant":  # no answer follows a question at the end
        messages = messages[:-1]
    return Demonstration(where=where, messages=tuple(messages))


def _alpaca(item: Mapping[str, Any], where: str) -> Demonstration:
    prompt = _alpaca_prompt(item, where).prompt
    return Demonstration(where=where, prompt=prompt, response=field_checks.text(item["output"], "output", empty=False))


def _alpaca_prompt(item: Mapping[str, Any], where: str) -> Prompt:
    """The prompt of Taori et al. 2023, without its preamble."""
    instruction = field_checks.text(item["instruction"], "instruction", empty=False)
    context = "" if item.get("input") is None else field_checks.text(item["input"], "input")
    middle = f"\n\n### Input:\n{context}" if context else ""
    return Prompt(where=where, prompt=f"### Instruction:\n{instruction}{middle}\n\n### Response:\n")


def _ranked(item: Mapping[str, Any], where: str) -> Comparison:
    responses = enumerate(field_checks.items(item["responses"], "responses"))
    texts = tuple(field_checks.text(text, f"responses[{i}]", empty=False) for i, text in responses)
    ranks = field_checks.ranks(item["ranking"], texts)
    return Comparison(where=where, **_prompt_fields(_prompt_field(item["prompt"], where)), responses=texts, ranks=ranks)


def _ranked_ids(item: Mapping[str, Any], where: str) -> Comparison:
    responses = enumerate(field_checks.items(item["response_ids"], "response_ids"))
    ids = tuple(field_checks.token_ids(row, f"response_ids[{i}]") for i, row in responses)
    ranks = field_checks.ranks(item["ranking"], ids)
    return Comparison(where=where, **_prompt_fields(_ids_prompt(item, where)), response_ids=ids, ranks=ranks)


def _preferred(item: Mapping[str, Any], where: str) -> Comparison:
    """A prompt beside chosen and rejected: texts, or messages with or without the prompt's own turns in front."""
    if isinstance(item["chosen"], str):
        texts = [field_checks.text(item[name], name, empty=False) for name in ("chosen", "rejected")]
        return _two(where, _prompt_field(item["prompt"], where), *texts)
    prompt = _prompt_field(item["prompt"], where)
    before = list(prompt.messages or ({"role": "user", "content": prompt.prompt or ""},))
    chosen, rejected = (field_checks.messages(item[name], name) for name in ("chosen", "rejected"))
    if len(chosen) == len(rejected) == 1:
        chosen, rejected = before + chosen, before + rejected
    elif chosen[: len(before)] != before:
        problem = "does not begin with the prompt's turns; give only the answer, or the whole dialogue."
        raise FieldError("chosen", problem)
    return _last_turns(where, chosen, rejected)


def _dialogues(item: Mapping[str, Any], where: str) -> Comparison:
    """chosen and rejected are whole dialogues that share their beginning (as in Bai et al. 2022's data)."""
    if isinstance(item["chosen"], list):
        return _last_turns(where, *(field_checks.messages(item[name], name) for name in ("chosen", "rejected")))
    chosen, rejected = (field_checks.text(item[name], name, empty=False) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise FieldError("rejected", SAME)
    cut = _last_answer(chosen, rejected)
    if cut <= 0:
        raise FieldError("rejected", "shares no beginning with chosen; give the prompt as a field of its own.")
    return _two(where, Prompt(where=where, prompt=chosen[:cut]), chosen[cut:], rejected[cut:])


def _last_answer(chosen: str, rejected: str) -> int:
    """Where the answers begin: behind the last "Assistant:" that both share, else behind a shared line or label."""
    mark = "\n\nAssistant:"
    start = chosen.rfind(mark)
    if start >= 0 and rejected.startswith(chosen[: start + len(mark)]):
        return start + len(mark)
    apart = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = chosen[: next(apart, min(len(chosen), len(rejected)))]
    return max((shared.rfind(end) + len(end) for end in ("\n", ": ") if end in shared), default=0)


def _last_turns(where: str, chosen: list[Message], rejected: list[Message]) -> Comparison:
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise FieldError("rejected", "must share all but the last turn with chosen, and begin with what was asked.")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant":
            raise FieldError(name, "must end with an assistant turn.")
    if chosen[-2]["role"] != "user":
        raise FieldError("chosen", "must answer a user turn.")
    return _two(where, Prompt(where=where, messages=tuple(chosen[:-1])), chosen[-1]["content"], rejected[-1]["content"])


def _two(where: str, prompt: Prompt, chosen: str, rejected: str) -> Comparison:
    if chosen == rejected:
        raise FieldError("rejected", SAME)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text:
            raise FieldError(name, "has an empty answer; write one or remove the line.")
    return Comparison(where=where, **_prompt_fields(prompt), responses=(chosen, rejected), ranks=(0, 1))


def _text_prompt(item: Mapping[str, Any], where: str) -> Prompt:
    return _prompt_field(item["prompt"], where)


def _ids_prompt(item: Mapping[str, Any], where: str) -> Prompt:
    return Prompt(where=where, prompt_ids=field_checks.token_ids(item["prompt_ids"], "prompt_ids"))


def _only_prompt(read_whole: Callable[[Mapping[str, Any], str], Prompt]) -> Callable[[Mapping[str, Any], str], Prompt]:
    def read_prompt(item: Mapping[str, Any], where: str) -> Prompt:
        return Prompt(where=where, **_prompt_fields(read_whole(item, where)))

    return read_prompt


def _messages_prompt(item: Mapping[str, Any], where: str, name: str = "messages") -> Prompt:
    messages = field_checks.messages(item[name], name)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise FieldError(name, "has no user turn to answer.")
    return Prompt(where=where, messages=tuple(messages))


def _named(read: Callable[..., Any], name: str) -> Callable[[Mapping[str, Any], str], Any]:
    return lambda item, where: read(item, where, name)


FORMS: dict[Kind, tuple[Form, ...]] = {
    "demonstrations": (
        Form("token ids", ("prompt_ids", "response_ids"), _ids_pair),
        Form("prompt/response", ("prompt", "response"), _pair),
        Form("prompt/completion", ("prompt", "completion"), _named(_pair, "completion")),
        Form("messages", ("messages",), _dialogue),
        Form("sharegpt", ("conversations",), _named(_dialogue, "conversations")),
        Form("alpaca", ("instruction", "output"), _alpaca, may=("id", "input")),
    ),
    "comparisons": (
        Form("ranked responses", ("prompt", "responses", "ranking"), _ranked),
        Form("ranked token ids", ("prompt_ids", "response_ids", "ranking"), _ranked_ids),
        Form("prompt/chosen/rejected", ("prompt", "chosen", "rejected"), _preferred),
        Form("chosen/rejected dialogues", ("chosen", "rejected"), _dialogues),
    ),
    # In the same order as above: a file gives the same prompts whichever kind it is read as.
    "prompts": (
        Form("token ids", ("prompt_ids",), _ids_prompt),
        Form("prompt/response", ("prompt", "response"), _text_prompt),
        Form("prompt/completion", ("prompt", "completion"), _text_prompt),
        Form("messages", ("messages",), _messages_prompt),
        Form("sharegpt", ("conversations",), _named(_messages_prompt, "conversations")),
        Form("alpaca", ("instruction",), _alpaca_prompt, may=("id", "input")),
        Form("prompt/chosen/rejected", ("prompt", "chosen", "rejected"), _only_prompt(_preferred)),
        Form("prompt", ("prompt",), _text_prompt),
        Form("chosen/rejected dialogues", ("chosen", "rejected"), _only_prompt(_dialogues)),
    ),
}


# --- pieces -----------------------------------------------------------------------------------------------------------


def _prompt_field(value: Any, where: str) -> Prompt:
    """A prompt field: text, or a list of messages."""
    if isinstance(value, list):
        messages = field_checks.messages(value, "prompt")
        if messages[-1]["role"] != "user":
            raise FieldError("prompt", "must end with a user turn, the one to answer.")
        return Prompt(where=where, messages=tuple(messages))
    return Prompt(where=where, prompt=field_checks.text(value, "prompt"))


def _prompt_fields(record: Prompt) -> dict[str, Any]:
    return {"prompt": record.prompt, "messages": record.messages, "prompt_ids": record.prompt_ids}


def _lengths(records: Sequence[Prompt]) -> dict[str, list[int]]:
    """Lengths by part: characters of texts, tokens of ids."""
    lengths: dict[str, list[int]] = {}
    for record in records:
        parts: list[tuple[str, Any]] = [("prompt characters", record.prompt), ("prompt tokens", record.prompt_ids)]
        if record.messages is not None:
            parts += [(f"{message['role']} characters", message["content"]) for message in record.messages]
        if isinstance(record, Demonstration):
            parts += [("response characters", record.response), ("response tokens", record.response_ids)]
        elif isinstance(record, Comparison):
            parts += [("response characters", text) for text in record.responses or ()]
            parts += [("response tokens", row) for row in record.response_ids or ()]
        for name, value in parts:
            if value is not None:
                lengths.setdefault(name, []).append(len(value))
    return lengths


def _list_bad(bad: Sequence[str]) -> str:
    return "\n".join([*bad[:SHOWN], *([f"... and {len(bad) - SHOWN} more."] if len(bad) > SHOWN else [])])


def _bad_lines(count: int) -> str:
    return f"{count} bad line{'' if count == 1 else 's'}"
