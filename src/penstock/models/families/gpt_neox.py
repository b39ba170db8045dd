"""GPT-NeoX and Pythia (Black et al. 2022): partly rotary heads, attention and MLP in parallel, untied head."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families.rope import rope, rope_parameters, rotary
from penstock.models.families.settings import Fields, read, write
from penstock.models.families.weights import Weight, pair

CAUSAL_LM, CLASSIFIER = "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"
PREFIX, HEAD = "gpt_neox.", "embed_out.weight"
HEAD_MODULE = "lm_head"  # what transformers 5 calls the module whose weight it saves as embed_out
TOP = (Weight("embed.tokens", ("embed_in.weight",)), *pair("norm", "final_layer_norm"))
BLOCK = (
    *pair("norm1", "layers.{}.input_layernorm"),
    *pair("qkv", "layers.{}.attention.query_key_value", layout="interleaved"),
    *pair("out", "layers.{}.attention.dense"),
    *pair("norm2", "layers.{}.post_attention_layernorm"),
    *pair("up", "layers.{}.mlp.dense_h_to_4h"),
    *pair("down", "layers.{}.mlp.dense_4h_to_h"),
)
FIELDS: Fields = {
    "family": ("model_type", "gpt_neox"),
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_length": ("max_position_embeddings", 2048),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "activation": ("hidden_act", "gelu"),
    "parallel_residual": ("use_parallel_residual", True),
    "qkv_bias": ("attention_bias", True),
    "tied": ("tie_word_embeddings", False),
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """GPTNeoXConfig -> DecoderConfig."""
    theta, share, scaling = rope(hf, theta="rotary_emb_base", share="rotary_pct")
    fields = read(hf, FIELDS)
    fields |= rotary(fields, int(fields["head_dim"] * (0.25 if share is None else share)), theta, scaling)
    return DecoderConfig(**fields, out_bias=fields["qkv_bias"])


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> GPTNeoXConfig."""
    rotary = {"partial_rotary_factor": 1.0, **rope_parameters(config)}  # theirs is 0.25 where the file has none
    return {**write(config, FIELDS), "rotary_pct": rotary["partial_rotary_factor"], "rope_parameters": rotary}
