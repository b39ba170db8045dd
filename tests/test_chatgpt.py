"""The published script, and what people added to it."""

import copy
from copy import deepcopy

import pytest
import torch
import transformers

from penstock.errors import UserError

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 60, "n_positions": 32}


def test_the_published_snippet_trains_unchanged():
    from chatgpt.nn import GPTActor, GPTCritic, RewardModel
    from chatgpt.trainer import PPOTrainer
    from chatgpt.trainer.strategies import ColossalAIStrategy

    strategy = ColossalAIStrategy(stage=3, placement_policy='cuda')  # fmt: skip

    with strategy.model_init_context():
        actor = GPTActor().cuda()
        critic = GPTCritic().cuda()
        initial_model = deepcopy(actor).cuda()
        reward_model = RewardModel(deepcopy(critic.model)).cuda()

    assert all(p.is_meta for model in (actor, critic, initial_model, reward_model) for p in model.model.parameters())
    trainer = PPOTrainer(
        strategy, actor, critic, reward_model, initial_model,
        experience_batch_size=2, train_batch_size=2, max_new_tokens=4,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in actor.named_parameters()}
    first = {name: p.detach().clone() for name, p in initial_model.named_parameters()}
    assert all(torch.equal(before[name], weight) for name, weight in first.items())
    metrics = trainer.fit([[5, 6, 7], [8, 9]], num_episodes=1, max_timesteps=1, update_timesteps=1)
    assert metrics[0]["policy/updates"] == 1
    assert any(not torch.equal(p, before[name]) for name, p in actor.named_parameters())
    assert all(torch.equal(p, first[name]) for name, p in initial_model.named_parameters())


def tiny(strategy, **more):
    from chatgpt.nn import GPTActor, GPTCritic, RewardModel
    from chatgpt.trainer import PPOTrainer

    with strategy.model_init_context():
        torch.manual_seed(0)
        actor, critic = GPTActor(config=TINY).cuda(), GPTCritic(config=TINY)
        initial, reward = deepcopy(actor), RewardModel(deepcopy(critic.model))
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in (actor, critic)]
    pairs = (actor, optimizers[0]), (critic, optimizers[1])
    (actor, one), (critic, two), reward, initial = strategy.prepare(*pairs, reward, initial)
    more = {"max_new_tokens": 6, "do_sample": True, **more}
    return PPOTrainer(
        strategy, actor, critic, reward, initial, one, two, experience_batch_size=4, train_batch_size=2, max_epochs=2,
        use_cache=True, **more,
    )  # fmt: skip


def strategies():
    from chatgpt.trainer.strategies import ColossalAIStrategy, DDPStrategy, NaiveStrategy

    return {
        "naive": NaiveStrategy, "ddp": DDPStrategy, "zero2": lambda: ColossalAIStrategy(stage=2),
        "zero2 cpu": lambda: ColossalAIStrategy(stage=2, placement_policy="cpu"),
        "gemini cpu": lambda: ColossalAIStrategy(placement_policy="cpu", device_memory="10MB"),
        "gemini auto": lambda: ColossalAIStrategy(placement_policy="auto"),
    }  # fmt: skip


PROMPTS = [[1, 2, 3], torch.tensor([4, 5]), {"input_ids": [6, 7, 8]}]


@pytest.mark.parametrize("name", strategies())
def test_every_published_strategy_trains_the_same(name):
    metrics = tiny(strategies()[name]()).fit(PROMPTS, num_episodes=2, max_timesteps=2, update_timesteps=2)
    expected = tiny(strategies()["naive"]()).fit(PROMPTS, num_episodes=2, max_timesteps=2, update_timesteps=2)
    assert len(metrics) == 2
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert metrics[1]["objective/kl"] != pytest.approx(0.0, abs=1e-7)  # the actor has moved from the reference


def test_a_reward_is_learned():
    """The reward model's score head prefers one token's embedding; its share of the answers grows."""
    trainer = tiny(strategies()["naive"](), kl_coef=0.0, eos_token_id=59)
    rewards = []

    def prefers_seven(prompts, answers):
        rewards.append(sum(a.response_ids.count(7) / len(a.response_ids) for a in answers) / len(answers))
        return [a.response_ids.count(7) / len(a.response_ids) for a in answers]

    trainer.ppo.roles.reward, trainer.ppo.roles.scorer = None, prefers_seven
    trainer.experience_batch_size, trainer.train_batch_size = 16, 16
    trainer.fit(PROMPTS, num_episodes=25, max_timesteps=1)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


def test_every_family_has_its_names(tmp_path):
    from chatgpt import nn

    for prefix, family in (("GPT", "gpt2"), ("OPT", "opt"), ("BLOOM", "bloom")):
        with torch.device("meta"):
            actor, critic = getattr(nn, f"{prefix}Actor")(), getattr(nn, f"{prefix}Critic")()
        assert actor.model.config.family == critic.model.config.family == family
        assert copy.deepcopy(critic.model).config == actor.model.config
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for given in ({"pretrained": str(tmp_path)}, {"config": config}):
        assert nn.GPTActor(**given).model.config.d_model == 16


def test_what_was_trained_is_saved_for_transformers(tmp_path):
    strategy = strategies()["gemini cpu"]()
    trainer = tiny(strategy)
    trainer.fit(PROMPTS)
    strategy.save_model(trainer.actor, tmp_path / "actor", only_rank0=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "actor")
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        ours = trainer.actor.decoder.logits(trainer.actor(tokens, None))
    assert torch.allclose(loaded(tokens).logits, ours, atol=1e-5)


def test_callbacks_are_called_in_order():
    seen = []

    class Note:
        def __getattr__(self, name):
            return lambda *_: seen.append(name)

    tiny(strategies()["naive"](), callbacks=[Note()]).fit(PROMPTS)
    assert seen == [
        "on_fit_start", "on_episode_start", "on_make_experience_start", "on_make_experience_end",
        "on_learn_epoch_start", "on_learn_epoch_end", "on_learn_epoch_start", "on_learn_epoch_end", "on_episode_end",
        "on_fit_end",
    ]  # fmt: skip


def test_mistakes_are_said():
    from chatgpt.trainer.strategies import ColossalAIStrategy

    with pytest.raises(UserError, match="stages are 1, 2 and 3"):
        ColossalAIStrategy(stage=4)
    with pytest.raises(UserError, match="needs stage=3"):
        ColossalAIStrategy(stage=2, placement_policy="auto")
    with pytest.raises(UserError, match="does not know num_beams"):
        tiny(strategies()["naive"](), num_beams=4)
    for changes in ({"do_sample": False}, {"temperature": 0.0}):  # issue 19, item 17: it sampled all the same
        with pytest.raises(UserError, match="PPO learns from sampled answers"):
            tiny(strategies()["naive"](), **changes)
    with pytest.raises(UserError, match="give tokenizer="):
        tiny(strategies()["naive"]()).fit(["hello"])
    with pytest.raises(UserError, match="in the vocabulary"):
        tiny(strategies()["naive"]()).fit([[99]])
    with pytest.raises(UserError, match="max_length=3 leaves no room"):
        tiny(strategies()["naive"](), max_length=3).fit(PROMPTS)
