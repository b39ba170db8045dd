"""Adapters in the three stages: what a run leaves, what it goes on from, and four roles on one base."""

import dataclasses
import json
import shutil

import peft
import pytest
import torch
import transformers

from penstock.algorithms.experience import Roles, score
from penstock.algorithms.ppo import ppo
from penstock.algorithms.sft import sft
from penstock.config import DataFlags, LoraFlags, OptimFlags, RunFlags
from penstock.memory.strategy import Strategy
from penstock.models import lora
from penstock.models.roles import Actor, Critic, RewardModel
from penstock.rollout.engine import Answer
from tests.conftest import (
    assert_same_metrics,
    cli,
    comparisons,
    demonstrations,
    last_model,
    metrics,
    ppo_config,
    stage_config,
)


def logits_of(source, **how):
    actor = Actor.from_pretrained(str(source), **how)
    with torch.no_grad():
        return actor.decoder.logits(actor.decoder(torch.arange(3, 12)[None]))


def test_the_whole_way_by_command(tmp_path, tiny_model, jsonl, capsys):
    """sft, reward and ppo through adapters; export, with peft and transformers as judges; generate."""
    base = tiny_model()
    quick = ["--steps", "3", "--batch-size", "4", "--lr", "1e-2", "--max-new-tokens", "4", "--samples", "2"]
    assert cli("sft", "--model", base, "--data", jsonl(demonstrations(12), "demos.jsonl"), "--out", tmp_path / "sft",
               "--lora", "4", "--lora-targets", "c_attn", "c_fc", *quick) == 0  # fmt: skip
    trained = last_model(tmp_path / "sft")
    names = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json", "penstock.json"}
    assert {file.name for file in trained.iterdir()} == names
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, trained).eval()
    with torch.no_grad():
        expected = theirs(torch.arange(3, 12)[None]).logits
    assert (logits_of(trained) - expected).abs().max() <= 1e-5
    assert (logits_of(base) - expected).abs().max() > 1e-3

    assert cli("reward", "--model", tmp_path / "sft", "--data", jsonl(comparisons(12), "pairs.jsonl"), "--out",
               tmp_path / "reward", "--steps", "3", "--batch-size", "4", "--lr", "1e-2") == 0  # fmt: skip
    assert cli("ppo", "--actor", tmp_path / "sft", "--reward", tmp_path / "reward", "--lora", "4",
               "--data", jsonl([{"prompt_ids": [1, 3 + i]} for i in range(8)], "prompts.jsonl"),
               "--out", tmp_path / "ppo", *quick) == 0  # fmt: skip
    assert (logits_of(last_model(tmp_path / "ppo")) - expected).abs().max() > 1e-4

    assert cli("export", tmp_path / "ppo", "--out", tmp_path / "whole", "--merge") == 0
    assert cli("export", tmp_path / "ppo", "--out", tmp_path / "part") == 0
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        merged = whole(torch.arange(3, 12)[None]).logits
    assert (merged - logits_of(base, adapter=str(tmp_path / "part"))).abs().max() <= 1e-5
    assert cli("export", tmp_path / "reward", "--out", tmp_path / "judge", "--merge") == 0
    judge = RewardModel.from_pretrained(str(tmp_path / "judge"))
    other = RewardModel.from_pretrained(str(last_model(tmp_path / "reward")))
    assert (judge.mean, judge.std) == (other.mean, other.std)
    assert judge.std != 1.0
    capsys.readouterr()
    said = []
    for flags in (["--model", tmp_path / "whole"], ["--model", base, "--adapter", tmp_path / "ppo"]):
        assert cli("generate", *flags, "--data", tmp_path / "prompts.jsonl", "--temperature", "0", "--json",
                   "--max-new-tokens", "4") == 0  # fmt: skip
        said.append([json.loads(line)["response_ids"] for line in capsys.readouterr().out.splitlines()])
    assert said[0] == said[1]


def test_flags_that_shape_no_adapter_are_refused(tmp_path, tiny_model, jsonl, capsys):
    data = jsonl(demonstrations(8))
    start = ["sft", "--model", tiny_model(), "--data", data, "--out", tmp_path / "run"]
    for flags, word in [
        (["--lora-alpha", "8"], "give its rank too"),
        (["--lora", "0"], "must be at least 1"),
        (["--lora", "2", "--lora-targets", "q_proj"], "c_attn"),
    ]:
        assert cli(*start, *flags) == 2
        assert word in capsys.readouterr().err


def test_a_stopped_run_goes_on_bit_by_bit(tmp_path):
    def config(out):
        one = stage_config(tmp_path, "sft", out, steps=4, checkpoint_every=2)
        return dataclasses.replace(one, peft=LoraFlags(lora=4), heldout=0.0)

    straight, stopped = sft(config("straight")), sft(config("stopped"))
    shutil.rmtree(stopped / "checkpoints" / "step-000004")
    (stopped / "checkpoints" / "latest").write_text("step-000002\n")
    sft(config("stopped"), resume=True)
    weights = [last_model(run) / "adapter_model.safetensors" for run in (straight, stopped)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert metrics(straight) == metrics(stopped)


# --- hydra ------------------------------------------------------------------------------------------------------------
PLACES = {"naive": {}, "gemini_cpu": {"device_memory": "1MB"}, "gemini_nvme": {"device_memory": "1MB"}, "zero2_cpu": {}}


def hydra_config(tmp_path, base, data, reward, name, out):
    disk = {"disk": str(tmp_path / f"disk-{out}")} if name == "gemini_nvme" else {}
    return ppo_config(
        actor=base, reward=reward, data=DataFlags(data=(data,), max_length=32),
        run=RunFlags(out=str(tmp_path / out), strategy=name, checkpoint_every=1000, **PLACES[name], **disk),
        peft=LoraFlags(lora=4), critic_lr=1e-2, value_warmup=False, max_new_tokens=6, samples=0,
        optim=OptimFlags(lr=5e-3, batch_size=8, micro_batch_size=3, epochs=2, steps=3), mini_batch_size=4,
    )  # fmt: skip


@pytest.fixture
def reward_run(tmp_path, tiny_model, jsonl):
    def make():
        base = tiny_model()
        assert cli("reward", "--model", base, "--data", jsonl(comparisons(12), "pairs.jsonl"), "--lora", "4", "--out",
                   tmp_path / "reward", "--steps", "3", "--batch-size", "4", "--lr", "1e-2") == 0  # fmt: skip
        return base, str(tmp_path / "reward")

    return make


@pytest.mark.parametrize("name", PLACES)
def test_four_roles_on_one_base_learn_as_four_models_do(name, tmp_path, reward_run, jsonl, monkeypatch):
    base, reward = reward_run()
    data = jsonl([{"prompt_ids": [1, 3 + i % 9, 4]} for i in range(8)])
    shared = ppo(hydra_config(tmp_path, base, data, reward, name, "shared"))
    with monkeypatch.context() as patch:  # nobody knows where weights come from: four copies
        for role in (Actor, Critic, RewardModel):
            patch.setattr(role, "recipe", lambda self, name: None)
        apart = ppo(hydra_config(tmp_path, base, data, reward, "naive", "apart"))
    assert_same_metrics(shared, apart)
    assert metrics(shared)[-1]["policy/grad_norm"] > 0


def prepared(tmp_path, base, reward, strategy_name="gemini_cpu", **budgets):
    strategy = Strategy.named(strategy_name, **budgets)
    with strategy.init():
        actor = Actor.from_pretrained(base, lora=4)
        models = [actor, actor.frozen(), Critic.from_pretrained(base, lora=4, seed=1)]
        models.append(RewardModel.trained(str(last_model(reward))).eval().requires_grad_(False))
    return strategy, models, strategy.prepare_all(*models)


def test_four_roles_take_the_bytes_of_one_base_and_their_adapters(tmp_path, reward_run):
    base, reward = reward_run()
    strategy, models, _ = prepared(tmp_path, base, reward)
    weights = sum(p.numel() for n, p in models[1].named_parameters()) * 4
    adapters = sum(p.numel() for model in models for n, p in model.named_parameters() if lora.is_adapter(n)) * 4
    heads = 2 * models[2].score.numel() * 4
    trained = sum(p.numel() for model in models for p in model.parameters() if p.requires_grad) * 4
    pages = 4 * 8 * 8192  # chunks end on pages
    assert strategy.tiers["host"].used <= weights + adapters + heads + 3 * trained + 4 * pages
    assert strategy.tiers["host"].used < 2 * weights + 4 * trained + 4 * pages or weights < 10 * trained


def test_one_weight_stream_serves_all_four_roles(tmp_path, reward_run):
    """Bytes that scoring fetches from the host: the base once, not four times."""
    base, reward = reward_run()
    answers = [Answer([1, 3 + i], [4, 5, 2], [-1.0] * 3, "stop") for i in range(6)]
    fetched = {}
    for company in (True, False):
        strategy, models, streams = prepared(tmp_path, base, reward, device_memory="150kB")
        actors, references, critics, rewards = streams
        if not company:
            for stream in streams:
                stream.shares = lambda other, stream=stream: other is stream
        tier = strategy.tiers["host"]
        before = tier.bytes_read
        with strategy.phase("score"):
            score(strategy, Roles(actors, references, critics, rewards), answers, [None] * 6, 1.0, 2)
        fetched[company] = tier.bytes_read - before
    weights = sum(p.numel() for p in models[1].parameters()) * 4
    others = sum(p.numel() for model in models for n, p in model.named_parameters() if lora.is_adapter(n)) * 4
    pages = 4 * 8 * 8192
    assert weights <= fetched[True] <= weights + others + pages
    assert fetched[False] > 1.9 * weights


def test_only_equal_frozen_weights_are_shared(tmp_path, tiny_model):
    base, other = tiny_model(), tiny_model("other", seed=3)
    strategy = Strategy.named("gemini_cpu")
    with strategy.init():
        actor = Actor.from_pretrained(base, lora=4)
        stranger = Actor.from_pretrained(other).eval().requires_grad_(False)
        full = Actor.from_pretrained(base)
    one, two, three, four = strategy.prepare_all(actor, actor.frozen(), stranger, full)
    assert [one.shares(other) for other in (two, three, four)] == [True, False, False]


def test_a_loaded_adapter_stays_in_the_reference(tmp_path, tiny_model):
    base = tiny_model()
    actor = Actor.from_pretrained(base, lora=4)
    with torch.no_grad():
        for adapter in lora.adapters_of(actor.decoder):
            adapter.b.normal_()
    actor.save_pretrained(tmp_path / "adapter")
    again = Actor.from_pretrained(str(tmp_path / "adapter"))
    assert not any(p.requires_grad for p in again.frozen().parameters())
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(again.frozen().decoder(tokens), again.decoder(tokens))
    assert not lora.adapters_of(Actor.from_pretrained(base, lora=4).frozen().decoder)
    assert dataclasses.replace(lora.Adapted(again.decoder.adapted.spec, "", None, 1)).source != 0


def test_whole_weights_that_came_with_an_adapter_stay_with_it(tmp_path, tiny_model, jsonl):
    """modules_to_save of a tied model, through training where weights move: peft reads what comes out."""
    base, tokens = tiny_model(), torch.arange(3, 12)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn"], modules_to_save=["wte", "lm_head"])
    adapted = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape) * ("modules_to_save" in name))
    adapted.save_pretrained(tmp_path / "first")
    data = jsonl(demonstrations(12))
    for strategy in ("naive", "gemini_cpu"):
        flags = ["--steps", "2", "--batch-size", "4", "--lr", "1e-2", "--samples", "0", "--strategy", strategy]
        out = tmp_path / strategy
        assert cli("sft", "--model", base, "--adapter", tmp_path / "first", "--data", data, "--out", out, *flags) == 0
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
        again = peft.PeftModel.from_pretrained(theirs, last_model(out)).eval()
        with torch.no_grad():
            expected = again(tokens).logits
            before = adapted.eval()(tokens).logits
        assert (logits_of(last_model(out)) - expected).abs().max() <= 1e-5
        assert 1e-3 < (expected - before).abs().max() < 1.0
        assert torch.equal(again.base_model.model.lm_head.weight, adapted.base_model.model.lm_head.weight)
