"""Rotary positions in config.json: what they are computed from, and the longest row that this is exact for.

transformers 5 writes rope_parameters, before that rope_scaling, which wins. What a type of scaling does is in
positions.py.
"""

import math
from typing import Any

from penstock.models.config import DecoderConfig

ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("long_factor", "original_max_position_embeddings", "short_factor"),
}
"""What each type of rope scaling is computed from."""
ROPE_OPTIONS = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}
"""What it may have besides; null is as if it was not there."""
ROPE_TYPES = tuple(ROPE_NUMBERS)
KINDS = ("full_attention", "sliding_attention")
"""Kinds of layers that may have rope_parameters of their own."""


def rope(
    hf: dict[str, Any], supported: tuple[str, ...] = ROPE_TYPES, *, theta: str = "rope_theta",
    share: str = "partial_rotary_factor", options: tuple[str, ...] = (),
) -> tuple[float, float | None, tuple[tuple[str, Any], ...]]:  # fmt: skip
    """theta, the rotating share of a head, and the numbers of rope scaling with its rope_type (empty: none).

    transformers 5 writes rope_parameters, before that rope_scaling, which wins. theta, share: their older keys.
    options: what a family's scaling may have besides.
    """
    settings = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    rope_type = settings.pop("rope_type", settings.get("type", "default"))
    settings.pop("type", None)
    if rope_type not in supported:
        raise ValueError(f"rope scaling {rope_type!r} is not supported; supported: {', '.join(supported)}")
    base = float(settings.pop("rope_theta", hf.get(theta, 10_000.0)))
    rotating = settings.pop("partial_rotary_factor", hf.get(share))
    original = settings.pop("original_max_position_embeddings", hf.get("max_position_embeddings"))
    if "original_max_position_embeddings" in (needed := ROPE_NUMBERS[rope_type]):
        settings["original_max_position_embeddings"] = hf.get("original_max_position_embeddings", original)
    optional = {*ROPE_OPTIONS.get(rope_type, ()), *options}
    settings = {key: value for key, value in settings.items() if key not in optional or value is not None}
    if not set(needed) <= set(settings) <= optional | set(needed) or not all(map(_is_number, settings.values())):
        wants = " and the numbers ".join(filter(None, ("rope_theta", ", ".join(needed))))
        wants += f"; it may have {', '.join(sorted(optional))}" if optional else ""
        raise ValueError(f"rope scaling {rope_type!r} has {settings}; it is computed from {wants}")
    if rope_type == "longrope":  # as Phi-3's files leave it out
        settings.setdefault("factor", hf["max_position_embeddings"] / settings["original_max_position_embeddings"])
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    items = () if rope_type == "default" else tuple(sorted({**settings, "rope_type": rope_type}.items()))
    return base, rotating, items


def _is_number(value: Any) -> bool:
    """Or a list of numbers: longrope's factors."""
    return isinstance(value, int | float) or (isinstance(value, list) and all(map(_is_number, value)))


def rotary(
    fields: dict[str, Any], rotary_dim: int, theta: float, scaling: tuple[tuple[str, Any], ...]
) -> dict[str, Any]:
    """DecoderConfig's fields of rotary positions, and the longest row that means the same alone and in a batch: see
    [Note: a token's angle is its own]. fields: with max_length, as config.json says it."""
    values = {"position": "rotary", "rotary_dim": rotary_dim, "rope_theta": theta, "rope_scaling": scaling}
    numbers, length = dict(scaling), fields["max_length"]
    if numbers.get("rope_type") == "dynamic":
        return {**values, "declared_length": length}
    if numbers.get("rope_type") != "longrope":
        return values
    for key in ("short_factor", "long_factor"):
        if not isinstance(numbers[key], tuple) or 2 * len(numbers[key]) != rotary_dim:
            raise ValueError(f"{key}: {numbers[key]} is not supported; a list of {rotary_dim // 2} numbers is")
    if numbers["short_factor"] == numbers["long_factor"]:
        return values
    longest = min(numbers["original_max_position_embeddings"], length)
    return {**values, "max_length": longest, "declared_length": length}


def rope_parameters(config: DecoderConfig) -> dict[str, Any]:
    """The key of that name, with the share of a head that rotates where that is not all of it."""
    values = {"rope_type": "default", **dict(config.rope_scaling), "rope_theta": config.rope_theta}
    share = config.rotary_dim / config.head_dim
    if int(config.head_dim * share) < config.rotary_dim:  # 6 of 47
        share = math.nextafter(share, 1)
    return values if share == 1 else {**values, "partial_rotary_factor": share}


def rope_by_kind(hf: dict[str, Any], thetas: tuple[Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json with the rope_parameters of full and of sliding attention. The older rope_scaling is of the first.

    thetas: of either, where the file has none.
    """
    settings = hf.get("rope_parameters") or {}
    if unknown := set(settings) - set(KINDS):
        raise ValueError(f"rope_parameters: {', '.join(sorted(unknown))} stands outside {' and '.join(KINDS)}")
    full, narrow = (
        {"rope_theta": theta, **(settings.get(kind) or {})} for theta, kind in zip(thetas, KINDS, strict=True)
    )
    full |= hf.get("rope_scaling") or {}
    for values in (full, narrow):
        if values.get("truncate", True) is not True:  # transformers does not find the key there
            raise ValueError(f"truncate: {values['truncate']!r} is not supported; only True is")
        if (kind := values.get("rope_type", values.get("type", "default"))) in ("dynamic", "longrope"):
            raise ValueError(f"rope scaling {kind!r} is not supported by kinds of layers")
    return {**hf, "rope_scaling": None, "rope_parameters": full}, {
        **hf,
        "rope_scaling": None,
        "rope_parameters": narrow,
    }


def window_rope(hf: dict[str, Any], config: DecoderConfig) -> tuple[tuple[str, Any], ...]:
    """DecoderConfig's field of that name. hf: config.json with the rope_parameters of sliding attention alone."""
    theta, share, scaling = rope(hf)
    if share not in (None, 1):
        raise ValueError(f"partial_rotary_factor: {share!r} is not supported; only 1 is")
    same = (theta, scaling) == (config.rope_theta, config.rope_scaling) or not any(config.windows)
    return () if same else (("rope_theta", theta), *scaling)


def parameters_by_kind(config: DecoderConfig) -> dict[str, Any]:
    """rope_parameters, by kind of layer."""
    full = rope_parameters(config)
    narrow = {"rope_type": "default", **dict(config.window_rope)} if config.window_rope else full
    return dict(zip(KINDS, (full, narrow), strict=True))
