"""What PPO learns from, number by number: transformers' GPT-2 gives the logits, the slow oracle does the arithmetic."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.algorithms import functional as fn
from penstock.algorithms.experience import Experience, Roles, score, used_scores
from penstock.algorithms.policy_metrics import summary
from penstock.algorithms.ppo import PPO, actor_loss, critic_loss, with_advantages
from penstock.algorithms.sft import rows_of
from penstock.config import OptimFlags, PPOFlags
from penstock.data.chat import Example
from penstock.memory.strategy import StepStats, Strategy
from penstock.models.roles import Actor, Critic
from penstock.rollout.engine import Answer
from tests.algorithms import oracle

ANSWERS = [
    # prompt ids, response ids, how it ended
    Answer([1, 3, 4], [5, 6, 2], [-1.0, -2.0, -3.0], "stop"),
    Answer([1, 7, 8, 9, 10], [11, 2], [-1.5, -2.5], "stop"),
    Answer([1], [5, 5, 5, 5], [-0.1, -0.2, -0.3, -0.4], "length"),
    Answer([1, 12], [2], [-0.7], "stop"),
]
SCORES = [1.0, -2.0, 4.0, 0.5]


def config(**changes):
    return PPOFlags(**{"temperature": 0.7, **changes})


@pytest.fixture
def models(tiny_model):
    """Three different sets of weights, so that a mix-up shows; wide enough weights for logits that matter."""
    addresses = [tiny_model(name, seed) for seed, name in enumerate(("actor", "reference", "critic"))]
    actor, reference = Actor.from_pretrained(addresses[0]), Actor.from_pretrained(addresses[1]).frozen()
    torch.manual_seed(0)
    critic = Critic.from_pretrained(addresses[2])
    critic.mean, critic.std = 0.3, 2.0
    with torch.no_grad():
        for model in (actor, reference):
            model.decoder.embed.tokens.mul_(10)
    actor.save_pretrained(addresses[0])
    reference.save_pretrained(addresses[1])
    return actor, reference, critic, addresses


def scored(models, size=3):
    strategy = Strategy.named("naive", device="cpu")
    streams = [strategy.prepare(copy.deepcopy(model)) for model in models[:3]]
    return score(strategy, Roles(*streams, scorer=lambda *_: SCORES), ANSWERS, [None] * 4, 0.7, size)


def loss_of_actor(actor, part, setting, count):
    return actor_loss(actor, actor(part.tokens, part.lengths), part, setting, count, 0)


def loss_of_critic(critic, part, setting, count):
    return critic_loss(critic, critic(part.tokens, part.lengths), part, setting, count)


def transformers_logprobs(address, answer, temperature):
    """Log-probs and entropies of one unpadded answer's tokens, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(address, dtype=torch.float64, attn_implementation="eager")
    row = torch.tensor([answer.prompt_ids + answer.response_ids])
    with torch.no_grad():
        logits = model(row).logits[0, len(answer.prompt_ids) - 1 : -1] / temperature
    return oracle.token_logprobs(logits, torch.tensor(answer.response_ids))


def losses_of(models, count):
    """(model, its loss of a part, over `count` tokens) of actor and critic."""
    actor, _, critic, _ = models
    return (
        (actor, lambda part: loss_of_actor(actor, part, config(), count)[0]),
        (critic, lambda part: loss_of_critic(critic, part, config(), count)[0]),
    )


def gradients_of(model, loss_of, *parts):
    model.zero_grad()
    for part in parts:
        loss_of(part).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("size", [1, 3, 4])
def test_logprobs_and_entropies_are_those_of_transformers_at_the_temperature(models, size):
    experience = scored(models, size)
    for i, answer in enumerate(ANSWERS):
        n = len(answer.response_ids)
        for address, ours in ((models[3][0], experience.logprobs), (models[3][1], experience.ref_logprobs)):
            theirs, entropies = transformers_logprobs(address, answer, 0.7)
            assert torch.allclose(ours[i, :n].double(), theirs, atol=1e-5)
            assert not ours[i, n:].any()
            if ours is experience.logprobs:
                assert torch.allclose(experience.entropy[i, :n].double(), entropies, atol=1e-5)


def test_values_are_of_the_state_before_each_token_in_the_reward_models_scale(models):
    experience, critic = scored(models), models[2]
    model = AutoModelForCausalLM.from_pretrained(models[3][2], dtype=torch.float64, attn_implementation="eager")
    for i, answer in enumerate(ANSWERS):
        row = torch.tensor([answer.prompt_ids + answer.response_ids])
        with torch.no_grad():
            hidden = model.transformer(row).last_hidden_state[0]
        for j in range(len(answer.response_ids)):
            state = hidden[len(answer.prompt_ids) + j - 1]
            value = (float(state @ critic.score[0].double()) - 0.3) / 2.0
            assert float(experience.values[i, j]) == pytest.approx(value, abs=1e-5)


def test_lengths_scores_and_endings_are_kept(models):
    experience = scored(models)
    assert experience.lengths.tolist() == [3, 2, 4, 1]
    assert experience.prompt_lengths.tolist() == [3, 5, 1, 2]
    assert experience.scores.tolist() == SCORES
    assert experience.ended.tolist() == [True, True, False, True]
    assert float(experience.sampling_logprobs[0, 0]) == -1.0


def used_by_oracle(experience, setting):
    """Clipped, and then changed where there is no EOS: at once, or below those that have it."""
    scores = torch.tensor(SCORES)
    if setting.reward_clip:
        scores = scores.clamp(-setting.reward_clip, setting.reward_clip)
    if setting.missing_eos_score is not None:
        return oracle.replace_missing_eos(scores, experience.ended, setting.missing_eos_score)
    return oracle.below_ended(scores, experience.ended, setting.missing_eos_penalty)


@pytest.mark.parametrize("changes", [
    {}, {"gamma": 0.9, "lam": 0.5}, {"missing_eos_penalty": None}, {"reward_clip": 0.75}, {"whiten_rewards": True},
    {"missing_eos_score": -3.0, "reward_clip": 2.0, "whiten_rewards": True}, {"missing_eos_score": 0.0},
    {"missing_eos_penalty": 0.5, "reward_clip": 1.5},
])  # fmt: skip
def test_advantages_and_returns_step_by_step(models, changes):
    """Clip, replace without EOS, KL at every token, whiten if asked, GAE, returns, and only then whiten (7-14)."""
    setting, beta = config(**changes), 0.3
    experience = scored(models)
    scores = used_by_oracle(experience, setting)
    rewards = oracle.shape_rewards(scores, experience.logprobs, experience.ref_logprobs, experience.lengths, beta)
    if setting.whiten_rewards:
        rewards = oracle.whiten(rewards, experience.mask, shift_mean=False)
    advantages, returns = oracle.gae(rewards, experience.values, experience.lengths, setting.gamma, setting.lam)
    ours = with_advantages(experience, beta, setting)
    assert torch.allclose(ours.returns.double(), returns, atol=1e-5)
    assert torch.allclose(ours.advantages.double(), oracle.whiten(advantages, experience.mask), atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"missing_eos_penalty": None}])
def test_scores_and_the_critic_that_predicts_them_get_one_scale(models, changes):
    """The scale is that of the answers whose own score is used; what was predicted before moves with it."""
    strategy = Strategy.named("naive", device="cpu")
    streams = [strategy.prepare(copy.deepcopy(model)) for model in models[:3]]
    roles, scale = Roles(*streams, scorer=lambda *_: SCORES), fn.Moments()
    iteration = PPO(strategy, roles, OptimFlags(lr=1e-3), config(**changes), critic_scores=True)
    raw, experience = scored(models), iteration.score(ANSWERS, [None] * 4, 0.1, scale)
    counted = torch.tensor(SCORES if changes else [1.0, -2.0, 0.5])
    mean, std = float(counted.mean()), float(counted.std())
    assert experience.scores.tolist() == SCORES
    assert torch.allclose(experience.scaled_scores, (torch.tensor(SCORES) - mean) / std, atol=1e-6)
    used = used_scores(experience, config(**changes))
    assert torch.equal(used[experience.ended], experience.scaled_scores[experience.ended])
    expected = fn.clean((raw.values - mean) / std, raw.mask)
    assert torch.allclose(fn.clean(experience.values, raw.mask), expected, atol=1e-5)
    assert roles.critic.model.std == pytest.approx(2.0 * std)
    again = score(strategy, roles, ANSWERS, [None] * 4, 0.7, 3)  # later it predicts on that scale by itself
    assert torch.allclose(fn.clean(again.values, raw.mask), expected, atol=1e-5)
    iteration.score(ANSWERS, [None] * 4, 0.1, scale)
    assert roles.critic.model.std == pytest.approx(2.0 * std)  # once: from then on it learns
    assert scale.count == 2 * len(counted)


def test_padding_garbage_reaches_no_gradient(models):
    """Token ids and NaN in the padding of a batch change neither losses nor gradients (PPO.md 1, 13)."""
    clean = with_advantages(scored(models), 0.1, config())
    mask = clean.mask
    whole = fn.mask_of(clean.prompt_lengths + clean.lengths, clean.tokens.shape[1])
    dirty = {
        field.name: torch.where(mask, value, torch.nan)
        for field in dataclasses.fields(Experience)
        if (value := getattr(clean, field.name)).dtype == torch.float32 and value.shape == mask.shape
    }
    dirty = dataclasses.replace(clean, tokens=torch.where(whole, clean.tokens, 13), **dirty)
    for model, loss_of in losses_of(models, 10):
        grads = [gradients_of(model, loss_of, part) for part in (clean, dirty)]
        assert grads[0]
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_give_the_same_gradient(models, size):
    """1e-6 in fp32, losses divided by the tokens of the whole mini-batch (15)."""
    experience = with_advantages(scored(models), 0.1, config())
    for model, loss_of in losses_of(models, int(experience.lengths.sum())):
        whole = gradients_of(model, loss_of, experience)
        parts = gradients_of(model, loss_of, *(experience.rows(rows) for rows in torch.arange(4).split(size)))
        for a, b in zip(whole, parts, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_losses_are_the_oracles(models):
    actor, _, critic, _ = models
    experience = with_advantages(scored(models), 0.1, config())
    moved = dataclasses.replace(experience, logprobs=experience.ref_logprobs, values=experience.values - 0.5)
    setting = config(clip=0.1, value_clip=0.3)
    loss, stats = loss_of_actor(actor, moved, setting, 10)
    inputs = experience.logprobs, moved.logprobs, moved.advantages, moved.mask
    expected, numbers = oracle.policy_loss(*inputs, clip=0.1, count=10)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert 0 < float(stats["clipfrac"]) == numbers["clipfrac"]
    assert float(stats["entropy"]) == pytest.approx(float(experience.entropy.sum()), abs=1e-4)
    loss, stats = loss_of_critic(critic, moved, setting, 10)
    inputs = experience.values, moved.values, moved.returns, moved.mask
    expected, clipped = oracle.value_loss(*inputs, clip=0.3, count=10)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert 0 < float(stats["clipfrac"]) == clipped
    loss, _ = loss_of_critic(critic, moved, config(value_clip=None), 10)
    expected, _ = oracle.value_loss(*inputs, clip=None, count=10)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_without_a_critic_values_are_zero_and_the_actor_learns_alone(models):
    """What algorithms with other advantages (GRPO) build on."""
    strategy = Strategy.named("naive", device="cpu")
    actor, reference = (strategy.prepare(copy.deepcopy(model)) for model in models[:2])
    roles = Roles(actor, reference, scorer=lambda *_: SCORES)
    iteration = PPO(strategy, roles, OptimFlags(lr=1e-3, micro_batch_size=3), config())
    experience = iteration.score(ANSWERS, [None] * 4, 0.1)
    assert not experience.values.any()
    steps = iteration.learn(experience, torch.arange(4))
    assert list(steps) == ["policy"]
    assert steps["policy"].applied


def test_ptx_is_the_sft_loss_times_its_coefficient(models):
    actor = models[0]
    examples = [Example([1, 3, 5, 2], [False, False, True, True]), Example([1, 6], [False, True])]
    rows, count = rows_of(examples[:1], torch.device("cpu")), sum(sum(example.trained) for example in examples)
    loss, stats = actor_loss(actor, actor(rows.tokens, None), rows, config(ptx_coef=3.0), 99, count)
    logprobs = transformers_logprobs(models[3][0], Answer([1, 3], [5, 2]), 1.0)[0]
    assert float(stats["ptx"]) == pytest.approx(-float(logprobs.sum()) / 3, abs=1e-5)
    assert float(loss) == pytest.approx(-float(logprobs.sum()), abs=1e-5)


def test_the_metrics_are_means_over_valid_tokens_and_sums_over_sequences(models):
    experience = with_advantages(scored(models), 0.1, config())
    policy = {
        "loss": 1.0, "policy": 1.0, "approxkl": 2.0, "clipfrac": 5.0, "ratio": 11.0, "ratio_sq": 14.0, "entropy": 20.0,
        "tokens": 10.0, "max_ratio_gap": 0.25,
    }  # fmt: skip
    sums = [
        ("policy", StepStats(True, 3.0, policy)),
        ("value", StepStats(True, 1.0, {"loss": 7.0, "clipfrac": 4.0, "tokens": 10.0})),
        ("policy", StepStats(True, 5.0, {**policy, "loss": 3.0, "policy": 3.0, "max_ratio_gap": 9.0})),
    ]
    setting = config(missing_eos_score=-1.0, reward_clip=1.5)
    metrics = summary(experience, sums, 0.1, setting)
    ours, reference = experience.logprobs, experience.ref_logprobs
    kl = sum(float(oracle.kl_k1(ours[i], reference[i])) for i in oracle.chosen(experience.mask))
    expected = {
        "objective/kl": kl / 4, "objective/non_score_reward": -0.1 * kl / 4, "objective/scores": sum(SCORES) / 4,
        "objective/used_scores": (1.0 - 1.5 - 1.0 + 0.5) / 4,  # what it learns from: clipped, and replaced without EOS
        "objective/used_scores_std": float(used_by_oracle(experience, setting).std()),
        "objective/rlhf_reward": (1.0 - 1.5 - 1.0 + 0.5) / 4 - 0.1 * kl / 4, "objective/response_length": 2.5,
        "objective/entropy": -float(experience.logprobs.sum()) / 4, "objective/scores_clipfrac": 0.5,
        "val/num_eos_tokens": 3.0, "val/missing_eos_rate": 0.25, "policy/approxkl_avg": 0.2, "policy/clipfrac_avg": 0.5,
        "policy/entropy_avg": 2.0, "loss/policy_avg": 2.0, "val/ratio": 1.1, "val/ratio_var": 1.4 - 1.21,
        "val/first_ratio_gap": 0.25, "loss/value_avg": 7.0, "val/clipfrac_avg": 0.4, "policy/grad_norm": 4.0,
        "val/explained_variance": oracle.explained_variance(experience.values, experience.returns, experience.mask),
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4), name
