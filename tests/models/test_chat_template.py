"""What a chat template does, read off what it writes, and which tokens end an answer."""

import pytest

from penstock.errors import UserError
from penstock.models.chat_template import ChatTemplate, arguments_of, ends_of, words_of
from penstock.models.tokenizer_files import load_tokenizer
from tests.conftest import CHATML

BOS, EOS, IM_START, IM_END = 0, 1, 2, 3
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def template_of(make_tokenizer):
    """template_of(template, eos_token="<eos>"): what is read off it."""
    return lambda template, eos_token="<eos>", **options: ChatTemplate(
        load_tokenizer(str(make_tokenizer(template=template, eos_token=eos_token))), **options
    )


@pytest.mark.parametrize(
    ("eos_token", "model_ids", "ids"),
    [
        ("<eos>", [EOS], [EOS, IM_END]),  # Qwen's base models: only the template names <|im_end|>
        ("<eos>", [EOS, IM_END], [EOS, IM_END]),
        ("<|im_end|>", [EOS], [IM_END, EOS]),
        ("<eos>", [IM_START], [EOS, IM_END, IM_START]),  # generation_config.json names more
        ("<eos>", [40], [EOS, IM_END]),  # ordinary text ends nothing
        (None, [], [IM_END]),
    ],
)
def test_an_answer_ends_at_all_that_tokenizer_template_and_configs_name(template_of, eos_token, model_ids, ids):
    assert list(ends_of(template_of(CHATML, eos_token), model_ids).ids) == ids


def test_it_is_said_in_a_line_when_they_differ(template_of):
    assert ends_of(template_of(CHATML, "<|im_end|>"), [IM_END]).note == ""
    assert ends_of(template_of(CHATML), [EOS]).note == (
        "an answer ends at <eos> (tokenizer, config) or <|im_end|> (chat template); a chat turn is taught to end with "
        "<|im_end|>"
    )
    assert ends_of(template_of(CHATML, "<|im_end|>"), [40]).note.startswith("the config's end 40 (")
    assert ends_of(template_of("{{ messages }}", None), []).note.startswith("the model names no token that ends")


def test_an_end_that_is_named_comes_first(template_of):
    assert ends_of(template_of("{{ messages }}", None), [], "<|im_end|>").ids == (IM_END,)
    assert ends_of(None, [5], "7").ids == (7, 5)
    with pytest.raises(UserError, match="--eos x: the model has no tokenizer; give the token's id"):
        ends_of(None, [5], "x")


def test_what_opens_and_ends_an_answer_is_read_off(template_of):
    usual = template_of(CHATML)
    assert (usual.end, usual.opening, usual.takes_system, usual.chats) == (IM_END, "", True, True)
    assert usual.structure == {BOS, EOS, IM_START, IM_END}
    bare = template_of(CHATML.partition("{% if add")[0])
    assert bare.opening == "<|im_start|>assistant\n"
    assert bare.render([USER], answer=True) == usual.render([USER], answer=True)
    plain = template_of("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert (plain.end, plain.opening, plain.chats) == (None, "", False)
    assert template_of("[{{ messages[-1].content }}]").takes_system is False


def test_a_template_has_the_day_that_it_is_given(template_of):
    template = template_of("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}", date="2024-02-29")
    assert template.render([USER]) == "29 Feb 2024 Hi"
    assert template.notes == []
    any_form = template_of("{% set form = '%d' %}{{ strftime_now(form) }}{{ messages[0].content }}", date="2024-02-29")
    assert any_form.notes == ["the chat template reads today's date in a form that --date 2024-02-29 does not reach"]
    with pytest.raises(UserError, match=r"--date 2024-02-31: .*; write it as 2026-01-31"):
        template_of("x", date="2024-02-31")


def test_arguments_are_json_or_text():
    assert arguments_of(["a=false", "b=3", "c=x y", "d=[1]"]) == {"a": False, "b": 3, "c": "x y", "d": [1]}


def test_text_has_all_but_what_is_hidden(template_of):
    tokenizer = template_of(CHATML).tokenizer
    ids = tokenizer("<bos>Hi<|im_end|>").input_ids
    assert words_of(tokenizer, ids, {IM_END}) == "<bos>Hi"


GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
"""Gemma 2's, with the test tokenizer's words for the starts and ends of turns."""


def test_gemmas_template_ends_an_answer_at_its_end_of_turn_and_takes_no_system_message(template_of):
    template = template_of(GEMMA)
    assert (template.end, template.takes_system, template.chats) == (IM_END, False, True)
    assert list(ends_of(template, [EOS, IM_END]).ids) == [EOS, IM_END]  # as generation_config.json of gemma-2-*-it has
    assert template.render([USER], answer=True).endswith("<|im_start|>model\n")
