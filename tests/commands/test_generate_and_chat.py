"""`penstock generate`: answers in order, judged and picked where that was asked for."""

import io
import json

import pytest

from penstock.commands import chat
from penstock.commands.config import ChatConfig, GenerateConfig
from penstock.commands.generate import generate
from penstock.errors import UserError
from tests.conftest import CHATML

REWARD_FN = """
def score(prompts, responses, *, response_ids=None, **_):
    return [ids.count(5) - ids.count(6) + len(ids) / 100 for ids in response_ids]
"""


@pytest.fixture
def ask(tmp_path, tiny_model, jsonl):
    """Answers to five prompts of different lengths, as generate writes them."""
    model = tiny_model()
    data = jsonl([{"prompt_ids": [1, *range(3, 3 + i)]} for i in (5, 1, 4, 2, 3)])
    (tmp_path / "fn.py").write_text(REWARD_FN)
    calls = []

    def run(**flags):
        calls.append(tmp_path / f"answers-{len(calls)}.jsonl")
        if "best_of" in flags:
            flags["reward_fn"] = f"{tmp_path}/fn.py:score"
        generate(GenerateConfig(model=model, data=data, out=str(calls[-1]), max_new_tokens=8, device="cpu", **flags))
        return [json.loads(line) for line in calls[-1].read_text().splitlines()]

    return run


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_answers_come_in_the_order_of_prompts_whatever_the_batch_size(ask, batch_size):
    lines, alone = ask(n=2, batch_size=batch_size), ask(n=2, batch_size=7)
    assert [len(line["prompt_ids"]) for line in lines] == [6, 6, 2, 2, 5, 5, 3, 3, 4, 4]
    assert [line["response_ids"] for line in lines] == [line["response_ids"] for line in alone]
    assert set(lines[0]) == {"prompt", "response", "prompt_ids", "response_ids", "logprobs", "finish_reason"}


@pytest.mark.parametrize("keep", [1, 3])
def test_best_of_keeps_the_best_by_score(ask, keep):
    every = ask(n=6, reward_fn=None)
    best = ask(n=keep, best_of=6)
    assert len(best) == 5 * keep
    for i in range(5):
        mine = [line["response_ids"] for line in every[i * 6 : i * 6 + 6]]
        scores = sorted((ids.count(5) - ids.count(6) + len(ids) / 100 for ids in mine), reverse=True)
        assert [line["score"] for line in best[i * keep : (i + 1) * keep]] == pytest.approx(scores[:keep])
        assert all(line["response_ids"] in mine for line in best[i * keep : (i + 1) * keep])


def test_what_was_asked_for_besides_is_told(ask):
    lines = ask(top_logprobs=2, min_p=0.01, repetition_penalty=1.2)
    assert all(len(likely) == 2 for line in lines for likely in line["top_logprobs"])


@pytest.mark.parametrize(("flags", "why"), [
    ({"best_of": 4, "n": 8}, "keeps the best --n 8"), ({"best_of": 4, "reward_weights": (1.0, 2.0)}, "2 for 1 rewards"),
    ({"min_p": 2.0}, "not in"), ({"repetition_penalty": 0.0}, "not above 0"), ({"stop": ("",)}, "empty one"),
])  # fmt: skip
def test_flags_that_cannot_work_are_refused(ask, flags, why):
    with pytest.raises(UserError, match=why):
        ask(**flags)


def test_best_of_needs_a_judge(tiny_model):
    with pytest.raises(UserError, match="needs a judge"):
        generate(GenerateConfig(model=tiny_model(), prompt="a", best_of=3))


@pytest.fixture
def chat_model(make_tokenizer, tiny_model):
    """The directory of a ChatML model whose tokenizer names no end of its own."""

    def make(template=CHATML):
        directory = make_tokenizer(template=template, eos_token=None)
        tiny_model("model", vocab_size=320, max_length=64, hf={})
        return str(directory)

    return make


def test_a_plain_prompt_of_a_chat_model_is_said_or_becomes_a_turn(chat_model, capsys):
    asked = {"model": chat_model(), "prompt": "Hi", "max_new_tokens": 2, "device": "cpu", "json": True}
    generate(GenerateConfig(**asked))
    output = capsys.readouterr()
    assert json.loads(output.out)["prompt"] == "Hi"
    assert "1 plain prompts are read without the model's chat template; --apply-chat-template makes" in output.err
    generate(GenerateConfig(**asked, apply_chat_template=True, system="Be kind."))
    output = capsys.readouterr()
    assert json.loads(output.out)["prompt"] == "system\nBe kind.\nuser\nHi\nassistant\n"
    assert "plain prompts" not in output.err


def test_a_model_without_any_end_answers_to_the_limit_and_says_so(chat_model, capsys):
    generate(GenerateConfig(model=chat_model("{{ messages }}"), prompt="Hi", max_new_tokens=5, device="cpu", json=True))
    output = capsys.readouterr()
    line = json.loads(output.out)
    assert (len(line["response_ids"]), line["finish_reason"]) == (5, "length")
    assert "the model names no token that ends an answer, so all go on to their limit" in output.err


def test_an_answer_without_a_word_is_no_turn_of_a_conversation(chat_model, monkeypatch):
    prompts, replies = [], iter(["", "Hello", "Well"])

    def say(config, engine, encoder, prompt, sampling, turn):
        prompts.append(encoder.decode(prompt))
        return next(replies)

    monkeypatch.setattr(chat, "_say", say)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nYou?\nBye\n"))
    chat.chat(ChatConfig(model=chat_model(), device="cpu"))
    opened = "user\nYou?\nassistant\n"
    assert prompts == ["user\nHi\nassistant\n", opened, f"{opened}Hello\nuser\nBye\nassistant\n"]
