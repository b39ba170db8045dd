"""Checks of the values in a record's fields: a FieldError says what is wrong and how to fix it."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.data.jsonl import FieldError, kind_name

Message = dict[str, Any]
"""One turn, as chat templates read it. Example: {"role": "user", "content": "Hello"}.

An assistant's may have tool_calls (its content is then empty, or text) and reasoning_content; one with weight 0 is
read and not learned.
"""

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
"""Left: also ShareGPT's names, LLaMA-Factory's for tools, and OpenAI's former one for a function's result."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Under these names templates read what an assistant thought before its answer."""
RENDERED = ("name", "tool_call_id", "tool_calls", *REASONING)
"""Fields of a turn that are handed to the template as they are."""
LEARNED = ("weight", "train", "loss")
"""0 or false on an assistant's turn: read and not learned (OpenAI's, axolotl's and ms-swift's names)."""
TURN = {"role", "content", "from", "value", "function_call", *RENDERED, *LEARNED, "finish_reason"}

NO_TEXT = ("messages", "conversations", "responses", "ranking", "prompt_ids", "response_ids", "tools", "functions",
           "history", "label", "weight")  # fmt: skip
"""Fields that hold no text: in a table of texts (CSV) as JSON."""
TURNS = re.compile(r"\s*\[\s*\{\s*[\"'](?:role|from|content|value)[\"']\s*:")
"""How a cell begins that holds messages."""


def uncelled(item: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table of texts with lists, labels and messages as what they are; an empty cell is a null."""
    values: dict[str, Any] = {name: cell or None for name, cell in item.items()}
    for name, cell in item.items():
        if name in NO_TEXT and cell:
            values[name] = decoded(cell.lower() if cell in ("True", "False") else cell, name)
        elif TURNS.match(cell):
            values[name] = decoded(cell, name)
    return values


def text(value: Any, name: str, empty: bool = True) -> str:
    """Text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise FieldError(name, f"{kind_name(value)}, and text is expected; put it in quotes.")
    if not empty and not value:
        raise FieldError(name, "is empty; write a text or remove the line.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"character {error.start + 1} is half a character (a lone surrogate); export the text again."
        raise FieldError(name, problem) from error
    return value


def items(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise FieldError(name, f"{kind_name(value)}, and a list is expected.")
    return value


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """At least one token id; the encoder checks that the model has them."""
    for i, token in enumerate(items(value, name)):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise FieldError(f"{name}[{i}]", f"{shown(token)} is no token id; give whole numbers from 0.")
    if not value:
        raise FieldError(name, "is empty; give at least one token id (a BOS, say).")
    return tuple(value)


def messages(value: Any, name: str) -> list[Message]:
    """At least one turn, ShareGPT's roles renamed to the usual ones, system messages only at the start."""
    messages: list[Message] = []
    for i, turn in enumerate(items(value, name)):
        where = f"{name}[{i}]"
        if not isinstance(turn, dict):
            raise FieldError(where, f"{kind_name(turn)}, and an object with role and content is expected.")
        message = _turn({key: content for key, content in turn.items() if content is not None}, where)
        opens = not messages or messages[-1]["role"] in ("system", "developer")
        if message["role"] in ("system", "developer") and not opens:
            role_key = "from" if "from" in turn else "role"
            raise FieldError(f"{where}.{role_key}", "a system message belongs at the start; move it there.")
        messages.append(message)
    if not messages:
        raise FieldError(name, "is empty; give at least one message.")
    return messages


def _turn(turn: Mapping[str, Any], where: str) -> Message:
    """One turn in our words, from ShareGPT's names (from, value) or the usual ones."""
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    spoken, content = turn.get(role_key), turn.get(text_key)
    if not isinstance(spoken, str) or spoken not in ROLES:
        raise FieldError(f"{where}.{role_key}", f"{shown(spoken)} is no role; use system, user, assistant or tool.")
    message = {"role": ROLES[spoken]} | {key: turn[key] for key in RENDERED if turn.get(key) not in (None, "", [])}
    calls = items(message.get("tool_calls", []), f"{where}.tool_calls")
    if spoken == "function_call":  # the text is the call, as JSON
        calls, content = [decoded(content, f"{where}.{text_key}")], None
    elif "function_call" in turn:
        calls = [turn["function_call"]]
    if calls:
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
        if message["role"] != "assistant":
            raise FieldError(f"{where}.tool_calls", f"of {message['role']}; only an assistant calls tools.")
    for key in REASONING:
        text(turn.get(key, ""), f"{where}.{key}")
    if content is None and calls:
        content = ""  # transformers drops a null, and many templates need the key
    content = _joined(content, f"{where}.{text_key}") if isinstance(content, list) else content
    content = text(content, f"{where}.{text_key}", empty=bool(calls) or message["role"] != "assistant")
    return message | {"content": content} | ({} if _is_learned(turn, message["role"], where) else {"weight": 0})


def _is_learned(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """False for an assistant's turn that says so."""
    wanted = {key: turn[key] for key in LEARNED if key in turn}
    for key, value in wanted.items():
        if value not in (0, 1):
            raise FieldError(f"{where}.{key}", f"{shown(value)}; give 0 or 1: a turn is learned or it is not.")
        if value and role != "assistant":
            raise FieldError(f"{where}.{key}", f"{shown(value)} on a turn of {role}; only an assistant's is learned.")
    return role != "assistant" or all(wanted.values())


def _joined(parts: Sequence[Any], name: str) -> str:
    """The text of OpenAI's content parts, end to end."""
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise FieldError(f"{name}[{i}]", f"{shown(kind)} is no part of type text; penstock trains on text alone.")
    return "".join(text(part.get("text"), f"{name}[{i}].text") for i, part in enumerate(parts))


def _tool_call(value: Any, name: str) -> dict[str, Any]:
    """A call as transformers' templates read it: its arguments are an object, not JSON text as in OpenAI's files."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FieldError(name, f"{shown(value)} is no tool call; give an object with name and arguments.")
    arguments = decoded(function.get("arguments") or {}, f"{name}.arguments")
    if not isinstance(arguments, dict):
        raise FieldError(f"{name}.arguments", f"{kind_name(arguments)}, and an object is expected.")
    around = {"id": value["id"]} if value.get("id") is not None else {}
    return around | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def tools(value: Any, name: str) -> tuple[dict[str, Any], ...] | None:
    """Descriptions of the tools that an assistant may call: a list, or the same as JSON text; None for no tools."""
    tools = items(decoded(value or [], name), name)
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise FieldError(f"{name}[{i}]", f"{kind_name(tool)}, and an object that describes a tool is expected.")
    wrap = name == "functions"  # OpenAI's former field
    return tuple({"type": "function", "function": tool} if wrap else tool for tool in tools) or None


def decoded(value: Any, name: str) -> Any:
    """The value that JSON text stands for; any other value is returned as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise FieldError(name, f"{shown(value)} is not JSON; export the record again.") from error


def history(value: Any) -> list[Message]:
    """Earlier turns as pairs of question and answer, as LLaMA-Factory's alpaca files have them."""
    turns: list[Message] = []
    for i, pair in enumerate(items(value or [], "history")):
        name = f"history[{i}]"
        if len(items(pair, name)) != 2:
            raise FieldError(name, f"has {len(pair)} parts; give pairs of question and answer.")
        turns.append({"role": "user", "content": text(pair[0], name)})
        turns.append({"role": "assistant", "content": text(pair[1], name, empty=False)})
    return turns


def ranks(value: Any, responses: Sequence[Any]) -> tuple[int, ...]:
    """[best, ..., worst] as indices into the responses, ties nested -> a rank per response."""
    count = len(responses)
    if not 2 <= count <= 9:
        raise FieldError("responses", f"{count} responses; a ranking has 2 to 9.")
    ranks: dict[int, int] = {}
    for rank, place in enumerate(items(value, "ranking")):
        for index in place if isinstance(place, list) else [place]:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
                problem = f"{shown(index)} is no index of a response; use 0 to {count - 1}, best first."
                raise FieldError("ranking", problem)
            if index in ranks:
                raise FieldError("ranking", f"names response {index} twice.")
            ranks[index] = rank
    if len(ranks) != count:
        missing = next(i for i in range(count) if i not in ranks)
        raise FieldError("ranking", f"leaves out response {missing}; rank all {count}, ties as nested lists.")
    for i, j in itertools.combinations(range(count), 2):
        if responses[i] == responses[j] and ranks[i] != ranks[j]:
            raise FieldError("responses", f"{i} and {j} are the same, so neither is better; give different answers.")
    return tuple(ranks[i] for i in range(count))


def shown(value: Any) -> str:
    """A value short enough for a message."""
    if isinstance(value, dict | list):
        return kind_name(value)
    return short if len(short := ascii(value)) <= 40 else f"{short[:40]}..."
