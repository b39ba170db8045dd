"""What config.json says and what it leaves out, against transformers: the same logits, or a refusal by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock.errors import UserError
from penstock.models import pretrained
from tests.models.test_families import CASES, reference

NAMES = (
    "gpt2", "opt", "bloom, 6 heads", "gpt_neox", "llama, llama3 rope scaling", "llama, linear rope scaling",
    "mistral, window exceeded", "qwen2, last two layers in a window", "qwen3, normed queries and keys",
    "gemma2, window exceeded, strong caps", "gemma3, two ropes", "granite", "smollm3, windows without rotary",
    "qwen3_moe, shares of all, a dense block", "mixtral",
    "phi3, partly rotary, longrope", "ministral3, yarn, longer than its first context", "olmo3, two ropes",
)  # fmt: skip
YARN, LONG = {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "longrope", "factor": 2.0}
PER_LAYER = {"full_attention": {"rope_type": "default", "rope_theta": 77.0}}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ODD: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "gelu_fast", "quick_gelu", "mish"], "activation_function": ["gelu", "gelu_fast", "tanh"],
    "num_attention_heads": [2, 3], "num_hidden_layers": [2], "hidden_size": [24], "head_dim": [4, 12], "n_embed": [24],
    "num_key_value_heads": [1, 6], "partial_rotary_factor": [0.5], "rotary_pct": [0.5], "rotary_emb_base": [50],
    "rope_theta": [100.0], "sliding_window": [3, None, 0, -1], "use_sliding_window": [True, False],
    "max_window_layers": [0, 2], "is_causal": [False], "scale_attn_weights": [False], "attention_bias": [True, False],
    "scale_attn_by_inverse_layer_idx": [True], "use_parallel_residual": [False], "do_layer_norm_before": [False],
    "_remove_final_layer_norm": [True], "enable_bias": [False], "apply_residual_connection_post_layernorm": [True],
    "layer_types": [["sliding_attention", "full_attention", "full_attention"], ["full_attention"] * 2,
                    ["chunked_attention"] * 3,
                    ["full_attention", "full_attention", "sliding_attention", "full_attention"]],
    "rope_scaling": [{"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}, YARN, {"type": "su"},
                     {"rope_type": "default", "rope_theta": 77.0}, LLAMA3, {"factor": 4.0}],
    "rope_parameters": [{"rope_theta": 77.0}, {"rope_theta": 77.0, "partial_rotary_factor": 0.5}, PER_LAYER, LONG,
                        {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0, "attention_factor": 3.0}],
    "original_max_position_embeddings": [8], "norm_eps": [1], "layer_norm_epsilon": [0.1], "rms_norm_eps": [0.1],
    "hidden_activation": ["gelu", "gelu_new", "silu", "mish"], "use_bidirectional_attention": [True, False],
    "query_pre_attn_scalar": [16, 0], "attn_logit_softcapping": [7.0, None, 0.0],
    "final_logit_softcapping": [7.0, None, -1.0], "rope_local_base_freq": [50.0], "sliding_window_pattern": [2, 3],
    "embedding_multiplier": [3.0, 0.1], "residual_multiplier": [2.0], "attention_multiplier": [0.5, 0.0],
    "logits_scaling": [0.5, 0.0], "no_rope_layers": [[0, 1, 1], [1, 1, 1], [1]], "no_rope_layer_interval": [3, 0],
    "num_experts_per_tok": [1, 4, 9, 0], "norm_topk_prob": [True], "decoder_sparse_step": [2, 0], "num_experts": [4],
    "mlp_only_layers": [[], [0, 2], [7]], "router_jitter_noise": [0.1], "router_aux_loss_coef": [0.5],
    "moe_intermediate_size": [10], "num_local_experts": [2],
    "is_encoder_decoder": [True], "add_cross_attention": [True], "n_inner": [None],
}  # fmt: skip
WINDOWED = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3")
TOKENS = torch.randint(96, (2, 14), generator=torch.Generator().manual_seed(1))


def written_as_before(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it: theta at the top, and rope_scaling."""
    rope = copy.deepcopy(config["rope_parameters"])
    if "full_attention" in rope:  # Gemma 3
        rest = {key: value for key, value in config.items() if key != "rope_parameters"}
        thetas = {"rope_theta": rope["full_attention"].pop("rope_theta")}
        if config["model_type"] == "olmo3":  # it has no key for that of the others, which is 500,000
            return rest | {"rope_scaling": rope["full_attention"] | thetas}
        thetas["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        return rest | thetas | {"rope_scaling": rope["full_attention"]}
    neox = config["model_type"] == "gpt_neox"
    older = {"rotary_emb_base" if neox else "rope_theta": rope.pop("rope_theta")}
    if neox:
        older["rotary_pct"] = rope.pop("partial_rotary_factor")
    scaling = {"rope_scaling": rope} if rope["rope_type"] != "default" else {}
    return {key: value for key, value in config.items() if key != "rope_parameters"} | older | scaling


def changes_of(config: dict[str, Any], known: set[str]) -> list[tuple[str, dict[str, Any]]]:
    """Each key left out, each null, each odd value (of a key that the family does not know: the first); in a rope
    setting too."""
    rows = []
    keys = [key for key in config if key not in ("model_type", "architectures", "transformers_version")]
    rows += [(f"{key} = None", config | {key: None}) for key in keys if config[key] is not None]
    odd = {key: values if key in known or "rope" in key else values[:1] for key, values in ODD.items()}
    rows += [(f"{key} = {value}", config | {key: value}) for key, values in odd.items() for value in values]
    for form in [config, *([written_as_before(config)] if "rope_parameters" in config else [])]:
        rows += [("as it is", form)]
        rows += [(f"without {key}", {k: v for k, v in form.items() if k != key}) for key in keys if key in form]
        for rope in {"rope_parameters", "rope_scaling"} & form.keys():
            inner = form[rope]
            rows += [(f"without {k}", form | {rope: {n: v for n, v in inner.items() if n != k}}) for k in inner]
    return rows


def theirs_of(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> tuple[Any, Any] | None:
    """transformers' config and model; None where it refuses."""
    try:
        parsed = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))  # it changes what it is given
        if max(parsed.hidden_size, parsed.num_hidden_layers * 10, parsed.vocab_size) > 96:
            return None  # a size that the file left out: no weight of this checkpoint fits
        model = transformers.AutoModelForCausalLM.from_config(parsed).float().eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            model(TOKENS)
        return parsed, model
    except Exception:  # of many kinds: strict dataclasses, missing keys, shapes
        return None


def disagreement(directory: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], may_refuse: bool) -> str:
    """What is wrong; empty: nothing."""
    (directory / "config.json").write_text(json.dumps(config))
    theirs = theirs_of(config, weights)
    try:
        ours = pretrained.load(directory)[0]
    except UserError as error:
        named = "does not have it" in str(error) or "is computed from" in str(error)
        return "" if may_refuse or named or theirs is None else f"refused: {error}"
    if theirs is None:
        return ""  # ours is more patient with settings that change nothing: a dropout of null
    tokens = TOKENS[:, : ours.config.max_length]  # with longrope logits depend on the row's length
    with torch.no_grad():
        if (far := float((ours.logits(ours(tokens)) - theirs[1](tokens).logits).abs().max())) > 1e-4:
            return f"logits differ by {far:.2f}"
    parsed = theirs[0]
    kinds = getattr(parsed, "layer_types", None) or ["sliding_attention"] * ours.config.num_layers
    window = 0 if parsed.model_type == "llama" else getattr(parsed, "sliding_window", 0) or 0
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    own = ours.config.windows or (0,) * ours.config.num_layers
    if parsed.model_type in WINDOWED and own != windows:
        return f"windows {own}, not {windows}"
    limit = getattr(parsed, "max_position_embeddings", None)
    return (
        ""
        if limit in (None, ours.config.declared_length or ours.config.max_length)
        else f"rows of {ours.config.max_length} tokens, not {limit}"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_config_json_means_what_it_means_to_transformers(name, tmp_path):
    model = reference(name)
    model.save_pretrained(tmp_path)
    weights = model.state_dict()
    config = json.loads((tmp_path / "config.json").read_text())
    wrong = []
    known = {*model.config.to_dict(), *model.config.attribute_map, *config}
    for label, changed in changes_of(config, known):
        if problem := disagreement(tmp_path, changed, weights, may_refuse=" = " in label):
            wrong.append(f"{label}: {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("change", "windows"), [
    ({"max_window_layers": ...}, ()), ({"max_window_layers": ..., "num_hidden_layers": 30}, (0,) * 28 + (6,) * 2),
    ({"sliding_window": ...}, (0, 4096, 4096)), ({"use_sliding_window": ...}, ()), ({}, (0, 6, 6)),
])  # fmt: skip
def test_qwen2s_windows_have_the_defaults_of_its_config_class(change, windows):
    from penstock.models.families import qwen

    settings = CASES["qwen2, last two layers in a window"][1] | {"model_type": "qwen2", "sliding_window": 6} | change
    settings = {key: value for key, value in settings.items() if value is not ...}
    assert qwen.config_from_hf(settings).windows == windows
