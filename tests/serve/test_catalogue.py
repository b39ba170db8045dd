"""A served model ends its answers where the template, the tokenizer and both configs say, and reads text as trained."""

import json

from penstock.serve.catalogue import Catalogue
from penstock.serve.config import ServeConfig
from tests.conftest import CHATML


def test_a_served_model_ends_at_every_end_and_says_so(make_tokenizer, tiny_model, capsys):
    directory = make_tokenizer(template=CHATML)
    tiny_model("model", vocab_size=320, hf={"eos_token_id": 1})
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    model = Catalogue(ServeConfig(model=(str(directory),), device="cpu"))._load("model", str(directory))
    assert model.engine.eos_ids == {1, 2, 3}
    assert "an answer ends at <eos> (tokenizer, config) or <|im_end|> (chat template) or <|im_start|> (config)" in (
        capsys.readouterr().err
    )


def test_a_served_model_without_any_end_answers_to_the_limit(make_tokenizer, tiny_model, capsys):
    directory = make_tokenizer(eos_token=None, extra_special_tokens=["<think>"])
    tiny_model("model", vocab_size=330, hf={})
    model = Catalogue(ServeConfig(model=(str(directory),), device="cpu"))._load("model", str(directory))
    assert not model.engine.eos_ids
    assert "names no token that ends an answer, so all go on to their limit" in capsys.readouterr().err
    ids = model.encoder.tokenizer("<bos><think>Hm").input_ids
    assert model.decode(ids) == "<think>Hm"
