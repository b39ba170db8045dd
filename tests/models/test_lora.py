"""Adapters against peft: what one writes the other reads, and both compute and learn the same."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.models import adapter_files, lora, presets, surgery
from penstock.models.linear import linear
from penstock.models.lora_targets import ALL_LINEAR, LoraSpec, lora_targets_of
from penstock.models.roles import Actor, Critic, RewardModel
from tests.models.test_families import CASES, reference

TARGETS: dict[str, Any] = {
    "gpt2": ("c_attn", "wte", "lm_head"),
    "opt, 350m: post-norm, projections": ("q_proj", "fc2", "project_in"),
    "bloom, 6 heads": "transformer\\.h\\.1\\..*(query_key_value|dense_h_to_4h)",
    "gpt_neox": ("query_key_value", "embed_in", "lm_head"),
    "llama, grouped queries": ("q_proj", "v_proj", "up_proj", "embed_tokens", "lm_head"),
    "phi3, grouped, a window, tied": ("qkv_proj", "gate_up_proj"),
}


def all_random(decoder: Any) -> None:
    """An adapter that adds something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in lora.adapters_of(decoder):
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator) / adapter.b.shape[1] ** 0.5)


def logits(actor: Actor, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return actor.decoder.logits(actor.decoder(tokens))


@pytest.mark.parametrize(("name", "targets"), [*((name, ALL_LINEAR) for name in CASES), *TARGETS.items()])
def test_peft_reads_what_we_write_and_computes_the_same(name, targets, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "base")
    rslora = name.startswith("opt")
    ours = Actor.from_pretrained(str(tmp_path / "base"), lora=LoraSpec(4, 12.0, targets, rslora))
    tokens = torch.randint(ours.decoder.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(1))
    plain = logits(ours, tokens)
    all_random(ours.decoder)
    ours.save_pretrained(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = adapted(tokens).logits
    assert (expected - plain).abs().max() > 0.1
    assert (logits(ours, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    names = {adapter.target.theirs for adapter in lora.adapters_of(ours.decoder)}  # one for all experts of a block
    assert len(load_file(tmp_path / "adapter" / adapter_files.WEIGHTS)) == 2 * len(names)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
        ("bloom, 4 heads", {"target_modules": ["query_key_value", "dense"], "use_rslora": True}),
        ("llama, grouped queries", {"target_modules": ["k_proj", "gate_proj", "embed_tokens"]}),
        ("phi3, grouped, a window, tied", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
        ("gpt_neox", {"target_modules": ".*layers\\.[12]\\.attention\\.query_key_value"}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
        ("gpt_oss", {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj"]}),
        ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ],
)
def test_we_read_what_peft_writes(name, settings, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(theirs, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.randint(theirs.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = adapted(tokens).logits
    ours = Actor.from_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    assert (logits(ours, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_classifiers_adapter_goes_both_ways(tmp_path):
    config = transformers.AutoConfig.for_model("llama", **CASES["llama, grouped queries"][1], pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    ours = RewardModel.from_pretrained(str(tmp_path / "base"), lora=4)
    all_random(ours.decoder)
    ours.mean, ours.std = 0.5, 2.0
    ours.save_pretrained(tmp_path / "adapter")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = torch.randint(1, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = adapted(tokens).logits[:, 0]
        back = RewardModel.from_pretrained(str(tmp_path / "adapter"))
        for model in (ours, back):
            got = model.read(model(tokens, torch.full((3,), 9))[:, -1])
            assert (got * 2.0 + 0.5 - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "bloom, 4 heads", "llama, grouped queries"])
def test_fifty_steps_give_pefts_losses(name, tmp_path):
    """Same base, same first adapter, same batches, AdamW: the same curve."""
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "base")
    strategy = Strategy.named("naive")
    with strategy.init():
        ours = Actor.from_pretrained(str(tmp_path / "base"), lora=4, seed=3)
    stream = strategy.prepare(ours)
    ours.save_pretrained(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    learning = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    curves: tuple[list[float], list[float]] = ([], [])

    def loss_of(hidden: torch.Tensor, part: Any) -> tuple[torch.Tensor, dict]:
        scores = ours.decoder.logits(hidden[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), part.tokens[:, 1:].flatten()), {}

    for _ in range(50):
        tokens = torch.randint(1, 96, (4, 12), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(adapted(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
        stats = strategy.step(stream, [type("Batch", (), {"tokens": tokens})()], loss_of, lr=2e-3)
        curves[0].append(stats.sums["loss"])
        curves[1].append(float(loss))
    assert curves[1][-1] < curves[1][0] - 0.05
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 1e-5


@pytest.mark.parametrize("alpha", [4, 32, 24])
def test_wherever_the_factor_is_multiplied_no_bit_differs_from_behind_both_products(alpha):
    config = presets.named("s")
    target = next(target for target in lora_targets_of(config) if not target.table)
    adapter = lora.Adapter(target, LoraSpec(16, alpha=alpha), config, torch.bfloat16)
    torch.manual_seed(0)
    for weight in (adapter.a, adapter.b):
        torch.nn.init.normal_(weight, std=0.1)
    x = torch.randn(2, 7, target.width, dtype=torch.bfloat16)
    behind = linear(linear(x, adapter.a), adapter.b) * (alpha / 16)
    assert torch.equal(adapter(x), behind)
    slopes = torch.randn_like(behind)
    wanted = torch.autograd.grad(behind, (adapter.a, adapter.b), slopes)
    assert all(map(torch.equal, torch.autograd.grad(adapter(x), (adapter.a, adapter.b), slopes), wanted))


# --- merging ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gpt2", "bloom, 4 heads", "gpt_neox", "llama, grouped queries"])
def test_merging_changes_nothing_and_is_undone_bit_by_bit(name, tmp_path):
    reference(name).save_pretrained(tmp_path / "base")
    ours = Actor.from_pretrained(str(tmp_path / "base"), lora=LoraSpec(4, targets=TARGETS.get(name, ALL_LINEAR)))
    all_random(ours.decoder)
    tokens = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(1))
    before, weights = logits(ours, tokens), {n: p.clone() for n, p in ours.named_parameters()}
    surgery.merge_adapters(ours.decoder)
    assert not lora.adapters_of(ours.decoder)
    assert (logits(ours, tokens) - before).abs().max() <= 1e-5 * before.abs().max()
    ours.save_pretrained(tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (whole(tokens).logits - before).abs().max() <= 1e-5 * before.abs().max()
    surgery.unmerge_adapters(ours.decoder)
    assert torch.equal(logits(ours, tokens), before)
    now = dict(ours.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in weights.items())


def test_weights_that_were_let_go_of_cannot_be_unmerged(tmp_path):
    reference("gpt2").save_pretrained(tmp_path / "base")
    ours = Actor.from_pretrained(str(tmp_path / "base"), lora=4)
    surgery.merge_adapters(ours.decoder, keep=False)
    with pytest.raises(ValueError, match="not kept"):
        surgery.unmerge_adapters(ours.decoder)


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.fixture
def base(tmp_path: Path) -> str:
    reference("gpt2").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize(("spec", "word"), [
    (LoraSpec(0), "give one from 1"), (LoraSpec(4, targets=("q_proj",)), "c_attn"),
    (LoraSpec(4, targets="nothing.*"), "matches no weight"),
])  # fmt: skip
def test_an_adapter_that_cannot_be_is_refused(base, spec, word):
    with pytest.raises(UserError, match=word):
        Actor.from_pretrained(base, lora=spec)


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    Actor.from_pretrained(base, lora=4).save_pretrained(tmp_path / "adapter")
    other = reference("gpt2")
    with torch.no_grad():
        other.transformer.ln_f.bias.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another base"):
        Actor.from_pretrained(str(tmp_path / "other"), adapter=str(tmp_path / "adapter"))
    reference("gpt2, untied, n_inner, erf GELU").save_pretrained(tmp_path / "wider")
    (tmp_path / "adapter" / adapter_files.OURS).unlink()  # as peft leaves it: shapes alone can tell
    with pytest.raises(UserError, match="has shape"):
        Actor.from_pretrained(str(tmp_path / "wider"), adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize(("change", "word"), [
    ({"peft_type": "IA3"}, "IA3"), ({"rank_pattern": {"c_attn": 2}}, "has shape"), ({"r": "many"}, "many"),
    ({"target_modules": None}, "target_modules is empty"), ({"target_modules": ["c_fc"]}, "weights belong nowhere"),
    ({"revision": "v2"}, "revision = 'v2'"), ({"a_new_key": 3}, "a_new_key = 3 is not read here; merge it with peft"),
    ({"base_model_name_or_path": None}, "names no base"),
])  # fmt: skip
def test_an_adapter_that_computes_something_else_is_refused(base, tmp_path, change, word):
    Actor.from_pretrained(base, lora=4).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / adapter_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=word):
        Actor.from_pretrained(str(tmp_path / "adapter"))


# --- adapter_config.json, key by key: honoured as peft does, without effect, or refused by name ---------------------
def from_peft(base: str, directory: Path, **settings: Any) -> Any:
    """peft's model with every weight that it would train moved, saved."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    defaults = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**(defaults | settings))).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory)
    return adapted


ATTENTION, GPT2_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["c_attn", "c_fc", "c_proj"]
LLAMA_NAME, TIED = "llama, grouped queries", "llama, tied, all biased, wide heads"
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 5, "up_proj": 1},
            "alpha_pattern": {"k_proj": 1, "^model.layers.2.*v_proj": 30}}  # fmt: skip
HONOURED: list[tuple[str, dict[str, Any]]] = [
    (LLAMA_NAME, {"target_modules": [*ATTENTION, "up_proj"], **PATTERNS}),
    (LLAMA_NAME, {"target_modules": [*ATTENTION, "up_proj"], "use_rslora": True, **PATTERNS}),
    ("gpt2", {"target_modules": GPT2_TARGETS, "fan_in_fan_out": True, "rank_pattern": {"h.0.attn.c_proj": 6}}),
    (LLAMA_NAME, {"target_modules": ATTENTION, "layers_to_transform": [0, 2]}),
    ("gpt2", {"target_modules": GPT2_TARGETS, "layers_to_transform": 1}),
    ("gpt2", {"target_modules": GPT2_TARGETS, "exclude_modules": ["mlp.c_proj", "h.2.attn.c_attn"]}),
    (LLAMA_NAME, {"target_modules": "all-linear", "exclude_modules": ".*layers\\.1.*"}),
    (LLAMA_NAME, {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    (LLAMA_NAME, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    (TIED, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    (TIED, {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}),
    ("gpt_neox", {"target_modules": ["dense"], "modules_to_save": ["lm_head"]}),
    ("gpt2", {"target_modules": GPT2_TARGETS, "bias": "all"}),
    (TIED, {"target_modules": ATTENTION, "bias": "lora_only"}),
    (LLAMA_NAME, {"target_modules": ["v_proj"], "r": 100}),  # above its smaller side
    (LLAMA_NAME, {"target_modules": ["v_proj"], "init_lora_weights": "gaussian"}),
    (LLAMA_NAME, {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal", "r": 4}),
]


@pytest.mark.parametrize(("name", "settings"), HONOURED)
def test_what_adapter_config_json_says_is_honoured_as_peft_does(name, settings, tmp_path):
    """And what we save of it, peft reads; merged, transformers computes the same."""
    reference(name).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    adapted = from_peft(base, tmp_path / "adapter", **settings)
    tokens = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(1))
    ours = Actor.from_pretrained(base, adapter=str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = adapted(tokens).logits
        plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits
    near = 2e-5 * expected.abs().max()
    assert (expected - plain).abs().max() > 1000 * near
    assert (logits(ours, tokens) - expected).abs().max() <= near
    ours.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "again")
    with torch.no_grad():
        assert (again.eval()(tokens).logits - expected).abs().max() <= near
    assert (logits(Actor.from_pretrained(str(tmp_path / "again")), tokens) - expected).abs().max() <= near
    surgery.merge_adapters(ours.decoder, keep=False)
    ours.save_pretrained(tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (whole(tokens).logits - expected).abs().max() <= 2 * near  # a merge rounds every weight once more


def test_a_classifiers_adapter_by_peft_itself_is_read(tmp_path):
    """Its modules_to_save names `classifier` too, which no model of ours has."""
    config = transformers.AutoConfig.for_model("llama", **CASES[LLAMA_NAME][1], pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["v_proj"])).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ours, tokens = RewardModel.from_pretrained(str(tmp_path / "adapter")), torch.arange(1, 10)[None]
    with torch.no_grad():
        assert (ours.read(ours(tokens, torch.tensor([9]))[:, -1]) - adapted(tokens).logits[:, 0]).abs().max() <= 1e-5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
    ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens = \[5, 6\]"),
    ({"use_dora": True}, "use_dora = True"), ({"lora_bias": True}, "lora_bias = True"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"trainable_token_indices": [4, 5]}, "trainable_token_indices"),
    ({"target_parameters": ["self_attn.q_proj.weight"]}, "target_parameters"),
    ({"modules_to_save": ["gate_proj"]}, "has a whole weight in an adapter's place"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "word"), REFUSED)
def test_what_peft_writes_and_we_cannot_follow_is_refused_by_name(settings, word, tmp_path):
    reference(LLAMA_NAME).save_pretrained(tmp_path / "base")
    from_peft(str(tmp_path / "base"), tmp_path / "adapter", **({"target_modules": ["v_proj"]} | settings))
    with pytest.raises(UserError, match=f"(?s){word}.*merge_and_unload"):
        Actor.from_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))


def test_pissa_that_peft_converted_is_an_adapter_like_any_other(tmp_path):
    """The way that peft offers: save_pretrained(..., path_initial_model_for_weight_conversion=...)."""
    reference(LLAMA_NAME).save_pretrained(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["v_proj"], init_lora_weights="pissa")
    adapted = peft.get_peft_model(theirs, config).eval()
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "first")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
        expected = adapted(torch.arange(9)[None]).logits
    adapted.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    ours = Actor.from_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    assert (logits(ours, torch.arange(9)[None]) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_every_key_that_peft_knows_is_read_or_without_effect_or_must_be_off():
    """A new key of peft's starts in the third kind: `_check_keys` refuses it by name once it is on."""
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    ours = adapter_files.READ | adapter_files.WITHOUT_EFFECT
    assert known >= adapter_files.READ
    off = {name: value for name, value in vars(peft.LoraConfig(target_modules=["v_proj"])).items() if name not in ours}
    assert not {name: value for name, value in off.items() if value and not name.startswith("_")}


def test_a_model_takes_one_adapter(base, tmp_path):
    Actor.from_pretrained(base, lora=4).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="rank 4"):
        Actor.from_pretrained(str(tmp_path / "adapter"), lora=8)
    with pytest.raises(UserError, match="is an adapter itself"):
        Actor.from_pretrained(str(tmp_path / "adapter"), adapter=str(tmp_path / "adapter"))
    assert Critic.from_pretrained(str(tmp_path / "adapter"), lora=4).decoder.adapted is not None
