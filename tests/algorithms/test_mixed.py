"""PPO between four models and one base: frozen starts that are shared, packed bases, a critic on the actor's trunk."""

import dataclasses
import shutil

import pytest
import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.experience import Experience, Roles
from penstock.algorithms.ppo import PPO, ppo
from penstock.config import DataFlags, LoraFlags, OptimFlags, RunFlags
from penstock.memory.strategy import Strategy
from penstock.models import pretrained
from penstock.models.roles import Actor, ActorCritic, Critic, RewardModel
from tests.conftest import assert_same_metrics, cli, comparisons, demonstrations, last_model, metrics, ppo_config


@pytest.fixture
def config(tmp_path, tiny_model, jsonl):
    """Makes a PPO run of one tiny model: config(out, strategy, **LoraFlags)."""
    base = tiny_model()
    data = jsonl([{"prompt_ids": [1, 3 + i % 9, 4]} for i in range(8)], "prompts.jsonl")
    score = "def score(prompts, responses, *, response_ids, **_): return [float(ids.count(5)) for ids in response_ids]"
    (tmp_path / "fn.py").write_text(score)

    def make(out, strategy="naive", peft=None, **budgets):
        return ppo_config(
            actor=base, reward_fn=f"{tmp_path}/fn.py:score", data=DataFlags(data=(data,), max_length=32),
            run=RunFlags(out=str(tmp_path / out), strategy=strategy, checkpoint_every=1, **budgets),
            peft=peft or LoraFlags(), critic_lr=1e-2, value_warmup=False, max_new_tokens=6, samples=0,
            optim=OptimFlags(lr=5e-3, batch_size=8, micro_batch_size=3, epochs=2, steps=3), mini_batch_size=4,
        )  # fmt: skip

    return make


def test_a_frozen_start_is_one_for_actor_reference_and_critic(tiny_model):
    source = tiny_model(num_layers=4)
    strategy = Strategy.named("gemini_cpu", device="cpu")
    with strategy.init():
        actor = Actor.from_pretrained(source, unfrozen=1)
        critic = Critic.from_pretrained(source, unfrozen=1)
        reference = actor.frozen()
    streams = strategy.prepare_all(actor, reference, critic)
    homes = [{id(one) for one in stream.homes if one.chunk.group.startswith(("tokens", "embed", "blocks"))}
             for stream in streams]  # fmt: skip
    assert len(homes[0] & homes[1]) == len(homes[0] & homes[2]) == 2 + 3  # tables and three of four blocks
    for name, p in actor.named_parameters():
        assert p.requires_grad == name.startswith(("decoder.blocks.3", "decoder.norm"))


@pytest.mark.parametrize("strategy", ["naive", "gemini_cpu"])
def test_a_shared_frozen_start_learns_as_copies_do(config, strategy, monkeypatch):
    flags = LoraFlags(num_layers_unfrozen=1)
    shared = ppo(config("shared", strategy, flags, device_memory=None if strategy == "naive" else "1MB"))
    with monkeypatch.context() as patch:
        for role in (Actor, Critic, RewardModel):
            patch.setattr(role, "recipe", lambda self, name: None)
        apart = ppo(config("apart", "naive", flags))
    assert_same_metrics(shared, apart)
    assert metrics(shared)[-1]["policy/grad_norm"] > 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_four_roles_stand_on_one_packed_base(config, kind):
    flags = LoraFlags(lora=4, base_dtype=kind)
    runs = [ppo(config(name, name, flags)) for name in ("naive", "gemini_cpu")]
    assert_same_metrics(*runs)
    plain = metrics(ppo(config("plain", "naive", LoraFlags(lora=4))))
    assert plain[0]["objective/entropy"] == pytest.approx(metrics(runs[0])[0]["objective/entropy"], rel=0.2)
    assert plain[0]["objective/entropy"] != metrics(runs[0])[0]["objective/entropy"]


def test_flags_that_do_not_go_together_are_refused(tmp_path, tiny_model, jsonl, capsys):
    start = ["sft", "--model", tiny_model(), "--data", jsonl(demonstrations(8)), "--out", tmp_path / "run"]
    for flags, word in [
        (["--base-dtype", "nf4"], "give an adapter that does"),
        (["--lora", "2", "--num-layers-unfrozen", "1"], "give one of the two"),
        (["--num-layers-unfrozen", "3"], "the model has 2 blocks"),
        (["--num-layers-unfrozen", "0"], "must be at least 1"),
    ]:
        assert cli(*start, *flags) == 2
        assert word in capsys.readouterr().err
    assert cli("reward", "--model", tiny_model(), "--data", jsonl(comparisons(8), "pairs.jsonl"), "--out",
               tmp_path / "reward", "--base-dtype", "int8") == 2  # fmt: skip


def test_a_frozen_start_is_left_as_it_was(config):
    run = ppo(dataclasses.replace(config("run", peft=LoraFlags(num_layers_unfrozen=1))))
    models = (config("x").actor, last_model(run))
    before, after = (dict(Actor.from_pretrained(str(model)).named_parameters()) for model in models)
    moved = {name for name, weight in before.items() if not weight.equal(after[name])}
    assert moved
    assert all(name.startswith(("decoder.blocks.1", "decoder.norm")) for name in moved)


# --- a critic on the actor's trunk ------------------------------------------------------------------------------------
def oracle_of(source, flags, experience, hold_actor):
    """The joint gradient in plain PyTorch: one decoder, two heads, two losses."""
    model = ActorCritic(pretrained.load(source)[0])
    rows = experience
    hidden = model.decoder(rows.tokens)
    mask = fn.response_mask(rows.prompt_lengths, rows.lengths, rows.tokens.shape[1])
    logits = model.decoder.logits(fn.states_before(hidden, mask))
    logprobs = fn.unpack(torch.log_softmax(logits, -1).gather(1, rows.tokens[mask][:, None])[:, 0], rows.lengths)
    trunk = hidden.detach() if hold_actor else hidden
    values = fn.unpack(fn.states_before(trunk, mask) @ model.score[0], rows.lengths)
    count = int(rows.lengths.sum())
    policy, _ = fn.policy_loss(logprobs, rows.logprobs, rows.advantages, rows.mask, flags.clip, count)
    value, _ = fn.value_loss(values, rows.values, rows.returns, rows.mask, flags.value_clip, count)
    (flags.vf_coef * value + (0.0 if hold_actor else policy)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("hold_actor", [False, True])
def test_both_losses_reach_one_trunk(config, hold_actor):
    setting = config("none")
    flags = dataclasses.replace(setting.ppo, vf_coef=0.3)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 16, (6, 9), generator=generator)
    numbers = [torch.randn(6, 6, generator=generator) * 0.1 for _ in range(7)]
    experience = Experience(
        tokens, torch.full((6,), 3), torch.full((6,), 6), numbers[0] - 2.7, *numbers[1:5], torch.zeros(6),
        torch.ones(6, dtype=torch.bool), *numbers[5:], torch.zeros(6), torch.zeros(6, 0),
    )  # fmt: skip
    strategy = Strategy.named("naive", device="cpu")
    with strategy.init():
        actor = ActorCritic(Actor.from_pretrained(setting.actor).decoder)
    stream = strategy.prepare(actor)
    iteration = PPO(strategy, Roles(stream, stream), setting.optim, flags)
    steps = iteration.learn(experience, torch.arange(6), 0.0, hold_actor=hold_actor)
    assert list(steps) == (["value"] if hold_actor else ["policy", "value"])
    assert set(steps["value"].sums) == {"loss", "clipfrac", "tokens"}
    expected = oracle_of(setting.actor, flags, experience, hold_actor)
    for name, p in actor.named_parameters():
        assert torch.allclose(p.grad, expected.get(name, torch.zeros_like(p)), atol=1e-6), name
    assert expected["score"].abs().max() > 1e-4


@pytest.mark.parametrize("strategy", ["naive", "gemini_cpu"])
def test_a_value_head_learns_and_a_stopped_run_goes_on(config, strategy, capsys):
    budget = {} if strategy == "naive" else {"device_memory": "1MB"}
    one = dataclasses.replace(config("run", strategy, **budget), value_head=True, value_warmup=True)
    run = ppo(one)
    found = metrics(run)
    assert found[-1]["val/explained_variance"] != found[0]["val/explained_variance"]
    again = dataclasses.replace(config("again", strategy, **budget), value_head=True, value_warmup=True)
    ppo(dataclasses.replace(again, optim=dataclasses.replace(again.optim, steps=3)))
    for step in ("step-000002", "step-000003"):
        shutil.rmtree(again_dir := run.parent / "again" / "checkpoints" / step)
        assert not again_dir.exists()
    (run.parent / "again" / "checkpoints" / "latest").write_text("step-000001\n")
    ppo(again, resume=True)
    assert metrics(run.parent / "again") == found
    assert cli("ppo", "--actor", one.actor, "--reward-fn", *one.reward_fn, "--data", *one.data.data, "--out",
               run.parent / "no", "--value-head", "--critic", one.actor) == 2  # fmt: skip
    assert "give one of the two" in capsys.readouterr().err
