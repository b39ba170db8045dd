"""What training says of the files that it reads; `penstock data check --model` says the same, count by count."""

import dataclasses
import json
from pathlib import Path

import pytest

from penstock.algorithms import reward
from penstock.algorithms.setup import encoder_of, read
from penstock.commands.config import CheckConfig
from penstock.commands.data import check
from penstock.config import DataFlags
from penstock.data.toyland import save_tokenizer
from penstock.errors import DataError
from penstock.models import pretrained

GOOD = {"prompt": "Question: what is it?\n", "response": "It is so."}
ASKED = {"role": "user", "content": "What is it?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ROWS = {
    "demonstrations": [
        GOOD, GOOD | {"response": "It is so. " * 9}, GOOD | {"label": False}, GOOD | {"source": "web"},
        {"messages": [ASKED, {"role": "assistant", "content": "So."}], "tools": TOOLS}, {"prompt": "Q", "response": 1},
    ],
    "comparisons": [
        {"prompt": "Question:", "responses": ["It is so.", "It is", "is it so? " * 9], "ranking": [0, 1, 2]},
        {"prompt": "Question:", "chosen": "It is so. " * 9, "rejected": "is it"},
        {"messages": [ASKED], "chosen": "A", "rejected": "A"},
        {"prompt": [ASKED], "chosen": "It is", "rejected": "It is "}, {"prompt": "Q", "chosen": "is", "rejected": "so"},
    ],
    "votes": [
        GOOD | {"label": True}, GOOD | {"label": False, "response": "It is so. " * 9}, GOOD | {"label": "yes"}, GOOD,
        {"messages": [ASKED, {"role": "assistant", "content": "So."}], "label": False, "source": "web"},
    ],
    "prompts": [{"prompt": "Question:"}, {"prompt": "Question: what is it? " * 9}, {"prompt": 3}],
}  # fmt: skip


@pytest.fixture
def model(tiny_model):
    """A model with a tokenizer whose template trims what it writes."""
    address = tiny_model(vocab_size=300, max_length=64)
    tokenizer = save_tokenizer(Path(address), ["Question: what is it? It is so."] * 9, vocab_size=300)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }}\n{% endfor %}"
    tokenizer.save_pretrained(address)
    return address


def said_by_training(model, path, kind, **flags):
    """What a training command says when it reads the file, and how many records it keeps."""
    lines = []
    data = DataFlags(data=(path,), max_length=24, **flags)
    config = pretrained.load(model, device="meta")[0].config
    encoder = encoder_of(model, config, data, reserve=8 if kind == "prompts" else 1)
    return lines, len(read(lines.append, encoder, (path,), kind, data)[0])


@pytest.mark.parametrize("truncate", ["drop", "left", "right"])
@pytest.mark.parametrize("kind", ROWS)
def test_check_with_a_model_says_all_that_training_says(capsys, jsonl, model, kind, truncate):
    path = jsonl(ROWS[kind])
    said, kept = said_by_training(model, path, kind, skip_bad=True, truncate=truncate)
    config = CheckConfig(data=(path,), model=model, kind=kind, max_length=24, max_new_tokens=8, truncate=truncate)
    assert check(config) == 4
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in said if not line.startswith("--skip-bad")] == [line for line in printed if line in said]
    assert any(line.startswith(f"{model}: {kept} {kind}; tokens of a row: median") for line in printed)
    with pytest.raises(DataError) as raised:
        said_by_training(model, path, kind, truncate=truncate)
    problems = [line for line in str(raised.value).splitlines() if line.startswith(f"{path}:")]
    assert problems
    assert set(problems) <= set(printed)
    assert check(dataclasses.replace(config, json=True)) == 4
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["bad"] == [line for line in printed if line in found["bad"]]
    assert set(problems) <= set(found["bad"])
    assert [(row["kind"], row["records"]) for row in found["model"]] == [(kind, kept)]
    assert [row["data"] for row in found["sources"]] == [path]
    assert err.splitlines() == printed


def test_what_does_not_fit_is_left_out_and_said_with_its_count(jsonl, model):
    said, kept = said_by_training(model, path := jsonl(ROWS["demonstrations"]), "demonstrations", skip_bad=True)
    assert kept == 2
    assert said[0] == (
        f"{path}: 4 demonstrations (3 prompt/response, 1 messages; 1 bad line left out; 1 with label false left out; "
        "ignored fields: source (1))."
    )
    assert said[1].startswith(f"--truncate drop left out 1 of 4 demonstrations, the first: {path}:2: response: ")
    assert said[2].startswith(f"--skip-bad left out 2 of 4 records, the first: {path}:6: response: a number")


def test_a_prompt_that_does_not_fit_is_left_out_or_cut_or_an_error(jsonl, model):
    rows = ROWS["prompts"][:2]
    said, kept = said_by_training(model, path := jsonl(rows), "prompts")
    assert (kept, said[1].partition(":")[0]) == (1, "--truncate drop left out 1 of 2 prompts, the first")
    said, kept = said_by_training(model, path, "prompts", truncate="left")
    assert (kept, said[1]) == (2, "1 prompts cut at their beginning to fit --max-length")
    with pytest.raises(DataError, match=f"{path}:2: prompt: .* tokens where there is room for 16"):
        said_by_training(model, path, "prompts", truncate="right")


def test_answers_with_equal_tokens_are_not_compared_and_rankings_keep_their_other_pairs(jsonl, model):
    words = ["so is", "it is", "so what"]
    long = [f"Question: {'what is it? ' * 5}{word}" for word in words]
    rows = [
        {"prompt": "Question:", "responses": [*long[:2], "It is so."], "ranking": [0, 1, 2]},
        {"prompt": "Question:", "chosen": long[0], "rejected": long[2]},
    ]
    path, data = jsonl(rows), DataFlags(data=(), max_length=16, truncate="right")
    lines = []
    encoder = encoder_of(model, pretrained.load(model, device="meta")[0].config, data)
    records, encoded = read(lines.append, encoder, (path,), "comparisons", data)
    assert lines[1:] == [
        "4 answers cut at --max-length: they have no end of sequence, so only how they begin is learned",
        "2 pairs of answers not compared: their tokens are the same",
        "1 rankings left out: no answer in them is better than another",
    ]
    first, second = (reward.ranking_of(e, r.ranks) for e, r in zip(encoded, records, strict=True))
    assert first.rows[0] == first.rows[1]
    assert first.pairs == [(0, 2), (1, 2)]
    assert second.pairs == []


def test_without_a_model_it_says_that_the_files_alone_were_checked(capsys, jsonl):
    assert check(CheckConfig(data=(jsonl([GOOD]),))) == 0
    assert "The files were checked alone; --model says what training makes of them." in capsys.readouterr().out
