"""Weights that bitsandbytes packed. The files are made here, by the published formulas; bitsandbytes 0.50.2 itself was
compared by hand: equal values, and the same bytes under --base-dtype nf4."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.errors import UserError
from penstock.models import pretrained, recipe
from penstock.models.packed import NF4
from penstock.models.surgery import quantise_base
from tests.conftest import save_tiny

WIDE: dict[str, Any] = {"family": "llama", "d_model": 128, "d_ff": 192, "num_heads": 4, "head_dim": 32,
                        "num_kv_heads": 4, "position": "rotary", "norm": "rms", "rotary_dim": 32, "gated": True,
                        "activation": "silu", "qkv_bias": False, "out_bias": False, "mlp_bias": False}  # fmt: skip
LEVELS = torch.linspace(-1, 1, 256)


def four_bits(weight: Tensor, name: str, blocksize: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    """The entries of a weight that is packed in nf4 with double quantisation, and its values."""
    blocks = weight.float().reshape(-1, blocksize)
    absmax = blocks.abs().amax(1)
    codes = (blocks / absmax[:, None]).unsqueeze(-1).sub(torch.tensor(NF4)).abs().argmin(-1).flatten()
    offset = absmax.mean()
    outer = [(part - offset).abs().amax() for part in absmax.split(256)]
    inner = torch.cat([(part - offset) / top for part, top in zip(absmax.split(256), outer, strict=True)])
    bytes_of_scales = (inner[:, None] - LEVELS).abs().argmin(-1)
    scales = torch.cat([LEVELS[p] * top + offset for p, top in zip(bytes_of_scales.split(256), outer, strict=True)])
    state = {
        "quant_type": "nf4", "blocksize": blocksize, "dtype": "bfloat16", "shape": list(weight.shape),
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset),
    }  # fmt: skip
    entries = {
        "": (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None],
        ".absmax": bytes_of_scales.to(torch.uint8),
        ".quant_map": torch.tensor(NF4),
        ".nested_absmax": torch.stack(outer),
        ".nested_quant_map": LEVELS.clone(),
        ".quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    values = (torch.tensor(NF4)[codes].view(-1, blocksize) * scales[:, None]).view(weight.shape)
    return {name + ending: tensor for ending, tensor in entries.items()}, values


def eight_bits(weight: Tensor, name: str) -> tuple[dict[str, Tensor], Tensor]:
    scales = weight.float().abs().amax(1)
    codes = (weight.float() / scales[:, None] * 127).round().to(torch.int8)
    module = name.removesuffix("weight")
    entries = {name: codes, f"{module}SCB": scales, f"{module}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return entries, codes.float() * (scales / 127)[:, None]


def packed_model(path: Path, pack: Any, **changes: Any) -> tuple[Path, dict[str, Tensor]]:
    """A tiny Llama whose products are packed, and their values by name."""
    directory = Path(save_tiny(path, **(WIDE | changes)))
    weights, values = load_file(directory / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("proj.weight")]:
        entries, values[name] = pack(weights.pop(name), name)
        weights |= entries
    save_file(weights, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": pack is four_bits}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return directory, values


@pytest.mark.parametrize("pack", [four_bits, eight_bits])
def test_packed_weights_are_read_as_the_numbers_that_they_mean(tmp_path, pack):
    directory, values = packed_model(tmp_path / "model", pack)
    with pytest.warns(UserWarning, match="14 weights are packed by bitsandbytes"):
        decoder = pretrained.load(directory, dtype=torch.float32)[0]
    down = values["model.layers.1.mlp.down_proj.weight"]
    stacked = [values[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(decoder.blocks[1].down.weight, down)
    assert torch.equal(decoder.blocks[0].qkv.weight, torch.cat(stacked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pack", "kind"), [(four_bits, "nf4"), (eight_bits, "int8")])
def test_a_packed_base_keeps_its_codes_and_scales(tmp_path, dtype, pack, kind):
    directory, values = packed_model(tmp_path / "model", pack)
    with pytest.warns(UserWarning, match=f"--base-dtype {kind} keeps them as they are"):
        decoder = pretrained.load(directory, dtype=dtype, device="meta")[0]
    quantise_base(decoder, kind)
    names = [f"blocks.1.down.{half}" for half in ("weight", "scales")]
    halves = {name: torch.empty_like(decoder.get_parameter(name), device="cpu") for name in names}
    recipe.fill(decoder, halves)
    stored = load_file(directory / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(halves[names[0]].flatten(), stored.flatten())
    scales = values["model.layers.1.mlp.down_proj.weight"].unflatten(1, (-1, 64 if kind == "nf4" else 192))
    assert torch.allclose(halves[names[1]].flatten(), (scales.abs().amax(2) / (1 if kind == "nf4" else 127)).flatten())


def test_blocks_that_ours_do_not_match_are_packed_again_and_the_error_is_printed(tmp_path):
    directory, _ = packed_model(tmp_path / "model", four_bits, d_model=96, num_heads=3, num_kv_heads=3)
    with pytest.warns(UserWarning, match=r"packs 12 of them again, \d+\.\d% off"):
        pretrained.load(directory)


def test_what_is_saved_is_full_and_says_so(tmp_path):
    directory, _ = packed_model(tmp_path / "model", four_bits)
    with pytest.warns(UserWarning, match="packed"):
        pretrained.save(pretrained.load(directory)[0], tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    pretrained.load(tmp_path / "again")


def test_scales_that_are_missing_are_named(tmp_path):
    directory, _ = packed_model(tmp_path / "model", four_bits)
    weights = load_file(directory / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight.nested_absmax")
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.0.mlp.up_proj.weight.nested_absmax: missing"):
        pretrained.load(directory)
