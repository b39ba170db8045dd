"""Checks of the values in a record's fields: a FieldError says what is wrong and how to fix it."""

import itertools
from collections.abc import Sequence
from typing import Any

from penstock.data.jsonl import FieldError, kind_name

Message = dict[str, str]
"""One turn. Example: {"role": "user", "content": "Hello"}."""

ROLES = {
    "system": "system", "user": "user", "assistant": "assistant",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip


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
    """At least one turn, ShareGPT's roles renamed to the usual ones, a system message only at the start."""
    messages: list[Message] = []
    for i, turn in enumerate(items(value, name)):
        field = f"{name}[{i}]"
        if not isinstance(turn, dict):
            raise FieldError(field, f"{kind_name(turn)}, and an object with role and content is expected.")
        # ShareGPT's names, or the usual ones
        role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in ROLES:
            raise FieldError(f"{field}.{role_key}", f"{shown(role)} is no role; use system, user or assistant.")
        role = ROLES[role]
        messages.append(
            {"role": role, "content": text(turn.get(text_key), f"{field}.{text_key}", empty=role != "assistant")}
        )
        if role == "system" and i > 0:
            raise FieldError(f"{field}.{role_key}", "a system message belongs at the start; move it there.")
    if not messages:
        raise FieldError(name, "is empty; give at least one message.")
    return messages


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
