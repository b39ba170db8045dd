"""GGUF in and out: what is written is read back as it was, and what the other side has no place for is refused by name.

The oracles are transformers' own reader of GGUF and, in benchmarks/gguf.py, llama.cpp itself.
"""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from penstock.errors import UserError
from penstock.models import pretrained
from penstock.models.decoder import Decoder
from penstock.models.families import FAMILIES
from penstock.models.formats import gguf_file, gguf_writer
from penstock.models.formats.architectures import ARCHITECTURES
from penstock.models.positions import rotary_tables
from tests.conftest import cli
from tests.models.test_families import CASES, GPT_OSS, GPT_OSS_YARN, LLAMA, QWEN_MOE, YARN
from tests.test_broken_inputs import train


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def decoder_of(family: str, seed: int = 0, **settings: Any) -> Decoder:
    """Random weights that f16 holds exactly."""
    hf = transformers.AutoConfig.for_model(family, **settings).to_dict()
    decoder = Decoder(FAMILIES[family].config_from_hf(hf), generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1).copy_(parameter.half().float())
    return decoder


def written(decoder: Decoder, path: Path, kind: Any = "f16", tokenizer: Any = None) -> Path:
    gguf_writer.write_model(decoder, path, kind, name="tiny", tokenizer=tokenizer, ends=())
    return path


def angles(decoder: Decoder, narrow: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_tables(decoder.config, narrow, torch.arange(40)[None], torch.float32)


SMALL = LLAMA | {"num_hidden_layers": 7, "num_key_value_heads": 2, "head_dim": 8}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2, as published": ("gemma2", SMALL | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3, as published": ("gemma3_text", SMALL | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "smollm3, as published": ("smollm3", SMALL),
    "granite, as published": ("granite", SMALL | {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "olmo2, as published": ("olmo2", SMALL | {"head_dim": None}),
    "olmo3, as published": (
        "olmo3",
        SMALL
        | {
            "head_dim": None,
            "sliding_window": 4,
            "rope_parameters": {
                "full_attention": YARN | {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.138629436111989},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "ministral3, as published": (
        "ministral3",
        SMALL
        | {
            "rope_parameters": YARN
            | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.3}
        },
    ),
    "ministral, all layers in a window": ("ministral", SMALL | {"sliding_window": 5}),
    "gpt_oss, as published": ("gpt_oss", SMALL | GPT_OSS | {"rope_parameters": GPT_OSS_YARN}),
    "qwen2, yarn": ("qwen2", LLAMA | {"rope_parameters": YARN}),
}
"""Configs that llama.cpp has a place for, of families whose odd configs it has none for."""
REFUSED = {
    "gemma2": "attention_scale|out_bias", "gemma3": "attention_scale", "smollm3": "rotary_layers",
    "qwen2, last two layers in a window": r"windows=\(0, 4, 4\) \(where no row is longer",
    "gpt_neox, sequential, fully rotary": "activation", "gpt2, untied, n_inner, erf GELU": "activation",
    "gpt_neox, tied": "tied=True, qkv_bias=False",
    "olmo2, all biased, tied": "tied=True, out_bias=True; export it without --format",
    "olmo3, two ropes": "window_rope", "ministral, windows by layer": "windows",
    "qwen3_moe, shares of all, a dense block": r"dense_layers=\(1,\)",
    "gpt_oss, heads of keys, other limits": r"tied=True",
}  # fmt: skip
"""Cases, by how their names start: the setting that is named."""


@pytest.mark.parametrize("name", [*CASES, *PLAIN])
def test_a_model_comes_back_bit_by_bit_or_is_refused_by_the_settings_name(name, tmp_path):
    family, settings = (CASES | PLAIN)[name]
    decoder, path = decoder_of(family, **settings), tmp_path / "model.gguf"
    known = family in {architecture.family for architecture in ARCHITECTURES}
    reason = (
        "the family"
        if not known
        else next((reason for start, reason in REFUSED.items() if name.startswith(start) and name not in PLAIN), None)
    )
    if reason is not None:
        with pytest.raises(UserError, match=reason):
            written(decoder, path)
        assert list(tmp_path.iterdir()) == []
        return
    written(decoder, path)
    again = pretrained.load(path, dtype=torch.float32)[0]
    for narrow in (False, True) if decoder.config.position == "rotary" else ():
        assert all(map(torch.equal, angles(again, narrow), angles(decoder, narrow)))
    assert again.config.scales_queries(40) == decoder.config.scales_queries(40)
    assert (again.config.windows or decoder.config.windows) == decoder.config.windows
    ours, theirs = dict(decoder.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    shifted = decoder.config.norm_offset  # Gemma's norms are 1 + w in the file, rounded to fp32
    for key, weight in ours.items():
        if shifted and "norm" in key:
            assert (theirs[key] - weight).abs().max() <= 2**-23
        else:
            assert torch.equal(theirs[key], weight), key


def test_f32_holds_what_f16_rounds(tmp_path):
    decoder = decoder_of("llama", **LLAMA)
    with torch.no_grad():
        decoder.embed.tokens.add_(1e-6)
    for kind, same in (("f16", False), ("f32", True)):
        again = pretrained.load(written(decoder, tmp_path / f"{kind}.gguf", kind), dtype=torch.float32)[0]
        assert torch.equal(again.embed.tokens, decoder.embed.tokens) == same
        assert torch.equal(again.blocks[0].qkv.weight, decoder.blocks[0].qkv.weight)


WHOLE_RAMP = tuple(sorted((key, value) for key, value in (YARN | {"truncate": True}).items() if key != "rope_theta"))


@pytest.mark.parametrize("changes", [
    {"norm_topk": False}, {"clamp": (1.702, 6.0)}, {"sinks": False}, {"rope_scaling": WHOLE_RAMP},
    {"qkv_bias": False, "out_bias": False},
])  # fmt: skip
def test_what_llama_cpps_code_decides_is_refused_where_a_model_differs(changes, tmp_path):
    family, experts = ("qwen3_moe", QWEN_MOE) if "norm_topk" in changes else ("gpt_oss", GPT_OSS)
    config = dataclasses.replace(decoder_of(family, **LLAMA | experts).config, **changes)
    with pytest.raises(UserError, match=f"has no place for {next(iter(changes))}="):
        written(Decoder(config), tmp_path / "model.gguf")


def test_layers_with_windows_elsewhere_than_llama_cpp_has_them_are_in_the_file(tmp_path):
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    decoder = decoder_of("gpt_oss", **LLAMA | GPT_OSS | {"layer_types": kinds})
    assert pretrained.load(written(decoder, tmp_path / "model.gguf"))[0].config.windows == (0, 5, 5)


def test_transformers_reads_experts_that_we_wrote(tmp_path):
    settings = LLAMA | QWEN_MOE
    decoder, config = decoder_of("qwen3_moe", **settings), transformers.AutoConfig.for_model("qwen3_moe", **settings)
    written(decoder, tmp_path / "model.gguf", "f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(  # it reads no width of experts in the file
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
    )
    tokens = torch.arange(24)[None] * 5 % 96
    with torch.no_grad():
        assert (theirs.eval()(tokens).logits - decoder.logits(decoder(tokens))).abs().max() <= 1e-4


def test_gpt_oss_experts_lie_as_in_llama_cpps_conversion(tmp_path):
    """Gate and up are every second output there (conversion/gpt_oss.py); transformers' own reader loses them."""
    decoder = decoder_of("gpt_oss", **LLAMA | GPT_OSS)
    file = gguf_file.GGUFFile(written(decoder, tmp_path / "model.gguf", "f32"))
    pretrained.save(decoder, tmp_path)
    theirs = {
        name.removeprefix("model.layers.1.mlp."): w for name, w in load_file(tmp_path / "model.safetensors").items()
    }
    both, bias = theirs["experts.gate_up_proj"].transpose(1, 2), theirs["experts.gate_up_proj_bias"]
    expected = {
        "ffn_gate_exps.weight": both[:, ::2], "ffn_up_exps.weight": both[:, 1::2], "ffn_gate_exps.bias": bias[:, ::2],
        "ffn_up_exps.bias": bias[:, 1::2], "ffn_down_exps.weight": theirs["experts.down_proj"].transpose(1, 2),
        "ffn_down_exps.bias": theirs["experts.down_proj_bias"], "ffn_gate_inp.weight": theirs["router.weight"],
    }  # fmt: skip
    for name, weight in expected.items():
        assert torch.equal(file.tensor(f"blk.1.{name}"), weight), name
    half = gguf_file.GGUFFile(written(decoder, tmp_path / "half.gguf"))
    kinds = {name: half.dtype(f"blk.0.{name}") for name in expected}
    assert {name for name, kind in kinds.items() if kind == "F16"} == {n for n in expected if n.endswith("exps.weight")}


# --- damaged and foreign files ----------------------------------------------------------------------------------------
def test_a_file_that_is_cut_short_anywhere_is_refused_and_leaves_nothing(tmp_path, cache):
    whole = written(decoder_of("llama", **LLAMA), tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 20, 60, 150, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.gguf: (is no GGUF file, or is damaged|cannot be read)"):
            pretrained.load(cut)
    assert not list(cache.rglob("config.json"))


def test_lists_of_lists_without_end_are_damage(tmp_path):
    deep = struct.pack("<IQ", gguf_file.ARRAY, 1) * 5000
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", gguf_file.ARRAY)
    (tmp_path / "deep.gguf").write_bytes(header + deep)
    with pytest.raises(UserError, match="is no GGUF file, or is damaged"):
        gguf_file.GGUFFile(tmp_path / "deep.gguf")


def edited(
    path: Path, meta: dict[str, Any], drop: str = "", extra: str = "", cut: str = "", model: Decoder | None = None
) -> Path:
    """The tiny model written again by gguf itself, with other metadata, without a tensor, with one more, or with one
    that lacks its last row."""
    file = gguf_file.GGUFFile(written(model or decoder_of("llama", **LLAMA), path.with_name("whole.gguf")))
    writer = gguf.GGUFWriter(path, meta.pop("general.architecture", file.meta["general.architecture"]))
    kept = {key: value for key, value in file.meta.items() if key != "general.architecture"} | meta
    for key, value in kept.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    for name in file.tensors:
        if name != drop:
            rows = file.tensor(name).numpy()
            writer.add_tensor(name, rows[:-1] if name == cut else rows)
    if extra:
        writer.add_tensor(extra, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("meta", "tensors", "complaint"),
    [
        ({"general.architecture": "mamba"}, {}, "general.architecture: 'mamba' is not read here"),
        ({"llama.expert_count": 8}, {}, "weights are missing: model.layers.0.block_sparse_moe.gate.weight"),
        ({"llama.attention.temperature_scale": 0.1}, {}, "llama.attention.temperature_scale: 0.1.* is not supported"),
        ({"llama.rope.scaling.yarn_beta_fast": 8.0}, {}, "llama.rope.scaling.yarn_beta_fast: 8.0 is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "rope scaling 'longrope' has"),
        ({"llama.attention.head_count": 5}, {}, "head"),
        ({"tokenizer.ggml.model": "bert"}, {}, "tokenizer.ggml.model: 'bert' is not read here"),
        ({}, {"drop": "blk.1.ffn_up.weight"}, "1 weights are missing: model.layers.1.mlp.up_proj.weight"),
        ({}, {"extra": "blk.0.surprise.weight"}, "1 weights belong to no llama model.*blk.0.surprise.weight"),
        ({}, {"drop": "token_embd.weight"}, "token_embd.weight is missing"),
    ],
)
def test_what_a_file_says_and_we_do_not_do_is_refused_by_its_key(tmp_path, meta, tensors, complaint):
    with pytest.raises(UserError, match=complaint):
        pretrained.load(edited(tmp_path / "model.gguf", dict(meta), **tensors))


def test_experts_in_another_number_than_the_router_has_are_refused(tmp_path):
    model = decoder_of("qwen3_moe", **LLAMA | QWEN_MOE)
    for change, complaint in (
        ({"cut": "blk.1.ffn_up_exps.weight"}, r"8 weights are missing: model\.layers\.1\.mlp\.experts\.0\.up_proj"),
        ({"meta": {"qwen3moe.expert_count": 7}}, r"shape \(8, 48\) and config\.json says \(7, 48\)"),
    ):
        with pytest.raises(UserError, match=complaint):
            pretrained.load(edited(tmp_path / "model.gguf", **{"meta": {}, "model": model} | change))


# --- commands ---------------------------------------------------------------------------------------------------------
def test_a_run_is_exported_and_read_again(tmp_path, capsys):
    assert cli(*train(tmp_path)) == 0
    assert cli("export", tmp_path / "run", "--out", tmp_path / "out.gguf", "--format", "gguf") == 0
    ours = pretrained.load(tmp_path / "run" / "checkpoints" / "step-000001" / "model", dtype=torch.float32)[0]
    again = pretrained.load(tmp_path / "out.gguf", dtype=torch.float32)[0]
    assert torch.equal(again.blocks[0].up.weight, ours.blocks[0].up.weight.half().float())
    for flags, complaint in {
        ("--out", tmp_path / "b.gguf", "--type", "q8_0"): "--type: shapes a GGUF file; add --format gguf",
        ("--out", tmp_path / "b", "--format", "gguf"): "a GGUF file's name ends in .gguf",
        ("--out", tmp_path / "out.gguf", "--format", "gguf"): "out.gguf exists; choose another name",
        ("--out", tmp_path / "b.gguf", "--format", "gguf", "--lora-only"): "trained all weights, no adapter",
    }.items():
        assert cli("export", tmp_path / "run", *flags) == 2
        assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "b.gguf").exists()


def test_an_adapter_is_exported_alone_or_merged_and_trains_on_a_gguf_base(tmp_path):
    base = written(decoder_of("llama", **LLAMA, seed=1), tmp_path / "base.gguf")
    flags = ("--lora", 2, "--lora-alpha", 6, "--rslora", "--lr", 0.01, "--max-length", 60, "--eos", 2)
    assert cli(*train(tmp_path, base, None, *flags)) == 0
    for more in (["--lora-only"], []):
        out = tmp_path / f"out{len(more)}.gguf"
        assert cli("export", tmp_path / "run", "--out", out, "--format", "gguf", *more) == 0
    file = gguf_file.GGUFFile(tmp_path / "out1.gguf")
    assert (file.meta["general.type"], file.meta["adapter.type"]) == ("adapter", "lora")
    factor = file.meta["adapter.lora.alpha"] / 2  # llama.cpp's: alpha / rank
    merged, plain = gguf_file.GGUFFile(tmp_path / "out0.gguf"), gguf_file.GGUFFile(base)
    for name in ("blk.0.attn_q.weight", "blk.2.attn_k.weight", "blk.1.ffn_down.weight"):
        a, b = file.tensor(f"{name}.lora_a"), file.tensor(f"{name}.lora_b")
        change = merged.tensor(name).float() - plain.tensor(name).float()
        assert change.abs().max() > 1e-3
        assert torch.allclose(change, factor * (b @ a), atol=1e-3)
