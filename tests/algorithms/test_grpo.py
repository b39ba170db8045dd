"""GRPO as a whole: known optima, exactness, invariance, what it refuses and says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.algorithms import functional as fn
from penstock.algorithms.config import GRPOConfig, GRPOFlags
from penstock.algorithms.grpo import grpo, refilled, with_advantages
from penstock.config import DataFlags, OptimFlags, RunFlags
from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.models import decoder
from tests.algorithms.test_ppo import next_token_distribution, task, write_reward_fn  # noqa: F401
from tests.conftest import last_model, metrics

RAGGED = [{"prompt_ids": [1, 3, *range(3, 3 + i)]} for i in range(8)]
ONE_TOKEN = {"max_new_tokens": 1, "missing_eos_penalty": None, "target_kl": None}


def config(tmp_path, model, data, reward_fn, out="run", **changes):
    optim = {"lr": 3e-3, "batch_size": 16, "micro_batch_size": 16, "steps": 3} | changes.pop("optim", {})
    run = {"seed": 0, "checkpoint_every": 1000} | changes.pop("run", {})
    names = {"mini_batch_size", "samples", "heldout", "eval_every", "peft", "reference"} & set(changes)
    others = {"samples": 0, "heldout": 0.0} | {name: changes.pop(name) for name in names}
    flags = GRPOFlags(**{"max_new_tokens": 6, "group_size": 4, **changes})
    return GRPOConfig(
        model=model, reward_fn=reward_fn, data=DataFlags(data=(data,), max_length=32), grpo=flags,
        run=RunFlags(out=str(tmp_path / out), **run), optim=OptimFlags(**optim), **others,
    )  # fmt: skip


def log_of(run):
    return (Path(run) / "log.txt").read_text()


# --- known optima ---------------------------------------------------------------------------------------------------


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("advantage", "kl_in", "estimator"), [
    ("rloo", "reward", "k1"), pytest.param("reinforce++", "reward", "k1", marks=pytest.mark.slow),
    pytest.param("dr_grpo", "loss", "k2", marks=pytest.mark.slow), ("dr_grpo", "loss", "k3"),
])  # fmt: skip
def test_the_one_token_task_ends_at_the_kl_regularised_optimum(task, advantage, kl_in, estimator, seed):  # noqa: F811
    beta, table = 0.5, {3: 1.0, 4: 0.5, 5: -0.5, 6: 0.25}
    setup = task(table, seed=seed)
    optim = {"batch_size": 512, "micro_batch_size": 512, "steps": 80, "lr": 4e-3}
    changes = {"kl_coef": beta, "kl_in": kl_in, "kl_estimator": estimator, "group_size": 128, "advantage": advantage}
    run = grpo(config(*setup, **ONE_TOKEN, **changes, optim=optim, run={"seed": seed}))
    rewards = torch.tensor([table.get(i, 0.0) for i in range(16)])
    optimum = torch.softmax(next_token_distribution(setup[1]).log() + rewards / beta, dim=-1)  # PPO.md 26
    distance = 0.5 * (next_token_distribution(last_model(run)) - optimum).abs().sum()
    assert distance < 0.03


# --- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2])
def test_first_ratio_is_one_and_engine_agrees_with_the_trainer(task, epochs):  # noqa: F811
    for row in metrics(grpo(config(*task({3: 1.0, 5: -1.0}, RAGGED), optim={"epochs": epochs}))):
        assert row["val/first_ratio_gap"] <= 1e-5
        assert 0 < row["val/engine_logprob_gap"] <= 1e-5


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
def test_a_single_update_needs_no_second_reading_and_ends_in_the_same_weights(task, monkeypatch, loss):  # noqa: F811
    setup, reread = task({3: 1.0, 5: -1.0}, RAGGED), []
    evaluated = Strategy.evaluate_all
    monkeypatch.setattr(
        Strategy, "evaluate_all", lambda self, works: reread.append(len(works)) or evaluated(self, works)
    )
    skipped = grpo(config(*setup, "skipped", loss=loss))
    monkeypatch.setattr(GRPOConfig, "rereads", True)
    twice = grpo(config(*setup, "twice", loss=loss))
    steps = len(metrics(skipped))
    assert reread == [1] * steps + [2] * steps  # the reference alone, then with the policy
    for a, b in zip(metrics(skipped), metrics(twice), strict=True):
        for key in ("objective/kl", "loss/policy_avg", "loss/kl_avg", "policy/grad_norm", "val/engine_logprob_gap"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=2e-6), key
    weights = [load_file(last_model(run) / "model.safetensors") for run in (skipped, twice)]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-5), name


@pytest.mark.parametrize(("micro", "changes"), [
    (1, {}), (2, {"advantage": "reinforce++", "kl_in": "reward"}), (4, {"normalization": "sequence", "loss": "gspo"}),
    (16, {"loss": "cispo", "advantage": "dr_grpo"}),
])  # fmt: skip
def test_micro_batch_size_never_changes_the_curve(task, micro, changes):  # noqa: F811
    curves = []
    for out, size in (("whole", 16), ("parts", micro)):
        optim = {"micro_batch_size": size, "epochs": 2}
        curves.append(metrics(grpo(config(*task({3: 1.0, 5: -1.0}, RAGGED), out, **changes, optim=optim))))
    for whole, parts in zip(*curves, strict=True):
        for key in whole:
            if not key.startswith(("timing", "perf", "memory")):
                assert parts[key] == pytest.approx(whole[key], rel=1e-3, abs=2e-5), key


def test_a_group_shares_one_prefill_and_its_answers_differ(task, monkeypatch):  # noqa: F811
    from penstock.rollout.engine import Engine

    engines = []
    real = Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, *given: engines.append(self) or real(self, *given))
    grpo(config(*task({3: 1.0}, RAGGED), optim={"steps": 1}))
    assert [engine.prompts_read for engine in engines] == [4]  # 16 answers in groups of 4


def test_a_group_shares_its_prompt_in_every_pass(task, monkeypatch):  # noqa: F811
    """Groups lie side by side, in scoring and in an update of whole groups, though the update draws its own order."""
    computed = []
    real = decoder.ragged_rows
    monkeypatch.setattr(decoder, "ragged_rows", lambda *masks: computed.append(int(masks[1].sum())) or real(*masks))
    prompts = [{"prompt_ids": [1, 3 + i, *range(3, 13)]} for i in range(8)]
    grpo(config(*task({3: 1.0}, prompts), max_new_tokens=2, optim={"steps": 1, "micro_batch_size": 8}))
    # two micro-batches, read and learned: 11 tokens of one prompt, all but the first of another's, and of each answer
    # the last token of its prompt and at most two of its own
    assert len(computed) == 4
    assert max(computed) <= 11 + 10 + 8 * 3


# --- what a step makes of scores ------------------------------------------------------------------------------------


def experience_of(scores, lengths, group=4):
    from penstock.algorithms.experience import Experience

    rows, width = len(scores), max(lengths)
    zeros = torch.zeros(rows, width)
    lengths = torch.tensor(lengths)
    return Experience(
        tokens=torch.arange(rows)[:, None].expand(rows, width + 1).clone(), prompt_lengths=torch.ones_like(lengths),
        lengths=lengths, logprobs=zeros - 1.0, ref_logprobs=zeros - 1.5, values=zeros, entropy=zeros,
        sampling_logprobs=zeros,
        scores=torch.tensor(scores), ended=torch.ones(rows, dtype=torch.bool), advantages=zeros, returns=zeros,
        scaled_scores=torch.tensor(scores), part_scores=torch.zeros(rows, 0),
    )  # fmt: skip


def test_groups_without_a_spread_give_way_to_those_that_have_one():
    flags = GRPOFlags(group_size=2)
    first = experience_of([1.0, 1.0, 0.0, 1.0, 0.0, 0.0], [1] * 6)
    more = experience_of([5.0, 5.0, 2.0, 3.0, 7.0, 7.0], [1] * 6)
    assert refilled(first, more, flags).scores.tolist() == [2.0, 3.0, 0.0, 1.0, 0.0, 0.0]


def test_dynamic_sampling_draws_until_every_group_teaches(tmp_path, tiny_model, jsonl):
    """Only prompts that end in 4 have answers that score differently."""
    reward_fn = write_reward_fn(
        tmp_path,
        "def score(prompts, responses, *, prompt_ids, response_ids, **_):\n"
        "    return [float(p[-1] == 4 and a[0] % 2) for p, a in zip(prompt_ids, response_ids)]\n",
    )
    data = jsonl([{"prompt_ids": [1, 3 + i % 4]} for i in range(32)])
    rates = {}
    for name, changes in {"off": {}, "on": {"dynamic_sampling": True, "max_resamples": 8}}.items():
        run = grpo(config(tmp_path, tiny_model(), data, reward_fn, name, group_size=4, **changes))
        rates[name] = [row["frac_reward_zero_std"] for row in metrics(run)]
    assert min(rates["off"]) > 0.2
    assert max(rates["on"]) == 0.0


def test_a_step_without_any_spread_leaves_the_weights_alone_and_says_so(task):  # noqa: F811
    setup = task({})
    run = grpo(config(*setup, missing_eos_penalty=None, optim={"steps": 2}))
    assert [row["policy/held"] for row in metrics(run)] == [1.0, 1.0]
    assert "answers score alike" in log_of(run) or "have the used score" in log_of(run)
    assert torch.equal(next_token_distribution(setup[1]), next_token_distribution(last_model(run)))


def test_answers_that_are_too_long_lose_reward_in_a_line():
    """Yu et al. 2025, eq. 13: limit 10, buffer 4."""
    from penstock.algorithms.grpo import used_rewards

    flags = GRPOFlags(group_size=2, max_new_tokens=10, overlong_buffer=4)
    experience = experience_of([1.0] * 6, [3, 6, 7, 8, 9, 10])
    assert used_rewards(experience, flags).tolist() == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    cut = experience_of([1.0, 1.0], [10, 3])
    cut.ended[0] = False
    assert used_rewards(cut, flags).tolist() == [0.0, 1.0]  # and not missing_eos_penalty as well
    assert used_rewards(cut, GRPOFlags(group_size=2)).tolist() == [0.0, 1.0]


def test_kl_in_the_reward_is_taken_off_every_token_or_off_the_answer():
    experience = experience_of([1.0, 0.0], [2, 1], group=2)
    by_answer = with_advantages(experience, GRPOFlags(group_size=2, advantage="dr_grpo", kl_in="reward", kl_coef=0.1,
                                                      kl_estimator="k1"))  # fmt: skip
    rewards = torch.tensor([1.0 - 0.1 * 2 * 0.5, 0.0 - 0.1 * 0.5])
    assert torch.allclose(by_answer.advantages[:, 0], rewards - rewards.mean())
    assert by_answer.advantages[1, 1] == 0.0
    flags = GRPOFlags(group_size=2, advantage="reinforce++", kl_in="reward", kl_coef=0.1, kl_estimator="k1")
    tokens = torch.tensor([[1.0 - 0.1 * 1.0, 1.0 - 0.1 * 0.5], [0.0 - 0.1 * 0.5, 0.0]])
    wanted = fn.whiten(tokens, experience.mask)
    assert torch.allclose(with_advantages(experience, flags).advantages, wanted)


def test_dr_grpo_is_a_mean_over_the_most_tokens_by_default(task):  # noqa: F811
    """Liu et al. 2025: a mean over the tokens there are favours long wrong answers."""
    setup, losses = task({3: 1.0, 5: -1.0}, RAGGED), {}
    for how in (None, "constant", "token"):
        changes = {"advantage": "dr_grpo", "normalization": how, "optim": {"steps": 1}}
        losses[how] = metrics(grpo(config(*setup, f"{how}", **changes)))[0]["policy/grad_norm"]
    assert losses[None] == losses["constant"] != losses["token"]


def test_ratios_above_one_have_a_clip_of_their_own(task):  # noqa: F811
    """Yu et al. 2025: with a high upper clip nothing is clipped there any more."""
    optim = {"epochs": 4, "lr": 5e-2}
    setup = task({3: 1.0, 5: -1.0}, RAGGED)
    rates = {
        high: max(
            row.get("policy/clipfrac_avg", 0.0)
            for row in metrics(
                grpo(config(*setup, f"{high}", clip=0.9999, clip_high=high, target_kl=None, kl_coef=0.0, optim=optim))
            )
        )
        for high in (0.01, 1e9)
    }
    assert rates[0.01] > 0
    assert rates[1e9] == 0


@pytest.mark.parametrize(("optim", "changes", "words"), [
    ({"batch_size": 10}, {}, "whole groups of --group-size 4"),
    ({}, {"kl_estimator": "k1"}, "k1's gradient in a loss is 0"),
    ({}, {"overlong_buffer": 9}, "--overlong-buffer 9"),
    ({}, {"temperature": 0.0}, "--temperature 0"),
    ({}, {"min_new_tokens": 9}, "--min-new-tokens 9"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_refused(task, optim, changes, words):  # noqa: F811
    with pytest.raises(UserError, match=words):
        grpo(config(*task({3: 1.0}), optim=optim, **changes))


def test_a_group_of_one_is_refused():
    with pytest.raises(UserError, match="--group-size 1: must be at least 2"):
        GRPOFlags(group_size=1)


def test_gspo_with_the_clip_of_tokens_says_what_is_usual(task):  # noqa: F811
    assert "3e-4 is usual" in log_of(grpo(config(*task({3: 1.0}), loss="gspo", optim={"steps": 1})))
