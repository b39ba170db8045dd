"""Tokenizers that become a GGUF file's, and come back: the same ids."""

import pytest
import transformers

from benchmarks.gguf import ROTARY, byte_level, decoder_of, sentencepiece
from penstock.models.formats import gguf_writer
from penstock.models.formats.gguf_tokenizer import ELSEWHERE, HARD, RULES
from penstock.models.tokenizer_files import load_tokenizer

TEXTS = [HARD, "a", "Hello there", " two  spaces", "1234567", "<s>x</s> y", "tail \n", "\n\nx\ty"]


@pytest.mark.parametrize("name", [*RULES, "a space in front", "no space in front"])
def test_a_tokenizer_comes_back_with_the_same_ids(name, tmp_path):
    backend = byte_level(name) if name in RULES else sentencepiece(spaced=name == "a space in front")
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    decoder, path = decoder_of("llama", ROTARY | {"vocab_size": len(wrapped) + 5}), tmp_path / "model.gguf"
    notes = gguf_writer.write_model(decoder, path, "f16", name=name, tokenizer=wrapped, ends=(2,))
    assert any("cuts some words elsewhere" in note for note in notes) == (name in ELSEWHERE)
    again = load_tokenizer(str(path))
    for text in TEXTS:
        assert again(text).input_ids == wrapped(text).input_ids
        if name in RULES:  # the others were made without a decoder
            assert again.decode(again(text).input_ids) == wrapped.decode(wrapped(text).input_ids)
    assert (again.bos_token, again.eos_token) == ("<s>", "</s>")
