"""What is learned of conversations with the chat templates of Gemma 3, Granite 3 and SmolLM3, as they are published.

The oracle is a plain reading of the whole conversation as transformers renders it: an answer is what stands between the
words that open an assistant's turn and the end of turn; and, for Gemma 3, TRL's edition that marks answers itself.
Where the templates are from: templates/README.md.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from penstock.data.records import Demonstration, Prompt
from tests.data.test_chat import assistant, encoder_of, spans, user

TEMPLATES = Path(__file__).parent / "templates"
MODELS: dict[str, dict[str, Any]] = {
    # what opens an answer and what ends it, as a human reads them; the tokenizer's special words, its EOS
    "gemma3": {"opens": "<start_of_turn>model\n", "ends": "<end_of_turn>", "special": ["<start_of_turn>"],
               "eos_token": "<eos>"},
    "granite3": {"opens": "<|start_of_role|>assistant<|end_of_role|>", "ends": "<|end_of_text|>",
                 "special": ["<|start_of_role|>", "<|end_of_role|>"], "eos_token": "<|end_of_text|>"},
    "smollm3": {"opens": "<|im_start|>assistant\n", "ends": "<|im_end|>", "special": ["<think>", "</think>"],
                "eos_token": "<|im_end|>"},
}  # fmt: skip
SYSTEM = {"role": "system", "content": "Be kind."}
THINKING = "<think>\nTwo and two.\n</think>\n\n4"
TALKS = {
    "one turn": [user("Hi"), assistant("Hello")],
    "three turns": [user("Hi"), assistant("Hello"), user("2 + 2?"), assistant("4.\n\nReally."), user("Bye"),
                    assistant("See you")],
    "a system message": [SYSTEM, user("Hi"), assistant("Hello"), user("Bye"), assistant("See you")],
    "space around": [user(" Hi \n"), assistant("Hello  there"), user("\nBye"), assistant("See\n you")],
    "reasoning": [user("2 + 2?"), assistant(THINKING), user("3 + 3?"), assistant(THINKING.replace("4", "6"))],
}  # fmt: skip


def encoder_for(model: str, make_tokenizer: Any, template: str = "") -> Any:
    facts = MODELS[model]
    directory = make_tokenizer(
        name=template or model, template=(TEMPLATES / f"{template or model}.jinja").read_text(encoding="utf-8"),
        bos=model == "gemma3", eos_token=facts["eos_token"],
        additional_special_tokens=[*facts["special"], facts["ends"]],
    )  # fmt: skip
    return encoder_of(directory, max_length=2000, vocab_size=400)


def answers_in(text: str, opens: str, ends: str) -> list[str]:
    """By a plain reading."""
    return re.findall(f"{re.escape(opens)}(.*?{re.escape(ends)})", text, re.DOTALL)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("model", MODELS)
def test_an_answer_with_its_end_is_learned_and_nothing_else(model, talk, make_tokenizer):
    encoder, messages, facts = encoder_for(model, make_tokenizer), TALKS[talk], MODELS[model]
    (row,) = encoder.encode_rows(Demonstration(where="f:1", messages=tuple(messages)))
    whole = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    expected = answers_in(whole, facts["opens"], facts["ends"])
    assert len(expected) == sum(message["role"] == "assistant" for message in messages)
    assert spans(encoder, row.tokens, row.trained) == expected
    text = encoder.tokenizer.decode(row.tokens)
    assert whole.startswith(text)
    assert whole[len(text) :].strip() == ""  # the line end behind the last answer's end is never sampled
    assert row.tokens.count(encoder.tokenizer.bos_token_id) == (model == "gemma3")


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_is_what_stands_before_the_answer_that_is_learned(model, make_tokenizer):
    encoder, messages = encoder_for(model, make_tokenizer), TALKS["three turns"]
    row = encoder.encode_demonstration(Demonstration(where="f:1", messages=tuple(messages)))
    prompt = encoder.encode_prompt(Prompt(where="f:1", messages=tuple(messages[:-1])))
    assert row.tokens[: len(prompt)] == prompt
    assert all(row.trained[len(prompt) :])
    assert encoder.tokenizer.decode(prompt).endswith(MODELS[model]["opens"])


def test_gemma3_learns_what_trls_marked_template_marks(make_tokenizer):
    """But the line end that TRL marks behind the end of a turn, which no rollout ever reaches."""
    ours, marked = (encoder_for("gemma3", make_tokenizer, name) for name in ("gemma3", "gemma3_marked"))
    for messages in TALKS.values():
        record = Demonstration(where="f:1", messages=tuple(messages))
        row, theirs = ours.encode_demonstration(record), marked.encode_demonstration(record)
        assert theirs.tokens[: len(row.tokens)] == row.tokens
        assert [span.removesuffix("\n") for span in spans(marked, theirs.tokens, theirs.trained)] == spans(
            ours, row.tokens, row.trained
        )


def test_smollm3_without_thinking_does_not_learn_the_empty_thought_that_opens_its_answers(make_tokenizer):
    encoder = encoder_for("smollm3", make_tokenizer)
    messages = [SYSTEM | {"content": "/no_think"}, *TALKS["three turns"]]
    row = encoder.encode_demonstration(Demonstration(where="f:1", messages=tuple(messages)))
    assert spans(encoder, row.tokens, row.trained) == [
        "Hello<|im_end|>",
        "4.\n\nReally.<|im_end|>",
        "See you<|im_end|>",
    ]
    assert encoder.tokenizer.decode(row.tokens).count("<think>\n\n</think>\n") == 3


def test_granite_writes_the_day_that_it_is_given(make_tokenizer):
    directory = encoder_for("granite3", make_tokenizer).tokenizer.name_or_path
    from penstock.config import DataFlags

    flags = DataFlags(data=(), date="2024-02-29")
    encoder = encoder_of(Path(directory), max_length=2000, vocab_size=400, flags=flags)
    prompt = encoder.tokenizer.decode(encoder.encode_prompt(Prompt(where="f:1", messages=(user("Hi"),))))
    assert "Today's Date: February 29, 2024. You are Granite" in prompt
