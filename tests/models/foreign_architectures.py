"""Tiny models of transformers that are not native here, by model_type: what their config says beside SMALL.

State-space layers, hybrids, mixtures of experts, latent attention, shared layers, odd heads: one of each kind that
transformers 5.23 has. Weights are random, all of them, so that a swapped or forgotten one shows.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1, "shared_expert_intermediate_size": 24,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "num_hidden_layers": 4,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
HEADS = {"head_dim": 8}
HYBRID = {"num_hidden_layers": 6, "mamba_d_state": 4, "n_mamba_heads": 2}

QUICK: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 4},  # a bias on the head, parallel residual
    "mamba": {"state_size": 4},
    "qwen3_5_text": LINEAR,  # gated delta rule and attention by turns
    "deepseek_v3": MOE | LATENT | {"first_k_dense_replace": 1},  # a buffer that files hold
    "cohere2": {
        "sliding_window": 5,
        "logit_scale": 1.5,
        "num_hidden_layers": 4,
    },  # a factor of logits; the last sees all
    "zamba": HYBRID | {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 4, "attention_hidden_size": 64},
}
"""The kinds that differ most: each test of these takes part in make test."""
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.75},
    "ctrl": {"dff": 48, "n_positions": 64},
    "cwm": HEADS | {"bos_token_id": 1},
    "deepseek_v2": MOE | LATENT | HEADS | {"first_k_dense_replace": 1},
    "diffllama": {},
    "doge": {},
    "dots1": MOE | HEADS | {"n_shared_experts": 1},
    "ernie4_5": HEADS,
    "ernie4_5_moe": MOE | {"moe_num_experts": 4, "moe_k": 2},
    "exaone4": {"sliding_window": 5, "sliding_window_pattern": 2},
    "falcon": {},
    "falcon_h1": MAMBA2 | HEADS | {"mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 4},
    "gemma": HEADS,
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": MOE | HEADS,
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "num_layers": 3, "window_size": 5},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "granitemoe": MOE,
    "granitemoehybrid": MOE | MAMBA2 | {"shared_intermediate_size": 24, "layer_types": ["mamba", "attention", "mamba"]},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "hyperclovax": {},
    "jais2": {},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
    "jetmoe": {},
    "lfm2": {"block_ff_dim": 48, "full_attn_idxs": [1]},
    "llama4_text": MOE,
    "longcat_flash": LATENT | HEADS | {
        "n_routed_experts": 4, "moe_topk": 2, "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48,
        "zero_expert_num": 1, "num_layers": 2, "num_hidden_layers": 4,
    },
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "minicpm3": LATENT,
    "minimax": MOE | HEADS,
    "moshi": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2, "max_seq_len": 64},
    "nanochat": {},
    "nemotron": HEADS,
    "nemotron_h": {},
    "olmo": {},
    "olmo_hybrid": {},
    "olmoe": MOE,
    "openai-gpt": {"n_positions": 64},
    "persimmon": {},
    "phi": {},
    "phimoe": MOE,
    "qwen2_moe": MOE,
    "qwen3_next": MOE | LINEAR,
    "recurrent_gemma": HEADS | {"lru_width": 32, "attention_window_size": 8},
    "rwkv": {"attention_hidden_size": 32, "rescale_every": 0},
    "seed_oss": HEADS,
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": HEADS,
    "xglm": {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48},
    "youtu": LATENT,
    "zamba2": HYBRID | {
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"], "mamba_d_state": 8,
        "n_mamba_heads": 8, "mamba_headdim": 8, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 4], "use_mem_rope": True,
    },
}  # fmt: skip
ALL = QUICK | OTHERS
NO_CHAIN: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": MOE
    | LATENT
    | {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2, "first_k_dense_replace": 1},
}
"""Types that are refused: their layers hand each other the tokens that attention sees."""


def reference(model_type: str, **changes: Any) -> transformers.PreTrainedModel:
    """transformers' model of that type, tiny and random."""
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | (ALL | NO_CHAIN).get(model_type, {}) | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            else:
                weight.add_(0.1 * noise)
    return model


def saved(model_type: str, directory: Path, **changes: Any) -> transformers.PreTrainedModel:
    """The same, and its files in a directory."""
    model = reference(model_type, **changes)
    model.save_pretrained(directory)
    return model
