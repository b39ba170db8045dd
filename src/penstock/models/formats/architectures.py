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
from penstock.models.positions import attention_factor


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
    """Where the file does not say: every layer of that number sees everything, the others a window. 0: llama.cpp has no
    windows, and behind one it sees more than was trained."""
    marker: str = ""
    """The key that its files have and those of others of the same name have not."""
    always: tuple[tuple[str, Any], ...] = ()
    """What llama.cpp's code says of config.json, and the file does not."""
    more: tuple[tuple[str, str, str], ...] = ()
    """Further settings: a field of DecoderConfig, its key there, its key in config.json."""


WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
TEMPERATURE = "attention.temperature_scale"
COUNTS = ("experts_per_token", "expert_used_count", "num_experts_per_tok")
ARCHITECTURES = (
    Architecture("gpt2", "gpt2", rotary=False),
    Architecture("bloom", "bloom", rotary=False),
    Architecture("gpt_neox", "gptneox"),
    Architecture("ministral", "llama", turned=True),
    Architecture("llama", "llama", turned=True),
    Architecture("mistral", "llama", turned=True, marker=WINDOW),
    Architecture("mixtral", "llama", turned=True, marker="expert_count", more=(
        ("num_experts", "expert_count", "num_local_experts"), COUNTS)),
    Architecture("mistral", "mistral3", turned=True),
    Architecture("ministral3", "mistral3", turned=True, marker=TEMPERATURE),
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
    Architecture("olmo2", "olmo2"),
    Architecture("olmo3", "olmo2", period=4, marker=WINDOW),
    Architecture("qwen3_moe", "qwen3moe", always=(("norm_topk_prob", True),), more=(
        ("num_experts", "expert_count", "num_experts"), COUNTS,
        ("expert_ff", "expert_feed_forward_length", "moe_intermediate_size"))),
    Architecture("gpt_oss", "gpt-oss", period=2, always=(("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)), more=(
        ("num_experts", "expert_count", "num_local_experts"), COUNTS,
        ("expert_ff", "expert_feed_forward_length", "intermediate_size"))),
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
GEMMA_SCALES = {("gemma2", 46), ("gemma3_text", 62)}
"""Those of 27B, by their layers: their scores are divided by the root of d_model / num_heads, others' of head_dim."""
ORIGINAL, WINDOW_THETA = "rope.scaling.original_context_length", "rope.freq_base_swa"
SCALING, FACTOR = "rope.scaling.type", "rope.scaling.factor"
YARN = {
    "beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow",
    "attention_factor": "rope.scaling.yarn_attn_factor", "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
    "llama_4_scaling_beta": TEMPERATURE,
}  # fmt: skip
"""Numbers of yarn: their keys. llama.cpp follows them in mistral3's files, in others it has its defaults."""
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
WITH_OUT_BIAS = ("gpt2", "bloom", "gptneox", "llama", "mistral3", "granite", "gpt-oss")
WITH_BIASES = ("gptneox", "gpt-oss")
WITH_OWN_HEAD, WITH_SQUARE_OUT = ("gptneox", "olmo2", "gpt-oss"), ("qwen2", "phi3", "olmo2")
"""Those that read a bias behind attention; that need its biases, or a head of its own; whose heads together are as wide
as states."""
UNSAID = ("eos_ids", "router_aux_loss_coef", "part_of")
"""Fields of DecoderConfig that are no part of what a model computes, or that the tokenizer says."""
INSTEAD = "export it without --format gguf, for what runs files of transformers"
FREQUENCIES = "rope_freqs.weight"
"""A tensor: what Llama 3's rope scaling divides each frequency by."""
LONGROPE = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
"""The same of Phi-3's longrope, by config.json's keys."""
TABLES, HEAT = (FREQUENCIES, *LONGROPE.values()), "rope.scaling.attn_factor"
NEUTRAL = {
    "attention.causal": (True,), "expert_count": (0,), "expert_used_count": (0,),
    "rope.scaling.finetuned": (True, False), "rope.scaling.yarn_ext_factor": (1.0,),
    TEMPERATURE: (0.0,),
    "rope.scale_linear": (1.0,), "tensor_data_layout": ("Meta AI original pth",), HEAT: (1.0,),
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
    raise ValueError(f"llama.cpp does not know the family {family}; of ours it knows {known}; {INSTEAD}")


def architecture_named(meta: Mapping[str, Any]) -> Architecture:
    """Of a file: Mistral's and Mixtral's are llama's there. Raises ValueError for those that are not read."""
    name = meta.get("general.architecture")
    named = [architecture for architecture in ARCHITECTURES if architecture.name == name]
    if not named:
        known = ", ".join(dict.fromkeys(a.name for a in ARCHITECTURES))
        raise ValueError(f"general.architecture: {name!r} is not read here; known are {known}")
    return [each for each in named if not each.marker or meta.get(f"{name}.{each.marker}")][-1]


def settings_of(config: DecoderConfig) -> dict[str, Any]:
    """The metadata of a decoder, by key without the architecture's name in front."""
    architecture = architecture_of(config.family)
    if lost := _not_loaded(config, architecture.name):
        raise ValueError(_no_place(config, architecture, lost))
    settings = {key: getattr(config, ours) for ours, key in KEYS.items()}
    if not architecture.rotary:
        settings = {key: value for key, value in settings.items() if not key.startswith("rope.")}
    settings["context_length"] = config.declared_length or config.max_length
    settings |= {"attention.value_length": config.head_dim, EPS[config.norm]: config.norm_eps}
    settings |= {key: getattr(config, ours) for ours, key, _ in architecture.more if getattr(config, ours)}
    if any(config.windows):
        settings[WINDOW] = max(config.windows)
        sliding = [bool(window) for window in config.windows]
        if architecture.period and sliding != _sliding(architecture.period, config.num_layers):
            settings[PATTERN] = sliding
    if config.window_rope:
        settings[WINDOW_THETA] = dict(config.window_rope)["rope_theta"]
    return settings | _scaling_settings(architecture, dict(config.rope_scaling))


def _scaling_settings(architecture: Architecture, scaling: dict[str, Any]) -> dict[str, Any]:
    """The metadata of rope scaling."""
    settings: dict[str, Any] = {}
    if "original_max_position_embeddings" in scaling:
        settings[ORIGINAL] = scaling["original_max_position_embeddings"]
    kind = scaling.get("rope_type", "llama3")
    if kind == "longrope" and architecture.name == "phi3":
        settings[HEAT] = attention_factor(scaling)
    elif kind not in ("llama3", "linear", "yarn"):
        raise ValueError(f"rope scaling {kind!r} is not written; llama3, linear and yarn are, and Phi-3's longrope")
    elif kind != "llama3":
        settings |= {SCALING: scaling["rope_type"], FACTOR: float(scaling["factor"])}
    if architecture.name == "mistral3":
        settings |= {key: float(scaling[ours]) for ours, key in YARN.items() if scaling.get(ours) is not None}
        if "mscale_all_dim" in scaling and scaling.get("mscale") != 1:  # llama.cpp takes 1
            del settings[YARN["mscale_all_dim"]]
    return settings


def config_json(
    meta: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], tables: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """config.json from a file's metadata, its tensors' shapes, and those of its tensors that are TABLES.

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
    hf |= {"model_type": architecture.family, **dict(architecture.always)}
    if architecture.family == "gpt2":
        hf["n_inner"] = values["d_ff"]
    if architecture.rotary:
        hf["rope_parameters"] = _rope(architecture, settings, values, tables)
    hf |= {theirs: _rounded(settings[key]) for _, key, theirs in architecture.more if key in settings}
    if WINDOW in settings or architecture.period:
        hf |= _windows(architecture, settings, values["num_layers"])
    if architecture.name.startswith("gemma"):
        whole = (architecture.family, values["num_layers"]) in GEMMA_SCALES
        hf["query_pre_attn_scalar"] = values["d_model"] // values["num_heads"] if whole else values["head_dim"]
    if architecture.family in ("gemma3_text", "olmo3"):
        theta = 10_000.0 if architecture.family == "gemma3_text" else hf["rope_parameters"]["rope_theta"]
        local = {"rope_type": "default", "rope_theta": _short(settings.get(WINDOW_THETA, theta))}
        hf["rope_parameters"] = {"full_attention": hf["rope_parameters"], "sliding_attention": local}
    elif architecture.family == "phi3" and ORIGINAL in settings:  # beside it: rope_parameters' own does not count
        hf["original_max_position_embeddings"] = settings[ORIGINAL]
    elif architecture.family == "gemma2":  # null, which its config class has another default for
        hf = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping")) | hf
    _check(architecture, settings, values, family.config_from_hf(hf))
    return hf


def _windows(architecture: Architecture, settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The keys of config.json about windows, of `count` layers."""
    if not architecture.period:
        return {"sliding_window": settings[WINDOW] or None}  # Phi-4's files have 0
    window = settings.get(WINDOW, 4096 if architecture.family == "gemma2" else 0)
    pattern = settings.get(PATTERN, architecture.period)
    sliding = pattern if isinstance(pattern, list) else _sliding(pattern, count)
    kinds = ["sliding_attention" if slides and window else "full_attention" for slides in sliding[:count]]
    return {"sliding_window": window or None, "layer_types": kinds}


def _sliding(period: int, count: int) -> list[bool]:
    return [(i + 1) % period != 0 for i in range(count)]


def _rope(
    architecture: Architecture, settings: Mapping[str, Any], values: Mapping[str, Any], tables: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    theta = _short(values.get("rope_theta", 10_000.0))
    rope = {"rope_type": "default", "rope_theta": theta}
    rotating = values.get("rotary_dim", values["head_dim"])
    if rotating != values["head_dim"] or "parallel_residual" in values:  # GPT-NeoX's default is a quarter
        rope["partial_rotary_factor"] = rotating / values["head_dim"]
    if (kind := settings.get(SCALING, "none")) != "none":
        original = {"original_max_position_embeddings": settings[ORIGINAL]} if ORIGINAL in settings else {}
        rope |= {"rope_type": kind, "factor": _short(settings.get(FACTOR, 1.0))} | original
        return rope | _yarn(architecture, settings) if kind == "yarn" else rope
    if architecture.name == "phi3" and tables:
        lists = {key: [_short(number) for number in tables[name]] for key, name in LONGROPE.items()}
        return rope | lists | {"rope_type": "longrope", "attention_factor": _short(settings.get(HEAT, 1.0))}
    if (frequencies := tables.get(FREQUENCIES)) is None:
        return rope
    original = settings.get(ORIGINAL, LLAMA3["original_max_position_embeddings"])
    numbers = LLAMA3 | {"factor": _short(frequencies.max()), "original_max_position_embeddings": original}
    divisors = llama3_divisors(theta, rotating, **numbers)
    if divisors.shape != frequencies.shape or not np.allclose(divisors, frequencies, rtol=1e-4):
        raise ValueError(f"{FREQUENCIES}: is not Llama 3's rope scaling of {original} tokens; that alone is read")
    return rope | {"rope_type": "llama3"} | numbers


def _yarn(architecture: Architecture, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The further numbers of a yarn rope. A log multiplier of 0 is none."""
    numbers = {ours: _short(settings[key]) for ours, key in YARN.items() if settings.get(key)}
    numbers |= {"mscale": 1.0} if "mscale_all_dim" in numbers else {}
    return numbers | ({"truncate": False} if architecture.family == "gpt_oss" else {})


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
    if dict(config.rope_scaling).get("rope_type") == "longrope":
        known |= {HEAT}
    if settings.get(SCALING) == "yarn":
        known |= {key for key in YARN.values() if key != TEMPERATURE or architecture.family == "ministral3"}
    known |= {key for _, key, _ in architecture.more} | ({PATTERN, WINDOW_THETA} if architecture.period else set())
    for key, value in settings.items():
        if key == "attention.value_length" and value == config.head_dim:
            continue
        if key not in known and value not in NEUTRAL.get(key, ()):
            raise ValueError(f"{architecture.name}.{key}: {value!r} is not supported")
    for ours, value in values.items():
        taken = config.declared_length if ours == "max_length" and config.declared_length else getattr(config, ours)
        if ours in KEYS and ours != "rope_theta" and taken != value:
            raise ValueError(f"{architecture.name}.{KEYS[ours]}: {value!r} is not supported; the family has {taken!r}")


def check_written(config: DecoderConfig, meta: Mapping[str, Any], tensors: Mapping[str, Sequence[int]],
                  tables: Mapping[str, np.ndarray]) -> list[str]:  # fmt: skip
    """Compares what a reader of the file will see with the decoder, and returns what users must know.

    Raises ValueError that names each setting that llama.cpp has no place for.
    """
    architecture = architecture_of(config.family)
    family: ModuleType = FAMILIES[config.family]
    seen = family.config_from_hf(config_json(meta, tensors, tables) | {"model_type": config.family})
    names = [field.name for field in dataclasses.fields(config) if field.compare and field.name not in UNSAID]
    lost = [name for name in names if _meaning(getattr(seen, name)) != _meaning(getattr(config, name))]
    narrow = max(config.windows, default=0)
    if "windows" in lost and not narrow:
        lost.remove("windows")
    if lost:
        raise ValueError(_no_place(config, architecture, lost))
    notes = []
    if narrow and not architecture.period and narrow < config.max_length:
        notes.append(f"llama.cpp's {architecture.name} has no attention window: it sees more than {narrow} tokens back")
    if dict(config.rope_scaling).get("rope_type") == "longrope" and config.declared_length > config.max_length:
        longest = config.max_length
        notes.append(
            f"llama.cpp turns by the long factors where its context is above {longest}: run it with -c {longest}"
        )
    if dict(config.rope_scaling).get("truncate") is False:
        notes.append(f"llama.cpp's {architecture.name} rounds the ends of yarn's ramp, and turns some angles otherwise")
    return notes


def _no_place(config: DecoderConfig, architecture: Architecture, lost: Sequence[str]) -> str:
    shown = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
    hint = " (where no row is longer than the window, config.json without it means the same)" * ("windows" in lost)
    return f"llama.cpp's {architecture.name} has no place for {shown}{hint}; {INSTEAD}"


def _not_loaded(config: DecoderConfig, name: str) -> list[str]:
    """Fields whose tensors llama.cpp does not load in this architecture, or has other shapes of."""
    theta = dict(config.window_rope).get("rope_theta", config.rope_theta)
    refused = {
        "tied": config.tied and name in WITH_OWN_HEAD, "out_bias": config.out_bias and name not in WITH_OUT_BIAS,
        "head_dim": config.head_dim * config.num_heads != config.d_model and name in WITH_SQUARE_OUT,
        "qkv_bias": not config.qkv_bias and name in WITH_BIASES, "dense_layers": bool(config.dense_layers),
        "window_rope": theta != config.rope_theta and name == "olmo2",
    }  # fmt: skip
    return [field for field, is_so in refused.items() if is_so]


def _meaning(value: Any) -> Any:
    """A field as it is compared: of rope scaling what its numbers amount to, however they are written."""
    numbers = dict(value) if isinstance(value, tuple) and value and isinstance(value[0], tuple) else {}
    heated = {"yarn": ("mscale", "mscale_all_dim"), "longrope": ("factor",)}.get(numbers.get("rope_type", ""))
    if heated is None:
        return _rounded(value)
    numbers = (YARN_DEFAULTS if "mscale" in heated else {}) | numbers | {"attention_factor": attention_factor(numbers)}
    return sorted((key, _rounded(number)) for key, number in numbers.items() if key not in heated)


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_rounded(item) for item in value)
    return _short(value) if isinstance(value, float) else value


def _short(value: Any) -> float:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _key(key: str | tuple[str, Any]) -> str:
    return key if isinstance(key, str) else key[0]
