"""Records into ids: loss on the assistant's tokens only, one EOS, at most one BOS, and the same start everywhere."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from penstock.config import DataFlags
from penstock.data.chat import REWRITTEN, Encoder
from penstock.data.field_checks import Message
from penstock.data.limits import CUT, Example, TooLongError
from penstock.data.records import Comparison, Demonstration, Prompt, Vote
from penstock.errors import DataError, UserError
from penstock.models.tokenizer_files import check_fit, load_tokenizer
from tests.conftest import CHATML

BOS, EOS, IM_START, IM_END = 0, 1, 2, 3


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


TALK = ({"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), user("Bye"), assistant("See you"))

WAYS: dict[str, dict[str, Any]] = {
    "plain template": {},
    "plain template, BOS in front": {"bos": True},
    "ChatML": {"template": CHATML, "eos_token": "<|im_end|>"},
    "ChatML, BOS in front": {"template": CHATML, "eos_token": "<|im_end|>", "bos": True},
    "ChatML whose end of turn is not EOS": {"template": CHATML},
    "a template that writes BOS": {"template": "{{ bos_token }}" + CHATML, "eos_token": "<|im_end|>", "bos": True},
    "a template that writes BOS, alone": {"template": "{{ bos_token }}" + CHATML, "eos_token": "<|im_end|>"},
    "a template without ends": {"template": "{% for m in messages %}{{ m.content }}\n{% endfor %}"},
    "a template that closes conversations with EOS": {
        "template": CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    },
    "one token for BOS and EOS": {"bos_token": "<eos>"},
}


@pytest.fixture(params=WAYS)
def encoder(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Path]) -> Encoder:
    return encoder_of(make_tokenizer(**WAYS[request.param]))


def encoder_of(directory: Path, max_length: int = 200, reserve: int = 1, **more: Any) -> Encoder:
    values: dict[str, Any] = {"eos_ids": [EOS], "vocab_size": 320} | more
    if "truncate" in values:
        values["flags"] = DataFlags(data=(), truncate=values.pop("truncate"))
    return Encoder.for_model(str(directory), max_length=max_length, reserve=reserve, **values)


def spans(encoder: Encoder, ids: list[int], trained: list[bool]) -> list[str]:
    """The trained stretches as text, special tokens shown."""
    text: list[str] = []
    for i, (token, on) in enumerate(zip(ids, trained, strict=True)):
        if on and (i == 0 or not trained[i - 1]):
            text.append("")
        if on:
            text[-1] += encoder.tokenizer.decode([token])
    return text


def show(encoder: Encoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids)


def test_a_text_demonstration_trains_the_response_and_its_eos(make_tokenizer):
    encoder = encoder_of(make_tokenizer(bos=True))
    row = encoder.encode_demonstration(Demonstration(where="f:1", prompt="Hello?", response=" Yes"))
    assert show(encoder, row.tokens) == "<bos>Hello? Yes<eos>"
    assert spans(encoder, row.tokens, row.trained) == [" Yes<eos>"]


def test_an_eos_that_the_text_brings_is_not_doubled(make_tokenizer):
    encoder = encoder_of(make_tokenizer())
    row = encoder.encode_demonstration(Demonstration(where="f:1", prompt="Hello?", response=" Yes<eos>"))
    assert show(encoder, row.tokens) == "Hello? Yes<eos>"
    assert encoder.take_notes() == ["1 answers brought an end of their own, which is not doubled"]


def test_a_bos_that_the_text_brings_is_not_doubled(make_tokenizer):
    encoder = encoder_of(make_tokenizer(bos=True))
    assert encoder.encode_prompt(Prompt(where="f:1", prompt="<bos>Hi")).count(BOS) == 1


def test_a_tokenizer_that_never_writes_bos_gets_none_but_for_an_empty_prompt(make_tokenizer):
    encoder = encoder_of(make_tokenizer())
    assert BOS not in encoder.encode_prompt(Prompt(where="f:1", prompt="Hi"))
    assert encoder.encode_prompt(Prompt(where="f:1", prompt="")) == [BOS]


def test_the_plain_template_reads_as_a_dialogue(make_tokenizer):
    encoder = encoder_of(make_tokenizer())
    row = encoder.encode_demonstration(Demonstration(where="f:1", messages=TALK))
    text = "Be kind.\n\nHuman: Hi\n\nAssistant: Hello<eos>\n\nHuman: Bye\n\nAssistant: See you<eos>"
    assert show(encoder, row.tokens) == text
    assert spans(encoder, row.tokens, row.trained) == [" Hello<eos>", " See you<eos>"]


def test_the_models_own_template_comes_first(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template=CHATML, eos_token="<|im_end|>", bos=True))
    row = encoder.encode_demonstration(Demonstration(where="f:1", messages=TALK[1:]))
    assert show(encoder, row.tokens) == (
        "<bos><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you<|im_end|>"
    )
    assert spans(encoder, row.tokens, row.trained) == ["Hello<|im_end|>", "See you<|im_end|>"]


def test_every_assistant_turn_is_trained_with_one_end_and_nothing_else_is(encoder):
    row = encoder.encode_demonstration(Demonstration(where="f:1", messages=TALK))
    texts = spans(encoder, row.tokens, row.trained)
    assert len(texts) == 2
    for text, answer in zip(texts, ("Hello", "See you"), strict=True):
        assert answer in text
    trained = [token for token, on in zip(row.tokens, row.trained, strict=True) if on]
    assert sum(token in encoder.eos_ids for token in trained) == 2
    assert row.trained[-1]
    assert row.tokens[-1] in encoder.eos_ids
    if encoder.tokenizer.bos_token_id == BOS:
        assert row.tokens.count(BOS) <= 1


TURNS = st.lists(st.text("aH: \n.", min_size=1, max_size=6), min_size=1, max_size=6)


@settings(max_examples=60)
@example(turns=[":"], answer="\n")
@given(turns=TURNS, answer=st.text("aH: \n.", min_size=1, max_size=6))
def test_prompts_comparisons_and_demonstrations_of_one_dialogue_begin_with_the_same_ids(encoder, turns, answer):
    turns = turns if len(turns) % 2 else turns[:-1]
    asked = tuple(assistant(text) if i % 2 else user(text) for i, text in enumerate(turns))
    prompt = encoder.encode_prompt(Prompt(where="f:1", messages=asked))
    row = encoder.encode_demonstration(Demonstration(where="f:1", messages=(*asked, assistant(answer))))
    compared = Comparison(where="f:1", messages=asked, responses=(answer, "x"), ranks=(0, 1))
    again, (response, _) = encoder.encode_comparison(compared)
    vote = encoder.encode_vote(Vote(where="f:1", messages=asked, response=answer, label=False))
    assert (vote.tokens, sum(vote.trained)) == (again + response, len(response))
    assert prompt == again
    assert row.tokens == prompt + response
    assert row.trained[len(prompt) :] == [True] * len(response)
    assert encoder.encode_response(compared, answer, ended=True) == row.tokens
    cut = encoder.encode_response(compared, answer, ended=False)
    assert cut == row.tokens[: len(cut)]  # what the template writes behind an answer is not there
    assert cut[-1] not in encoder.eos_ids


# A text that spells a special token becomes that token, as in transformers; hypothesis knows to try "<bos>".
ORDINARY = st.text(min_size=1, max_size=9).filter(lambda text: "<" not in text)


@settings(max_examples=60)
@given(prompt=ORDINARY, answer=ORDINARY)
def test_text_prompts_too(encoder, prompt, answer):
    record = Comparison(where="f:1", prompt=prompt, responses=(answer, "x"), ranks=(0, 1))
    ids, (response, _) = encoder.encode_comparison(record)
    vote = encoder.encode_vote(Vote(where="f:1", prompt=prompt, response=answer, label=True))
    assert vote == Example(ids + response, [False] * len(ids) + [True] * len(response))
    row = encoder.encode_demonstration(Demonstration(where="f:1", prompt=prompt, response=answer))
    assert row.tokens == ids + response == encoder.encode_response(record, answer, ended=True)
    assert encoder.encode_prompt(Prompt(where="f:1", prompt=prompt)) == ids
    assert encoder.decode(ids) == prompt
    assert encoder.decode(response) == answer
    assert [token in encoder.eos_ids for token in response] == [False] * (len(response) - 1) + [True]


def test_an_answer_of_weight_0_is_read_and_not_learned(encoder):
    unlearned = (*TALK[:2], TALK[2] | {"weight": 0}, *TALK[3:])
    row, weighted = (encoder.encode_demonstration(Demonstration(where="f:1", messages=m)) for m in (TALK, unlearned))
    assert weighted.tokens == row.tokens
    assert spans(encoder, row.tokens, weighted.trained) == spans(encoder, row.tokens, row.trained)[1:]
    silent = encoder.encode_demonstration(Demonstration(where="f:1", messages=(*TALK[:4], TALK[4] | {"weight": 0})))
    assert spans(encoder, silent.tokens, silent.trained) == spans(encoder, row.tokens, row.trained)[:1]
    assert silent.trained[-1]


TOOLS = ({"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
CALLED: tuple[Message, ...] = (
    user("1 + 1?"), {"role": "assistant", "content": "", "reasoning_content": "Adding.", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"}, assistant("Two."),
)  # fmt: skip
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tool_calls_and_reasoning_are_learned_as_the_template_writes_them_and_results_are_not(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template=TOOL_TEMPLATE, eos_token="<|im_end|>"), max_length=400)
    record = Demonstration(where="f:1", messages=CALLED, tools=TOOLS)
    row = encoder.encode_demonstration(record)
    want = encoder.tokenizer.apply_chat_template(list(CALLED), tools=list(TOOLS), tokenize=False)
    assert show(encoder, row.tokens) + "\n" == want
    call = '<call>{"name": "add", "arguments": {"a": 1, "b": 1}}</call>'
    assert spans(encoder, row.tokens, row.trained) == [f"<think>Adding.</think>{call}<|im_end|>", "Two.<|im_end|>"]
    prompt = Comparison(where="f:1", messages=CALLED[:3], tools=TOOLS, responses=("Two.", "One."), ranks=(0, 1))
    ids, (answer, _) = encoder.encode_comparison(prompt)
    assert ids + answer == row.tokens
    assert encoder.encode_prompt(prompt) == ids


@pytest.mark.parametrize(("template", "missing"), [
    (None, "tools, messages[1].reasoning_content, messages[1].tool_calls, messages[2] of role tool"),
    (CHATML, "tools, messages[1].reasoning_content, messages[1].tool_calls"),
    (TOOL_TEMPLATE.replace("{% if tools %}", "{% if false %}"), "tools"),
    (TOOL_TEMPLATE.replace("or [] %}", "or [] if false %}"), "messages[1].tool_calls"),
])  # fmt: skip
def test_what_the_template_does_not_write_is_refused_by_name(make_tokenizer, template, missing):
    encoder = encoder_of(make_tokenizer(template=template), max_length=400)
    for record in (Demonstration(where="f:1", messages=CALLED, tools=TOOLS),
                   Prompt(where="f:1", messages=CALLED[:3], tools=TOOLS)):  # fmt: skip
        with pytest.raises(DataError) as raised:
            (encoder.encode_demonstration if isinstance(record, Demonstration) else encoder.encode_prompt)(record)
        assert str(raised.value) == (
            f"f:1: messages: this model's chat template does not write {missing}, so the model would never read it; "
            "take a model whose template does, or take it out."
        )


def test_a_developer_is_the_system_where_the_template_knows_no_developer(make_tokenizer):
    turns = ({"role": "developer", "content": "Be kind."}, user("Hi"))
    encoder = encoder_of(make_tokenizer(template=CHATML))
    assert "<|im_start|>system\nBe kind." in show(encoder, encoder.encode_prompt(Prompt(where="f:1", messages=turns)))
    knows = encoder_of(make_tokenizer("knows", template="{# developer #}" + CHATML))
    assert "<|im_start|>developer\nBe" in show(knows, knows.encode_prompt(Prompt(where="f:1", messages=turns)))


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}Hmm. {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_still_makes_prompts(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template=THINKING, eos_token="<|im_end|>"), eos_ids=[IM_END])
    row = encoder.encode_demonstration(Demonstration(where="f:1", messages=TALK))
    assert spans(encoder, row.tokens, row.trained) == ["Hmm. See you<|im_end|>"]
    assert encoder.take_notes() == [f"1 {REWRITTEN}"]
    prompt = encoder.encode_prompt(Prompt(where="f:1", messages=TALK[1:4]))
    assert show(encoder, prompt) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    single = encoder.encode_demonstration(Demonstration(where="f:1", messages=TALK[1:3]))
    assert spans(encoder, single.tokens, single.trained) == ["Hmm. Hello<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each_answer(make_tokenizer):
    directory = make_tokenizer(template=THINKING, eos_token="<|im_end|>")
    record = Demonstration(where="f:1", messages=(*TALK, user("Why?"), assistant("So")))
    encoder = encoder_of(directory, eos_ids=[IM_END])
    rows = encoder.encode_rows(record)
    assert [spans(encoder, row.tokens, row.trained) for row in rows] == [
        ["Hmm. Hello<|im_end|>"], ["Hmm. See you<|im_end|>"], ["Hmm. So<|im_end|>"]
    ]  # fmt: skip
    for row, end in zip(rows, (3, 5, 7), strict=True):  # each as the template writes the conversation up to there
        text = encoder.tokenizer.apply_chat_template(list(record.messages[:end]), tokenize=False)
        assert show(encoder, row.tokens) == text.removesuffix("\n")
    unlearned = dataclasses.replace(record, messages=(*record.messages[:4], assistant("See you") | {"weight": 0}))
    (row,) = encoder.encode_rows(unlearned)
    assert spans(encoder, row.tokens, row.trained) == ["Hmm. Hello<|im_end|>"]
    encoder.take_notes()
    short = encoder_of(directory, eos_ids=[IM_END], max_length=len(rows[1].tokens))
    assert short.encode_rows(record) == rows[:2]
    assert short.take_notes() == [f"1 {REWRITTEN}", "1 answers left out, because they do not fit --max-length"]


def test_an_answer_of_which_the_template_leaves_words_out_is_counted(make_tokenizer):
    template = CHATML.replace("m.content", "m.content.split('</think>')[-1]")  # as in DeepSeek-R1-Distill's
    encoder = encoder_of(make_tokenizer(template=template), eos_ids=[IM_END])
    record = Demonstration(where="f:1", messages=(user("Hi"), assistant("<think>Hm</think>Hello")))
    row = encoder.encode_demonstration(record)
    assert spans(encoder, row.tokens, row.trained) == ["Hello<|im_end|>"]
    note = "1 answers of which the template leaves words out (reasoning, say); only what it writes is read"
    assert note in encoder.take_notes()
    encoder.encode_demonstration(Demonstration(where="f:1", messages=(user("Hi"), assistant(" Hello \n"))))
    assert note not in encoder.take_notes()


@pytest.mark.parametrize("template", ["{{ messages | length }}", CHATML.replace("m.content", "m.content.text")])
def test_a_template_that_leaves_texts_out_is_refused(make_tokenizer, template):
    encoder = encoder_of(make_tokenizer(template=template), eos_ids=[IM_END])
    with pytest.raises(DataError, match=r"does not write messages\[0\] of role user, messages\[1\] of role assistant,"):
        encoder.encode_rows(Demonstration(where="f:1", messages=TALK[1:3]))


def test_what_a_template_refuses_is_a_data_error(make_tokenizer):
    template = "{{ raise_exception('Only one\n turn.') if messages | length > 1 else messages[0].content }}"
    encoder = encoder_of(make_tokenizer(template=template))
    with pytest.raises(DataError, match=r"f:1: messages: the chat template refuses them: Only one turn\."):
        encoder.encode_prompt(Prompt(where="f:1", messages=TALK[1:4]))


def test_a_template_that_hides_the_answer_is_a_data_error(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template=CHATML.replace("m.content", "m.content if m.role == 'user' else ''")))
    record = Comparison(where="f:1", messages=(user("Hi"),), responses=("a", "b"), ranks=(0, 1))
    with pytest.raises(DataError, match="does not write an answer behind its prompt"):
        encoder.encode_comparison(record)


def test_a_long_text_is_judged_by_our_limit_and_not_by_the_tokenizers(make_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    encoder = encoder_of(make_tokenizer(model_max_length=4))
    encoder.encode_demonstration(Demonstration(where="f:1", messages=TALK))
    assert not caplog.messages


def test_ids_are_used_as_they_are(make_tokenizer):
    encoder = encoder_of(make_tokenizer(bos=True))
    row = encoder.encode_demonstration(Demonstration(where="f:1", prompt_ids=(7, 8), response_ids=(9,)))
    assert row.tokens == [7, 8, 9, EOS]
    assert row.trained == [False, False, True, True]


def test_a_model_without_tokenizer_takes_ids_only(tmp_path):
    encoder = encoder_of(tmp_path, vocab_size=10)
    assert encoder.tokenizer is None
    assert encoder.encode_prompt(Prompt(where="f:1", prompt_ids=(3,))) == [3]
    compared = Comparison(where="f:1", prompt_ids=(3,), response_ids=((4, EOS), (5, EOS, 6)), ranks=(0, 1))
    assert encoder.encode_comparison(compared) == ([3], [[4, EOS], [5, EOS]])
    assert encoder.decode([3]) == ""
    problem = "f:1: prompt: the model has no tokenizer, so it reads no text; give prompt_ids"
    with pytest.raises(DataError, match=problem):
        encoder.encode_prompt(Prompt(where="f:1", prompt="x"))
    with pytest.raises(DataError, match="f:1: messages: the model has no tokenizer; give prompt_ids"):
        encoder.encode_prompt(Prompt(where="f:1", messages=(user("x"),)))


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (Demonstration(where="f:1", prompt_ids=(10,), response_ids=(1,)), "prompt_ids: token id 10"),
        (Demonstration(where="f:1", prompt_ids=(1,), response_ids=(2, 99)), "response_ids: token id 99"),
    ],
)
def test_an_id_outside_the_vocabulary_is_a_data_error(tmp_path, record, name):
    with pytest.raises(DataError) as raised:
        encoder_of(tmp_path, vocab_size=10).encode_demonstration(record)
    assert str(raised.value) == (
        f"f:1: {name} is outside the model's vocabulary of 10; make the ids with the model's own tokenizer."
    )


def test_a_prompt_longer_than_the_context_is_a_data_error(tmp_path):
    encoder = encoder_of(tmp_path, max_length=8, reserve=3)
    assert encoder.encode_prompt(Prompt(where="f:1", prompt_ids=(4,) * 5))
    with pytest.raises(DataError) as raised:
        encoder.encode_prompt(Prompt(where="f:2", prompt_ids=(4,) * 6))
    assert str(raised.value) == (
        "f:2: prompt: 6 tokens where there is room for 5, and a row has 8 with 3 at least for the response; shorten "
        "it, raise --max-length if the model allows, --truncate left, or --skip-bad."
    )


LONG = Demonstration(where="f:1", prompt_ids=(4, 5), response_ids=(6, 7, 8))
RANKED = Comparison(where="f:1", prompt_ids=(4, 5), response_ids=((6, 7, 8), (6,), (6, 7, 9), (7,)), ranks=(0, 1, 2, 1))


def test_what_does_not_fit_whole_is_dropped_an_answer_at_a_time(tmp_path):
    encoder = encoder_of(tmp_path, max_length=5)
    with pytest.raises(TooLongError, match="f:1: response: 6 tokens with the prompt, and a row has 5"):
        encoder.encode_demonstration(LONG)
    assert encoder.encode_comparison(RANKED) == ([4, 5], [[], [6, EOS], [], [7, EOS]])
    assert encoder.notes == {
        "answers left out of their rankings, because they do not fit --max-length": 2,
        "rankings left out: no answer in them is better than another": 1,
    }
    with pytest.raises(TooLongError, match="f:1: responses: a prompt of 2 tokens, answers of up to 4"):
        encoder_of(tmp_path, max_length=3).encode_comparison(RANKED)


@pytest.mark.parametrize(("truncate", "tokens"), [("drop", None), ("right", [4, 5, 6, 7]), ("left", [6, 7, 8, EOS])])
def test_a_judged_answer_that_does_not_fit_follows_truncate(tmp_path, truncate, tokens):
    encoder = encoder_of(tmp_path, max_length=4 if truncate == "right" else 5, truncate=truncate)
    vote = Vote(where="f:1", prompt_ids=(4, 5), response_ids=(6, 7, 8), label=True)
    if tokens is None:
        with pytest.raises(TooLongError, match="f:1: response: 6 tokens with the prompt, and a row has 5"):
            encoder.encode_vote(vote)
    else:
        row = encoder.encode_vote(vote)
        assert row.tokens[-4:] == tokens
        assert row.trained == [False] * (len(row.tokens) - sum(row.trained)) + [True] * (
            2 if truncate == "right" else 4
        )
        assert sum(encoder.notes.values()) == 1


def test_a_response_that_is_cut_right_has_no_eos_and_is_counted(tmp_path):
    encoder = encoder_of(tmp_path, max_length=4, truncate="right")
    row = encoder.encode_demonstration(LONG)
    assert (row.tokens, row.trained) == ([4, 5, 6, 7], [False, False, True, True])
    assert encoder.encode_comparison(RANKED) == ([4, 5], [[6, 7], [6, EOS], [6, 7], [7, EOS]])
    assert encoder.notes == {CUT: 3, "pairs of answers not compared: their tokens are the same": 1}
    with pytest.raises(TooLongError):
        encoder.encode_demonstration(Demonstration(where="f:1", prompt_ids=(4,) * 4, response_ids=(6,)))


@pytest.mark.parametrize("apply_chat_template", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_no_end_follows_an_answer_that_was_cut(make_tokenizer, way, apply_chat_template):
    flags = DataFlags(data=(), apply_chat_template=apply_chat_template)
    encoder = encoder_of(make_tokenizer(**WAYS[way]), flags=flags)
    answer: dict[str, Any] = {"where": "f:1", "prompt": "Who?", "response": "Nobody"}
    for cut in (Demonstration(**answer, cut=(0,)), Vote(**answer, label=True, cut=(0,))):
        encode = encoder.encode_demonstration if isinstance(cut, Demonstration) else encoder.encode_vote
        open_row, row = encode(cut), encode(dataclasses.replace(cut, cut=()))
        assert row.tokens[-1] in encoder.eos_ids
        assert open_row.tokens == row.tokens[: len(open_row.tokens)]
        assert spans(encoder, open_row.tokens, open_row.trained)[0].strip() == "Nobody"
    asked: dict[str, Any] = {"where": "f:1", "prompt": "Who?", "ranks": (0, 1)}
    _, (whole, part) = encoder.encode_comparison(Comparison(**asked, responses=("Somebody", "Nobody"), cut=(1,)))
    assert (whole[-1] in encoder.eos_ids, part) == (True, open_row.tokens[-len(part) :])
    ids = Comparison(where="f:1", prompt_ids=(4,), response_ids=((5, 6), (7,)), ranks=(0, 1), cut=(0,))
    assert encoder.encode_comparison(ids)[1] == [[5, 6], [7, encoder.eos_ids[0]]]


def test_a_prompt_that_is_cut_left_keeps_its_bos_and_the_whole_answer(make_tokenizer):
    encoder = encoder_of(make_tokenizer(bos=True), max_length=6, truncate="left")
    assert encoder.limits.bos == [BOS]
    prompt, response = (BOS, 9, 8, 7, 6), (5, 4)
    row = encoder.encode_demonstration(Demonstration(where="f:1", prompt_ids=prompt, response_ids=response))
    assert (row.tokens, row.trained) == ([BOS, 7, 6, 5, 4, EOS], [False] * 3 + [True] * 3)
    ranked = Comparison(where="f:1", prompt_ids=prompt, response_ids=(response, (5,), (5,) * 9), ranks=(0, 1, 2))
    assert encoder.encode_comparison(ranked) == ([BOS, 7, 6], [[5, 4, EOS], [5, EOS], []])
    assert encoder.encode_prompt(Prompt(where="f:1", prompt_ids=(BOS, *range(4, 14)))) == [BOS, 10, 11, 12, 13]
    assert encoder.notes == {
        "rows cut at their beginning to fit --max-length": 1, "prompts cut at their beginning to fit --max-length": 2,
        "answers left out of their rankings, because they do not fit --max-length": 1,
    }  # fmt: skip
    with pytest.raises(TooLongError, match="6 tokens without any prompt"):
        encoder.encode_demonstration(Demonstration(where="f:1", prompt_ids=(BOS, 9), response_ids=(5,) * 5))


@pytest.mark.parametrize(("truncate", "shown", "learned"), [
    ("drop", "Be kind.\n\nHuman: Hi\n\nAssistant: Hello<eos>", [" Hello<eos>"]),
    ("left", "<eos>\n\nHuman: Bye\n\nAssistant: See you<eos>", [" See you<eos>"]),
    ("right", "Be kind.\n\nHuman: Hi\n\nAssistant: Hello<eos>\n\nHuman: Bye\n\nAssistant: See",
     [" Hello<eos>", " See"]),
])  # fmt: skip
def test_a_long_dialogue_is_learned_from_answers_with_their_beginning(make_tokenizer, truncate, shown, learned):
    directory = make_tokenizer()
    record = Demonstration(where="f:1", messages=TALK)
    whole = encoder_of(directory).encode_demonstration(record)
    length = len(whole.tokens) - {"drop": 1, "left": whole.trained.index(True) + 2, "right": 2}[truncate]
    encoder = encoder_of(directory, max_length=length, truncate=truncate)
    row = encoder.encode_demonstration(record)
    assert len(row.tokens) <= length
    assert spans(encoder, row.tokens, row.trained) == learned
    assert show(encoder, row.tokens) == shown
    assert list(encoder.notes.values()) == [1]


def test_a_dialogue_whose_first_answer_is_beyond_the_limit_is_a_data_error(make_tokenizer):
    encoder = encoder_of(make_tokenizer(), max_length=5)
    with pytest.raises(TooLongError, match=r"f:1: response: 23 tokens with the prompt, and a row has 5"):
        encoder.encode_demonstration(Demonstration(where="f:1", messages=TALK))


def test_an_empty_prompt_without_any_bos_is_a_data_error(make_tokenizer):
    encoder = encoder_of(make_tokenizer())
    encoder.tokenizer.bos_token = None
    with pytest.raises(DataError, match=r"f:1: prompt: no tokens in it, and this tokenizer adds no BOS"):
        encoder.encode_prompt(Prompt(where="f:1", prompt=""))


def test_half_a_character_is_a_data_error(make_tokenizer):
    with pytest.raises(DataError, match="--prompt:1: text: character 2 is half a character"):
        encoder_of(make_tokenizer()).encode_prompt(Prompt(where="--prompt:1", prompt="a\udcff"))


def test_a_tokenizer_that_does_not_fit_the_model_is_a_user_error(make_tokenizer):
    directory = make_tokenizer()
    check_fit(load_tokenizer(str(directory)), 320, "model")
    with pytest.raises(UserError, match=r"the tokenizer writes ids up to \d+ and the model has 100 embeddings; they"):
        encoder_of(directory, vocab_size=100)


def test_a_directory_without_tokenizer_files_has_none(tmp_path):
    assert load_tokenizer(str(tmp_path)) is None


def test_a_damaged_tokenizer_is_a_user_error_in_one_line(make_tokenizer):
    directory = make_tokenizer()
    (directory / "tokenizer.json").write_text('{"version": "1.0", "truncat')
    with pytest.raises(UserError) as raised:
        load_tokenizer(str(directory))
    assert "its tokenizer cannot be read" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_model_that_names_no_eos_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encoder_of(tmp_path, eos_ids=[])


def test_the_tokenizers_eos_comes_before_the_models(make_tokenizer):
    encoder = encoder_of(make_tokenizer(eos_token="<|im_end|>"), eos_ids=[EOS, IM_END])
    assert encoder.eos_ids == (IM_END, EOS)


def test_two_encoders_have_the_same_tokenizer_only_with_the_same_template(make_tokenizer):
    first, second = encoder_of(make_tokenizer("one")), encoder_of(make_tokenizer("two"))
    chatml = encoder_of(make_tokenizer("chatml", template=CHATML))
    assert first.same_tokenizer(second)
    assert not first.same_tokenizer(chatml)


# --- which token ends an answer, templates of all kinds (issue 19: 10, 18, 19) --------------------------------------

QWEN_BASE = {"template": CHATML, "eos_token": "<eos>"}
"""ChatML where config and tokenizer name another end than the template's: Qwen's base models."""


def demonstration(*messages: Message) -> Demonstration:
    return Demonstration(where="f:1", messages=messages)


def trained(encoder: Encoder, *messages: Message) -> list[str]:
    row = encoder.encode_demonstration(demonstration(*messages))
    return spans(encoder, row.tokens, row.trained)


def test_a_turn_ends_as_the_template_ends_it_and_with_nothing_else(make_tokenizer):
    encoder = encoder_of(make_tokenizer(**QWEN_BASE))
    row = encoder.encode_demonstration(demonstration(*TALK))
    assert spans(encoder, row.tokens, row.trained) == ["Hello<|im_end|>", "See you<|im_end|>"]
    whole = encoder.tokenizer.apply_chat_template(list(TALK), tokenize=True, return_dict=False)
    assert row.tokens == whole[: len(row.tokens)]  # transformers' own ids
    assert encoder.tokenizer.decode(whole[len(row.tokens) :]) == "\n"
    assert set(encoder.eos_ids) == {EOS, IM_END}
    (line,) = encoder.take_notes()
    assert "an answer ends at <eos> (tokenizer, config) or <|im_end|> (chat template); a chat turn is taught to" in line


def test_a_plain_response_ends_with_the_tokenizers_eos(make_tokenizer):
    encoder = encoder_of(make_tokenizer(**QWEN_BASE))
    row = encoder.encode_demonstration(Demonstration(where="f:1", prompt="Hello?", response=" Yes"))
    assert row.tokens[-1] == EOS


def test_all_ids_of_the_configs_end_an_answer_but_for_those_of_ordinary_text(make_tokenizer):
    encoder = encoder_of(make_tokenizer(**QWEN_BASE), eos_ids=[IM_START, 40])
    assert set(encoder.eos_ids) == {EOS, IM_END, IM_START}
    assert "is an ordinary token of this tokenizer, and ends nothing" in encoder.take_notes()[0]


def test_a_model_without_any_end_answers_to_its_limit_and_trains_with_eos(make_tokenizer):
    directory = make_tokenizer(eos_token=None)
    with pytest.raises(UserError, match=r"names no end-of-sequence token.*--eos TOKEN"):
        encoder_of(directory, eos_ids=[])
    encoder = encoder_of(directory, eos_ids=[], task="answer")
    assert encoder.eos_ids == ()
    assert "names no token that ends an answer, so all go on to their limit" in encoder.take_notes()[0]
    named = encoder_of(directory, eos_ids=[], flags=DataFlags(data=(), eos="<|im_end|>"))
    row = named.encode_demonstration(Demonstration(where="f:1", prompt="Hello?", response=" Yes"))
    assert row.tokens[-1] == IM_END
    with pytest.raises(UserError, match="--eos <end>: is no token of the model's tokenizer; its special tokens: "):
        encoder_of(directory, eos_ids=[], flags=DataFlags(data=(), eos="<end>"))


NO_BRANCH = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_template_without_a_generation_prompt_gets_one(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template=NO_BRANCH, eos_token="<|im_end|>"), eos_ids=[IM_END])
    usual = encoder_of(make_tokenizer("usual", template=CHATML, eos_token="<|im_end|>"), eos_ids=[IM_END])
    assert encoder.encode_demonstration(demonstration(*TALK)) == usual.encode_demonstration(demonstration(*TALK))
    prompt = Prompt(where="f:1", messages=TALK[:2])
    assert encoder.encode_prompt(prompt) == usual.encode_prompt(prompt)
    assert "has no branch for add_generation_prompt; '<|im_start|>assistant\\n'" in encoder.take_notes()[0]


R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)


def test_an_answer_stands_behind_what_the_template_opens_it_with(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template=R1, eos_token="<|im_end|>"), eos_ids=[IM_END])
    row = encoder.encode_demonstration(demonstration(*TALK[1:]))
    assert show(encoder, row.tokens) == "Hi<|im_start|>Hello<|im_end|>Bye<|im_start|><think>\nSee you<|im_end|>"
    assert spans(encoder, row.tokens, row.trained) == ["See you<|im_end|>"]
    assert any("do not repeat what the template opens an answer with" in line for line in encoder.take_notes())
    compared = Comparison(where="f:1", messages=TALK[1:2], responses=("Hello", "x"), ranks=(0, 1))
    prompt, (response, _) = encoder.encode_comparison(compared)
    assert prompt == encoder.encode_prompt(Prompt(where="f:1", messages=TALK[1:2]))
    assert show(encoder, response) == "Hello<|im_end|>"


def test_only_the_last_answer_is_learned_where_that_is_asked_for(make_tokenizer):
    directory = make_tokenizer(template=CHATML, eos_token="<|im_end|>")
    encoder, last = encoder_of(directory), encoder_of(directory, flags=DataFlags(data=(), train_on="last"))
    whole, row = (each.encode_demonstration(demonstration(*TALK)) for each in (encoder, last))
    assert row.tokens == whole.tokens
    assert spans(last, row.tokens, row.trained) == ["See you<|im_end|>"]


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if loop.last %}Hmm. {% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_may_mark_what_is_learned(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template=MARKED, eos_token="<|im_end|>"))
    row = encoder.encode_demonstration(demonstration(*TALK))
    theirs = encoder.tokenizer.apply_chat_template(list(TALK), return_dict=True, return_assistant_tokens_mask=True)
    assert row.tokens == theirs["input_ids"][: len(row.tokens)]
    marked = [i for i, mark in enumerate(theirs["assistant_masks"]) if mark]
    ends = [i for i, token in enumerate(row.tokens) if token == IM_END and i - 1 in marked]
    assert [i for i, on in enumerate(row.trained) if on] == sorted(marked + ends)  # the end is learned as well
    assert spans(encoder, row.tokens, row.trained) == ["Hello<|im_end|>", "See you<|im_end|>"]


def test_a_conversation_that_the_assistant_opens(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template=CHATML, eos_token="<|im_end|>"), eos_ids=[IM_END])
    assert trained(encoder, assistant("Welcome"), user("Hi"), assistant("Hello")) == ["Hello<|im_end|>"]
    assert encoder.take_notes() == [
        "1 conversations begin with the assistant; that turn answers nothing and is not learned"
    ]
    strict = "{{ raise_exception('Roles must alternate') if messages[0].role == 'assistant' }}" + CHATML
    encoder = encoder_of(make_tokenizer("strict", template=strict))
    with pytest.raises(DataError, match="Roles must alternate; it begins with the assistant: put a user's turn in fr"):
        trained(encoder, assistant("Welcome"), user("Hi"), assistant("Hello"))


@pytest.mark.parametrize("way", ["refuses", "drops"])
def test_without_a_system_role_the_message_goes_to_the_user(make_tokenizer, way):
    loop = "{% for m in messages %}{% if m.role == 'system' %}{}{% else %}" + CHATML.partition("%}")[2]
    template = loop.replace("{% endfor %}", "{% endif %}{% endfor %}").replace(
        "{}", "{{ raise_exception('no system') }}" if way == "refuses" else ""
    )
    encoder = encoder_of(make_tokenizer(template=template, eos_token="<|im_end|>"), eos_ids=[IM_END])
    prompt = encoder.encode_prompt(Prompt(where="f:1", messages=TALK[:2]))
    assert show(encoder, prompt) == "<|im_start|>user\nBe kind.\n\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert encoder.take_notes() == [
        "1 system messages stand at the start of the user's first turn: the template has no system role"
    ]


def test_a_quoted_token_is_text_and_neither_ends_nor_opens_a_turn(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template=CHATML, eos_token="<|im_end|>"), eos_ids=[IM_END])
    quoting = (
        user("What is <|im_start|>?"),
        assistant("It opens; <|im_end|> ends. So"),
        user("<bos>?"),
        assistant("X"),
    )
    row = encoder.encode_demonstration(demonstration(*quoting))
    assert [row.tokens.count(token) for token in (IM_START, IM_END, BOS)] == [4, 4, 0]
    assert show(encoder, row.tokens) == (
        "<|im_start|>user\nWhat is <|im_start|>?<|im_end|>\n<|im_start|>assistant\nIt opens; <|im_end|> ends. So"
        "<|im_end|>\n<|im_start|>user\n<bos>?<|im_end|>\n<|im_start|>assistant\nX<|im_end|>"
    )
    assert spans(encoder, row.tokens, row.trained) == ["It opens; <|im_end|> ends. So<|im_end|>", "X<|im_end|>"]
    assert encoder.take_notes()[0].startswith("3 words in texts spell ends or tokens of the chat template")
    plain = encoder.encode_demonstration(Demonstration(where="f:1", prompt="a", response="b<|im_end|>c"))
    assert plain.tokens.count(IM_END) == 1
    assert show(encoder, plain.tokens) == "ab<|im_end|>c<|im_end|>"
    assert encoder.decode(plain.tokens) == "ab<|im_end|>c"


def test_plain_prompts_of_a_chat_model_are_counted_or_become_turns(make_tokenizer):
    directory = make_tokenizer(template=CHATML, eos_token="<|im_end|>")
    encoder = encoder_of(directory, eos_ids=[IM_END])
    encoder.encode_prompt(Prompt(where="f:1", prompt="Hi"))
    encoder.encode_prompt(Prompt(where="f:2", prompt="<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"))
    assert encoder.take_notes() == [
        "1 plain prompts are read without the model's chat template; --apply-chat-template makes each a user's turn"
    ]
    flags = DataFlags(data=(), apply_chat_template=True, system="Be kind.")
    turned = encoder_of(directory, flags=flags)
    vote = turned.encode_vote(Vote(where="f:1", prompt="Hi", response="Hello", label=False))
    assert vote == turned.encode_demonstration(Demonstration(where="f:1", messages=TALK[:3]))
    for record, messages in (
        (Demonstration(where="f:1", prompt="Hi", response="Hello"), TALK[:3]),
        (Prompt(where="f:1", prompt="Hi"), TALK[:2]),
        (Comparison(where="f:1", prompt="Hi", responses=("Hello", "x"), ranks=(0, 1)), TALK[:2]),
    ):
        as_messages = dataclasses.replace(record, prompt=None, messages=messages)
        if isinstance(record, Demonstration):
            as_messages = dataclasses.replace(as_messages, response=None)
        for method in ("encode_demonstration", "encode_comparison", "encode_prompt"):
            if method == f"encode_{type(record).__name__.lower()}":
                assert getattr(turned, method)(record) == getattr(encoder, method)(as_messages)


THOUGHT = (
    CHATML + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}None.{% endif %}"
)


def test_template_arguments_reach_the_template_and_unknown_ones_are_refused(make_tokenizer):
    directory = make_tokenizer(template=THOUGHT)
    flags = DataFlags(data=(), template_args=("enable_thinking=false",))
    prompt = Prompt(where="f:1", messages=TALK[:2])
    text = show(encoder_of(directory), encoder_of(directory).encode_prompt(prompt))
    encoder = encoder_of(directory, flags=flags)
    assert show(encoder, encoder.encode_prompt(prompt)) == text + "None."
    with pytest.raises(UserError, match="--template-args think: the chat template reads no such argument"):
        encoder_of(directory, flags=DataFlags(data=(), template_args=("think=false",)))
    with pytest.raises(UserError, match="--template-args think: give pairs key=value"):
        encoder_of(directory, flags=DataFlags(data=(), template_args=("think",)))


def test_the_date_of_a_template_is_the_runs(make_tokenizer):
    directory = make_tokenizer(template="Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML)
    encoder = encoder_of(directory, flags=DataFlags(data=(), date="2024-02-29"))
    prompt = encoder.encode_prompt(Prompt(where="f:1", messages=TALK[:2]))
    assert show(encoder, prompt).startswith("Today is 29 Feb 2024.\n<|im_start|>system")


def test_named_templates_are_read_by_default(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template={"default": CHATML, "tool_use": "tools"}, eos_token="<|im_end|>"))
    assert trained(encoder, *TALK) == ["Hello<|im_end|>", "See you<|im_end|>"]
    with pytest.raises(UserError, match="chat templates named tool_use and none named default"):
        encoder_of(make_tokenizer("other", template={"tool_use": "tools"}))


def test_special_tokens_that_are_text_stay_in_the_text(make_tokenizer):
    encoder = encoder_of(make_tokenizer(template=CHATML, eos_token="<|im_end|>", extra_special_tokens=["<think>"]), 200,
                         vocab_size=330)  # fmt: skip
    ids = encoder.encode_demonstration(demonstration(user("Hi"), assistant("<think>Hm"))).tokens
    assert len(encoder.tokenizer("<think>").input_ids) == 1
    assert encoder.decode(ids).endswith("<think>Hm")


# --- tokenizers of other kinds (21) -------------------------------------------------------------------------------


def byte_tokenizer(directory: Path) -> Path:
    """A tokenizer written in Python, without offsets and without a backend: ByT5's."""
    tokenizer = ByT5Tokenizer(extra_ids=2)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


def test_a_tokenizer_written_in_python_works(tmp_path):
    encoder = encoder_of(byte_tokenizer(tmp_path), 400, eos_ids=[1], vocab_size=300)
    row = encoder.encode_demonstration(demonstration(*TALK))
    text = encoder.tokenizer.apply_chat_template(list(TALK), tokenize=False)
    assert row.tokens == encoder.tokenizer(text, add_special_tokens=False).input_ids
    assert spans(encoder, row.tokens, row.trained) == ["Hello</s>", "See you</s>"]
    assert encoder.decode(row.tokens).endswith("assistant: See you")
    assert "no branch for add_generation_prompt; 'assistant: '" in encoder.take_notes()[0]
