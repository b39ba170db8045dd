"""`penstock data show`: three records as a model's tokens, with marks around what is learned."""

import pytest

from penstock.commands.config import ShowConfig
from penstock.commands.data import show
from penstock.commands.drawing import drawn
from tests.conftest import CHATML


@pytest.fixture
def shown(tiny_model, make_tokenizer, jsonl, capsys):
    """The exit code and the lines of `penstock data show` on rows."""
    model = tiny_model(vocab_size=320, max_length=128, eos_ids=(3,))
    make_tokenizer(template=CHATML)

    def lines(*rows, **flags):
        code = show(ShowConfig(data=(jsonl(rows),), model=model, max_length=128, max_new_tokens=8, **flags))
        return code, capsys.readouterr().out.replace(str(jsonl(rows)), "FILE").splitlines()

    return lines


def talk(answer):
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}


def test_learned_runs_stand_between_marks():
    class Letters:
        def decode(self, ids, skip_special_tokens):
            return "".join(chr(97 + i) for i in ids)

    assert drawn(Letters(), [0, 1, 2, 3], [False, True, True, False]) == "a>>bc<<d"
    assert drawn(None, [0, 1, 2, 3], [False, True, True, False]) == "[0]>>[1, 2]<<[3]"


def test_three_of_the_records_are_drawn_behind_the_decision(shown):
    code, lines = shown(*(talk(f"Answer {i}.") for i in range(9)))
    assert code == 0
    assert lines[0] == "FILE: 9 demonstrations (messages)."
    assert any(line.endswith("model: 9 demonstrations; >>so<< is what is learned:") for line in lines)
    assert [line for line in lines if line.startswith("FILE:") and line[5:].isdigit()] == ["FILE:1", "FILE:5", "FILE:9"]
    assert sum(">>Answer" in line and line.endswith("<|im_end|><<") for line in lines) == 3
    row = lines.index("FILE:5")
    assert lines[row + 2 : row + 5] == ["    <|im_start|>user", "    Hi<|im_end|>", "    <|im_start|>assistant"]
    tokens, learned = (int(word) for word in lines[row + 1].split() if word.isdigit())
    assert lines[row + 1].startswith("  row: ")
    assert 0 < learned < tokens


def test_each_kind_is_drawn_as_it_is_trained(shown):
    pair = {"prompt": [talk("")["messages"][0]], "chosen": talk("Good.")["messages"][1:]}
    code, lines = shown({**pair, "rejected": talk("Bad.")["messages"][1:]})
    assert code == 0
    assert [line.split(":")[0] for line in lines if "tokens," in line] == ["  prompt", "  rank 0", "  rank 1"]
    assert "    >>Good.<|im_end|><<" in lines
    code, lines = shown({**talk("No."), "label": False})
    assert sum(line.startswith("  disliked: ") and line.endswith(" judged") for line in lines) == 1
    assert "    >>No.<|im_end|><<" in lines
    code, lines = shown({"prompt": [{"role": "user", "content": "Hi"}]})
    assert "0 learned" in lines[-4]
    assert lines[-1] == "    <|im_start|>assistant"


def test_a_bad_line_is_named_and_the_others_are_drawn(shown):
    code, lines = shown(talk("Yes."), {"messages": 3})
    assert code == 4
    assert "    >>Yes.<|im_end|><<" in lines
    assert lines[-1] == "FILE:2: messages: a number, and a list is expected."
