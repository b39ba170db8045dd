"""Models of transformers without their weights, and which path a config.json takes: ours, theirs, or none.

No code from a model's repository is run: what transformers does not ship is refused.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from penstock.models.families import FAMILIES

BOTH_WAYS = ("cpmant", "xlnet")
"""Types that transformers lists as causal, whose states depend on what stands behind them."""


def _refusal(hf: dict[str, Any]) -> str:
    """Why transformers cannot build it as a causal language model; empty if it can."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    model_type, shipped = hf.get("model_type"), f"transformers {transformers.__version__}"
    if model_type not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = f"native here are {', '.join(FAMILIES)}"
        if hf.get("auto_map"):
            return (
                f"auto_map: model_type {model_type!r} is code in the model's own repository, which is never run "
                f"(trust_remote_code), and {shipped} does not ship it; {known}"
            )
        return f"model_type {model_type!r}: {shipped} has no causal language model of that type; {known}"
    if hf.get("is_encoder_decoder"):
        return f"is_encoder_decoder: {model_type!r} reads prompts with an encoder, and only decoders are trained here"
    if model_type in BOTH_WAYS or model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return f"model_type {model_type!r} reads in both directions; a causal model is needed"
    return ""


def skeleton(hf: dict[str, Any], dtype: torch.dtype) -> Any:
    """transformers' causal language model with its weights on `meta` and its buffers (rotary tables) as they are.

    Raises ValueError, which says why, for a config that transformers does not build.
    """
    import transformers

    if reason := _refusal(hf):
        raise ValueError(reason)
    text = {key: value for key, value in hf.items() if key not in ("auto_map", "quantization_config")}
    text = json.loads(json.dumps(text), object_hook=_special_floats)
    try:
        config = transformers.CONFIG_MAPPING[text["model_type"]].from_dict(text)
        with _weights_on_meta(), torch.device("cpu"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # whatever transformers' own code raises for its configs
        raise ValueError(f"transformers does not build it: {type(error).__name__}: {error}") from error
    model.tie_weights()
    for module in model.modules():
        _buffers_become_weights(module)
    return model.eval()


def _special_floats(value: dict[str, Any]) -> Any:
    """Infinity is {"__float__": "Infinity"} in config.json, which has no word for it."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _buffers_become_weights(module: nn.Module) -> None:
    """Of a module's buffers those that files hold (biases of routers): weights that do not learn."""
    for name, buffer in list(module._buffers.items()):
        if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
            del module._buffers[name]
            module.register_parameter(name, nn.Parameter(buffer.to("meta"), requires_grad=False))


@contextlib.contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Inside, a module's parameters lose their memory as they are registered; buffers keep their values."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def as_text(hf: dict[str, Any]) -> str:
    """config.json as a DecoderConfig keeps it: equal texts, equal models."""
    return json.dumps({key: value for key, value in hf.items() if not key.startswith("penstock_")}, sort_keys=True)
