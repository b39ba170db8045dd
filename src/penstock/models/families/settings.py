"""Reading config.json: a setting that the decoder cannot follow is refused by name, never ignored."""

from typing import Any

from penstock.models.config import ACTIVATIONS, DecoderConfig

NAMES = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
"""Activations, theirs: ours. Of several names for one of ours the first is written."""
assert set(NAMES.values()) == set(ACTIVATIONS)
Fields = dict[str, str | tuple[str, Any]]
"""A field of DecoderConfig: its key in config.json, which must be there, or the key and its default."""


def read(hf: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The values of these fields, num_kv_heads and head_dim in any case.

    Raises KeyError for a key without a default, ValueError for an activation that the decoder does not have.
    """
    values: dict[str, Any] = {ours: hf[key] if isinstance(key, str) else hf.get(*key) for ours, key in fields.items()}
    values["num_kv_heads"] = values.get("num_kv_heads") or values["num_heads"]
    values["head_dim"] = values.get("head_dim") or values["d_model"] // values["num_heads"]
    if "activation" in values:
        name = values["activation"]
        if name not in NAMES:
            raise ValueError(
                f"{_key(fields['activation'])}: {name!r} is not supported; supported are {', '.join(NAMES)}"
            )
        values["activation"] = NAMES[name]
    return values


def write(config: DecoderConfig, fields: Fields) -> dict[str, Any]:
    """The keys of config.json that hold these fields."""
    hf = {_key(key): getattr(config, ours) for ours, key in fields.items()}
    if "activation" in fields:
        hf[_key(fields["activation"])] = next(name for name in NAMES if NAMES[name] == config.activation)
    return hf


def _key(key: str | tuple[str, Any]) -> str:
    return key if isinstance(key, str) else key[0]


def require(hf: dict[str, Any], **values: Any) -> None:
    """Each key, where the config has it, must have that value: the decoder does nothing else."""
    for key, value in values.items():
        if hf.get(key, value) != value:
            raise ValueError(f"{key}: {hf[key]!r} is not supported; only {value!r} is")


def rope(hf: dict[str, Any], supported: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """The type of rope scaling and its numbers. transformers 5 writes rope_parameters, before that rope_scaling."""
    settings = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    rope_type = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    if rope_type not in supported:
        raise ValueError(f"rope scaling {rope_type!r} is not supported; supported: {', '.join(supported)}")
    return rope_type, settings
