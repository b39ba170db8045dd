"""GGUF in and out: what is written is read back as it was, and what the other side has no place for is refused by name.

The oracles are transformers' own reader of GGUF and, in benchmarks/gguf.py, llama.cpp itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock.errors import UserError
from penstock.models import pretrained
from penstock.models.decoder import Decoder
from penstock.models.families import FAMILIES
from penstock.models.formats import gguf_writer
from penstock.models.formats.architectures import ARCHITECTURES
from tests.models.test_families import CASES, LLAMA


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


SMALL = LLAMA | {"num_hidden_layers": 7, "num_key_value_heads": 2, "head_dim": 8}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2, as published": ("gemma2", SMALL | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3, as published": ("gemma3_text", SMALL | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "smollm3, as published": ("smollm3", SMALL),
    "granite, as published": ("granite", SMALL | {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
}
"""Configs that llama.cpp has a place for, of families whose odd configs it has none for."""
REFUSED = {
    "gemma2": "attention_scale|lm_head.weight", "gemma3": "attention_scale", 
    "smollm3": "rotary_layers",
    "phi3, partly rotary, longrope": "rope scaling 'longrope'",
    "qwen2, last two layers in a window": "windows", "gpt_neox, sequential, fully rotary": "activation",
    "gpt2, untied, n_inner, erf GELU": "activation",
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
    assert again.config.rope_scaling == decoder.config.rope_scaling
    ours, theirs = dict(decoder.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    shifted = decoder.config.norm_offset  # Gemma's norms are 1 + w in the file, rounded to fp32
    for key, weight in ours.items():
        if shifted and "norm" in key:
            assert (theirs[key] - weight).abs().max() <= 2**-23
        else:
            assert torch.equal(theirs[key], weight), key
