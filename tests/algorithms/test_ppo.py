"""PPO as a whole: known optima, exactness of the ratio, invariance, and what it refuses."""

from pathlib import Path

import pytest
import torch

from penstock.algorithms import reward_source
from penstock.algorithms.experience import Experience, concatenate, in_order
from penstock.algorithms.ppo import permutation, ppo
from penstock.config import DataFlags, OptimFlags, RunFlags
from penstock.data.chat import Encoder
from penstock.errors import ResourceError, UserError
from penstock.models.roles import Actor, RewardModel
from penstock.rollout.engine import Answer
from tests.conftest import last_model, metrics, ppo_config

REWARD_FN = """
def score(prompts, responses, *, prompt_ids=None, response_ids=None, **_):
    table = {table}
    return [table.get(ids[0], 0.0) for ids in response_ids]
"""
BANDIT = {"max_new_tokens": 1, "missing_eos_score": None, "samples": 0, "target_kl": None}


def config(tmp_path, model, data, reward_fn, out="run", **changes):
    optim = {"lr": 3e-3, "batch_size": 16, "micro_batch_size": 16, "epochs": 2, "steps": 3} | changes.pop("optim", {})
    run = {"seed": 0, "checkpoint_every": 1000} | changes.pop("run", {})
    return ppo_config(
        actor=model, reward_fn=reward_fn, data=DataFlags(data=(data,), max_length=32),
        run=RunFlags(out=str(tmp_path / out), **run), optim=OptimFlags(**optim),
        **{"max_new_tokens": 6, "value_warmup": False, "critic_lr": 1e-2, **changes},
    )  # fmt: skip


def write_reward_fn(tmp_path, text, name="reward_fn.py"):
    (tmp_path / name).write_text(text)
    return f"{tmp_path / name}:score"


@pytest.fixture
def task(tmp_path, tiny_model, jsonl):
    """task(table): directory, model, data and reward function for `config`; `table` has the score of a first token."""

    def make(table, prompts=({"prompt_ids": [1, 3]},) * 4, seed=0):
        reward_fn = write_reward_fn(tmp_path, REWARD_FN.format(table=table))
        return tmp_path, tiny_model(seed=seed), jsonl(prompts), reward_fn

    return make


RAGGED = [{"prompt_ids": [1, 3, *range(3, 3 + i)]} for i in range(8)]


def next_token_distribution(source, prompt=(1, 3)):
    actor = Actor.from_pretrained(str(source))
    with torch.no_grad():
        tokens = torch.tensor([prompt])
        return torch.softmax(actor.decoder.logits(actor(tokens, torch.tensor([2])))[0, -1], dim=-1)


def test_one_token_task_approaches_the_kl_regularised_optimum(task):
    """The optimum of E[r] - beta KL is ref * exp(r / beta) / Z (PPO.md 26)."""
    beta, table = 0.5, {3: 1.0, 4: 0.5, 5: -0.5, 6: 0.25}
    setup = task(table)
    optim = {"batch_size": 256, "micro_batch_size": 256, "steps": 100, "lr": 2e-3}
    run = ppo(config(*setup, **BANDIT, kl_coef=beta, value_clip=None, optim=optim))
    rewards = torch.tensor([table.get(i, 0.0) for i in range(16)])
    optimum = torch.softmax(next_token_distribution(setup[1]).log() + rewards / beta, dim=-1)
    assert 0.5 * (next_token_distribution(last_model(run)) - optimum).abs().sum() < 0.05
    assert 0.5 * (next_token_distribution(setup[1]) - optimum).abs().sum() > 0.2  # it had somewhere to go


@pytest.mark.parametrize("seed", range(5))
def test_two_armed_bandit_is_solved(task, seed):
    optim = {"batch_size": 128, "micro_batch_size": 128, "steps": 50, "lr": 5e-3, "epochs": 4}
    run = ppo(config(*task({3: 1.0, 4: 0.2}, seed=seed), **BANDIT, kl_coef=0.01, run={"seed": seed}, optim=optim))
    assert next_token_distribution(last_model(run))[3] > 0.9


def test_first_ratio_is_one_and_engine_agrees_with_the_trainer(task):
    for row in metrics(ppo(config(*task({3: 1.0}, RAGGED)))):
        assert row["val/first_ratio_gap"] <= 1e-5
        assert row["val/engine_logprob_gap"] <= 1e-5


@pytest.mark.parametrize(("micro", "temperature"), [(1, 1.0), (2, 1.0), (4, 0.7), (16, 0.7)])
def test_micro_batch_size_never_changes_the_curve(task, micro, temperature):
    curves = []
    for out, optim in (("whole", {}), ("parts", {"micro_batch_size": micro})):
        setting = config(*task({3: 1.0, 5: -1.0}, RAGGED), out, temperature=temperature, optim=optim)
        curves.append(metrics(ppo(setting)))
    for whole, parts in zip(*curves, strict=True):
        for key in whole:
            assert parts[key] == pytest.approx(whole[key], rel=1e-3, abs=2e-5), key


def test_whole_run_with_every_option_on(tmp_path, tiny_model, jsonl):
    demonstrations = jsonl([{"prompt_ids": [1, 3], "response_ids": [5, 6]}] * 4, "ptx.jsonl")
    model, data = tiny_model(), jsonl([{"prompt_ids": [1, 3 + i]} for i in range(8)])
    reward_fn = write_reward_fn(tmp_path, REWARD_FN.format(table={3: 1.0, 5: -9.0}))
    run = ppo(
        config(
            tmp_path, model, data, reward_fn, kl_target=3.0, whiten_rewards=True, reward_clip=0.5, ptx_coef=0.5,
            ptx_data=(demonstrations,), mini_batch_size=8, top_k=8, top_p=0.95, value_warmup=True, reference=model,
        )
    )  # fmt: skip
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["objective/kl_coef"] != rows[0]["objective/kl_coef"]
    assert (Path(run) / "report.html").stat().st_size > 10_000
    assert "truncated" in (Path(run) / "log.txt").read_text()


@pytest.mark.parametrize("critic", [None, "lm"])
def test_value_warmup_holds_the_actor_until_the_critic_explains_variance(task, tiny_model, critic):
    """A critic made from a language model starts at zero, and a zero head explains nothing."""
    changes = {"critic": tiny_model(critic, seed=3)} if critic else {}
    rows = metrics(ppo(config(*task({3: 1.0}), value_warmup=True, optim={"steps": 2}, **changes)))
    assert "policy/updates" not in rows[0]


def test_score_replaced_not_added_without_eos(tmp_path, tiny_model, jsonl):
    """Nothing ends within one token unless it is EOS itself, so nearly every score is the missing-EOS score."""
    model, data = tiny_model(), jsonl([{"prompt_ids": [1, 3]}] * 4)
    reward_fn = write_reward_fn(tmp_path, "def score(prompts, responses, **_):\n    return [100.0] * len(prompts)\n")
    optim = {"steps": 1, "epochs": 1}
    row = metrics(ppo(config(tmp_path, model, data, reward_fn, max_new_tokens=1, kl_coef=0.0, optim=optim)))[0]
    ended = row["val/num_eos_tokens"] / 16
    assert row["objective/rlhf_reward"] == pytest.approx(100 * ended - (1 - ended), abs=1e-4)


def test_one_score_is_needed(tmp_path, tiny_model, jsonl):
    model, data = tiny_model(), jsonl([{"prompt_ids": [1, 3]}])
    with pytest.raises(UserError, match="either --reward"):
        ppo(config(tmp_path, model, data, None))


@pytest.mark.parametrize(("text", "message"), [
    ("def score(prompts, responses, **_):\n    return [1.0]\n", "1 scores for"),
    ("def score(prompts, responses, **_):\n    return [float('nan')] * len(prompts)\n", "must be finite"),
    ("def score(prompts, responses, **_):\n    1 / 0\n", "ZeroDivisionError"),
    ("def other():\n    pass\n", "no function 'score'; it has other"), ("def (", "SyntaxError"),
])  # fmt: skip
def test_a_bad_reward_function_is_named(tmp_path, tiny_model, jsonl, text, message):
    model, data = tiny_model(), jsonl([{"prompt_ids": [1, 3]}])
    with pytest.raises(UserError, match=message):
        ppo(config(tmp_path, model, data, write_reward_fn(tmp_path, text)))


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("def score(prompts, responses):\n    return [1.0] * len(responses)\n", [1.0, 1.0]),
        ("def score(prompts, responses, response_ids):\n    return [len(x) for x in response_ids]\n", [1.0, 2.0]),
        ("from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: int\n\n"
         "def score(prompts, responses, **_):\n    return [A(2).x for _ in responses]\n", [2.0, 2.0]),
    ],
)  # fmt: skip
def test_a_reward_function_takes_what_it_wants(tmp_path, text, scores):
    address = write_reward_fn(tmp_path, text)
    encoder = Encoder(None, eos_ids=[2], vocab_size=16, max_length=32)
    source = reward_source.FunctionReward(reward_source.load_reward_fn(address), encoder, address)
    assert source.score([None] * 2, [Answer([1], [3], [0.0]), Answer([1], [4, 5], [0.0, 0.0])]) == scores


@pytest.mark.parametrize("role", ["reference", "critic"])
def test_roles_that_read_other_tokens_are_refused(task, tiny_model, role):
    setup = task({3: 1.0})
    for changes, message in (({"vocab_size": 12}, "another tokenizer"), ({"max_length": 16}, "--max-length 16")):
        other = tiny_model(f"other{changes}", **changes)
        with pytest.raises(UserError, match=message):
            ppo(config(*setup, **{role: other}))


def test_a_reward_model_is_no_actor(tmp_path, tiny_model):
    torch.manual_seed(0)
    RewardModel.from_pretrained(tiny_model()).save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match="is a reward model"):
        Actor.from_pretrained(str(tmp_path / "reward"))


def test_three_skips_of_one_model_stop_the_run_whatever_the_other_does(task, monkeypatch):
    from penstock.algorithms import ppo as module

    real = module.actor_loss
    monkeypatch.setattr(module, "actor_loss", lambda *a: (real(*a)[0] * torch.nan, real(*a)[1]))
    with pytest.raises(ResourceError, match="3 updates in a row"):
        ppo(config(*task({3: 1.0}), target_kl=None))


def experience(rows: int, width: int, responses: int, start: int = 0) -> Experience:
    per_token = [torch.full((rows, responses), float(start)) for _ in range(7)]
    numbers = torch.arange(start, start + rows)
    return Experience(
        torch.ones(rows, width, dtype=torch.int64), numbers * 0 + width - responses, numbers * 0 + responses,
        *per_token[:5], numbers.float(), numbers > 0, *per_token[5:],
    )  # fmt: skip


def test_ranks_shares_come_back_in_the_order_of_episodes():
    joined = in_order([experience(3, 9, 4), experience(2, 7, 5, start=10)])
    assert joined.scores.tolist() == [0.0, 10.0, 1.0, 11.0, 2.0]
    assert joined.tokens.shape == (5, 9)
    assert joined.logprobs.shape == (5, 5)


def test_rows_are_trimmed_to_their_own_longest():
    both = concatenate([experience(1, 9, 4), experience(1, 7, 5)])
    assert both.rows(torch.tensor([1])).tokens.shape == (1, 7)
    assert both.rows(torch.tensor([0])).logprobs.shape == (1, 4)


def test_permutations_differ_by_epoch_and_step_and_repeat_by_key():
    order = permutation(50, 0, 3, 1)
    assert sorted(order.tolist()) == list(range(50))
    assert torch.equal(order, permutation(50, 0, 3, 1))
    assert not torch.equal(order, permutation(50, 0, 3, 2))
    assert not torch.equal(order, permutation(50, 0, 4, 1))
