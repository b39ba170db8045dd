"""Every field of every family's transformers config, set to another value: equal to transformers, or refused by name.

Each row is a model of transformers' own with that setting, saved by it. tests/models/test_config_keys.py has what files
say in other words, and what they leave out.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock.errors import UserError
from penstock.models import pretrained
from penstock.models.families import FAMILIES
from tests.models.test_families import BY_KIND, GPT2, KINDS, LLAMA, LLAMA3, NEOX, OPT, YARN, random_model

BASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2, "opt": OPT, "gpt_neox": NEOX, "bloom": {"vocab_size": 96, "hidden_size": 48, "n_layer": 3},
    "ministral": LLAMA | {"head_dim": 8},
}  # fmt: skip
"""Small models; of the families that are not here the same one."""
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
INERT: dict[str, Any] = {
    "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3, "dropout": 0.3, "attention_dropout": 0.3,
    "layerdrop": 0.3, "hidden_dropout": 0.3, "classifier_dropout": 0.3, "summary_first_dropout": 0.3,
    "initializer_range": 0.5, "init_std": 0.5, "use_cache": False, "bos_token_id": 3, "eos_token_id": 4,
    "pad_token_id": 5, "is_decoder": True, "summary_type": "mean", "summary_use_proj": False,
    "summary_activation": "tanh", "summary_proj_to_labels": False, "reorder_and_upcast_attn": True, "pretraining_tp": 2,
    "output_router_logits": True, "router_aux_loss_coef": 0.5,
}  # fmt: skip
"""What no logit depends on when nothing is trained. Set at once."""
SIZES: dict[str, Any] = {
    "vocab_size": 70, "hidden_size": 24, "n_embd": 24, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4,
    "n_head": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 40, "n_inner": 40, "ffn_dim": 40,
    "word_embed_proj_dim": 16, "max_position_embeddings": 48, "n_positions": 32, "layer_norm_epsilon": 0.3,
    "layer_norm_eps": 0.3, "rms_norm_eps": 0.3, "num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}  # fmt: skip
"""What every family follows. Set at once: one that is not heard shows, as an error or in the logits."""
THETA = {"rope_theta": 77.0}
LONG = {
    **THETA, "rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 2.0,
    "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 3.0, 8.0],
}  # fmt: skip
ROUNDED = YARN | {"truncate": False, "beta_fast": 4}
LINEAR = {**THETA, "rope_type": "linear", "factor": 2.0}
SHORT = YARN | {"attention_factor": 2.0, "llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 8}
ROPES = [
    {**THETA, "rope_type": "default"}, LINEAR, LLAMA3, SHORT,
    ROUNDED | {"mscale": 0.7, "mscale_all_dim": 1.3}, LONG, {**THETA, "rope_type": "dynamic", "factor": 3.0},
]  # fmt: skip
BY_LAYER = [
    BY_KIND, dict.fromkeys(BY_KIND, ROUNDED), dict.fromkeys(BY_KIND, LONG),
    {"full_attention": LINEAR, "sliding_attention": LLAMA3},
]  # fmt: skip
ACTIVATIONS = ["gelu_new", "relu", "mish"]
OTHER: dict[str, list[Any]] = {
    "hidden_act": ACTIVATIONS, "activation_function": ACTIVATIONS, "hidden_activation": ACTIVATIONS,
    "rope_parameters": ROPES, "sliding_window": [3, None], "max_window_layers": [1], "query_pre_attn_scalar": [5],
    "layer_types": [KINDS, ["full_attention"] * 3], "original_max_position_embeddings": [16],
    "final_logit_softcapping": [1.0, None], "attn_logit_softcapping": [1.0, None], "embedding_multiplier": [3.0],
    "logits_scaling": [3.0], "residual_multiplier": [0.3], "attention_multiplier": [0.3], "no_rope_layers": [[1, 0, 0]],
    "no_rope_layer_interval": [2], "decoder_sparse_step": [2], "mlp_only_layers": [[1]], "swiglu_alpha": [1.1],
    "swiglu_limit": [0.5], "router_jitter_noise": [0.5],
}  # fmt: skip
"""All else, one by one; what is true or false becomes the other."""
BESIDE: dict[str, dict[str, Any]] = {
    "sliding_window": {"use_sliding_window": True, "max_window_layers": 1},
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 3},
    "use_sliding_window": {"sliding_window": 3, "max_window_layers": 1},
    "layer_types": {"sliding_window": 3},
    "slow_but_exact": {"pretraining_tp": 2},
}
"""What a field needs beside it to be heard, where the family has that."""
TOKENS = torch.randint(64, (2, 14), generator=torch.Generator().manual_seed(1))


def rows_of(family: str) -> list[tuple[str, dict[str, Any]]]:
    """(field, changes): each of the config class's own fields once at least."""
    general = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    own = {field.name: field.default for field in dataclasses.fields(transformers.CONFIG_MAPPING[family])}
    fields = own.keys() - general
    rows = [("nothing", {key: INERT[key] for key in sorted(fields & INERT.keys())})]
    rows += [("sizes", {key: SIZES[key] for key in sorted(fields & SIZES.keys())})]
    for field in sorted(fields - INERT.keys() - SIZES.keys()):
        values = OTHER.get(field, [not own[field]] if own[field] in (True, False, None) else [])
        assert values, f"no other value of {family}'s {field} is tried"
        if field == "rope_parameters" and family in ("olmo3", "gemma3_text"):
            values = BY_LAYER
        beside = {key: value for key, value in BESIDE.get(field, {}).items() if key in fields}
        rows += [(field, beside | {field: value}) for value in values]
    return rows


def disagreement(family: str, settings: dict[str, Any], field: str, directory: Path) -> str | None:
    """What is wrong; empty: nothing; None: transformers refuses too."""
    try:
        theirs = random_model(family, settings)
        with torch.no_grad():
            expected = theirs(TOKENS).logits
    except Exception:  # of many kinds
        return None
    theirs.save_pretrained(directory)
    try:
        ours, _ = pretrained.load(directory)
    except UserError as error:
        names = (field, *("rope scaling", "truncate", "short_factor") * (field == "rope_parameters"))
        return "" if any(name in str(error) for name in names) else f"refused, not by its name: {error}"
    with torch.no_grad():
        far = float((ours.logits(ours(TOKENS)) - expected).abs().max())
    return "" if far <= 1e-4 else f"logits differ by {far:.2g}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_config_is_followed_or_refused_by_its_name(family, tmp_path):
    rows = rows_of(family)
    base = BASES.get(family, LLAMA) | {key: EXPERTS[key] for key in EXPERTS if "experts" in str(rows)}
    problems = {f"{field}: {change}": disagreement(family, base | change, field, tmp_path) for field, change in rows}
    wrong = [f"{row}: {problem}" for row, problem in problems.items() if problem]
    assert not wrong, "\n".join(wrong)
    refused = [row for row, problem in problems.items() if problem is None]
    assert all(row.split(":")[0] in REFUSED for row in refused), refused


REFUSED = ("rope_parameters", "layer_types", "sliding_window")
"""Fields whose values here transformers itself does not take in every family."""
