"""PPO as a whole: known optima, exactness of the ratio, invariance, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from penstock.algorithms.experience import Experience, concatenate, in_order
from penstock.algorithms.policy import permutation
from penstock.algorithms.ppo import ppo
from penstock.algorithms.reward_functions import RewardFunction
from penstock.algorithms.reward_source import RewardSum
from penstock.config import DataFlags, OptimFlags, RunFlags
from penstock.data.chat import Encoder
from penstock.data.records import Prompt
from penstock.errors import ResourceError, UserError
from penstock.models.roles import Actor, RewardModel
from penstock.rollout.engine import Answer
from tests.conftest import last_model, metrics, ppo_config

REWARD_FN = """
def score(prompts, responses, *, prompt_ids=None, response_ids=None, **_):
    table = {table}
    return [table.get(ids[0], 0.0) for ids in response_ids]
"""
BANDIT = {"max_new_tokens": 1, "scale_rewards": "none", "missing_eos_penalty": None, "samples": 0, "target_kl": None}


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


def test_whole_run_with_every_option_on(tmp_path, tiny_model, jsonl, drawn):
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


def log_of(run):
    return (Path(run) / "log.txt").read_text()


COUNT = "def score(prompts, responses, *, response_ids, **_):\n    return [{} for ids in response_ids]\n"


def test_a_constant_or_a_factor_in_the_reward_changes_nothing(tmp_path, tiny_model, jsonl):
    """Issue 19, 1: `50 + 2 * count` taught one-token answers, and `-50 + 2 * count` endless ones."""
    model, data, curves = tiny_model(), jsonl([{"prompt_ids": [1, 3 + i]} for i in range(8)]), []
    for i, score in enumerate(("2 * ids.count(5)", "50 + 2 * ids.count(5)", "-50 + 0.2 * ids.count(5)")):
        reward_fn = write_reward_fn(tmp_path, COUNT.format(score), f"fn{i}.py")
        run = ppo(config(tmp_path, model, data, reward_fn, f"run{i}", optim={"steps": 6, "batch_size": 32}))
        raw = ("objective/scores", "rewards/")
        curves.append([{k: v for k, v in row.items() if not k.startswith(raw)} for row in metrics(run)])
        assert log_of(run).count("scores are normalised by the mean and standard deviation") == 1
    for curve in curves[1:]:
        for row, plain in zip(curve, curves[0], strict=True):
            assert row == pytest.approx(plain, rel=1e-2, abs=1e-3)
    assert curves[0][-1]["policy/updates"] == 2


def test_scores_that_bring_a_scale_or_are_asked_to_be_left_alone_are_used_as_they_are(task):
    setup = task({3: 51.0, 5: 49.0})
    run = ppo(config(*setup, scale_rewards="none", missing_eos_penalty=None, optim={"steps": 1}))
    row = metrics(run)[0]
    assert row["objective/used_scores"] == row["objective/scores"]
    assert "normalised" not in log_of(run)


def test_sparse_scores_from_none_to_few_stay_finite(tmp_path, tiny_model, jsonl):
    """A first rollout without spread has no scale; the first hit gives one, and later ones change it."""
    score = "def score(prompts, responses, *, response_ids, calls=[0], **_):\n    calls[0] += 1\n    return "
    score += "[float(calls[0] > 3 and i % 64 < calls[0] - 3) for i, _ in enumerate(response_ids)]\n"
    model, data = tiny_model(), jsonl([{"prompt_ids": [1, 3]}] * 4)
    reward_fn = write_reward_fn(tmp_path, score)
    optim = {"steps": 6, "batch_size": 64, "micro_batch_size": 64}
    run = ppo(config(tmp_path, model, data, reward_fn, missing_eos_penalty=None, samples=0, optim=optim))
    rows = metrics(run)
    assert [row["policy/held"] for row in rows] == [1, 1, 1, 0, 0, 0]
    assert "policy/updates" not in rows[2]
    assert all(abs(value) < 1e3 for row in rows for value in row.values())


@pytest.mark.parametrize("normalised", [True, False])
def test_a_reward_model_without_a_scale_gets_one_and_so_does_the_critic_that_starts_from_it(
    tmp_path, tiny_model, jsonl, normalised
):
    """A public reward model's scores are large. The critic starts as that model, and predicts on the used scale."""
    torch.manual_seed(0)
    model, reward = tiny_model(), RewardModel.from_pretrained(tiny_model("base", seed=1))
    reward.score.data.mul_(50)
    reward.mean = 3.0
    reward.save_pretrained(tmp_path / "reward")
    if not normalised:
        file = tmp_path / "reward" / "config.json"
        facts = {key: value for key, value in json.loads(file.read_text()).items() if "penstock" not in key}
        file.write_text(json.dumps(facts))
    setting = config(tmp_path, model, jsonl([{"prompt_ids": [1, 3]}] * 4), None, reward=str(tmp_path / "reward"),
                     missing_eos_penalty=None, run={"checkpoint_every": 2, "keep": 9}, optim={"steps": 4})  # fmt: skip
    run = ppo(setting)
    rows = metrics(run)
    saved = json.loads((last_model(run).parent / "critic" / "config.json").read_text())
    if normalised:
        assert rows[0]["objective/used_scores"] == rows[0]["objective/scores"]
        assert (saved["penstock_score_mean"], saved["penstock_score_std"]) == (3.0, 1.0)
    else:
        assert abs(rows[0]["objective/used_scores"]) < 1e-5
        assert rows[0]["objective/used_scores_std"] == pytest.approx(1.0)
        assert saved["penstock_score_mean"] == pytest.approx(rows[0]["objective/scores"], rel=1e-5)
        assert saved["penstock_score_std"] == pytest.approx(rows[0]["objective/scores_std"], rel=1e-5)
        shutil.rmtree(run / "checkpoints" / "step-000004")
        assert metrics(ppo(setting, resume=True)) == rows


def test_a_held_actor_is_said_and_let_go(tmp_path, tiny_model, jsonl):
    """Issue 19, 2: with lambda 1 and an offset, the critic never explained anything and all ten steps were held."""
    model, data = tiny_model(), jsonl([{"prompt_ids": [1, 3]}] * 4)
    reward_fn = write_reward_fn(tmp_path, COUNT.format("5 + 0.01 * ids.count(5)"))
    run = ppo(config(tmp_path, model, data, reward_fn, value_warmup=True, lam=1.0, optim={"steps": 20}))
    held = [row["policy/held"] for row in metrics(run)]
    assert held == [1.0, 1.0, *[0.0] * 18]
    lines = [line for line in log_of(run).splitlines() if "the actor" in line]
    assert len(lines) == 2
    assert "step 1: the actor is held until the critic explains 10% of the variance" in lines[0]
    assert "step 3: the actor learns from now on, after 2 steps, the most that it may be held" in lines[1]


def test_not_to_end_is_never_worth_more_than_to_end(tmp_path, tiny_model, jsonl):
    """Issue 19, 3: with scores around -3 and -1 for cut answers, nothing ended any more after 40 steps."""
    model, data = tiny_model(), jsonl([{"prompt_ids": [1, 3]}] * 4)
    reward_fn = write_reward_fn(tmp_path, COUNT.format("-3 + 0.1 * ids.count(5)"))
    optim = {"steps": 12, "batch_size": 64, "micro_batch_size": 64, "epochs": 4}
    rates = []
    for i, changes in enumerate(({}, {"missing_eos_score": -1.0})):
        run = ppo(config(tmp_path, model, data, reward_fn, f"run{i}", scale_rewards="none", optim=optim, **changes))
        rates.append([row["val/missing_eos_rate"] for row in metrics(run)])
    assert rates[0][-1] < 0.5 * rates[0][0]
    assert rates[1][-1] > rates[1][0]  # the negative control: an absolute score, on request


def test_a_batch_without_spread_moves_no_policy_and_the_first_line_says_what_is_cut(tmp_path, tiny_model, jsonl):
    """Issue 19, 4: all answers were cut, every used score was the same, and PPO went on by its KL penalty alone."""
    model, data = tiny_model(), jsonl([{"prompt_ids": [1, 3]}] * 4)
    reward_fn = write_reward_fn(tmp_path, COUNT.format("ids.count(5)"))
    run = ppo(config(tmp_path, model, data, reward_fn, max_new_tokens=1, optim={"steps": 2, "batch_size": 4}))
    rows = metrics(run)
    assert all(row["val/missing_eos_rate"] == 1.0 for row in rows)
    assert all(row["policy/held"] == 1.0 and "policy/updates" not in row for row in rows)
    assert rows[0]["objective/used_scores_std"] == 0
    log = log_of(run)
    assert "step 1: 4 of the starting model's 4 answers exceed --max-new-tokens 1" in log
    assert "cut 100.0%" in log
    assert "used" in log
    before, after = (Actor.from_pretrained(str(path)) for path in (model, last_model(run)))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    report = (Path(run) / "report.html").read_text()
    assert "cut answers" in report
    assert "used score" in report


def test_score_replaced_not_added_without_eos(tmp_path, tiny_model, jsonl):
    """Nothing ends within one token unless it is EOS itself, so nearly every score is the missing-EOS score."""
    model, data = tiny_model(), jsonl([{"prompt_ids": [1, 3]}] * 4)
    reward_fn = write_reward_fn(tmp_path, "def score(prompts, responses, **_):\n    return [100.0] * len(prompts)\n")
    optim = {"steps": 1, "epochs": 1}
    changes = {"max_new_tokens": 1, "kl_coef": 0.0, "missing_eos_score": -1.0, "scale_rewards": "none"}
    row = metrics(ppo(config(tmp_path, model, data, reward_fn, **changes, optim=optim)))[0]
    ended = row["val/num_eos_tokens"] / 16
    assert row["objective/rlhf_reward"] == pytest.approx(100 * ended - (1 - ended), abs=1e-4)


def test_one_score_is_needed(tmp_path, tiny_model, jsonl):
    model, data = tiny_model(), jsonl([{"prompt_ids": [1, 3]}])
    with pytest.raises(UserError, match="ppo needs a score: give --reward MODEL"):
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
    source = RewardSum([RewardFunction.load(address)], encoder)
    assert source.score([Prompt(where="f:1")] * 2, [Answer([1], [3], [0.0]), Answer([1], [4, 5], [0.0, 0.0])]) == scores


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
        *per_token[:5], numbers.float(), numbers > 0, *per_token[5:], numbers.float(), numbers.float()[:, None],
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
