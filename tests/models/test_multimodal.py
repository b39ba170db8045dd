"""Checkpoints with vision or audio parts: the text model is read, counted, trained and saved; oracle: transformers."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from penstock.errors import UserError
from penstock.models import pretrained
from penstock.planner.workload import config_of
from tests.models.test_families import GEMMA3, LLAMA, NO_SPECIAL

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "embed_dim": 16, "hidden_size": 48, "num_heads": 2, "out_hidden_size": 48, "intermediate_size": 16,
    "fullatt_block_indexes": [0],
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 300.0, "mrope_section": [1, 1, 2]}
TEXT = LLAMA | NO_SPECIAL
CASES = {
    "gemma3": (GEMMA3 | NO_SPECIAL | {"model_type": "gemma3_text"},
        VISION | {"model_type": "siglip_vision_model"}, {"mm_tokens_per_image": 4, "image_token_index": 7}),
    "mistral3": (TEXT | {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
        VISION | {"model_type": "pixtral", "head_dim": 8}, {"image_token_index": 7}),
    "llava": (TEXT | {"model_type": "llama"},
        VISION | {"model_type": "clip_vision_model", "projection_dim": 16}, {"image_token_index": 7}),
    "qwen2_5_vl": (TEXT | {"rope_parameters": MROPE}, QWEN_VISION, {}),
}  # fmt: skip
TOKENS = torch.randint(8, 96, (2, 14), generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.filterwarnings("ignore:.*left out")


@pytest.fixture(params=CASES)
def multimodal(request, tmp_path):
    """A tiny model with every weight random, saved."""
    text, vision, rest = CASES[request.param]
    config = transformers.AutoConfig.for_model(request.param, text_config=text, vision_config=vision, **rest)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(5)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.2)
    model.save_pretrained(tmp_path / "whole")
    return model, tmp_path / "whole"


def test_the_text_model_alone_is_read_and_saved_as_a_text_model(multimodal, tmp_path):
    theirs, directory = multimodal
    others = sum("language_model" not in name and "lm_head" not in name for name, _ in theirs.named_parameters())
    with pytest.warns(UserWarning, match=f"{others} weights of the parts that see or hear are left out"):
        ours, _ = pretrained.load(directory)
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
        assert (ours.logits(ours(TOKENS)) - expected).abs().max() <= 1e-4
    assert config_of(str(directory), "--model").num_layers == ours.config.num_layers
    pretrained.save(ours, tmp_path / "text")
    alone, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(info.values()), info
    assert "ForCausalLM" in type(alone).__name__
    with torch.no_grad():
        assert (alone(TOKENS).logits - expected).abs().max() <= 1e-5


def test_files_from_before_transformers_renamed_their_weights_are_read_alike(multimodal, tmp_path):
    _, directory = multimodal
    before = pretrained.load(directory)[0]
    expected = dict(before.named_parameters())
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] == "qwen2_5_vl":  # everything at the top
        config |= {key: value for key, value in config.pop("text_config").items() if key != "model_type"}
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        older = {"model.language_model.": "model.", "model.visual.": "visual."}
    else:
        older = {"lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model."}
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((key for key in older if name.startswith(key)), "")
        renamed[older.get(prefix, "") + name.removeprefix(prefix)] = tensor
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    after = pretrained.load(directory)[0]
    assert after.config == before.config
    again = dict(after.named_parameters())
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_multimodal_config_without_its_text_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(UserError, match="gemma3 needs text_config"):
        pretrained.load(tmp_path)
