"""A piece of a text has the ids that the whole text gives it; a word that spells a token stays a word."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from penstock.data.chat import Encoder
from penstock.data.pieces import Pieces
from penstock.data.records import Demonstration
from penstock.models.tokenizer_files import load_tokenizer
from tests.conftest import TEXT

TALK = (
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
)  # fmt: skip


def encoder_of(directory: Path) -> Encoder:
    sizes: dict[str, Any] = {"eos_ids": [2], "vocab_size": 320, "max_length": 200}
    return Encoder.for_model(str(directory), **sizes)


def sentencepiece(directory: Path, template: str) -> Path:
    """A tokenizer as Llama 2's and Mistral 7B's: a space in front of every text, then spaces as U+2581."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # words do not merge
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = ["\u2581", "\n", *map(chr, range(33, 127))]
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("template", [LLAMA2, ZEPHYR], ids=["Llama 2", "Zephyr"])
def test_the_ids_of_a_conversation_are_those_of_its_whole_text(tmp_path, template):
    encoder = encoder_of(sentencepiece(tmp_path, template))
    row = encoder.encode_demonstration(Demonstration(where="f:1", messages=TALK))
    text = encoder.tokenizer.apply_chat_template(list(TALK), tokenize=False)
    whole = encoder.tokenizer(text, add_special_tokens=False).input_ids
    assert row.tokens == encoder.limits.bos * (whole[0] != 1) + whole[: len(whole) - whole[::-1].index(2)]
    answer = [token for token, on in zip(row.tokens, row.trained, strict=True) if on]
    assert "".join(encoder.tokenizer.convert_ids_to_tokens(answer)).count("\u2581\u2581") == 0
    plain = encoder.encode_demonstration(Demonstration(where="f:1", prompt="Hello there,", response=" how are you?"))
    assert plain.tokens == [*encoder.tokenizer("Hello there, how are you?").input_ids, 2]


def test_a_piece_whose_first_token_would_reach_back_stands_alone_without_a_space(tmp_path):
    tokenizer = load_tokenizer(str(sentencepiece(tmp_path, ZEPHYR)))
    pieces = Pieces(tokenizer, [2])
    assert tokenizer.convert_ids_to_tokens(pieces.ids("Hello", behind="so "))[0] != "\u2581"
    assert "".join(tokenizer.convert_ids_to_tokens(pieces.ids("Hello", behind="so "))) == "Hello"
    assert "".join(tokenizer.convert_ids_to_tokens(pieces.ids("Hello"))) == "\u2581Hello"


def test_a_word_that_spells_a_token_is_a_token_only_where_it_is_not_quoted(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer()))
    pieces = Pieces(tokenizer, [1, 3])
    assert pieces.words == {"<eos>": 1, "<|im_end|>": 3}
    assert pieces.spells("a <|im_end|> b <bos> <eos>") == 2
    text = pieces.quote("a<|im_end|>b") + "<|im_end|>" + pieces.quote("<eos>") + "<eos>"
    ids = pieces.ids(text)
    assert [token for token in ids if token in (1, 3)] == [3, 1]
    assert tokenizer.decode(ids) == "a<|im_end|>b<|im_end|><eos><eos>"
    assert pieces.is_quoted(text)
    assert not pieces.is_quoted("a<|im_end|>b")
