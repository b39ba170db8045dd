"""Reading config.json: a setting that the decoder cannot follow is refused by name, never ignored."""

from typing import Any

from penstock.models.config import ACTIVATIONS

NAMES: dict[str, str] = {
    # theirs: ours; the first of ours is the name we write
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation(hf: dict[str, Any], key: str, default: str) -> str:
    """Our name for the activation that `key` names. Raises ValueError for one that we do not have."""
    name = hf.get(key, default)
    if name not in NAMES:
        raise ValueError(f"{key}: {name!r} is not supported; supported are {', '.join(NAMES)}")
    return NAMES[name]


def activation_name(ours: str) -> str:
    """Hugging Face's name for ours."""
    return next(name for name in NAMES if NAMES[name] == ours)


def require(hf: dict[str, Any], **values: Any) -> None:
    """Each key, where the config has it, must have that value: the decoder does nothing else."""
    for key, value in values.items():
        if hf.get(key, value) != value:
            raise ValueError(f"{key}: {hf[key]!r} is not supported; only {value!r} is")


def rope(hf: dict[str, Any], supported: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """The type of rope scaling and its numbers. transformers 5 writes rope_parameters, before that rope_scaling."""
    settings = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    if kind not in supported:
        raise ValueError(f"rope scaling {kind!r} is not supported; supported: {', '.join(supported)}")
    return kind, settings


assert set(NAMES.values()) == set(ACTIVATIONS)
