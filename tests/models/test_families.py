"""Every family against transformers: the same weights give the same logits, the same greedy text and the same files.

transformers is the oracle. All weights are random, biases and norms too, so that a swapped or forgotten one shows.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.data.batching import pad
from penstock.models import pretrained
from penstock.models.decoder import Decoder
from penstock.models.roles import RewardModel
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling
from tests.algorithms.oracle import token_logprobs

SMALL = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
LLAMA = SMALL | {"intermediate_size": 80, "max_position_embeddings": 64, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
OPT = SMALL | {"ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 48}
NEOX = SMALL | {"intermediate_size": 80, "max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA = LLAMA | {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "hidden_size": 48}
GEMMA3 = GEMMA | {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
}  # fmt: skip
GPT_OSS = {
    "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "sliding_window": 5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
GPT_OSS_YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 16,
}  # fmt: skip
QWEN_MOE = {
    "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True,
}  # fmt: skip
GRANITE = LLAMA | {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25, "logits_scaling": 1.5,
}  # fmt: skip

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.2, 1.9], "long_factor": [1.0, 3.0, 9.0], "partial_rotary_factor": 0.75,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
BY_KIND = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # name: model_type, what its transformers config says
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied, n_inner, erf GELU": ("gpt2",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 100, "activation_function": "gelu"}),
    "opt": ("opt", OPT),
    "opt, 350m: post-norm, projections": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt, no final norm, no biases": ("opt", OPT | {"_remove_final_layer_norm": True, "enable_bias": False}),
    "opt, untied": ("opt", OPT | {"tie_word_embeddings": False}),
    "bloom, 6 heads": ("bloom", {"vocab_size": 96, "hidden_size": 48, "n_layer": 3, "n_head": 6}),
    "bloom, 4 heads": ("bloom", {"vocab_size": 96, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox, sequential, fully rotary": ("gpt_neox",
        NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"}),
    "gpt_neox, tied, no attention bias": ("gpt_neox", NEOX | {"tie_word_embeddings": True, "attention_bias": False}),
    "llama, grouped queries": ("llama", LLAMA),
    "llama, tied, all biased, wide heads": ("llama",
        LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama, llama3 rope scaling": ("llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama, linear rope scaling": ("llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "mistral, window exceeded": ("mistral", LLAMA | {"sliding_window": 5}),
    "mistral, no window": ("mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2, last two layers in a window": ("qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3, normed queries and keys": ("qwen3", LLAMA | {"head_dim": 16}),
    "qwen3, tied": ("qwen3", LLAMA | {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2, window exceeded, strong caps": ("gemma2",
        GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0}),
    "gemma2, untied, biased, no caps": ("gemma2",
        GEMMA | {"tie_word_embeddings": False, "attention_bias": True, "attn_logit_softcapping": None,
                 "final_logit_softcapping": None, "num_key_value_heads": 6}),
    "gemma3, two ropes": ("gemma3_text", GEMMA3),
    "gemma3, one head of keys, untied, capped logits": ("gemma3_text",
        GEMMA3 | {"num_key_value_heads": 1, "tie_word_embeddings": False, "final_logit_softcapping": 9.0}),
    "granite": ("granite", GRANITE),
    "granite, tied, biased": ("granite",
        GRANITE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "smollm3, last layer without rotary": ("smollm3",
        LLAMA | {"no_rope_layers": [1, 1, 0], "tie_word_embeddings": False}),
    "smollm3, windows without rotary": ("smollm3",
        LLAMA | {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4, "head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", LLAMA | QWEN_MOE),
    "qwen3_moe, shares of all, a dense block": ("qwen3_moe",
        LLAMA | QWEN_MOE | {"norm_topk_prob": False, "mlp_only_layers": [1], "num_key_value_heads": 6}),
    "gpt_oss": ("gpt_oss", LLAMA | GPT_OSS),
    "gpt_oss, heads of keys, other limits, tied, windows elsewhere": ("gpt_oss",
        LLAMA | GPT_OSS | {"num_key_value_heads": 6, "swiglu_limit": 1.0, "swiglu_alpha": 1.1, "head_dim": 24,
                           "tie_word_embeddings": True, "attention_bias": False,
                           "rope_parameters": GPT_OSS_YARN,
                           "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4, "sliding_window": None}),
    "mixtral, window exceeded, tied": ("mixtral",
        LLAMA | {"num_local_experts": 3, "sliding_window": 5, "tie_word_embeddings": True}),
    "phi3, grouped, a window, tied": ("phi3", LLAMA | {"sliding_window": 5, "tie_word_embeddings": True}),
    "phi3, partly rotary, longrope": ("phi3",
        LLAMA | {"num_key_value_heads": 6, "rope_parameters": LONG,
                 "max_position_embeddings": 256, "original_max_position_embeddings": 64}),
    "ministral, windows by layer": ("ministral",
        LLAMA | {"layer_types": KINDS, "sliding_window": 5, "head_dim": 16, "num_key_value_heads": 1}),
    "ministral3, yarn, longer than its first context": ("ministral3",
        LLAMA | {"head_dim": 16, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}, "sliding_window": 9}),
    "olmo2, all biased, tied": ("olmo2", LLAMA | {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo3, two ropes": ("olmo3", LLAMA | {"layer_types": KINDS, "sliding_window": 5, "rope_parameters": BY_KIND}),
}  # fmt: skip

NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LENGTHS = (9, 14, 1, 6)


def reference(name: str) -> transformers.PreTrainedModel:
    """A transformers model with every weight random."""
    return random_model(*CASES[name])


def random_model(model_type: str, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    """One with these settings."""
    settings = copy.deepcopy(settings | NO_SPECIAL)  # config classes change what they are given
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.mul_(parameter.dim() == 1).add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Decoder, Path]:
    """The reference, our decoder read from what it saved, and that directory."""
    theirs = reference(request.param)
    directory = tmp_path_factory.mktemp("reference")
    theirs.save_pretrained(directory)
    return theirs, pretrained.load(str(directory))[0], directory


def ragged_batch(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Right-padded rows whose padding is other tokens, [B, T] and [B]."""
    tokens = torch.randint(vocab_size, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(3))
    return tokens, torch.tensor(LENGTHS)


def test_logits_are_those_of_transformers_on_a_ragged_batch(both):
    theirs, ours, _ = both
    tokens, lengths = ragged_batch(ours.config.vocab_size)
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=valid.long()).logits[valid]
        got = ours.logits(ours(tokens, lengths))[valid]
    assert expected.std() > 0.5  # else the comparison says nothing
    assert (got - expected).abs().max() <= 1e-4


def test_greedy_text_is_that_of_transformers_for_32_tokens(both, both_ways):
    """Ragged prompts, two rows of a cache for four answers; log-probs are those of the trainer's forward, within 1e-5
    for logits up to 4 and in proportion for louder ones: either may be off by as much from fp64, as processors go."""
    theirs, ours, _ = both
    tokens, lengths = ragged_batch(ours.config.vocab_size)
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    for rows in (None, 2):
        greedy = Sampling(temperature=0.0, max_new_tokens=32)
        for answer in generate(ours, prompts, greedy, eos_ids=(), batch_size=rows):
            prompt = torch.tensor([answer.prompt_ids])
            with torch.no_grad():
                flags = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 32, "do_sample": False}
                expected = theirs.generate(prompt, **flags)
                whole = torch.tensor([answer.prompt_ids + answer.response_ids])
                logits = ours.logits(ours(whole)[0, :-1])
                logprobs = logits.log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
            assert answer.response_ids == expected[0, prompt.shape[1] :].tolist()
            near = 1e-5 * max(1.0, float(logits.abs().max()) / 4)
            assert answer.logprobs == pytest.approx(logprobs[prompt.shape[1] - 1 :].tolist(), rel=0, abs=near)


def test_in_bf16_the_engines_logprobs_are_near_those_of_the_trainers_forward(both, both_ways):
    """Within two bf16 ulps of the loudest logit (0.016 each for logits up to 4): states are rounded to bf16 between
    products, and one that is rounded the other way moves what follows by as much. Such a state may choose another
    expert where two are nearly alike, and then the answer of one token in a hundred is far off.
    """
    _, ours, _ = both
    half = copy.deepcopy(ours).bfloat16()
    tokens, lengths = ragged_batch(half.config.vocab_size)
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    answers = generate(half, prompts, Sampling(n=4, max_new_tokens=16, seed=3), eos_ids=())
    gaps, loudest = [], 0.0
    for start in range(0, len(answers), 8):
        rows, sizes = pad([one.prompt_ids + one.response_ids for one in answers[start : start + 8]])
        with torch.no_grad():
            logits = half.logits(half(rows, sizes))
        loudest = max(loudest, float(logits.abs().max()))
        for i, one in enumerate(answers[start : start + 8]):
            n = len(one.prompt_ids)
            said = token_logprobs(logits[i, n - 1 : sizes[i] - 1], rows[i, n : sizes[i]])[0]
            gaps.append((said - torch.tensor(one.logprobs)).abs())
    ulp = 2.0 ** (math.floor(math.log2(loudest)) - 7)
    near = torch.cat(gaps) <= 2 * ulp
    assert near.double().mean() >= (0.99 if half.config.num_experts else 1)
    assert torch.cat(gaps)[near].mean() <= ulp / 16  # one state rounded the other way here and there


def test_what_we_save_transformers_loads_bit_for_bit(both, tmp_path):
    theirs, ours, _ = both
    pretrained.save(ours, tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(theirs)
    expected, got = theirs.state_dict(), again.state_dict()
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    tokens, _ = ragged_batch(ours.config.vocab_size)
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, theirs(tokens).logits)  # the config came back as well


def test_a_reward_model_is_a_sequence_classifier_for_transformers(both, tmp_path):
    _, ours, _ = both
    score = torch.randn(1, ours.head_weight.shape[1], generator=torch.Generator().manual_seed(5))
    pretrained.save(ours, tmp_path, score=score, extra_config={"penstock_score_mean": 0.5, "pad_token_id": 0})
    tokens, lengths = ragged_batch(ours.config.vocab_size)
    tokens = tokens.clamp(min=1).masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], 0)
    again, extras = pretrained.load(tmp_path)
    with torch.no_grad():
        if ours.config.family == "granite":  # transformers has no classifier of it, only what it would stand on
            states = transformers.AutoModel.from_pretrained(tmp_path).eval()(tokens).last_hidden_state
            expected = states[torch.arange(len(lengths)), lengths - 1] @ score[0]
        else:
            kind = transformers.AutoModelForSequenceClassification
            theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
            assert not any(info.values()), info
            expected = theirs.eval()(tokens, attention_mask=(tokens != 0).long()).logits[:, 0]
        last = again(tokens, lengths)[torch.arange(len(lengths)), lengths - 1]
    assert ((last @ extras["score.weight"][0]) - expected).abs().max() <= 1e-4
    assert again.config.hf["penstock_score_mean"] == 0.5


HEADS = {"score": "score.", "classifier": "classifier.", "TRL's": "v_head.summary.", "DeepSpeed-Chat's": "v_head."}


JUDGES = ["gpt2", "opt, untied", "bloom, 4 heads", "gpt_neox", "llama, grouped queries", "qwen3, tied"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("head", HEADS)
def test_scores_of_reward_models_that_others_made_are_those_of_transformers(tmp_path, head, name, bias):
    model_type, settings = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **(settings | NO_SPECIAL), num_labels=1)
    config.pad_token_id = 0
    torch.manual_seed(11)
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).float().eval()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{HEADS[head]}weight"] = tensors.pop("score.weight")
    tensors |= {f"{HEADS[head]}bias": torch.tensor([0.75])} if bias else {}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours = RewardModel.trained(str(tmp_path))
    tokens, lengths = ragged_batch(ours.decoder.config.vocab_size)
    tokens = tokens.clamp(min=1).masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], 0)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=(tokens != 0).long()).logits[:, 0] + 0.75 * bias
        scores = ours.read(ours(tokens, lengths)[torch.arange(len(lengths)), lengths - 1])
    assert (scores - expected).abs().max() <= 1e-5
