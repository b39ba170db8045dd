"""Which ids end an answer, as the files beside a model say it and as we write it."""

import json

from transformers import GenerationConfig

from penstock.models import pretrained
from penstock.models.tokenizer_files import load_tokenizer, read_ends, write_ends


def test_both_configs_name_ends(tiny_model, tmp_path):
    directory = tmp_path / "model"
    tiny_model("model")
    assert read_ends(directory) == (2,)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2], "temperature": 0.5}))
    assert read_ends(directory) == (2, 5)
    assert pretrained.load(directory)[0].config.eos_ids == (2, 5)
    config = json.loads((directory / "config.json").read_text())
    config |= {"eos_token_id": None, "text_config": {"eos_token_id": [7, 2]}}
    (directory / "config.json").write_text(json.dumps(config))
    assert read_ends(directory) == (7, 2, 5)


def test_what_is_written_is_what_transformers_reads(tiny_model, tmp_path):
    directory = tmp_path / "model"
    tiny_model("model")
    write_ends(directory, [5, 2])
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == [5, 2]
    generation = GenerationConfig.from_pretrained(directory)
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == ([5, 2], 1, 0)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "do_sample": True, "top_p": 0.5}))
    write_ends(directory, [5])
    generation = GenerationConfig.from_pretrained(directory)
    assert (generation.eos_token_id, generation.top_p) == (5, 0.5)


def test_a_tokenizer_without_an_end_gets_one_and_others_keep_theirs(make_tokenizer):
    for eos_token, kept in ((None, "<|im_end|>"), ("<eos>", "<eos>")):
        directory = make_tokenizer(eos_token=eos_token)
        write_ends(directory, [3], load_tokenizer(str(directory)))
        assert load_tokenizer(str(directory)).eos_token == kept
