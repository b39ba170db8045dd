"""`penstock doctor MODEL`: the facts of the files, and the learned tokens of a conversation."""

import json

import pytest

from penstock.commands.config import DoctorConfig
from penstock.commands.doctor import doctor
from penstock.commands.doctor_model import CONVERSATION, describe
from penstock.errors import UserError
from tests.conftest import CHATML


@pytest.fixture
def chatting(tiny_model, make_tokenizer):
    """A tiny GPT-2 of 320 tokens with a ChatML tokenizer beside it."""
    model = tiny_model(vocab_size=320, max_length=128, eos_ids=(3,))
    make_tokenizer(template=CHATML)
    return model


def test_a_model_is_described_and_what_it_learns_is_drawn(chatting, monkeypatch):
    text = "\n".join(describe(chatting))
    assert "family       gpt2" in text
    assert "context      128 tokens, learned positions" in text
    assert "<|im_end|>' (3)" in text
    assert ">>4.<|im_end|><<" in text.replace("\n             ", "")
    assert ">>6.<|im_end|><<" in text
    assert "And 3 + 3?" in text.split(">>4.")[1].split(">>6.")[0]  # and the question is not learned
    assert "ppo --lora 16" in text


def test_the_same_as_one_json_object(chatting, capsys):
    assert doctor(DoctorConfig(model=chatting, json=True)) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert facts["family"][0].startswith("gpt2")
    assert "learned:\n" in facts["learned"][0]
    assert ">>6.<|im_end|><<" in facts["learned"][0]


def test_what_does_not_fit_is_said(chatting, monkeypatch):
    for free, verdict in ((100 * 2**30, "fits:"), (2**20, "does not fit:")):
        monkeypatch.setattr("penstock.commands.doctor_model.memory", lambda free=free: {"device": free})
        lines = describe(chatting)
        start = next(i for i, line in enumerate(lines) if line.startswith("fits "))
        assert len(lines) > start + 5
        assert all(verdict in line for line in lines[start + 1 :])


def test_a_model_without_a_tokenizer_or_an_end_is_said(tiny_model, make_tokenizer):
    model = tiny_model(vocab_size=320)
    assert "none: data must be token ids" in "\n".join(describe(model))
    make_tokenizer(eos_token=None)
    text = "\n".join(describe(model))
    assert "none: give --eos TOKEN" in text or "unusual" in text


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="config"):
        describe(str(tmp_path))


def test_the_conversation_has_two_answers():
    assert [turn["role"] for turn in CONVERSATION].count("assistant") == 2
