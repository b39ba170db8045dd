"""Adapters against peft: what one writes the other reads, and both compute and learn the same."""

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
from penstock.models import adapter_files, lora, surgery
from penstock.models.lora_targets import ALL_LINEAR, LoraSpec
from penstock.models.roles import Actor, Critic, RewardModel
from tests.models.test_families import CASES, reference

TARGETS: dict[str, Any] = {
    "gpt2": ("c_attn", "wte", "lm_head"),
    "opt, 350m: post-norm, projections": ("q_proj", "fc2", "project_in"),
    "bloom, 6 heads": "transformer\\.h\\.1\\..*(query_key_value|dense_h_to_4h)",
    "gpt_neox": ("query_key_value", "embed_in", "lm_head"),
    "llama, grouped queries": ("q_proj", "v_proj", "up_proj", "embed_tokens", "lm_head"),
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
    assert len(load_file(tmp_path / "adapter" / adapter_files.WEIGHTS)) == 2 * len(lora.adapters_of(ours.decoder))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
        ("bloom, 4 heads", {"target_modules": ["query_key_value", "dense"], "use_rslora": True}),
        ("llama, grouped queries", {"target_modules": ["k_proj", "gate_proj", "embed_tokens"]}),
        ("gpt_neox", {"target_modules": ".*layers\\.[12]\\.attention\\.query_key_value"}),
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
    (LoraSpec(0), "a rank from 1"), (LoraSpec(49), "from 1 to 48"), (LoraSpec(4, targets=("q_proj",)), "c_attn"),
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
    ({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"rank_pattern": {"c_attn": 2}}, "rank_pattern"),
    ({"modules_to_save": ["wte"]}, "modules_to_save"), ({"base_model_name_or_path": None}, "names no base"),
])  # fmt: skip
def test_an_adapter_that_computes_something_else_is_refused(base, tmp_path, change, word):
    Actor.from_pretrained(base, lora=4).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / adapter_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=word):
        Actor.from_pretrained(str(tmp_path / "adapter"))


def test_a_model_takes_one_adapter(base, tmp_path):
    Actor.from_pretrained(base, lora=4).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="rank 4"):
        Actor.from_pretrained(str(tmp_path / "adapter"), lora=8)
    with pytest.raises(UserError, match="is an adapter itself"):
        Actor.from_pretrained(str(tmp_path / "adapter"), adapter=str(tmp_path / "adapter"))
    assert Critic.from_pretrained(str(tmp_path / "adapter"), lora=4).decoder.adapted is not None
