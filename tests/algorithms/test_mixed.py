"""PPO between four models and one base: frozen starts that are shared, packed bases, a critic on the actor's trunk."""

import dataclasses
import json

import pytest

from penstock.algorithms.ppo import ppo
from penstock.cli import main
from penstock.config import DataFlags, LoraFlags, OptimFlags, PPOConfig, RunFlags
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor, Critic, RewardModel
from tests.conftest import comparisons, demonstrations


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cli(*arguments):
    try:
        main([*map(str, arguments)])
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture
def config(tmp_path, tiny_model, jsonl):
    """Makes a PPO run of one tiny model: config(out, strategy, **LoraFlags)."""
    base = tiny_model()
    data = jsonl([{"prompt_ids": [1, 3 + i % 9, 4]} for i in range(8)], "prompts.jsonl")
    (tmp_path / "fn.py").write_text(
        "def score(prompts, responses, *, response_ids, **_): return [float(ids.count(5)) for ids in response_ids]\n"
    )

    def make(out, strategy="naive", peft=None, **budgets):
        return PPOConfig(
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
    homes = [{id(one) for one in stream.stored if one.chunk.group.startswith(("tokens", "embed", "blocks"))}
             for stream in streams]  # fmt: skip
    assert len(homes[0] & homes[1]) == len(homes[0] & homes[2]) == 2 + 3  # tables and three of four blocks
    assert [name for name, p in actor.named_parameters() if p.requires_grad] == [
        name for name, _ in actor.named_parameters() if name.startswith(("decoder.blocks.3", "decoder.norm"))
    ]


@pytest.mark.parametrize("strategy", ["naive", "gemini_cpu"])
def test_a_shared_frozen_start_learns_as_copies_do(config, strategy, monkeypatch):
    flags = LoraFlags(num_layers_unfrozen=1)
    shared = ppo(config("shared", strategy, flags, device_memory=None if strategy == "naive" else "1MB"))
    with monkeypatch.context() as patch:
        for role in (Actor, Critic, RewardModel):
            patch.setattr(role, "recipe", lambda self, name: None)
        apart = ppo(config("apart", "naive", flags))
    for one, other in zip(metrics(shared), metrics(apart), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert metrics(shared)[-1]["policy/grad_norm"] > 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_four_roles_stand_on_one_packed_base(config, kind):
    flags = LoraFlags(lora=4, base_dtype=kind)
    runs = [ppo(config(name, name, flags)) for name in ("naive", "gemini_cpu")]
    for one, other in zip(*map(metrics, runs), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
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
    last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "model"
    before, after = (dict(Actor.from_pretrained(str(one)).named_parameters()) for one in (config("x").actor, last))
    moved = {name for name, weight in before.items() if not weight.equal(after[name])}
    assert moved
    assert all(name.startswith(("decoder.blocks.1", "decoder.norm")) for name in moved)
