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
from tests.models.test_families import CASES


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


KNOWN = {architecture.family for architecture in ARCHITECTURES}
LOST = {"qwen2, last two layers in a window", "gpt_neox, sequential, fully rotary", "gpt2, untied, n_inner, erf GELU"}
FITS = [name for name, (family, _) in CASES.items() if family in KNOWN and name not in LOST]


@pytest.mark.parametrize("name", FITS)
def test_a_model_comes_back_bit_by_bit(name, tmp_path):
    family, settings = CASES[name]
    decoder = decoder_of(family, **settings)
    again = pretrained.load(written(decoder, tmp_path / "model.gguf"), dtype=torch.float32)[0]
    assert again.config.rope_scaling == decoder.config.rope_scaling
    ours, theirs = dict(decoder.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("opt", "llama.cpp does not know the family opt"),
        ("qwen2, last two layers in a window", r"qwen2 has no place for windows=\(0, 4, 4\)"),
        ("gpt2, untied, n_inner, erf GELU", "no place for activation='gelu'"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused_by_name(name, complaint, tmp_path):
    family, settings = CASES[name]
    with pytest.raises(UserError, match=complaint):
        written(decoder_of(family, **settings), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []
