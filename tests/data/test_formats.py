"""What lines mean: each format is told from its fields, and each bad line is named with the way to mend it."""

import contextlib
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.commands.config import CheckConfig
from penstock.commands.data import check
from penstock.data import formats
from penstock.data.records import FORMS, KINDS, Comparison, Demonstration, Kind, Prompt, Vote, line_of
from penstock.errors import DataError, PenstockError, UserError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows as JSON lines and returns the path."""

    def write_rows(*rows: Any, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write_rows


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def bare(record: Prompt) -> dict[str, Any]:
    """What a record was read as, without its address and what else its line had."""
    absent = ("where", "fields")
    return {name: value for name, value in vars(record).items() if value not in (None, ()) and name not in absent}


SYSTEM = {"role": "system", "content": "Be kind."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
CALLED = (
    user("1 + 1?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "2"},
    assistant("Two."),
)  # fmt: skip
TALK = (user("Hi"), assistant("Hello!"), user("Bye"), assistant("See you."))
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in TALK]
ALPACA = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"

# The line, the format that is named, the record.
READ_BY_KIND: dict[Kind, list[tuple[Any, ...]]] = {
    "demonstrations": [
        ({"prompt": "Q", "response": "A"}, "prompt/response", {"prompt": "Q", "response": "A"}),
        ({"prompt": "Q", "response": "A", "finish_reason": "length"}, "prompt/response",
         {"prompt": "Q", "response": "A", "cut": (0,)}),
        ({"messages": [user("Q"), assistant("A")], "finish_reason": "MAX_TOKENS"}, "messages",
         {"messages": (user("Q"), assistant("A")), "cut": (0,)}),
        ({"prompt": "Q", "completion": "A"}, "prompt/completion", {"prompt": "Q", "response": "A"}),
        ({"prompt": [user("Q")], "completion": [assistant("A")]}, "prompt/completion",
         {"messages": (user("Q"), assistant("A"))}),
        ({"prompt": [user("Q")], "response": "A"}, "prompt/response", {"messages": (user("Q"), assistant("A"))}),
        ({"messages": TALK}, "messages", {"messages": TALK}),
        ({"messages": [*TALK, user("One more")]}, "messages", {"messages": TALK}),
        ({"conversations": SHAREGPT}, "sharegpt", {"messages": TALK}),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", {"prompt": ALPACA, "response": "3"}),
        ({"instruction": "Sing.", "input": "", "output": "La"}, "alpaca",
         {"prompt": "### Instruction:\nSing.\n\n### Response:\n", "response": "La"}),
        ({"prompt_ids": [1, 2], "response_ids": [3]}, "token ids", {"prompt_ids": (1, 2), "response_ids": (3,)}),
        ({"prompt": "Q", "response": "A", "messages": None}, "prompt/response", {"prompt": "Q", "response": "A"}),
        ({"instruction": "Add.", "context": "1 2", "response": "3", "category": ""}, "instruction/response",
         {"prompt": ALPACA, "response": "3"}),
        # what stands beside a text and only a chat has makes it one
        ({"system": "Be kind.", "prompt": "Q", "response": "A"}, "prompt/response as a chat",
         {"messages": (SYSTEM, user("Q"), assistant("A"))}),
        ({"system_prompt": "", "prompt": "Q", "response": "A"}, "prompt/response as a chat",
         {"messages": (user("Q"), assistant("A"))}),
        ({"system": "Be kind.", "history": [["Hi", "Hello!"]], "instruction": "Add.", "input": "1 2", "output": "3"},
         "alpaca as a chat",
         {"messages": (SYSTEM, user("Hi"), assistant("Hello!"), user("Add.\n1 2"), assistant("3"))}),
        ({"system": "Be kind.", "conversations": SHAREGPT}, "sharegpt", {"messages": (SYSTEM, *TALK)}),
        ({"system": "Be kind.", "messages": [SYSTEM, *TALK]}, "messages", {"messages": (SYSTEM, *TALK)}),
        # turns that are read and not learned
        ({"messages": [user("Q"), assistant("A") | {"weight": 0}, user("R"), assistant("B") | {"weight": 1}]},
         "messages", {"messages": (user("Q"), assistant("A") | {"weight": 0}, user("R"), assistant("B"))}),
        ({"conversations": [SHAREGPT[0], SHAREGPT[1] | {"train": False}, SHAREGPT[2], SHAREGPT[3] | {"loss": True}]},
         "sharegpt", {"messages": (TALK[0], TALK[1] | {"weight": 0}, *TALK[2:])}),
        ({"messages": [user("Q"), assistant("A") | {"reasoning_content": "Hm.", "name": None}]}, "messages",
         {"messages": (user("Q"), assistant("A") | {"reasoning_content": "Hm."})}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, assistant("A")]}, "messages",
         {"messages": (user("Q"), assistant("A"))}),
        ({"prompt": "Q", "response": "A", "label": True, "weight": 1}, "prompt/response",
         {"prompt": "Q", "response": "A"}),
        # tools, as OpenAI, transformers and LLaMA-Factory write them
        ({"messages": CALLED, "tools": TOOLS}, "messages", {"messages": CALLED, "tools": tuple(TOOLS)}),
        ({"messages": [CALLED[0], {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments":
            '{"a": 1, "b": null}'}}]}, *CALLED[2:]], "tools": json.dumps(TOOLS)}, "messages",
         {"messages": CALLED, "tools": tuple(TOOLS)}),
        ({"messages": [CALLED[0], {"role": "assistant", "content": None, "function_call": CALL["function"]},
            {"role": "function", "content": "2"}, CALLED[3]], "functions": [TOOLS[0]["function"]]}, "messages",
         {"messages": CALLED, "tools": tuple(TOOLS)}),
        ({"conversations": [{"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two."}], "tools": TOOLS}, "sharegpt",
         {"messages": CALLED, "tools": tuple(TOOLS)}),
        ({"messages": [SYSTEM | {"role": "developer"}, *TALK]}, "messages",
         {"messages": (SYSTEM | {"role": "developer"}, *TALK)}),
        ({"prompt": None, "response": None, "messages": TALK}, "messages", {"messages": TALK}),
    ],
    "comparisons": [
        ({"prompt": "Q", "responses": ["a", "b", "c"], "ranking": [2, 0, 1],
          "finish_reason": ["stop", "cancelled", None]}, "ranked responses",
         {"prompt": "Q", "responses": ("a", "b", "c"), "ranks": (1, 2, 0), "cut": (1,)}),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "prompt/chosen/rejected",
         {"prompt": "Q", "responses": ("A", "B"), "ranks": (0, 1)}),
        ({"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}, "prompt/chosen/rejected",
         {"messages": (user("Q"),), "responses": ("A", "B"), "ranks": (0, 1)}),
        ({"prompt": "Q", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
         "prompt/chosen/rejected", {"messages": (user("Q"),), "responses": ("A", "B"), "ranks": (0, 1)}),
        ({"chosen": [*TALK[:3], assistant("A")], "rejected": [*TALK[:3], assistant("B")]}, "chosen/rejected dialogues",
         {"messages": TALK[:3], "responses": ("A", "B"), "ranks": (0, 1)}),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"},
         "chosen/rejected dialogues",
         {"prompt": "\n\nHuman: Hi\n\nAssistant:", "responses": (" A", " B"), "ranks": (0, 1)}),
        ({"chosen": "Q: Hi? A: yes", "rejected": "Q: Hi? A: yet"}, "chosen/rejected dialogues",
         {"prompt": "Q: Hi? A: ", "responses": ("yes", "yet"), "ranks": (0, 1)}),
        ({"chosen": "Why?\nsame start\none", "rejected": "Why?\nsame start\ntwo"}, "chosen/rejected dialogues",
         {"prompt": "Why?\nsame start\n", "responses": ("one", "two"), "ranks": (0, 1)}),
        ({"prompt": "Q", "responses": ["a", "b", "c", "d"], "ranking": [2, [0, 3], 1]}, "ranked responses",
         {"prompt": "Q", "responses": ("a", "b", "c", "d"), "ranks": (1, 2, 0, 1)}),
        ({"system": "Be kind.", "prompt": "Q", "chosen": "A", "rejected": "B"}, "prompt/chosen/rejected as a chat",
         {"messages": (SYSTEM, user("Q")), "responses": ("A", "B"), "ranks": (0, 1)}),
        ({"system": "Be kind.", "prompt": "Q", "chosen": [user("Q"), assistant("A")],
            "rejected": [user("Q"), assistant("B")]}, "prompt/chosen/rejected as a chat",
         {"messages": (SYSTEM, user("Q")), "responses": ("A", "B"), "ranks": (0, 1)}),
        ({"system": "Be kind.", "prompt": "Q", "responses": ["a", "b"], "ranking": [1, 0]},
         "ranked responses as a chat", {"messages": (SYSTEM, user("Q")), "responses": ("a", "b"), "ranks": (1, 0)}),
        ({"tools": TOOLS, "chosen": [*CALLED[:3], assistant("A")], "rejected": [*CALLED[:3], assistant("B")]},
         "chosen/rejected dialogues",
         {"messages": CALLED[:3], "tools": tuple(TOOLS), "responses": ("A", "B"), "ranks": (0, 1)}),
        ({"prompt_ids": [1], "response_ids": [[2], [3, 4]], "ranking": [1, 0]}, "ranked token ids",
         {"prompt_ids": (1,), "response_ids": ((2,), (3, 4)), "ranks": (1, 0)}),
    ],
    "votes": [
        ({"prompt": [user("Q")], "response": "A", "label": False, "finish_reason": "interrupted"}, "prompt/response",
         {"messages": (user("Q"),), "response": "A", "label": False, "cut": (0,)}),
        ({"prompt": "Q", "response": "A", "label": True, "finish_reason": "stop"}, "prompt/response",
         {"prompt": "Q", "response": "A", "label": True}),
        ({"prompt": "Q", "response": "A", "label": True}, "prompt/response",
         {"prompt": "Q", "response": "A", "label": True}),
        ({"prompt": "Q", "completion": "A", "label": False, "id": 7, "weight": 1}, "prompt/completion",
         {"prompt": "Q", "response": "A", "label": False}),
        ({"prompt": [user("Q")], "completion": [assistant("A")], "label": False}, "prompt/completion",
         {"messages": (user("Q"),), "response": "A", "label": False}),
        ({"prompt": [SYSTEM, *TALK[:3]], "response": "A", "label": True}, "prompt/response",
         {"messages": (SYSTEM, *TALK[:3]), "response": "A", "label": True}),
        ({"system": "Be kind.", "prompt": "Q", "response": "A", "label": True}, "prompt/response as a chat",
         {"messages": (SYSTEM, user("Q")), "response": "A", "label": True}),
        # the vote is on the last answer; what precedes it is the prompt
        ({"messages": TALK, "label": False}, "messages",
         {"messages": TALK[:3], "response": "See you.", "label": False}),
        ({"messages": CALLED, "tools": TOOLS, "label": True}, "messages",
         {"messages": CALLED[:3], "tools": tuple(TOOLS), "response": "Two.", "label": True}),
        ({"conversations": SHAREGPT, "label": True}, "sharegpt",
         {"messages": TALK[:3], "response": "See you.", "label": True}),
        ({"instruction": "Add.", "input": "1 2", "output": "4", "label": False}, "alpaca",
         {"prompt": ALPACA, "response": "4", "label": False}),
        ({"instruction": "Add.", "context": "1 2", "response": "3", "label": True}, "instruction/response",
         {"prompt": ALPACA, "response": "3", "label": True}),
        ({"prompt_ids": [1, 2], "response_ids": [3], "label": False}, "token ids",
         {"prompt_ids": (1, 2), "response_ids": (3,), "label": False}),
        ({"prompt": "Q", "response": "A", "messages": None, "label": True}, "prompt/response",
         {"prompt": "Q", "response": "A", "label": True}),
    ],
    "prompts": [
        ({"prompt": "Q"}, "prompt", {"prompt": "Q"}),
        ({"prompt": ""}, "prompt", {"prompt": ""}),
        ({"prompt_ids": [1, 2]}, "token ids", {"prompt_ids": (1, 2)}),
        ({"messages": TALK[:3]}, "messages", {"messages": TALK[:3]}),
        ({"system": "Be kind.", "prompt": "Q"}, "prompt as a chat", {"messages": (SYSTEM, user("Q"))}),
        ({"system": "Be kind.", "instruction": "Sing."}, "alpaca as a chat", {"messages": (SYSTEM, user("Sing."))}),
        ({"instruction": "Add.", "context": "1 2", "response": "3"}, "alpaca", {"prompt": ALPACA}),
        ({"messages": CALLED[:3], "tools": TOOLS}, "messages", {"messages": CALLED[:3], "tools": tuple(TOOLS)}),
        ({"conversations": SHAREGPT}, "sharegpt", {"messages": TALK[:3]}),
        ({"instruction": "Add.", "input": "1 2"}, "alpaca", {"prompt": ALPACA}),
        ({"prompt": "Q", "response": "A"}, "prompt/response", {"prompt": "Q"}),
        ({"prompt": "Q", "completion": "A"}, "prompt/completion", {"prompt": "Q"}),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "prompt/chosen/rejected", {"prompt": "Q"}),
        ({"prompt": "Q", "responses": ["a", "b"], "ranking": [1, 0]}, "prompt", {"prompt": "Q"}),
        ({"prompt": "Q", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
         "prompt/chosen/rejected", {"messages": (user("Q"),)}),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"},
         "chosen/rejected dialogues", {"prompt": "\n\nHuman: Hi\n\nAssistant:"}),
    ],
}  # fmt: skip
RECORDS = {"demonstrations": Demonstration, "comparisons": Comparison, "votes": Vote, "prompts": Prompt}
READ = [(kind, *row) for kind, rows in READ_BY_KIND.items() for row in rows]


@pytest.mark.parametrize(("kind", "row", "form", "record"), READ)
def test_each_format_is_told_from_its_fields_and_the_decision_is_said(write, kind, row, form, record):
    path = write(row)
    dataset = formats.read(path, kind)
    assert dataset.decision == f"{path}: 1 {kind} ({form})."
    assert [bare(row) for row in dataset.records] == [record]
    assert dataset.records[0].where == f"{path}:1"
    assert type(dataset.records[0]) is RECORDS[kind]


@pytest.mark.parametrize(("kind", "row", "form", "record"), READ)
def test_a_record_that_is_written_is_read_as_the_same(write, kind, row, form, record):
    (before,) = formats.read(write(row), kind).records
    path = write(line_of(before), name="written.jsonl")
    assert formats.kind_of(path) == kind or kind == "prompts"
    (after,) = formats.read(path, kind).records
    assert (bare(after), after.fields) == (bare(before), before.fields)
    (asked,) = formats.read(write(line_of(Prompt(where="", **questions(before)))), "prompts").records
    assert questions(asked) == questions(before)


def questions(record: Prompt) -> dict[str, Any]:
    """What a record asks, without what it answers."""
    messages = record.messages
    if isinstance(record, Demonstration) and messages is not None:
        messages = messages[: next(i for i, turn in enumerate(messages) if turn["role"] == "assistant")] or TALK[:1]
    return {"prompt": record.prompt, "messages": messages, "prompt_ids": record.prompt_ids, "tools": record.tools}


@pytest.mark.parametrize(("kind", "row", "form", "record"), READ)
def test_a_file_gives_the_same_prompts_when_read_for_prompts(write, kind, row, form, record):
    path = write(row)
    asked = formats.read(path, "prompts").records[0]
    whole = formats.read(path, kind).records[0]
    if kind == "demonstrations" and whole.messages:
        if asked.messages == tuple(row.get("messages", ())):
            return  # it ends with a question: that is the prompt, and teaches nothing
        assert asked.messages == whole.messages[: len(asked.messages)]
        assert asked.messages[-1]["role"] in ("user", "tool")
    else:
        assert (asked.prompt, asked.messages, asked.prompt_ids) == (whole.prompt, whole.messages, whole.prompt_ids)


def test_every_format_of_the_table_is_tested():
    assert {(kind, form.removesuffix(" as a chat")) for kind, _, form, _ in READ} == {
        (kind, form.name) for kind in KINDS for form in FORMS[kind]
    }


def test_a_file_of_several_formats_says_how_many_of_each(write):
    path = write({"prompt": "a", "response": "b"}, {"messages": TALK}, {"prompt": "c", "response": "d"})
    decision = formats.read(path, "demonstrations").decision
    assert decision == f"{path}: 3 demonstrations (2 prompt/response, 1 messages)."


def test_files_are_read_in_order_whatever_they_are(write):
    first = write({"prompt": "a", "response": "b"}, name="one.jsonl.gz")
    second = write({"messages": TALK}, name="two.jsonl")
    dataset = formats.read([first, second], "demonstrations")
    assert [record.where for record in dataset.records] == [f"{first}:1", f"{second}:1"]
    assert dataset.decision == f"{first}: 1 demonstrations (prompt/response); {second}: 1 demonstrations (messages)."


# The line, the field and what is wrong with it.
BAD_BY_KIND: dict[Kind, list[tuple[Any, ...]]] = {
    "demonstrations": [
        ({"prompt": 3, "response": "A"}, "prompt: a number, and text is expected; put it in quotes."),
        ({"prompt": "Q", "response": None}, "response: null, and text is expected; put it in quotes."),
        ({"prompt": "Q", "response": ["A"]}, "response: a list, and text is expected; put it in quotes."),
        ({"prompt": "Q", "response": ""}, "response: is empty; write a text or remove the line."),
        ('{"prompt": "Q", "response": "x\\ud800y"}',
         "response: character 2 is half a character (a lone surrogate); export the text again."),
        ('{"prompt": "Q", "response": NaN}',
         "response: NaN or Infinity is not JSON; give a number, or leave the field out."),
        ('{"prompt": "Q", "response": "A", "response": "B"}', "response: stands there twice; keep one of them."),
        ('{"prompt": "Q", "response": 1e999}', "response: a number, and text is expected; put it in quotes."),
        ({}, "fields: found no fields; demonstrations need prompt_ids+response_ids or prompt+response or "
         "prompt+completion or messages or conversations or instruction+output or instruction+response, or name them "
         "with --keys ours=theirs."),
        ({"text": "x"}, "fields: found 'text'; demonstrations need prompt_ids+response_ids or "
         "prompt+response or prompt+completion or messages or conversations or instruction+output or "
         "instruction+response, or name them with --keys ours=theirs."),
        ({"messages": "Hi"}, "messages: text, and a list is expected."),
        ({"messages": []}, "messages: is empty; give at least one message."),
        ({"messages": ["Hi"]}, "messages[0]: text, and an object with role and content is expected."),
        ({"messages": [{"role": "wizard", "content": "x"}]},
         "messages[0].role: 'wizard' is no role; use system, user, assistant or tool."),
        ({"messages": [user("x"), {"role": ["user"], "content": "x"}]},
         "messages[1].role: a list is no role; use system, user, assistant or tool."),
        ({"messages": [{"content": "x"}]}, "messages[0].role: None is no role; use system, user, assistant or tool."),
        ({"messages": [{"role": "user"}]}, "messages[0].content: null, and text is expected; put it in quotes."),
        ({"conversations": [{"from": "human", "value": 1}]},
         "conversations[0].value: a number, and text is expected; put it in quotes."),
        ({"conversations": [{"from": "x" * 99, "value": "1"}]},
         f"conversations[0].from: '{'x' * 39}... is no role; use system, user, assistant or tool."),
        ({"messages": [user("x"), assistant("")]}, "messages[1].content: is empty; write a text or remove the line."),
        ({"messages": [user("x")]}, "messages: has no assistant turn, so there is no answer to learn from."),
        ({"messages": [user("x"), {"role": "system", "content": "y"}]},
         "messages[1].role: a system message belongs at the start; move it there."),
        ({"messages": [user("x"), assistant("y") | {"weight": 0.5}]},
         "messages[1].weight: 0.5; give 0 or 1: a turn is learned or it is not."),
        ({"messages": [user("x") | {"train": True}, assistant("y")]},
         "messages[0].train: True on a turn of user; only an assistant's is learned."),
        ({"prompt": "x", "response": "y", "weight": 0.5},
         "weight: 0.5; give 0 or 1: a record is learned or it is not."),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("y")]},
         "messages[0].content[0]: 'image_url' is no part of type text; penstock trains on text alone."),
        ({"conversations": SHAREGPT, "image": "a.jpg"},
         "image: would change what the record means, and sharegpt has no place for it; take it out."),
        ({"prompt": "x", "response": "y", "context": "z"},
         "context: would change what the record means, and prompt/response has no place for it; take it out."),
        ({"prompt_ids": [1], "response_ids": [2], "system": "z"},
         "system: would change what the record means, and token ids has no place for it; take it out."),
        ({"prompt": "x", "response": "y", "reasoning_content": "z"}, "reasoning_content: would change what the record "
         "means, and prompt/response has no place for it; take it out."),
        ({"messages": [SYSTEM, *TALK], "system": "Be rude."},
         "system: differs from the system message that opens the dialogue; give one of them."),
        ({"prompt": [user("x")], "response": "y", "history": [["a", "b"]]},
         "history: stands beside messages; put its turns in front of them."),
        ({"prompt": "x", "response": "y", "history": [["a"]]},
         "history[0]: has 1 parts; give pairs of question and answer."),
        ({"messages": TALK, "tools": "add(a, b)"}, "tools: 'add(a, b)' is not JSON; export the record again."),
        ({"messages": TALK, "tools": ["add"]},
         "tools[0]: text, and an object that describes a tool is expected."),
        ({"messages": [user("x"), {"role": "assistant", "tool_calls": ["add"]}]},
         "messages[1].tool_calls[0]: 'add' is no tool call; give an object with name and arguments."),
        ({"messages": [user("x"), {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "1"}]}]},
         "messages[1].tool_calls[0].arguments: a number, and an object is expected."),
        ({"messages": [user("x") | {"tool_calls": [CALL]}, assistant("y")]},
         "messages[0].tool_calls: of user; only an assistant calls tools."),
        ({"prompt": [assistant("x")], "response": "y"}, "prompt: must end with a user turn, the one to answer."),
        ({"instruction": "", "output": "x"}, "instruction: is empty; write a text or remove the line."),
        ({"instruction": "x", "input": [], "output": "x"}, "input: a list, and text is expected; put it in quotes."),
        ({"prompt_ids": [1, -2], "response_ids": [1]}, "prompt_ids[1]: -2 is no token id; give whole numbers from 0."),
        ({"prompt_ids": [1], "response_ids": [True]},
         "response_ids[0]: True is no token id; give whole numbers from 0."),
        ({"prompt_ids": [1], "response_ids": [2**31]},
         "response_ids[0]: 2147483648 is no token id; give whole numbers from 0."),
        ({"prompt_ids": [1.0], "response_ids": [1]}, "prompt_ids[0]: 1.0 is no token id; give whole numbers from 0."),
        ({"prompt_ids": [], "response_ids": [1]}, "prompt_ids: is empty; give at least one token id (a BOS, say)."),
        ({"prompt_ids": 5, "response_ids": [1]}, "prompt_ids: a number, and a list is expected."),
    ],
    "comparisons": [
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "finish_reason": ["stop"]},
         "finish_reason: give why the answer ended, as stop or length, or a list of 2."),
        ({"prompt": "x"}, "fields: found 'prompt' (it looks like prompts); comparisons need "
         "prompt+responses+ranking or prompt_ids+response_ids+ranking or prompt+chosen+rejected or chosen+rejected, or "
         "name them with --keys ours=theirs."),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"},
         "rejected: is the same as chosen; a comparison needs two different answers."),
        ({"chosen": "P\nA", "rejected": "P\nA"},
         "rejected: is the same as chosen; a comparison needs two different answers."),
        ({"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("A")]},
         "rejected: is the same as chosen; a comparison needs two different answers."),
        ({"chosen": "yes", "rejected": "no"},
         "rejected: shares no beginning with chosen; give the prompt as a field of its own."),
        ({"chosen": "Q\n\nAssistant:", "rejected": "Q\n\nAssistant: A"},
         "chosen: has an empty answer; write one or remove the line."),
        ({"chosen": "Q\n\nAssistant: A", "rejected": "Q\n\nAssistant:"},
         "rejected: has an empty answer; write one or remove the line."),
        ({"chosen": [user("Q"), assistant("A")], "rejected": [user("R"), assistant("B")]},
         "rejected: must share all but the last turn with chosen, and begin with what was asked."),
        ({"chosen": [assistant("A")], "rejected": [assistant("B")]},
         "rejected: must share all but the last turn with chosen, and begin with what was asked."),
        ({"chosen": [user("Q"), user("A")], "rejected": [user("Q"), assistant("B")]},
         "chosen: must end with an assistant turn."),
        ({"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), user("B")]},
         "rejected: must end with an assistant turn."),
        ({"chosen": [assistant("Q"), assistant("A")], "rejected": [assistant("Q"), assistant("B")]},
         "chosen: must answer a user turn."),
        ({"prompt": "Q", "chosen": "A", "rejected": [assistant("B")]},
         "rejected: a list, and text is expected; put it in quotes."),
        ({"prompt": "Q", "chosen": [assistant("A")], "rejected": "B"}, "rejected: text, and a list is expected."),
        ({"prompt": "P", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
         "chosen: does not begin with the prompt's turns; give only the answer, or the whole dialogue."),
        ({"chosen": "Q\n\nAssistant: A", "rejected": "Q\n\nAssistant: B", "system": "z"},
         "system: stands beside chosen and rejected texts; is it their prompt? Give prompt, or messages."),
        ({"chosen": "It is: so", "rejected": "It is: not", "question": "What?"},
         "question: stands beside chosen and rejected texts; is it their prompt? Give prompt, or messages."),
        ({"prompt": "Q", "chosen": [CALLED[1]], "rejected": [assistant("B")]},
         "chosen: ends with tool calls or reasoning; the answers that are compared must be text."),
        ({"prompt": "Q", "responses": ["a"], "ranking": [0]}, "responses: 1 responses; a ranking has 2 to 9."),
        ({"prompt": "Q", "responses": ["a"] * 10, "ranking": [0]}, "responses: 10 responses; a ranking has 2 to 9."),
        ({"prompt": "Q", "responses": ["a", ""], "ranking": [0, 1]},
         "responses[1]: is empty; write a text or remove the line."),
        ({"prompt": "Q", "responses": ["a", "b"], "ranking": [0, 2]},
         "ranking: 2 is no index of a response; use 0 to 1, best first."),
        ({"prompt": "Q", "responses": ["a", "b"], "ranking": ["a", "b"]},
         "ranking: 'a' is no index of a response; use 0 to 1, best first."),
        ({"prompt": "Q", "responses": ["a", "b"], "ranking": [[0, [1]]]},
         "ranking: a list is no index of a response; use 0 to 1, best first."),
        ({"prompt": "Q", "responses": ["a", "b"], "ranking": [0, 0]}, "ranking: names response 0 twice."),
        ({"prompt": "Q", "responses": ["a", "b", "c"], "ranking": [2, 0]},
         "ranking: leaves out response 1; rank all 3, ties as nested lists."),
        ({"prompt": "Q", "responses": ["a", "b"], "ranking": 0}, "ranking: a number, and a list is expected."),
        ({"prompt": "Q", "responses": ["a", "a"], "ranking": [0, 1]},
         "responses: 0 and 1 are the same, so neither is better; give different answers."),
    ],
    "votes": [
        *[({"prompt": "Q", "response": "A", "label": label},
           f"label: {shown}; give true for a liked answer, false for another.")
          for label, shown in [(None, "None"), (1, "1"), (0, "0"), ("true", "'true'"), ("good", "'good'"), (0.5, "0.5"),
                               ([True], "a list"), ({"liked": True}, "an object")]],
        ({"prompt": "Q", "response": "A"}, "fields: found 'prompt', 'response' (it looks like demonstrations); votes "
         "need prompt_ids+response_ids+label or prompt+response+label or prompt+completion+label or messages+label or "
         "conversations+label or instruction+output+label or instruction+response+label, or name them with --keys "
         "ours=theirs."),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "label": True},
         "fields: found 'prompt', 'chosen', 'rejected', 'label' (it looks like comparisons); votes need "
         "prompt_ids+response_ids+label or prompt+response+label or prompt+completion+label or messages+label or "
         "conversations+label or instruction+output+label or instruction+response+label, or name them with --keys "
         "ours=theirs."),
        ({"prompt": "Q", "response": "", "label": True}, "response: is empty; write a text or remove the line."),
        ({"prompt": "Q", "response": None, "label": True}, "response: null, and text is expected; put it in quotes."),
        ({"prompt": [assistant("x")], "response": "y", "label": True},
         "prompt: must end with a user turn, the one to answer."),
        ({"messages": [user("Q"), assistant("A"), user("R")], "label": True},
         "messages: must end with an assistant turn, the one that was judged."),
        ({"messages": [user("Q")], "label": True},
         "messages: has no assistant turn, so there is no answer to learn from."),
        ({"messages": [assistant("A")], "label": True},
         "messages: must judge an answer to a user turn; a vote is on the last answer alone."),
        ({"messages": [user("Q"), assistant("A"), assistant("B")], "label": True},
         "messages: must judge an answer to a user turn; a vote is on the last answer alone."),
        ({"prompt": [CALLED[0]], "completion": list(CALLED[1:]), "label": True},
         "completion: 3 turns; a vote is on one answer: move the others to the prompt."),
        ({"prompt": [user("Q")], "completion": [CALLED[1]], "label": True},
         "completion: ends with tool calls or reasoning; the answers that are judged must be text."),
        ({"messages": [user("Q"), assistant("A") | {"reasoning_content": "Hm."}], "label": True},
         "messages: ends with tool calls or reasoning; the answers that are judged must be text."),
        ({"messages": [user("Q"), assistant("A") | {"weight": 0}], "label": False},
         "messages: its last turn is not to be learned, and has a label; take one of the two out."),
        ({"prompt": "Q", "response": "A", "label": True, "weight": 0.5},
         "weight: 0.5; give 0 or 1: a record is learned or it is not."),
        ({"prompt": "Q", "response": "A", "label": True, "image": "a.jpg"},
         "image: would change what the record means, and prompt/response has no place for it; take it out."),
        ({"prompt_ids": [1], "response_ids": [], "label": True},
         "response_ids: is empty; give at least one token id (a BOS, say)."),
    ],
    "prompts": [
        ({"prompt": {"text": "Q"}}, "prompt: an object, and text is expected; put it in quotes."),
        ({"prompt": False}, "prompt: true or false, and text is expected; put it in quotes."),
        ({"messages": [assistant("x")]}, "messages: has no user turn to answer."),
    ],
}  # fmt: skip
BAD = [(kind, *row) for kind, rows in BAD_BY_KIND.items() for row in rows]


@pytest.mark.parametrize(("kind", "row", "problem"), BAD)
def test_a_bad_field_is_named_with_its_line_and_the_way_to_mend_it(write, kind, row, problem):
    good = next(good for this, good, _, _ in READ if this == kind)
    path = write(good, row)
    with pytest.raises(DataError) as raised:
        formats.read(path, kind)
    assert str(raised.value) == f"{path}:2: {problem}\nMend 1 bad line, or leave out what is bad with --skip-bad."
    assert raised.value.exit_code == 4
    skipped = formats.read(path, kind, skip_bad=True)
    assert len(skipped.records) == 1
    assert skipped.bad == [f"{path}:2: {problem}"]
    assert skipped.decision.endswith("; 1 bad line left out).")


def test_disliked_and_weightless_records_are_left_out_and_counted(write):
    pair = {"prompt": "Q", "completion": "A"}
    path = write(pair, pair | {"label": False}, pair | {"label": True}, pair | {"weight": 0}, pair | {"label": 0},
                 {"messages": [user("Q"), assistant("A") | {"weight": 0}]})  # fmt: skip
    dataset = formats.read(path, "demonstrations")
    assert [record.where for record in dataset.records] == [f"{path}:1", f"{path}:3"]
    how = "prompt/completion; 2 with label false left out; 2 with weight 0 left out"
    assert dataset.decision == f"{path}: 2 demonstrations ({how})."
    assert len(formats.read(path, "prompts").records) == 6  # a disliked answer says nothing against its prompt
    disliked = write(pair | {"label": False}, name="disliked")
    with pytest.raises(DataError, match=r"No good line is left: .*0 demonstrations .*1 with label false left out"):
        formats.read(disliked, "demonstrations")


def test_votes_without_weight_are_left_out_and_what_the_service_adds_is_ignored_and_counted(write):
    vote = {"prompt": "Q", "response": "A", "label": False, "shown": [{"model": "m"}], "kind": "thumb"}
    path = write(vote, vote | {"weight": 0}, vote | {"label": True})
    dataset = formats.read(path, "votes")
    assert [record.label for record in dataset.records] == [False, True]
    how = "prompt/response; 1 with weight 0 left out; ignored fields: shown (2), kind (2)"
    assert dataset.decision == f"{path}: 2 votes ({how})."


def test_a_vote_is_told_by_a_label_that_is_true_or_false(write, capsys):
    """Any other label is a class, say: the line is a demonstration, as it always was."""
    pair = {"prompt": "Q", "completion": "A"}
    lines = checked(capsys, write(pair | {"label": False}, pair | {"label": True}, pair | {"label": True}))[1]
    assert lines[0].endswith(": 3 votes (prompt/completion)")
    assert lines[2] == "  liked: 2; disliked: 1"
    for label in (1, 0, "sports", None):
        assert " demonstrations (" in checked(capsys, write(pair | {"label": label}))[1][0]
    assert formats.read(write(pair | {"label": True}), "demonstrations").records[0].response == "A"


def test_keys_name_the_fields_of_votes(write):
    path = write({"question": "Q", "answer": "A", "thumbs_up": True})
    keys = {"prompt": "question", "response": "answer", "label": "thumbs_up"}
    assert bare(formats.read(path, "votes", keys=keys).records[0]) == {"prompt": "Q", "response": "A", "label": True}


def test_every_ignored_field_is_named_with_its_count(write):
    turns = [user("Q") | {"timestamp": 3}, assistant("A") | {"model": "m"}]
    binarized = {"prompt": "Q", "chosen": turns, "rejected": [turns[0], assistant("B")], "score_chosen": 0.0}
    path = write(*[binarized] * 2, {"prompt": "Q", "chosen": "A", "rejected": "B", "label": "x", "notes": ""})
    how = "ignored fields: score_chosen (2), chosen[].model (2), chosen[].timestamp (2), rejected[].timestamp (2)"
    how += ", label (1)"
    assert formats.read(path, "comparisons").decision == f"{path}: 3 comparisons (prompt/chosen/rejected; {how})."
    both = write({"messages": TALK, "prompt": "Hi", "label": 7}, name="both")
    how = "ignored fields: prompt (1), label (1)"
    assert formats.read(both, "prompts").decision == f"{both}: 1 prompts (messages; {how})."
    assert formats.read(both, "demonstrations").decision == f"{both}: 1 demonstrations (messages; {how})."


def test_parquet_rows_mean_what_the_same_lines_mean(tmp_path, write):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    weighted = [user("Q"), assistant("A") | {"weight": 0}, user("R"), assistant("B")]
    rows = [
        {"messages": weighted, "label": None, "source": "a", "tools": None, "system": None},
        {"messages": CALLED, "tools": TOOLS, "label": True},
        {"messages": list(TALK), "label": False},
        {"messages": [user("Q"), assistant("A") | {"reasoning_content": "Hm."}], "system": "Be kind."},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines, table = (formats.read(str(path), "demonstrations") for path in (write(*rows), tmp_path / "rows.parquet"))
    without_null = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}  # a table cannot say it
    expected = [bare(record) for record in lines.records]
    expected[1]["messages"][1]["tool_calls"] = [without_null]
    assert [bare(record) for record in table.records] == expected
    assert table.decision.partition(": ")[2] == lines.decision.partition(": ")[2]


@pytest.mark.parametrize(("weight", "count"), [(0.3, 3), (1, 10), (2, 20), (2.5, 25), (0.04, 0)])
def test_a_weight_takes_that_share_and_the_same_records_each_time(write, weight, count):
    path = write(*({"prompt": str(i), "response": "A"} for i in range(10)))
    first, again = (formats.read([f"{path}*{weight}", path], "demonstrations") for _ in range(2))
    drawn = [record.prompt for record in first.records[:-10]]
    assert len(drawn) == count
    assert drawn == sorted(drawn) == [record.prompt for record in again.records[:-10]]
    times = {drawn.count(str(i)) for i in range(10)}
    assert times <= {int(weight), int(weight) + 1}
    assert f"weight {weight:g}: {count} of 10 records, the same in every run" in first.decision


def test_a_column_of_nulls_is_absent_and_a_null_beside_a_value_is_not(write):
    rows = [{"prompt": "Q", "response": "A", "system": None, "tools": None}, {"prompt": "R", "response": "B"}]
    read = formats.read(write(*rows), "demonstrations")
    assert read.decision.endswith(": 2 demonstrations (prompt/response).")
    assert [record.prompt for record in read.records] == ["Q", "R"]
    read = formats.read(write(rows[0], rows[1] | {"system": "Be kind."}), "demonstrations")
    assert read.decision.endswith(": 2 demonstrations (prompt/response as a chat).")
    assert [record.prompt for record in read.records] == [None, None]


def test_an_id_used_twice_is_counted_and_read(write):
    """Foreign data repeats ids: of a conversation, say, that gives several records."""
    rows = [{"id": "a", "prompt": "1"}, {"id": 1, "prompt": "2"}, {"id": None, "prompt": "3"}, {"prompt": "4"}]
    rows += [{"id": None, "prompt": "5"}, {"id": "1", "prompt": "6"}, {"id": {"a": 1}, "prompt": "7"}]
    dataset = formats.read(write(*rows, {"id": "a", "prompt": "8"}, {"id": 1, "prompt": "9"}), "prompts")
    assert [record.prompt for record in dataset.records] == list("123456789")
    assert "2 records repeat an earlier one's id, and are read" in dataset.decision


def test_two_files_may_number_their_records_alike(write):
    first, second = (write({"id": 0, "prompt": name}, name=name) for name in ("one", "two"))
    assert len(formats.read([first, second], "prompts").records) == 2


def test_an_empty_file_is_named(write):
    good, empty = write({"prompt": "Q"}), write(name="empty.jsonl")
    problem = f"{empty}:1: file: empty; one JSON object per line is expected."
    with pytest.raises(DataError, match=re.escape(problem)):
        formats.read(empty, "prompts")
    with pytest.raises(DataError, match=re.escape(problem)):
        formats.read([good, empty], "prompts")
    assert formats.read([good, empty], "prompts", skip_bad=True).bad == [problem]


def test_a_missing_file_is_a_user_error_even_with_skip_bad(write, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        formats.read([write({"prompt": "Q"}), str(tmp_path / "gone")], "prompts", skip_bad=True)


def test_ten_bad_lines_are_listed_and_all_are_counted(write):
    path = write(*[{"prompt": i} for i in range(25)])
    with pytest.raises(DataError) as raised:
        formats.read(path, "prompts")
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:10]] == [f"{path}:{i}" for i in range(1, 11)]
    assert lines[10:] == ["... and 15 more.", "Mend 25 bad lines, or leave out what is bad with --skip-bad."]


def test_skip_bad_that_leaves_nothing_is_still_an_error(write):
    path = write({"prompt": 1}, {"prompt": 2})
    with pytest.raises(DataError) as raised:
        formats.read(path, "prompts", skip_bad=True)
    assert str(raised.value).splitlines() == [
        f"{path}:1: prompt: a number, and text is expected; put it in quotes.",
        f"{path}:2: prompt: a number, and text is expected; put it in quotes.",
        f"No good line is left: {path}: 0 prompts (unknown; 2 bad lines left out); mend them.",
    ]


def test_a_bad_first_line_does_not_decide_the_format(write):
    path = write("{", {"prompt": "Q", "response": "A"})
    decision = formats.read(path, "demonstrations", skip_bad=True).decision
    assert decision == f"{path}: 1 demonstrations (prompt/response; 1 bad line left out)."


def test_explicit_keys_override_what_the_line_has_under_our_names(write):
    path = write({"prompt": "title", "question": "Q", "response": "no", "answer": "A", "messages": TALK})
    dataset = formats.read(path, "demonstrations", keys={"prompt": "question", "response": "answer"})
    assert bare(dataset.records[0]) == {"prompt": "Q", "response": "A"}


def test_explicit_keys_decide_between_formats(write):
    path = write({"prompt": "P", "response": "R", "talk": TALK})
    dataset = formats.read(path, "demonstrations", keys={"messages": "talk"})
    assert bare(dataset.records[0]) == {"messages": TALK}
    assert dataset.decision == f"{path}: 1 demonstrations (messages; ignored fields: prompt (1), response (1))."


def test_keys_may_swap_two_fields(write):
    path = write({"prompt": "Q", "chosen": "worse", "rejected": "better"})
    dataset = formats.read(path, "comparisons", keys={"chosen": "rejected", "rejected": "chosen"})
    assert dataset.records[0].responses == ("better", "worse")


def test_a_key_that_no_format_has_is_a_user_error(write):
    path = write({"prompt": "Q"})
    with pytest.raises(UserError) as raised:
        formats.read(path, "prompts", keys={"promt": "prompt"})
    assert str(raised.value).startswith("--keys promt: no format of prompts has these fields; the formats have ")
    with pytest.raises(UserError, match="--keys prompt instruction: no format"):
        formats.read(path, "prompts", keys={"prompt": "a", "instruction": "b"})


def test_a_line_without_the_field_that_keys_name_is_bad(write):
    path = write({"prompt": "kept out", "response": "A"})
    with pytest.raises(DataError) as raised:
        formats.read(path, "demonstrations", keys={"prompt": "question"})
    assert str(raised.value).startswith(f"{path}:1: fields: found 'response'; demonstrations need prompt+response or ")


def test_prompts_that_ask_the_same_have_one_key():
    talk = Prompt(where="a:1", messages=TALK)
    assert talk.prompt_key == Prompt(where="a:2", messages=TALK[:1]).prompt_key
    assert talk.prompt_key != Prompt(where="a:3", messages=(user("Ho"),)).prompt_key
    assert Prompt(where="a:4", prompt="x").prompt_key == "x"
    assert Prompt(where="a:5", prompt_ids=(1, 2)).prompt_key == "[1, 2]"


def checked(capsys: pytest.CaptureFixture, path: str, **flags: Any) -> tuple[int, list[str]]:
    """The exit code of `penstock data check` and its lines."""
    code = check(CheckConfig(data=(path,), **flags))
    return code, capsys.readouterr().out.splitlines()


def test_check_says_what_a_file_is_and_names_each_bad_line(write, capsys):
    path = write(
        {"prompt": "a", "chosen": "xx", "rejected": "y"},
        {"prompt": "a", "chosen": "xxx", "rejected": "xxx"},
        {"prompt": "abc", "chosen": "xxxx", "rejected": "y"},
    )
    assert checked(capsys, path) == (4, [
        f"{path}: 2 comparisons (prompt/chosen/rejected; 1 bad line left out)",
        "  distinct prompts: 2; most frequent: 1 times",
        "  prompt characters: median 3, 95 % below 3, longest 3",
        "  response characters: median 2, 95 % below 4, longest 4",
        "The files were checked alone; --model says what training makes of them.",
        f"{path}:2: rejected: is the same as chosen; a comparison needs two different answers.",
    ])  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "form", "record"), READ)
def test_check_works_out_the_kind(write, capsys, kind, row, form, record):
    code, (line, *_) = checked(capsys, write(row))
    assert code == 0
    if kind == "prompts" or isinstance(row.get("label"), bool):  # a richer line is taken for the most that it can be
        assert ": 1 votes (" in line if isinstance(row.get("label"), bool) else ": 1 " in line
    else:
        assert f": 1 {kind} ({form}" in line


def test_check_of_prompts_says_what_a_reward_function_may_read(write, capsys):
    code, out = checked(capsys, write(*[{"prompt": "1 + 1", "answer": "2"}] * 2))
    assert (code, "2 prompts (prompt; fields that a reward function may read: answer (2))" in out[0]) == (0, True)


def test_check_of_an_empty_file_and_of_rubbish(write, capsys):
    empty, rubbish = write(name="empty"), write("what", name="rubbish")
    code, lines = checked(capsys, empty)
    assert (code, lines[-1]) == (4, f"{empty}:1: file: empty; one JSON object per line is expected.")
    assert checked(capsys, rubbish)[1][0] == f"{rubbish}: 0 prompts (unknown; 1 bad line left out)"


NAMES = sorted({name for kind in KINDS for form in FORMS[kind] for name in form.needs + form.may})
TURN = {"role": st.sampled_from(["user", "assistant", "x", []]), "content": st.text()}
INNER = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.fixed_dictionaries({}, optional={**TURN, "from": inner}),
    max_leaves=10,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), INNER, max_size=5), max_size=4)


@settings(max_examples=400, deadline=None)
@given(rows=ROWS, kind=st.sampled_from(KINDS), skip_bad=st.booleans())
def test_no_objects_raise_anything_but_a_penstock_error(tmp_path_factory, rows, kind, skip_bad):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with contextlib.suppress(DataError):
        dataset = formats.read(str(path), kind, skip_bad=skip_bad)
        assert len(dataset.records) + len(dataset.bad) == len(rows)
        for record in dataset.records:
            forms = (record.prompt, record.messages, record.prompt_ids)
            assert sum(form is not None for form in forms) == 1
    check(CheckConfig(data=(str(path),)))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), kind=st.sampled_from(KINDS))
def test_no_bytes_raise_anything_but_a_penstock_error(tmp_path_factory, data, kind):
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    path.write_bytes(data)
    with pytest.raises(PenstockError):
        formats.read(str(path), kind, skip_bad=True)


def test_prompts_keep_their_fields_and_what_a_reward_function_reads_is_not_ignored(write):
    row = {"question": "2 + 2?", "solution": "#### 4", "level": 3, "source": "web"}
    path, keys = write(row), {"prompt": "question", "answer": "solution"}
    read = formats.read(path, "prompts", keys=keys, reads={"answer", "level"}.__contains__)
    assert read.decision == f"{path}: 1 prompts (prompt; ignored fields: source (1))."
    record = read.records[0]
    assert record.fields == {"prompt": "2 + 2?", "answer": "#### 4", "level": 3, "source": "web"}
    assert record == formats.read(path, "prompts", keys={"prompt": "question"}).records[0]  # they are not its identity
    with pytest.raises(UserError, match="no format of prompts has these fields"):
        formats.read(path, "prompts", keys=keys)
    assert formats.read(write({"prompt": "Q", "response": "A", "mood": 1}), "demonstrations").records[0].fields == {}
