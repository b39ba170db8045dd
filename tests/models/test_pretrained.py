"""Weights in and out of directories: every layout that is around, and what is said when one is damaged."""

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from penstock.errors import UserError
from penstock.models import presets, pretrained
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families import FAMILIES

TINY = dataclasses.replace(
    presets.named("s"), vocab_size=40, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=64,
    max_length=16,
)  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a tiny GPT-2."""
    pretrained.save(Decoder(TINY, generator=torch.Generator().manual_seed(0)), tmp_path / "model")
    return tmp_path / "model"


def same(one: Decoder, two: Decoder) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, **changes: Any) -> None:
    weights = load_file(directory / "model.safetensors") | changes
    save_file({name: t for name, t in weights.items() if t is not None}, directory / "model.safetensors")


def refused(directory: Path, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        pretrained.load(directory)


# --- layouts --------------------------------------------------------------------------------------------------------
def test_shards_are_written_and_read(saved, tmp_path):
    decoder = pretrained.load(str(saved))[0]
    pretrained.save(decoder, tmp_path / "shards", max_shard_bytes=5_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    assert same(decoder, pretrained.load(str(tmp_path / "shards"))[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(theirs.transformer.wte.weight, decoder.embed.tokens)


def test_saving_over_another_layout_leaves_one_model_there(saved):
    decoder = Decoder(TINY, generator=torch.Generator().manual_seed(1))
    pretrained.save(decoder, saved, max_shard_bytes=5_000)
    assert same(decoder, pretrained.load(str(saved))[0])
    decoder = Decoder(TINY, generator=torch.Generator().manual_seed(2))
    pretrained.save(decoder, saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert same(decoder, pretrained.load(str(saved))[0])


SETTINGS = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BASES = {
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "opt": SETTINGS | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2},
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_model_saved_without_prefix_is_read(name, tmp_path):
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **BASES[name], **ids)).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = theirs(tokens).last_hidden_state
        assert (pretrained.load(str(tmp_path))[0](tokens) - expected).abs().max() < 1e-5


def test_the_mask_buffers_of_old_gpt2_checkpoints_are_passed_over_and_named(saved):
    decoder = pretrained.load(str(saved))[0]
    table = decoder.embed.tokens.detach().clone()
    edit_weights(saved, **{"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16), "lm_head.weight": table})
    with pytest.warns(UserWarning, match=r"1 entries are not used, .*: transformer\.h\.0\.attn\.bias"):
        assert same(decoder, pretrained.load(str(saved))[0])


def test_a_head_of_its_own_beside_tied_embeddings_is_used_as_transformers_does(saved, tmp_path):
    edit_weights(saved, **{"lm_head.weight": torch.randn(40, 16, generator=torch.Generator().manual_seed(1))})
    tokens = torch.arange(9)[None]
    with pytest.warns(UserWarning, match="the head of its own is used"):
        ours = pretrained.load(str(saved))[0]
    pretrained.save(ours, tmp_path / "again")
    for directory in (saved, tmp_path / "again"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        with torch.no_grad():
            assert (theirs(tokens).logits - ours.logits(ours(tokens))).abs().max() <= 1e-5
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(("settings", "way"), [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes packed the weights, and they are full"),
    ({"quant_method": "fp8"}, r"\(fp8\).*FineGrainedFP8Config\(dequantize=True\)"),
    ({"quant_method": "compressed-tensors"}, r"CompressedTensorsConfig\(dequantize=True\)"),
    ({"quant_method": "gptq", "bits": 4}, r"\(gptq\).*take the model that it was made from\."),
])  # fmt: skip
def test_packed_weights_are_refused_with_the_way_to_full_ones(saved, settings, way):
    edit_config(saved, quantization_config=settings)
    refused(saved, way + r".*--lora 16 --base-dtype nf4")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_codes_without_their_scales_are_no_weights(saved, dtype):
    name = "transformer.h.1.mlp.c_fc.weight"
    edit_weights(saved, **{name: load_file(saved / "model.safetensors")[name].to(dtype)})
    refused(saved, rf"1 weights are stored as .*, codes of packed weights without their scales: {name}")


def test_weights_of_a_shard_that_the_index_does_not_name_are_refused(saved):
    pretrained.save(pretrained.load(str(saved))[0], saved, max_shard_bytes=5_000)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    del index["weight_map"]["transformer.ln_f.bias"]
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(saved, r"does not name 1 weights that its files hold: transformer\.ln_f\.bias")


def test_pickled_files_of_another_layout_are_not_mixed_in(saved):
    decoder = pretrained.load(str(saved))[0]
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, saved / "pytorch_model-00001-of-00001.bin")
    torch.save(weights, saved / "pytorch_model.bin")
    assert same(decoder, pretrained.load(saved, allow_pickle=True)[0])
    (saved / "pytorch_model.bin").unlink()
    index = {"weight_map": dict.fromkeys(weights, "pytorch_model-00002-of-00002.bin")}
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00002\.bin: the index names this file"):
        pretrained.load(saved, allow_pickle=True)


def test_rope_settings_of_transformers_4_are_understood(tmp_path):
    settings = SETTINGS | {"intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 64}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **scaling}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, rope_parameters=rope))
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["dtype"]
    old = {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **scaling}, "torch_dtype": "float32"}
    path.write_text(json.dumps(config | old))
    decoder = pretrained.load(str(tmp_path / "theirs"))[0]
    assert decoder.config.rope_theta == 500.0
    assert dict(decoder.config.rope_scaling) == {"rope_type": "llama3", **scaling}
    pretrained.save(decoder, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs.eval()(tokens).logits)


def test_settings_we_do_not_use_survive_a_round_trip(saved, tmp_path):
    edit_config(saved, eos_token_id=[7, 9], pad_token_id=3, summary_type="cls_index", somebodys_note={"a": [1]})
    decoder = pretrained.load(str(saved))[0]
    assert decoder.config.eos_ids == (7, 9)
    pretrained.save(decoder, tmp_path / "again")
    before, after = (json.loads((path / "config.json").read_text()) for path in (saved, tmp_path / "again"))
    assert after == before


def test_generation_settings_of_the_source_are_not_taken_over(saved, tmp_path):
    (saved / "generation_config.json").write_text('{"top_k": 50}')  # PPO.md 4
    pretrained.save(pretrained.load(str(saved))[0], tmp_path / "again")
    assert not (tmp_path / "again" / "generation_config.json").exists()


def test_weights_are_cast_to_the_dtype_asked_for(saved):
    decoder = pretrained.load(str(saved), dtype=torch.bfloat16)[0]
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
    assert same(decoder, pretrained.load(str(saved))[0].bfloat16())


def test_an_untied_reward_model_needs_no_language_model_head(tmp_path):
    decoder = Decoder(dataclasses.replace(TINY, tied=False), generator=torch.Generator().manual_seed(0))
    pretrained.save(decoder, tmp_path, score=torch.ones(1, 16))
    again, extras = pretrained.load(tmp_path)
    assert torch.equal(extras["score.weight"], torch.ones(1, 16))
    assert again.head_weight.eq(0).all()


def test_pickled_weights_are_read_only_when_asked_for(saved):
    decoder = pretrained.load(str(saved))[0]
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    refused(saved, r"only pickled weights.*--allow-pickle")
    assert same(decoder, pretrained.load(saved, allow_pickle=True)[0])


# --- what is wrong, in one paragraph --------------------------------------------------------------------------------
def test_an_unknown_family_lists_the_known_ones(saved):
    edit_config(saved, model_type="mambo")
    refused(saved, "model_type 'mambo': transformers .* has no causal language model of that type")
    refused(saved, f"native here are {', '.join(FAMILIES)}")


YARN = SETTINGS | {"rope_parameters": {"rope_type": "yarn"}}
SPIRAL = SETTINGS | {"rope_parameters": {"rope_type": "spiral"}}


@pytest.mark.parametrize(("family", "change", "complaint"), [
    ("gpt2", {"activation_function": "mish"}, "activation_function: 'mish' is not supported; supported are gelu"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: False is not supported; only True is"),
    ("gpt2", {"n_head": 0}, "n_head: 0 is not supported"), ("gpt2", {"n_embd": "wide"}, "config.json: "),
    ("llama", {}, "needs 'num_attention_heads' and does not have it"),
    ("llama", YARN, "computed from rope_theta and the numbers factor"),
    ("gpt_neox", SPIRAL, "'spiral' is not supported; supported: default"),
])  # fmt: skip
def test_a_config_that_we_cannot_follow_is_refused(saved, family, change, complaint):
    edit_config(saved, model_type=family, **change)
    refused(saved, complaint)


WPE = "transformer.wpe.weight"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({WPE: None}, f"1 weights are missing: {WPE};"),
        ({WPE: torch.zeros(9, 16)}, rf"'{WPE}' has shape \(9, 16\) and config.json says \(16, 16\)"),
        ({"transformer.h.1.attn.c_attn.weight": torch.zeros(16, 16)}, r"c_attn.weight' has shape \(16, 16\)"),
        ({"transformer.h.2.ln_1.bias": torch.zeros(16)}, r"1 weights belong to no gpt2 model .*: transformer\.h\.2"),
        ({"score.weight": torch.zeros(2, 16)}, r"score.weight has shape \(2, 16\); a reward model gives one score"),
        ({"v_head.weight": torch.zeros(1, 16), "score.weight": torch.zeros(1, 16)}, "and the only one"),
        ({"classifier.bias": torch.zeros(1)}, "classifier.bias stands without the head's weight"),
        ({"score.0.weight": torch.zeros(16, 16)}, "Of score heads, single linear ones are read: score, classifier"),
    ],
)
def test_weights_that_do_not_fit_are_named(saved, changes, complaint):
    edit_weights(saved, **changes)
    refused(saved, complaint)


def test_a_shape_that_does_not_fit_an_interleaved_weight_is_named(tmp_path):
    config = dataclasses.replace(TINY, family="bloom", position="alibi", embed_norm=True)
    pretrained.save(Decoder(config), tmp_path)
    edit_weights(tmp_path, **{"transformer.h.0.self_attention.query_key_value.weight": torch.zeros(47, 16)})
    refused(tmp_path, r"query_key_value.weight' has shape \(47, 16\) and config.json says \(48, 16\)")


@pytest.mark.parametrize("kept", [0, 5, 200, 5000])
def test_a_truncated_file_is_damaged_or_cut_short(saved, kept):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(saved, r"model.safetensors: damaged or cut short")


def test_a_missing_shard_is_named(saved):
    pretrained.save(pretrained.load(str(saved))[0], saved, max_shard_bytes=5_000)
    next(saved.glob("model-00002-*")).unlink()
    refused(saved, r"model-00002-of-.*the index names this file and it is missing")


def test_an_index_that_names_what_a_shard_does_not_hold_is_refused(saved):
    pretrained.save(pretrained.load(str(saved))[0], saved, max_shard_bytes=5_000)
    index = saved / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("wpe.weight", "wpo.weight"))
    refused(saved, r"the index names weight 'transformer.wpo.weight' in it")
    index.write_text("{")
    refused(saved, r"index.json: not valid JSON")


@pytest.mark.parametrize(("text", "complaint"), [("{", "not valid JSON"), ("[]", "no JSON object"), (None, "has no c")])
def test_a_config_that_is_none_is_said_to_be_none(saved, text, complaint):
    (saved / "config.json").unlink()
    if text is not None:
        (saved / "config.json").write_text(text)
    refused(saved, complaint)


def test_a_directory_without_weights_and_a_path_that_is_none(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    refused(saved, r"has no model.safetensors and no model.safetensors.index.json")
    refused(tmp_path / "nowhere", "no such model directory")


def test_a_write_that_the_disk_refuses_is_an_oserror_with_its_number(tmp_path):
    decoder = Decoder(TINY)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            pretrained.save(decoder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(tmp_path / "model.safetensors")


def test_every_family_says_the_same_in_both_directions():
    """config -> Hugging Face -> config changes nothing that the family knows."""
    for name, family in FAMILIES.items():
        hf = {"model_type": name, "intermediate_size": 32, "ffn_dim": 32, "num_key_value_heads": 2, **SETTINGS}
        config: DecoderConfig = family.config_from_hf(hf)
        assert family.config_from_hf(hf | family.hf_config(config)) == config, name


def test_weights_that_are_no_numbers_are_named(saved):
    name, broken = "h.1.mlp.c_fc.weight", load_file(saved / "model.safetensors")
    key = next(stored for stored in broken if stored.endswith(name))
    broken[key][0, 0] = float("nan")
    edit_weights(saved, **{key: broken[key]})
    refused(saved, f"1 weights hold NaN or infinite numbers: {key}")


def test_a_link_out_of_the_directory_is_refused_and_those_of_the_hubs_cache_are_read(saved, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in saved.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    pretrained.load(snapshot)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (saved / "tokenizer.json").symlink_to(secret)
    refused(saved, "tokenizer.json: is a link out of the model's directory, to .*secret.json; put a copy")
