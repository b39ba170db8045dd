"""Reading config.json: a setting that the decoder cannot follow is refused by name, never ignored."""

from typing import Any

from penstock.models.config import ACTIVATIONS, LARGEST, MOST, DecoderConfig

NAMES = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
"""Activations, theirs: ours. Of several names for one of ours the first is written."""
assert set(NAMES.values()) == set(ACTIVATIONS)
Fields = dict[str, str | tuple[str, Any]]
"""A field of DecoderConfig: its key in config.json, which must be there, or the key and transformers' default."""
COUNTS = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_length")


def read(hf: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The values of these fields, num_kv_heads and head_dim in any case.

    Raises KeyError for a key without a default, ValueError for a value that the decoder cannot follow.
    """
    require(hf, is_causal=True, is_encoder_decoder=False)
    values: dict[str, Any] = {ours: hf[key] if isinstance(key, str) else hf.get(*key) for ours, key in fields.items()}
    values["num_kv_heads"] = values["num_heads"] if values.get("num_kv_heads") is None else values["num_kv_heads"]
    if values.get("head_dim") is None:
        values["head_dim"] = values["d_model"] // values["num_heads"] if values["num_heads"] else 0
    for ours, value in values.items():
        key = _key(fields.get(ours, ours))
        most = MOST if ours == "num_layers" else LARGEST
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
        if (ours in COUNTS and not whole) or (value is None and hf.get(key, 0) is None and _default(fields[ours])):
            needed = (
                f"a whole number from 1 to {most:,} is needed"
                if ours in COUNTS
                else "leave the key out, or give a value"
            )
            raise ValueError(f"{key}: {value!r} is not supported; {needed}")
    if "head_dim" not in fields:
        require(hf, head_dim=hf.get("head_dim") and values["head_dim"])
    if values["num_heads"] % values["num_kv_heads"]:
        raise ValueError(f"{values['num_heads']} heads cannot share {values['num_kv_heads']} heads of keys and values")
    if "activation" in values:
        name = values["activation"]
        if name not in NAMES:
            raise ValueError(
                f"{_key(fields['activation'])}: {name!r} is not supported; supported are {', '.join(NAMES)}"
            )
        values["activation"] = NAMES[name]
    return values


def by_name(hf: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """config.json with each alias under its name. An alias wins over the name, as in transformers."""
    return hf | {name: hf[alias] for alias, name in aliases.items() if alias in hf}


def windows_of(hf: dict[str, Any], window: Any, default: list[str], num_layers: int) -> tuple[int, ...]:
    """By layer, the tokens that attention sees; 0 is all. `default`: the kinds of layers without layer_types."""
    kinds = hf.get("layer_types") or default
    if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types: {kinds} is not supported; give each layer full_attention or sliding_attention")
    if "sliding_attention" in kinds and not (isinstance(window, int) and window > 0):
        raise ValueError(f"sliding_window: {window!r} is not supported; a whole number from 1 is")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def number(hf: dict[str, Any], key: str, *, none: float | None = None) -> float:
    """The positive number that the config has there; null is `none`, if that is given."""
    value = hf[key]
    if value is None and none is not None:
        return none
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key}: {value!r} is not supported; a number above 0 is")
    return float(value)


def whole(hf: dict[str, Any], key: str, default: int) -> int:
    """The whole number from 1 that the config has there."""
    value = hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
        raise ValueError(f"{key}: {value!r} is not supported; a whole number from 1 to {LARGEST:,} is")
    return value


def write(config: DecoderConfig, fields: Fields) -> dict[str, Any]:
    """The keys of config.json that hold these fields."""
    hf = {_key(key): getattr(config, ours) for ours, key in fields.items()}
    if config.declared_length:
        hf[_key(fields["max_length"])] = config.declared_length
    if "activation" in fields:
        hf[_key(fields["activation"])] = next(name for name in NAMES if NAMES[name] == config.activation)
    return hf


def _key(key: str | tuple[str, Any]) -> str:
    return key if isinstance(key, str) else key[0]


def _default(key: str | tuple[str, Any]) -> Any:
    return True if isinstance(key, str) else key[1]


def require(hf: dict[str, Any], **values: Any) -> None:
    """Each key, where the config has it, must have that value: the decoder does nothing else."""
    for key, value in values.items():
        if hf.get(key, value) != value:
            raise ValueError(f"{key}: {hf[key]!r} is not supported; only {value!r} is")


def experts(hf: dict[str, Any], count: str, width: str) -> dict[str, Any]:
    """The fields of a model with experts; `count`, `width`: the keys of how many there are, and of their d_ff."""
    fields = {
        "num_experts": whole(hf, count, 0), "experts_per_token": whole(hf, "num_experts_per_tok", 0),
        "expert_ff": whole(hf, width, 0),
    }  # fmt: skip
    if fields["num_experts"] > MOST:
        raise ValueError(f"{count}: {fields['num_experts']} is not supported; at most {MOST:,} are")
    if fields["experts_per_token"] > fields["num_experts"]:
        raise ValueError(f"num_experts_per_tok: {fields['experts_per_token']} of {fields['num_experts']} experts")
    return {**fields, "router_aux_loss_coef": float(hf["router_aux_loss_coef"])}


def write_experts(config: DecoderConfig, width: str) -> dict[str, Any]:
    """The keys of config.json that hold them."""
    return {
        "num_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token, width: config.expert_ff,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }  # fmt: skip
