"""The settings of a decoder as the metadata of a GGUF file, and back: what our families are called in llama.cpp.

Facts from llama.cpp's conversion scripts and its src/models. A setting that the other side has no place for is refused
by name, in both directions: what is written is read back and compared.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from penstock.models.config import DecoderConfig
from penstock.models.families import FAMILIES, llama


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's. Example: Architecture("llama", "llama", turned=True)."""

    family: str
    """Our family, as config.json's model_type."""
    name: str
    """llama.cpp's general.architecture."""
    turned: bool = False
    """Rows of queries and keys that rotate together are neighbours there; in Hugging Face's files they are half a head
    apart (llama.cpp undoes what Hugging Face's conversion of Llama did)."""
    rotary: bool = True
    norm_shift: float = 0.0
    """What weights of norms are larger by there (Gemma)."""
    period: int = 0
    """Every which layer sees everything, the others a window, where the file does not say; 0: llama.cpp has no windows,
    and behind one it sees more than was trained."""
    more: tuple[tuple[str, str, str], ...] = ()
    """Further settings: a field of DecoderConfig, its key there, its key in config.json."""


ARCHITECTURES = (
    Architecture("gpt2", "gpt2", rotary=False),
    Architecture("bloom", "bloom", rotary=False),
    Architecture("gpt_neox", "gptneox"),
    Architecture("llama", "llama", turned=True),
    Architecture("mistral", "llama", turned=True),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3"),
    Architecture("gemma2", "gemma2", norm_shift=1.0, period=2, more=(
        ("attention_softcap", "attn_logit_softcapping", "attn_logit_softcapping"),
        ("logit_softcap", "final_logit_softcapping", "final_logit_softcapping"))),
    Architecture("gemma3_text", "gemma3", norm_shift=1.0, period=6, more=(
        ("logit_softcap", "final_logit_softcapping", "final_logit_softcapping"),)),
    Architecture("granite", "granite", turned=True, more=(
        ("embed_scale", "embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_scale", "residual_multiplier"),
        ("attention_scale", "attention.scale", "attention_multiplier"),
        ("logit_divisor", "logit_scale", "logits_scaling"))),
    Architecture("smollm3", "smollm3", turned=True),
    Architecture("phi3", "phi3"),
)  # fmt: skip
KEYS = {
    "vocab_size": "vocab_size",
    "max_length": "context_length",
    "d_model": "embedding_length",
    "num_layers": "block_count",
    "d_ff": "feed_forward_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rotary_dim": "rope.dimension_count",
    "rope_theta": "rope.freq_base",
    "parallel_residual": "use_parallel_residual",
}
"""Fields of DecoderConfig: their keys behind the architecture's name."""
EPS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
GEMMA_SCALES = {("gemma2", 46), ("gemma3_text", 62)}
"""Those of 27B, by their layers: their scores are divided by the root of d_model / num_heads, others' of head_dim."""
ORIGINAL, WINDOW_THETA = "rope.scaling.original_context_length", "rope.freq_base_swa"
SCALING, FACTOR = "rope.scaling.type", "rope.scaling.factor"
FREQUENCIES = "rope_freqs.weight"
"""A tensor: what Llama 3's rope scaling divides each frequency by."""
NEUTRAL = {
    "attention.causal": (True,), "expert_count": (0,), "expert_used_count": (0,),
    "rope.scaling.finetuned": (True, False),
    "rope.scale_linear": (1.0,), "tensor_data_layout": ("Meta AI original pth",), "rope.scaling.attn_factor": (1.0,),
}  # fmt: skip
"""Keys that we do not follow, and their values that say nothing new."""
HEAD, QKV_BIAS, MLP_BIAS = "output.weight", ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"), ("blk.0.ffn_up.bias",)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def architecture_of(family: str) -> Architecture:
    """Of our family. Raises ValueError where llama.cpp has none."""
    for architecture in ARCHITECTURES:
        if architecture.family == family:
            return architecture
    known = ", ".join(dict.fromkeys(a.family for a in ARCHITECTURES))
    raise ValueError(f"llama.cpp does not know the family {family}; of ours it knows {known}")


def architecture_named(meta: Mapping[str, Any]) -> Architecture:
    """Of a file. Mistral's files are llama's there, with a window. Raises ValueError for those that are not read."""
    name = meta.get("general.architecture")
    named = [architecture for architecture in ARCHITECTURES if architecture.name == name]
    if not named:
        known = ", ".join(dict.fromkeys(a.name for a in ARCHITECTURES))
        raise ValueError(f"general.architecture: {name!r} is not read here; known are {known}")
    return named[-1 if meta.get(f"{name}.{WINDOW}") else 0]


def settings_of(config: DecoderConfig) -> dict[str, Any]:
    """The metadata of a decoder, by key without the architecture's name in front."""
    architecture = architecture_of(config.family)
    settings = {key: getattr(config, ours) for ours, key in KEYS.items()}
    if not architecture.rotary:
        settings = {key: value for key, value in settings.items() if not key.startswith("rope.")}
    settings |= {"attention.value_length": config.head_dim, EPS[config.norm]: config.norm_eps}
    settings |= {key: getattr(config, ours) for ours, key, _ in architecture.more if getattr(config, ours)}
    if any(config.windows):
        settings[WINDOW] = max(config.windows)
        sliding = [bool(window) for window in config.windows]
        if architecture.period and sliding != _sliding(architecture.period, config.num_layers):
            settings[PATTERN] = sliding
    if config.window_rope:
        settings[WINDOW_THETA] = dict(config.window_rope)["rope_theta"]
    scaling = dict(config.rope_scaling)
    if "original_max_position_embeddings" in scaling:
        settings[ORIGINAL] = scaling["original_max_position_embeddings"]
    if scaling and scaling["rope_type"] not in ("llama3", "linear", "yarn"):
        raise ValueError(f"rope scaling {scaling['rope_type']!r} is not written; llama3, linear and yarn are")
    if scaling and scaling["rope_type"] != "llama3":
        settings |= {SCALING: scaling["rope_type"], FACTOR: scaling["factor"]}
    return settings


def config_json(
    meta: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], frequencies: np.ndarray | None
) -> dict[str, Any]:
    """config.json from a file's metadata and its tensors' shapes; `frequencies`: the tensor of that name.

    Raises ValueError for what it says and we do not do, by its key.
    """
    architecture = architecture_named(meta)
    start = f"{architecture.name}."
    settings = {key.removeprefix(start): value for key, value in meta.items() if key.startswith(start)}
    family = FAMILIES[architecture.family]
    fields = getattr(family, "FIELDS", llama.FIELDS)
    values = {ours: settings[key] for ours, key in KEYS.items() if key in settings}
    eps = [settings[key] for key in EPS.values() if key in settings]
    values |= {"norm_eps": _short(eps[0])} if eps else {}
    values["vocab_size"] = tensors["token_embd.weight"][0]
    values.setdefault("head_dim", values["d_model"] // max(values["num_heads"], 1))
    values.setdefault("num_kv_heads", values["num_heads"])
    facts = {
        "tied": HEAD not in tensors,
        "qkv_bias": any(name in tensors for name in QKV_BIAS),
        "mlp_bias": any(name in tensors for name in MLP_BIAS),
    }
    hf = {_key(fields[ours]): value for ours, value in (values | facts).items() if ours in fields}
    hf["model_type"] = architecture.family
    if architecture.family == "gpt2":
        hf["n_inner"] = values["d_ff"]
    if architecture.rotary:
        hf["rope_parameters"] = _rope(settings, values, frequencies)
    hf |= {theirs: _short(settings[key]) for _, key, theirs in architecture.more if key in settings}
    if WINDOW in settings or architecture.period:
        hf |= _windows(architecture, settings, values["num_layers"])
    if architecture.name.startswith("gemma"):
        whole = (architecture.family, values["num_layers"]) in GEMMA_SCALES
        hf["query_pre_attn_scalar"] = values["d_model"] // values["num_heads"] if whole else values["head_dim"]
    if architecture.family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": _short(settings.get(WINDOW_THETA, 10_000.0))}
        hf["rope_parameters"] = {"full_attention": hf["rope_parameters"], "sliding_attention": local}
    elif architecture.family == "gemma2":  # null, which its config class has another default for
        hf = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping")) | hf
    _check(architecture, settings, values, family.config_from_hf(hf))
    return hf


def _windows(architecture: Architecture, settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The keys of config.json about windows, of `count` layers."""
    if not architecture.period:
        return {"sliding_window": settings[WINDOW]}
    window = settings.get(WINDOW, 4096 if architecture.family == "gemma2" else 0)
    pattern = settings.get(PATTERN, architecture.period)
    sliding = pattern if isinstance(pattern, list) else _sliding(pattern, count)
    kinds = ["sliding_attention" if slides and window else "full_attention" for slides in sliding[:count]]
    return {"sliding_window": window or None, "layer_types": kinds}


def _sliding(period: int, count: int) -> list[bool]:
    return [(i + 1) % period != 0 for i in range(count)]


def _rope(settings: Mapping[str, Any], values: Mapping[str, Any], frequencies: np.ndarray | None) -> dict[str, Any]:
    theta = _short(values.get("rope_theta", 10_000.0))
    rope = {"rope_type": "default", "rope_theta": theta}
    rotating = values.get("rotary_dim", values["head_dim"])
    if rotating != values["head_dim"] or "parallel_residual" in values:  # GPT-NeoX's default is a quarter
        rope["partial_rotary_factor"] = rotating / values["head_dim"]
    if (kind := settings.get(SCALING, "none")) != "none":
        original = {"original_max_position_embeddings": settings[ORIGINAL]} if ORIGINAL in settings else {}
        return rope | {"rope_type": kind, "factor": _short(settings.get(FACTOR, 1.0))} | original
    if frequencies is None:
        return rope
    original = settings.get(ORIGINAL, LLAMA3["original_max_position_embeddings"])
    numbers = LLAMA3 | {"factor": _short(frequencies.max()), "original_max_position_embeddings": original}
    divisors = llama3_divisors(theta, rotating, **numbers)
    if divisors.shape != frequencies.shape or not np.allclose(divisors, frequencies, rtol=1e-4):
        raise ValueError(f"{FREQUENCIES}: is not Llama 3's rope scaling of {original} tokens; that alone is read")
    return rope | {"rope_type": "llama3"} | numbers


def llama3_divisors(
    theta: float,
    rotating: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """[rotating / 2] fp32: what Llama 3.1's rope scaling divides each frequency by (`positions.rope_frequencies`)."""
    frequencies = theta ** -(np.arange(0, rotating, 2, dtype=np.float64) / rotating)
    turns = original_max_position_embeddings * frequencies / (2 * np.pi)
    smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clip(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _check(
    architecture: Architecture, settings: Mapping[str, Any], values: Mapping[str, Any], config: DecoderConfig
) -> None:
    """Raises ValueError for a key that we do not know, and for one whose value our family does not take."""
    known = {*KEYS.values(), *EPS.values(), WINDOW, ORIGINAL, SCALING, FACTOR}
    known |= {key for _, key, _ in architecture.more} | ({PATTERN, WINDOW_THETA} if architecture.period else set())
    for key, value in settings.items():
        if key == "attention.value_length" and value == config.head_dim:
            continue
        if key not in known and value not in NEUTRAL.get(key, ()):
            raise ValueError(f"{architecture.name}.{key}: {value!r} is not supported")
    for ours, value in values.items():
        taken = getattr(config, ours)
        if ours in KEYS and ours != "rope_theta" and taken != value:
            raise ValueError(f"{architecture.name}.{KEYS[ours]}: {value!r} is not supported; the family has {taken!r}")


def check_written(config: DecoderConfig, meta: Mapping[str, Any], tensors: Mapping[str, Sequence[int]],
                  frequencies: np.ndarray | None) -> list[str]:  # fmt: skip
    """Compares what a reader of the file will see with the decoder, and returns what users must know.

    Raises ValueError that names each setting that llama.cpp has no place for.
    """
    architecture = architecture_of(config.family)
    family: ModuleType = FAMILIES[config.family]
    seen = family.config_from_hf(config_json(meta, tensors, frequencies) | {"model_type": config.family})
    names = [field.name for field in dataclasses.fields(config) if field.compare and field.name != "eos_ids"]
    lost = [name for name in names if _rounded(getattr(seen, name)) != _rounded(getattr(config, name))]
    narrow = max(config.windows, default=0)
    if "windows" in lost and not narrow:
        lost.remove("windows")
    if lost:
        shown = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(f"llama.cpp's {architecture.name} has no place for {shown}")
    if narrow and not architecture.period and narrow < config.max_length:
        return [f"llama.cpp's {architecture.name} has no attention window: it sees more than {narrow} tokens back"]
    return []


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_rounded(item) for item in value)
    return _short(value) if isinstance(value, float) else value


def _short(value: Any) -> float:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _key(key: str | tuple[str, Any]) -> str:
    return key if isinstance(key, str) else key[0]
