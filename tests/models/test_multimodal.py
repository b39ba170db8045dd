"""Checkpoints with vision or audio parts: the text model is read, counted, trained and saved; oracle: transformers."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from penstock.errors import UserError
from penstock.models import pretrained
from penstock.models.families import multimodal as families
from penstock.models.formats import gguf_file, gguf_writer
from penstock.models.lora import adapters_of
from penstock.models.lora_targets import LoraSpec
from penstock.models.surgery import merge_adapters
from penstock.planner.from_flags import config_of
from tests.conftest import cli, last_model
from tests.models.test_families import GEMMA3, LLAMA, NO_SPECIAL
from tests.test_broken_inputs import train

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


def saved(kind: str, path: Path, **changes: Any) -> tuple[Any, Path]:
    """A tiny model with every weight random, and its directory."""
    text, vision, rest = CASES[kind]
    config = transformers.AutoConfig.for_model(kind, text_config=text | changes, vision_config=vision, **rest)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(5)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.2)
    model.save_pretrained(path / "whole")
    return model, path / "whole"


@pytest.fixture(params=CASES)
def multimodal(request, tmp_path):
    return saved(request.param, tmp_path)


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


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapted(directory: Path, targets: Any) -> Any:
    """Ours with adapters whose B is random too."""
    ours = pretrained.load(directory)[0]
    pretrained.adapt(ours, LoraSpec(2, 6.0, targets=targets, ranks=((r"layers\.1\..*q_proj", 3),)), base=str(directory))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters_of(ours):
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator) * 0.3)
    return ours


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "lm_head"), ("embed_tokens", "down_proj")])
def test_peft_adds_to_the_whole_model_what_its_text_model_learned(multimodal, tmp_path, targets):
    theirs, directory = multimodal
    ours = adapted(directory, targets)
    pretrained.save(ours, tmp_path / "adapter")
    with torch.no_grad():
        expected = ours.logits(ours(TOKENS))
        plain = theirs(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
        whole = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        got = whole(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    assert (got - expected).abs().max() <= 1e-4
    assert (plain - expected).abs().max() > 1e-2
    names = [name for name, _ in whole.named_parameters() if "lora_" in name]
    assert len(names) == 2 * len(adapters_of(ours))  # none on the parts that see
    again = pretrained.load(tmp_path / "adapter")[0]  # the base that it names
    with torch.no_grad():
        assert torch.equal(again.logits(again(TOKENS)), expected)
    merge_adapters(again)
    pretrained.save(again, tmp_path / "merged")
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (alone(TOKENS).logits - got).abs().max() <= 1e-4


def test_an_adapter_that_peft_trained_on_the_whole_model_is_read(multimodal, tmp_path):
    theirs, directory = multimodal
    inside = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    whole = peft.get_peft_model(theirs, peft.LoraConfig(r=3, target_modules=inside, init_lora_weights=False)).eval()
    whole.save_pretrained(tmp_path / "adapter")
    ours = pretrained.load(directory, adapter=tmp_path / "adapter")[0]
    with torch.no_grad():
        expected = whole(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
        assert (ours.logits(ours(TOKENS)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", families.KINDS)
def test_the_names_in_a_whole_model_are_those_that_its_text_model_has_there(kind):
    """Of every kind, by transformers' own names of weights in its newest files."""
    name = "model.layers.0.self_attn.q_proj.weight"
    there = families.whole_name(kind, name)
    assert families.text_name(there) == name
    config = transformers.CONFIG_MAPPING[kind]()
    with torch.device("meta"):
        small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        config.text_config.update(small | {"num_key_value_heads": 1, "layer_types": ["full_attention"]})
        auto = transformers.models.auto.modeling_auto
        names = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
        model = getattr(transformers, names[kind])._from_config(config)
    assert there in dict(model.named_parameters())
    assert families.whole_name(kind, "lm_head") in dict(model.named_modules())


def test_an_adapter_of_a_whole_models_text_model_becomes_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = saved("llava", tmp_path)[1]
    ours = adapted(directory, ("q_proj", "down_proj", "lm_head"))
    gguf_writer.write_adapter(ours, tmp_path / "a.gguf", name="a")
    names = {name.rpartition(".")[0] for name in gguf_file.GGUFFile(tmp_path / "a.gguf").tensors}
    assert {"blk.1.attn_q.weight", "blk.0.ffn_down.weight", "output.weight"} <= names


@pytest.mark.parametrize("text", [{"model_type": "mistral"}, {"model_type": "ministral3", "rope_parameters": {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0}}])  # fmt: skip
def test_a_mistral3_checkpoint_is_trained_and_transformers_loads_what_was_saved(text, tmp_path):
    """All weights, as a text model; an adapter, on the whole one and merged."""
    theirs, directory = saved("mistral3", tmp_path, **text)
    for name, flags in {"all": (), "lora": ("--lora", 2, "--lr", 0.01)}.items():
        (tmp_path / name).mkdir()
        assert cli(*train(tmp_path / name, directory, None, "--max-length", 60, "--eos", 2, *flags)) == 0
    ours = pretrained.load(last_model(tmp_path / "all" / "run"))[0]
    alone = transformers.AutoModelForCausalLM.from_pretrained(last_model(tmp_path / "all" / "run"), dtype="float32")
    assert alone.config.model_type == text["model_type"]
    adapter = last_model(tmp_path / "lora" / "run")
    assert cli("export", tmp_path / "lora" / "run", "--out", tmp_path / "merged", "--merge") == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    with torch.no_grad():
        before = theirs(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
        assert (alone(TOKENS).logits - ours.logits(ours(TOKENS))).abs().max() <= 1e-4
        whole = peft.PeftModel.from_pretrained(theirs, adapter).eval()
        got = whole(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
        assert (got - before).abs().max() > 1e-3
        assert (merged(TOKENS).logits - got).abs().max() <= 1e-4


def test_a_multimodal_config_without_its_text_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(UserError, match="gemma3 needs text_config"):
        pretrained.load(tmp_path)
