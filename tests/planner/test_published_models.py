"""Models that people have, planned from what their config.json says, without weights: parameters as published.

The counts are those of the files at huggingface.co (safetensors metadata).
"""

import json
import re
from typing import Any

import pytest

from penstock.cli import main

Config = dict[str, Any]


def shape(
    model_type: str, layers: int, width: int, heads: int, groups: int, d_ff: int, vocabulary: int, context: int, **other
) -> Config:
    return {
        "model_type": model_type, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": d_ff, "vocab_size": vocabulary,
        "max_position_embeddings": context, "tie_word_embeddings": False, **other,
    }  # fmt: skip


TIED = {"tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
PHI4_MINI = {
    "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [
        1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
        2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
        6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
        16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
        32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
    ],
}  # fmt: skip
OLMO3 = {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.2079441541679836,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
GPT_OSS = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
PUBLISHED: dict[str, tuple[int, Config]] = {
    # name: parameters, config.json
    "Llama 3.1 8B": (8_030_261_248, shape("llama", 32, 4096, 32, 8, 14336, 128256, 131072, rms_norm_eps=1e-5,
        rope_theta=500000.0, rope_scaling=LLAMA3)),
    "Mistral 7B v0.3": (7_248_023_552, shape("mistral", 32, 4096, 32, 8, 14336, 32768, 32768, rms_norm_eps=1e-5,
        rope_theta=1000000.0, sliding_window=None)),
    "Mistral Nemo 12B": (12_247_782_400, shape("mistral", 40, 5120, 32, 8, 14336, 131072, 131072, head_dim=128,
        rope_theta=1000000.0, sliding_window=None)),
    "Qwen2.5 7B": (7_615_616_512, shape("qwen2", 28, 3584, 28, 4, 18944, 152064, 32768, rope_theta=1000000.0,
        use_sliding_window=False, sliding_window=131072, max_window_layers=28)),
    "Qwen3 32B": (32_762_123_264, shape("qwen3", 64, 5120, 64, 8, 25600, 151936, 40960, head_dim=128,
        rope_theta=1000000, use_sliding_window=False, sliding_window=None, max_window_layers=64)),
    "Phi-3-mini 4k": (3_821_079_552, shape("phi3", 32, 3072, 32, 32, 8192, 32064, 4096, sliding_window=2047,
        original_max_position_embeddings=4096, rope_scaling=None, rope_theta=10000.0, attention_bias=False)),
    "Phi-4": (14_659_507_200, shape("phi3", 40, 5120, 40, 10, 17920, 100352, 16384, rope_theta=250000,
        original_max_position_embeddings=16384, rope_scaling=None, sliding_window=None, attention_bias=False)),
    "Phi-4-mini": (3_836_021_760, shape("phi3", 32, 3072, 24, 8, 8192, 200064, 131072, **TIED,
        original_max_position_embeddings=4096, partial_rotary_factor=0.75, rope_scaling=PHI4_MINI, rope_theta=10000.0,
        sliding_window=262144, attention_bias=False, mlp_bias=False, lm_head_bias=False)),
    "OLMo 2 13B": (13_716_198_400, shape("olmo2", 40, 5120, 40, 40, 13824, 100352, 4096, rms_norm_eps=1e-6,
        rope_theta=500000, rope_scaling=None, attention_bias=False)),
    "OLMo 3 7B": (7_298_011_136, shape("olmo3", 32, 4096, 32, 32, 11008, 100278, 65536, rms_norm_eps=1e-6,
        rope_theta=500000, rope_scaling=OLMO3, sliding_window=4096, attention_bias=False)),
    "Gemma 2 9B": (9_241_705_984, shape("gemma2", 42, 3584, 16, 8, 14336, 256000, 8192, **TIED, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, sliding_window=4096, rope_theta=10000.0,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, attention_bias=False)),
    "Gemma 3 27B, its text": (27_009_002_240, shape("gemma3_text", 62, 5376, 32, 16, 21504, 262208, 131072, **TIED,
        head_dim=128, query_pre_attn_scalar=168, sliding_window=1024, sliding_window_pattern=6,
        rope_theta=1000000.0, rope_scaling={"factor": 8.0, "rope_type": "linear"})),
    "Granite 3.3 8B": (8_170_864_640, shape("granite", 40, 4096, 32, 8, 12800, 49159, 131072, **TIED, rms_norm_eps=1e-5,
        rope_theta=10000000.0, rope_scaling=None, embedding_multiplier=12.0, residual_multiplier=0.22,
        attention_multiplier=0.0078125, logits_scaling=16.0, attention_bias=False, mlp_bias=False)),
    "SmolLM3 3B": (3_075_098_624, shape("smollm3", 36, 2048, 16, 4, 11008, 128256, 65536, **TIED, rope_theta=5000000.0,
        rope_scaling=None, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, use_sliding_window=False,
        sliding_window=None, max_window_layers=28, attention_bias=False, mlp_bias=False)),
    "Mixtral 8x7B": (46_702_792_704, shape("mixtral", 32, 4096, 32, 8, 14336, 32000, 32768, rms_norm_eps=1e-5,
        rope_theta=1000000.0, sliding_window=None, num_local_experts=8, num_experts_per_tok=2)),
    "Qwen3 30B A3B": (30_532_122_624, shape("qwen3_moe", 48, 2048, 32, 4, 6144, 151936, 40960, head_dim=128,
        rope_theta=1000000.0, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False, sliding_window=None)),
    "gpt-oss 20B": (20_914_757_184, shape("gpt_oss", 24, 2880, 64, 8, 2880, 201088, 131072, head_dim=64,
        rms_norm_eps=1e-5, rope_theta=150000, rope_scaling=GPT_OSS, sliding_window=128, num_local_experts=32,
        num_experts_per_tok=4, attention_bias=True, layer_types=["sliding_attention", "full_attention"] * 12)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_planned_from_its_config_with_the_published_parameters(name, tmp_path, capsys):
    parameters, config = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main(["plan", "--stage", "sft", "--model", str(tmp_path), "--prompt-length", "512", "--json"])
    planned = json.loads(capsys.readouterr().out)["parameters"]
    assert list(planned.values()) == [pytest.approx(parameters, rel=1e-3)]


def test_the_plan_of_a_mixture_says_what_a_token_meets_and_when_only_the_chosen_experts_come(tmp_path, capsys):
    config = {**PUBLISHED["Qwen3 30B A3B"][1], "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--stage", "grpo", "--lora", "16", "--strategy", "gemini_cpu", "--device-memory", "5GB"]
    with pytest.raises(SystemExit):
        main(["plan", *flags, "--model", str(tmp_path), "--rollout-batch-size", "4"])
    out = capsys.readouterr().out
    assert re.search(r"actor: 3,\d{3},\d{3},\d{3} parameters, of which a token is computed with 8\d\d,", out)
    assert re.search(r"a step of up to \d+ answers fetches the experts that they choose.*; here 4 answers", out)
