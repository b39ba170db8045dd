"""Rotary tables of every type of rope scaling against transformers: equal bits, or a row that ends before."""

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from penstock.models import positions, pretrained
from penstock.models.decoder import Decoder
from penstock.models.families import llama
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling
from tests.models.test_families import LLAMA, NO_SPECIAL

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0, 1.1, 1.2, 2.0],
    "long_factor": [1.0, 2.0, 3.0, 8.0],
}  # fmt: skip
SAME = LONG | {"long_factor": LONG["short_factor"]}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn, of one": YARN | {"factor": 1.0},
    "yarn, other betas": YARN | {"beta_fast": 4, "beta_slow": 0.5},
    "yarn, null betas": YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None},
    "yarn, untruncated": YARN | {"truncate": False, "beta_slow": 0.2, "original_max_position_embeddings": 60},
    "yarn, both scales": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn, one scale": YARN | {"mscale": 0.7},
    "yarn, a factor of attention": YARN | {"attention_factor": 0.9},
    "yarn, a ramp of no width": YARN | {"beta_fast": 1e-9, "beta_slow": 1e-9, "original_max_position_embeddings": 64},
    "longrope": LONG,
    "longrope, a factor": LONG | {"factor": 3.0},
    "longrope, a factor of attention": LONG | {"attention_factor": 0.9},
    "longrope, one list": SAME,
}  # fmt: skip


def both(rope: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' config and ours."""
    hf = {**LLAMA, **NO_SPECIAL, "rope_parameters": {"rope_theta": 500.0, **rope}}
    theirs = transformers.LlamaConfig(**{**hf, "rope_parameters": dict(hf["rope_parameters"])})
    return theirs, llama.config_from_hf({"model_type": "llama", **hf})


@pytest.mark.parametrize("name", ROPES)
def test_rotary_tables_are_those_of_transformers_to_the_bit(name):
    theirs, ours = both(ROPES[name])
    where = torch.arange(ours.max_length)[None]
    expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1), where)
    for table, wanted in zip(positions.rotary_tables(ours, False, where, torch.float32), expected, strict=True):
        assert torch.equal(table[:, 0], wanted)
    again = transformers.LlamaConfig(**llama.hf_config(ours))
    assert torch.equal(LlamaRotaryEmbedding(again).inv_freq, LlamaRotaryEmbedding(theirs).inv_freq)
    assert again.max_position_embeddings == theirs.max_position_embeddings


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, Decoder):
            return model.logits(model(tokens))
        return model(tokens).logits


@pytest.mark.parametrize(("name", "longest"), [("dynamic", 64), ("longrope", 16), ("longrope, one list", 64)])
def test_rows_end_where_their_length_would_turn_earlier_tokens_another_way(name, longest, tmp_path):
    """See [Note: a token's angle is its own]."""
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(both(ROPES[name])[0]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)  # so that positions are heard
    theirs.save_pretrained(tmp_path)
    ours, _ = pretrained.load(tmp_path)
    assert ours.config.max_length == longest
    tokens = torch.randint(96, (1, 65), generator=torch.Generator().manual_seed(1))
    assert (logits(ours, tokens[:, :longest]) - logits(theirs, tokens[:, :longest])).abs().max() <= 1e-5
    answer = generate(ours, [tokens[0, : longest - 3].tolist()], Sampling(max_new_tokens=9), eos_ids=())[0]
    assert len(answer.response_ids) == 3
    if name.endswith("one list"):
        return
    first, later = logits(theirs, tokens[:, :longest]), logits(theirs, tokens[:, : longest + 1])[:, :longest]
    assert (first - later).abs().max() > 1e-2
    for call in (
        lambda: ours(tokens[:, : longest + 1]),
        lambda: ours.decode(tokens[0, :1], [], torch.tensor([longest])),
    ):
        with pytest.raises(
            ValueError, match=f"a row of {longest + 1} tokens does not fit the model's {longest} positions"
        ):
            call()
    pretrained.save(ours, tmp_path / "again")
    assert pretrained.load(tmp_path / "again")[0].config == ours.config
