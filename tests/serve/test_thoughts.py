"""Thoughts and answers apart, in pieces and whole."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.serve.detokenize import ThoughtSplitter
from tests.serve.conftest import running, save_chatty

CASES = [
    ("<think>\nwhy\n</think>\n\nso", False, "why", "so"),
    (" \n<think>why</think>so", False, "why", "so"),
    ("why\n</think>\n\nso", True, "why", "so"),
    ("\nwhy </thin", True, "why </thin", ""),
    ("<think>cut < off \n", False, "cut < off", ""),
    ("<think>\n\n</think>\n\nso", False, "", "so"),
    ("<thi", False, "", "<thi"),
    ("  plain <think>x</think>", False, "", "  plain <think>x</think>"),
    ("a </think> b", False, "", "a </think> b"),
    ("", False, "", ""),
    ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
]


def split(pieces, opened):
    splitter = ThoughtSplitter(opened)
    parts = [splitter.push(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize(("text", "opened", "thought", "answer"), CASES)
def test_a_thought_is_split_from_the_answer(text, opened, thought, answer):
    assert split([text], opened) == (thought, answer)
    assert split([*text, ""], opened) == (thought, answer)  # letter by letter


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", " ", "\n", "a"])), st.booleans(), st.data()
)
def test_pieces_give_what_the_whole_gives(words, opened, data):
    """The oracle is one regular expression over the whole text."""
    text = "".join(words)
    pieces, rest = [], text
    while rest:
        length = data.draw(st.integers(1, len(rest)))
        pieces, rest = [*pieces, rest[:length]], rest[length:]
    begin = "" if opened else r"\s*<think>"
    match = re.match(rf"{begin}(.*?)(?:</think>(.*)|$)\Z", text, re.DOTALL)
    expected = (match[1].strip(), (match[2] or "").lstrip()) if match else ("", text)
    assert split([*pieces, ""], opened) == expected


THINKING = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"


def test_a_template_that_opens_the_thought_makes_the_answer_reasoning(tmp_path):
    """A random model does not end its thought: all of its text is reasoning, streamed and whole and on the page."""
    model = save_chatty(tmp_path / "thinker")
    (tmp_path / "thinker" / "chat_template.jinja").write_text(THINKING)
    with running(tmp_path / "data", model) as server:
        asked = {"model": "thinker", "messages": [{"role": "user", "content": "a"}], "max_tokens": 12, "temperature": 0}
        [choice] = server.post(asked).json["choices"]
        assert choice["message"]["content"] == ""
        thought = choice["message"]["reasoning_content"]
        assert thought
        deltas = [event["choices"][0]["delta"] for event in server.post({**asked, "stream": True}).events if event]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == thought
        assert not any(delta.get("content") for delta in deltas)
        talk = server.ask("POST", "/api/conversations", {}).json["id"]
        message = {"parent_id": None, "role": "user", "content": "a"}
        asked_id = server.ask("POST", f"/api/conversations/{talk}/messages", message).json["id"]
        reply = {"parent_id": asked_id, "model": "thinker", "max_tokens": 12, "temperature": 0.0}
        events = server.ask("POST", f"/api/conversations/{talk}/replies", reply).events
        assert events[-1]["message"]["content"].startswith("<think>")
        assert events[-1]["message"]["content"].removeprefix("<think>").strip() == thought


def test_a_model_without_thoughts_has_no_such_key(server):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
    assert set(server.post(asked).json["choices"][0]["message"]) == {"role", "content", "refusal"}
