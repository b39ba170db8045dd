"""Records: a prompt, a demonstration, a comparison, a vote; and the formats in which people write them, as a table.

A format is known by its fields. What it reads, how it reads it and what is wrong with a value is here; files, lines and
the choice between formats are not.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock.data import field_checks
from penstock.data.field_checks import Message
from penstock.data.jsonl import FieldError

Kind = Literal["demonstrations", "comparisons", "votes", "prompts"]
KINDS: tuple[Kind, ...] = ("comparisons", "votes", "demonstrations", "prompts")
"""In the order in which they are tried: a line that can be read as several is the first of them."""

PAIR = ("chosen", "rejected")
QUESTIONS = ("messages", "conversations", "question", "query", "instruction", "input")
"""Fields in which chosen and rejected texts may have a prompt of their own."""
SAME = "is the same as chosen; a comparison needs two different answers."
CHAT = ("system", "history", "tools", "functions")
"""What only a chat has: a text beside one of these is the user's turn of a chat, for every line that has the field."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt in one of three forms: text, messages, or token ids."""

    where: str
    """file:line, for messages."""
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    """The conversation; in a demonstration with its answers."""
    prompt_ids: tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    """Descriptions of tools, for the chat template."""
    cut: tuple[int, ...] = ()
    """Numbers of its responses that were cut while they were written: no end follows them."""
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Of a prompt: all fields of its line, by our names, for reward functions."""

    @property
    def prompt_key(self) -> str:
        """Equal for records with the same question; of a conversation, all that precedes its first answer."""
        if self.messages is not None:
            first = next((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), len(self.messages))
            return json.dumps(self.messages[:first], sort_keys=True)
        return self.prompt if self.prompt is not None else json.dumps(self.prompt_ids)


@dataclass(frozen=True, kw_only=True)
class Demonstration(Prompt):
    """A prompt and the answer to learn; with `messages`, every assistant turn in it whose weight is not 0."""

    response: str | None = None
    response_ids: tuple[int, ...] | None = None

    @property
    def teaches(self) -> bool:
        """False for a conversation whose answers all have weight 0."""
        turns = self.messages
        return turns is None or any(turn["role"] == "assistant" and turn.get("weight", 1) for turn in turns)


@dataclass(frozen=True, kw_only=True)
class Comparison(Prompt):
    """A prompt and K = 2..9 responses with ranks: 0 is the best, equal ranks are ties."""

    responses: tuple[str, ...] | None = None
    response_ids: tuple[tuple[int, ...], ...] | None = None
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Vote(Prompt):
    """A prompt, one answer to it, and whether it was liked."""

    response: str | None = None
    response_ids: tuple[int, ...] | None = None
    label: bool


@dataclass(frozen=True)
class Form:
    """One way to write a record: its name, the fields that identify it, and the function that reads it."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Any]
    may: tuple[str, ...] = ()
    """Optional fields that it reads."""

    def fits(self, item: Mapping[str, Any]) -> bool:
        """True where the item has all the fields that identify this format."""
        return all(name in item for name in self.needs)


def _pair(item: Mapping[str, Any], where: str, answer: str = "response") -> Demonstration:
    return _answered(_prompt_of(item, where), item, where, answer)


def _answered(prompt: Prompt, item: Mapping[str, Any], where: str, answer: str) -> Demonstration:
    if prompt.messages is not None:
        turns = item[answer]
        if isinstance(turns, str):
            turns = [{"role": "assistant", "content": turns}]
        return _conversation(where, [*prompt.messages, *field_checks.messages(turns, answer)], answer, prompt.tools)
    response = field_checks.text(item[answer], answer, empty=False)
    return Demonstration(where=where, prompt=prompt.prompt, response=response)


def _ids_pair(item: Mapping[str, Any], where: str) -> Demonstration:
    prompt, response = (field_checks.token_ids(item[name], name) for name in ("prompt_ids", "response_ids"))
    return Demonstration(where=where, prompt_ids=prompt, response_ids=response)


def _dialogue(item: Mapping[str, Any], where: str, name: str = "messages") -> Demonstration:
    return _conversation(where, _turns(item, name), name, _tools(item))


def _conversation(
    where: str, messages: list[Message], name: str, tools: tuple[dict[str, Any], ...] | None
) -> Demonstration:
    if not any(message["role"] == "assistant" for message in messages):
        raise FieldError(name, "has no assistant turn, so there is no answer to learn from.")
    while messages[-1]["role"] != "assistant":  # no answer follows a question at the end
        messages = messages[:-1]
    return Demonstration(where=where, messages=tuple(messages), tools=tools)


def _alpaca(item: Mapping[str, Any], where: str, answer: str = "output") -> Demonstration:
    return _answered(_alpaca_prompt(item, where), item, where, answer)


def _alpaca_prompt(item: Mapping[str, Any], where: str) -> Prompt:
    """The prompt of Taori et al. 2023, without its preamble; as a chat, its two texts alone."""
    instruction = field_checks.text(item["instruction"], "instruction", empty=False)
    given = [name for name in ("input", "context") if item.get(name) is not None]  # context: dolly's name
    context = "\n\n".join(filter(None, (field_checks.text(item[name], name) for name in given)))
    if is_chat(item):
        return _chat(item, where, f"{instruction}\n{context}" if context else instruction)
    middle = f"\n\n### Input:\n{context}" if context else ""
    return Prompt(where=where, prompt=f"### Instruction:\n{instruction}{middle}\n\n### Response:\n")


def _ranked(item: Mapping[str, Any], where: str) -> Comparison:
    responses = enumerate(field_checks.items(item["responses"], "responses"))
    texts = tuple(field_checks.text(text, f"responses[{i}]", empty=False) for i, text in responses)
    ranks = field_checks.ranks(item["ranking"], texts)
    return Comparison(where=where, **_prompt_fields(_prompt_of(item, where)), responses=texts, ranks=ranks)


def _ranked_ids(item: Mapping[str, Any], where: str) -> Comparison:
    responses = enumerate(field_checks.items(item["response_ids"], "response_ids"))
    ids = tuple(field_checks.token_ids(row, f"response_ids[{i}]") for i, row in responses)
    ranks = field_checks.ranks(item["ranking"], ids)
    return Comparison(where=where, **_prompt_fields(_ids_prompt(item, where)), response_ids=ids, ranks=ranks)


def _preferred(item: Mapping[str, Any], where: str) -> Comparison:
    """A prompt beside chosen and rejected: texts, or messages with or without the prompt's own turns in front."""
    prompt = _prompt_of(item, where)
    if isinstance(item["chosen"], str):
        return _two(where, prompt, *(field_checks.text(item[name], name, empty=False) for name in PAIR))
    before = list(prompt.messages or ({"role": "user", "content": prompt.prompt or ""},))
    chosen, rejected = (field_checks.messages(item[name], name) for name in PAIR)
    if len(chosen) == len(rejected) == 1:
        chosen, rejected = before + chosen, before + rejected
    else:
        chosen, rejected = (_with_system(item, turns) for turns in (chosen, rejected))
        if chosen[: len(before)] != before:
            problem = "does not begin with the prompt's turns; give only the answer, or the whole dialogue."
            raise FieldError("chosen", problem)
    return _last_turns(where, chosen, rejected, prompt.tools)


def _dialogues(item: Mapping[str, Any], where: str) -> Comparison:
    """chosen and rejected are whole dialogues that share their beginning (as in Bai et al. 2022's data)."""
    if isinstance(item["chosen"], list):
        chosen, rejected = (_turns(item, name) for name in PAIR)
        return _last_turns(where, chosen, rejected, _tools(item))
    if name := next((name for name in (*CHAT, *QUESTIONS) if item.get(name)), None):
        raise FieldError(name, "stands beside chosen and rejected texts; is it their prompt? Give prompt, or messages.")
    liked, disliked = (field_checks.text(item[name], name, empty=False) for name in PAIR)
    if liked == disliked:
        raise FieldError("rejected", SAME)
    cut = _last_answer(liked, disliked)
    if cut <= 0:
        raise FieldError("rejected", "shares no beginning with chosen; give the prompt as a field of its own.")
    return _two(where, Prompt(where=where, prompt=liked[:cut]), liked[cut:], disliked[cut:])


def _last_answer(chosen: str, rejected: str) -> int:
    """Where the answers begin: behind the last "Assistant:" that both share, else behind a shared line or label."""
    mark = "\n\nAssistant:"
    start = chosen.rfind(mark)
    if start >= 0 and rejected.startswith(chosen[: start + len(mark)]):
        return start + len(mark)
    apart = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = chosen[: next(apart, min(len(chosen), len(rejected)))]
    return max((shared.rfind(end) + len(end) for end in ("\n", ": ") if end in shared), default=0)


def _last_turns(
    where: str, chosen: list[Message], rejected: list[Message], tools: tuple[dict[str, Any], ...] | None
) -> Comparison:
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise FieldError("rejected", "must share all but the last turn with chosen, and begin with what was asked.")
    for name, turns in zip(PAIR, (chosen, rejected), strict=True):
        if turns[-1]["role"] != "assistant":
            raise FieldError(name, "must end with an assistant turn.")
        if set(turns[-1]) & {"tool_calls", *field_checks.REASONING}:
            raise FieldError(name, "ends with tool calls or reasoning; the answers that are compared must be text.")
    if chosen[-2]["role"] not in ("user", "tool"):
        raise FieldError("chosen", "must answer a user turn.")
    prompt = Prompt(where=where, messages=tuple(chosen[:-1]), tools=tools)
    return _two(where, prompt, chosen[-1]["content"], rejected[-1]["content"])


def _two(where: str, prompt: Prompt, chosen: str, rejected: str) -> Comparison:
    if chosen == rejected:
        raise FieldError("rejected", SAME)
    for name, text in zip(PAIR, (chosen, rejected), strict=True):
        if not text:
            raise FieldError(name, "has an empty answer; write one or remove the line.")
    return Comparison(where=where, **_prompt_fields(prompt), responses=(chosen, rejected), ranks=(0, 1))


def _voted(form: Form) -> Form:
    """The same format with a label: the answer is judged, and not learned as it is."""

    def read(item: Mapping[str, Any], where: str) -> Vote:
        label, answer = item["label"], form.needs[-1]
        if not isinstance(label, bool):
            raise FieldError("label", f"{field_checks.shown(label)}; give true for a liked answer, false for another.")
        record = form.read(item, where)
        fields, response = _prompt_fields(record), record.response
        if record.messages is not None:
            fields["messages"], response = _judged(record.messages, item, answer)
        return Vote(where=where, **fields, response=response, response_ids=record.response_ids, label=label)

    return Form(form.name, (*form.needs, "label"), read, form.may)


def _judged(turns: tuple[Message, ...], item: Mapping[str, Any], answer: str) -> tuple[tuple[Message, ...], str]:
    """What precedes the last answer of a dialogue, and that answer's text."""
    *before, last = turns
    if isinstance(item[answer], list) and field_checks.messages(item[answer], answer)[-1]["role"] != "assistant":
        raise FieldError(answer, "must end with an assistant turn, the one that was judged.")
    if not before or before[-1]["role"] not in ("user", "tool"):
        raise FieldError(answer, "must judge an answer to a user turn; a vote is on the last answer alone.")
    if answer in ("response", "completion") and isinstance(item[answer], list) and len(item[answer]) > 1:
        raise FieldError(answer, f"{len(item[answer])} turns; a vote is on one answer: move the others to the prompt.")
    if set(last) & {"tool_calls", *field_checks.REASONING}:
        raise FieldError(answer, "ends with tool calls or reasoning; the answers that are judged must be text.")
    if not last.get("weight", 1):
        raise FieldError(answer, "its last turn is not to be learned, and has a label; take one of the two out.")
    return tuple(before), last["content"]


def _ids_prompt(item: Mapping[str, Any], where: str) -> Prompt:
    return Prompt(where=where, prompt_ids=field_checks.token_ids(item["prompt_ids"], "prompt_ids"))


def _only_prompt(read_whole: Callable[[Mapping[str, Any], str], Prompt]) -> Callable[[Mapping[str, Any], str], Prompt]:
    def read_prompt(item: Mapping[str, Any], where: str) -> Prompt:
        return Prompt(where=where, **_prompt_fields(read_whole(item, where)))

    return read_prompt


def _messages_prompt(item: Mapping[str, Any], where: str, name: str = "messages") -> Prompt:
    messages = _turns(item, name)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise FieldError(name, "has no user turn to answer.")
    return Prompt(where=where, messages=tuple(messages), tools=_tools(item))


def _named(read: Callable[..., Any], name: str) -> Callable[[Mapping[str, Any], str], Any]:
    return lambda item, where: read(item, where, name)


def _prompt_of(item: Mapping[str, Any], where: str) -> Prompt:
    """The prompt field: messages, or a text, which is a chat's user turn where fields of a chat stand beside it."""
    if not isinstance(item["prompt"], list):
        prompt = field_checks.text(item["prompt"], "prompt")
        return _chat(item, where, prompt) if is_chat(item) else Prompt(where=where, prompt=prompt)
    messages = _turns(item, "prompt")
    if messages[-1]["role"] not in ("user", "tool"):
        raise FieldError("prompt", "must end with a user turn, the one to answer.")
    if item.get("history"):
        raise FieldError("history", "stands beside messages; put its turns in front of them.")
    return Prompt(where=where, messages=tuple(messages), tools=_tools(item))


def is_chat(item: Mapping[str, Any]) -> bool:
    """True where a record's text is a turn of a chat."""
    return any(name in item for name in CHAT)


def _chat(item: Mapping[str, Any], where: str, question: str) -> Prompt:
    turns = [*field_checks.history(item.get("history")), {"role": "user", "content": question}]
    return Prompt(where=where, messages=tuple(_with_system(item, turns)), tools=_tools(item))


def _turns(item: Mapping[str, Any], name: str) -> list[Message]:
    return _with_system(item, field_checks.messages(item[name], name))


def _with_system(item: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The turns with the record's own system message in front, if it has one."""
    system = field_checks.text(item.get("system") or "", "system")
    if not system or (messages[0]["role"] == "system" and messages[0]["content"] == system):
        return messages
    if messages[0]["role"] in ("system", "developer"):
        raise FieldError("system", "differs from the system message that opens the dialogue; give one of them.")
    return [{"role": "system", "content": system}, *messages]


def _tools(item: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    return field_checks.tools(item.get("tools"), "tools") or field_checks.tools(item.get("functions"), "functions")


CUT = ("length", "max_tokens", "cancelled", "interrupted", "error")
"""Why an answer ended, where it did not end by itself: OpenAI's, Anthropic's and penstock serve's words."""


def cut_answers(item: Mapping[str, Any], record: Prompt) -> tuple[int, ...]:
    """Which of a record's responses were cut, by its `finish_reason`: one word, or a list with one for each."""
    count = len(record.ranks) if isinstance(record, Comparison) else 1
    reasons = item.get("finish_reason")
    reasons = reasons if isinstance(reasons, list) else [reasons] * count
    if len(reasons) != count or not all(isinstance(reason, str | None) for reason in reasons):
        raise FieldError("finish_reason", f"give why the answer ended, as stop or length, or a list of {count}.")
    return tuple(i for i, reason in enumerate(reasons) if (reason or "").lower() in CUT)


def _prompt_fields(record: Prompt) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ("prompt", "messages", "prompt_ids", "tools")}


ALPACA = ("input", "context", *CHAT)
TURNS = ("system", "tools", "functions")
"""What may stand beside messages."""
ANSWERED = (
    Form("token ids", ("prompt_ids", "response_ids"), _ids_pair),
    Form("prompt/response", ("prompt", "response"), _pair, CHAT),
    Form("prompt/completion", ("prompt", "completion"), _named(_pair, "completion"), CHAT),
    Form("messages", ("messages",), _dialogue, TURNS),
    Form("sharegpt", ("conversations",), _named(_dialogue, "conversations"), TURNS),
    Form("alpaca", ("instruction", "output"), _alpaca, ALPACA),
    Form("instruction/response", ("instruction", "response"), _named(_alpaca, "response"), ALPACA),
)
FORMS: dict[Kind, tuple[Form, ...]] = {
    "demonstrations": ANSWERED,
    "votes": tuple(_voted(form) for form in ANSWERED),
    "comparisons": (
        Form("ranked responses", ("prompt", "responses", "ranking"), _ranked, CHAT),
        Form("ranked token ids", ("prompt_ids", "response_ids", "ranking"), _ranked_ids),
        Form("prompt/chosen/rejected", ("prompt", "chosen", "rejected"), _preferred, CHAT),
        Form("chosen/rejected dialogues", ("chosen", "rejected"), _dialogues, TURNS),
    ),
    # In the same order as above: a file gives the same prompts whichever kind it is read as.
    "prompts": (
        Form("token ids", ("prompt_ids",), _ids_prompt),
        Form("prompt/response", ("prompt", "response"), _prompt_of, CHAT),
        Form("prompt/completion", ("prompt", "completion"), _prompt_of, CHAT),
        Form("messages", ("messages",), _messages_prompt, TURNS),
        Form("sharegpt", ("conversations",), _named(_messages_prompt, "conversations"), TURNS),
        Form("alpaca", ("instruction",), _alpaca_prompt, ALPACA),
        Form("prompt/chosen/rejected", ("prompt", "chosen", "rejected"), _only_prompt(_preferred), CHAT),
        Form("prompt", ("prompt",), _prompt_of, CHAT),
        Form("chosen/rejected dialogues", ("chosen", "rejected"), _only_prompt(_dialogues), TURNS),
    ),
}


def line_of(record: Prompt) -> dict[str, Any]:
    """The record as a line that is read as the same record again; of a prompt all its fields, for reward functions."""
    if type(record) is Prompt and record.fields:
        return dict(record.fields)
    line: dict[str, Any] = {"tools": list(record.tools)} if record.tools else {}
    if record.prompt_ids is not None:
        line["prompt_ids"] = list(record.prompt_ids)
    elif isinstance(record, Demonstration) and record.messages is not None:
        line |= {"messages": list(record.messages)}
    elif record.messages is not None:
        line["messages" if type(record) is Prompt else "prompt"] = list(record.messages)
    else:
        line["prompt"] = record.prompt
    if isinstance(record, Comparison):
        ids = record.response_ids
        line |= {"responses": record.responses} if ids is None else {"response_ids": ids}
        line |= {"finish_reason": [_reason(record, i) for i in range(len(record.ranks))]} if record.cut else {}
        levels = sorted(set(record.ranks))
        return line | {"ranking": [[i for i, rank in enumerate(record.ranks) if rank == level] for level in levels]}
    if isinstance(record, Demonstration | Vote) and "messages" not in line:
        line |= {"response": record.response} if record.response_ids is None else {"response_ids": record.response_ids}
    line |= {"finish_reason": _reason(record, 0)} if record.cut else {}
    return line | ({"label": record.label} if isinstance(record, Vote) else {})


def _reason(record: Prompt, number: int) -> str:
    return "length" if number in record.cut else "stop"
