"""Published model shapes by name: `8b` is a GPT-2 of that size, `opt-1.3b`, `bloom-7b1`, `llama-3-8b` are those."""

import difflib
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import family_of

GPT2 = {
    # name: layers, width, heads, positions. s to xl: Radford et al. 2019; the others as in Colossal-AI's coati
    # benchmarks, so that figures compare.
    "s": (12, 768, 12, 1024), "m": (24, 1024, 16, 1024), "l": (36, 1280, 20, 1024), "xl": (48, 1600, 25, 1024),
    "2b": (40, 2048, 16, 1024), "4b": (64, 2304, 16, 1024), "6b": (30, 4096, 16, 1024), "8b": (40, 4096, 16, 1024),
    "10b": (50, 4096, 16, 1024), "12b": (60, 4096, 16, 1024), "15b": (78, 4096, 16, 1024), "18b": (90, 4096, 16, 1024),
    "20b": (25, 8192, 16, 1024), "24b": (30, 8192, 16, 1024), "28b": (35, 8192, 16, 1024), "32b": (40, 8192, 16, 1024),
    "36b": (45, 8192, 16, 1024), "40b": (50, 8192, 16, 1024), "175b": (96, 12288, 96, 2048),
}  # fmt: skip
OPT = {
    # layers, width, heads: Zhang et al. 2022, table 1
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "1.3b": (24, 2048, 32), "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32), "13b": (40, 5120, 40), "30b": (48, 7168, 56), "66b": (64, 9216, 72),
    "175b": (96, 12288, 96),
}  # fmt: skip
BLOOM = {
    # layers, width, heads: Le Scao et al. 2022, table 3
    "560m": (24, 1024, 16), "1b1": (24, 1536, 16), "1b7": (24, 2048, 16), "3b": (30, 2560, 32),
    "7b1": (30, 4096, 32), "176b": (70, 14336, 112),
}  # fmt: skip
LLAMA = {
    # layers, width, heads, key and value heads, feed-forward, vocabulary: Touvron et al. 2023a, table 2; 2024, table 3
    "7b": (32, 4096, 32, 32, 11008, 32000), "13b": (40, 5120, 40, 40, 13824, 32000),
    "30b": (60, 6656, 52, 52, 17920, 32000), "65b": (80, 8192, 64, 64, 22016, 32000),
    "3-8b": (32, 4096, 32, 8, 14336, 128256), "3-70b": (80, 8192, 64, 8, 28672, 128256),
}  # fmt: skip

NAMES = [
    *GPT2, *(f"opt-{name}" for name in OPT), *(f"bloom-{name}" for name in BLOOM), *(f"llama-{name}" for name in LLAMA)
]  # fmt: skip


def named(name: str) -> DecoderConfig:
    """The decoder of that name. Raises ValueError with the nearest ones for a name that is not in NAMES."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=3) or NAMES
        raise ValueError(f"no size {name!r}; there are {', '.join(near)}")
    hf: dict[str, Any]
    family, _, size = name.rpartition("-") if name in GPT2 else name.partition("-")
    if family == "opt":
        layers, width, heads = OPT[size]
        hf = {
            "vocab_size": 50272, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
            "ffn_dim": 4 * width,
        }  # fmt: skip
        if size == "350m":
            hf |= {"do_layer_norm_before": False, "word_embed_proj_dim": 512}
    elif family == "bloom":
        layers, width, heads = BLOOM[size]
        hf = {"vocab_size": 250880, "n_layer": layers, "hidden_size": width, "n_head": heads}
    elif family == "llama":
        layers, width, heads, kv_heads, d_ff, vocabulary = LLAMA[size]
        hf = {
            "model_type": "llama", "vocab_size": vocabulary, "num_hidden_layers": layers, "hidden_size": width,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": d_ff,
        }  # fmt: skip
    else:
        family = "gpt2"
        layers, width, heads, positions = GPT2[name]
        hf = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": positions}
    return family_of(family, name).config_from_hf(hf)
