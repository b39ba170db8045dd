"""Models that people have, planned from what their config.json says, without weights: parameters as published.

The counts are those of the files at huggingface.co (safetensors metadata).
"""

import json
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
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_planned_from_its_config_with_the_published_parameters(name, tmp_path, capsys):
    parameters, config = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main(["plan", "--stage", "sft", "--model", str(tmp_path), "--prompt-length", "512", "--json"])
    planned = json.loads(capsys.readouterr().out)["parameters"]
    assert list(planned.values()) == [pytest.approx(parameters, rel=1e-3)]
