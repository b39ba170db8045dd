"""What PPO starts from: held-out prompts, the reference, the critic, prompts that the reward model can hold."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.ppo import actor_loss, ppo
from penstock.algorithms.sft import sft
from penstock.commands.plan import as_dict
from penstock.config import DataFlags, OptimFlags, PPOFlags, RunFlags, SFTConfig
from penstock.errors import DataError, UserError
from penstock.models.roles import Actor, RewardModel
from penstock.planner.config import PlanConfig
from penstock.planner.from_flags import setting_of
from penstock.planner.workload import forecast_of
from penstock.run.directory import resolve_model
from tests.algorithms.test_ppo import config, task, write_reward_fn  # noqa: F401
from tests.conftest import CHATML, metrics, save_tiny, save_tokenizer

COUNT = (
    "def score(prompts, responses, *, response_ids, **_):\n    return [float(ids.count(5)) for ids in response_ids]\n"
)
SPACED = "{{ ' ' }}" + CHATML
PROMPTS = [{"prompt_ids": [1, 3 + i % 13, 3 + i // 13]} for i in range(40)]


def log_of(run):
    return (Path(run) / "log.txt").read_text()


# --- held-out prompts -----------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path, tiny_model, jsonl):
    """A run that holds prompts out: evaluated(**flags)."""
    model, data, reward_fn = tiny_model(), jsonl(PROMPTS), write_reward_fn(tmp_path, COUNT)

    def run(**changes):
        optim = {"steps": 4, "lr": 1e-2} | changes.pop("optim", {})
        return Path(ppo(config(tmp_path, model, data, reward_fn, heldout=0.2, eval_every=1, optim=optim, **changes)))

    return run


def test_held_out_prompts_are_evaluated_never_trained_on_and_the_best_is_kept(evaluated, monkeypatch):
    """Issue 19, item 6: PPO trained on all prompts and kept its last checkpoint, whatever it was worth."""
    from penstock.algorithms import ppo as module

    asked = []
    real = module.PPO.rollout
    monkeypatch.setattr(
        module.PPO, "rollout",
        lambda self, prompts, episodes, **changes: asked.append(({tuple(p) for p in prompts}, "seed" in changes))
        or real(self, prompts, episodes, **changes),
    )  # fmt: skip
    run = evaluated()
    heldout = set.union(*(prompts for prompts, evaluates in asked if evaluates))
    trained = set.union(*(prompts for prompts, evaluates in asked if not evaluates))
    assert len(heldout) == 8
    assert not heldout & trained
    scores = {row["step"]: row["heldout/scores"] for row in metrics(run)}
    best = (run / "checkpoints" / "best").read_text().split()[0]
    assert int(best.split("-")[1]) == max(scores, key=scores.get)
    assert Path(resolve_model(str(run))).parent.name == best
    assert all({"heldout/kl", "heldout/response_length", "heldout/scores_stderr"} <= row.keys() for row in metrics(run))


def test_the_same_policy_gets_the_same_held_out_score(evaluated):
    """The answers of two evaluations differ by the policy alone: at a learning rate of nearly 0, not at all."""
    scores = [row["heldout/scores"] for row in metrics(evaluated(optim={"lr": 1e-12}))]
    assert len(set(scores)) == 1


def test_few_prompts_are_all_trained_on(task):  # noqa: F811
    run = ppo(config(*task({3: 1.0}), optim={"steps": 1}))
    assert "nothing held out" in log_of(run)
    assert "heldout/scores" not in metrics(run)[0]


def test_an_answer_that_does_not_end_is_worth_no_more_than_the_worst_that_does():
    from penstock.algorithms.policy_metrics import of_heldout
    from tests.algorithms.test_ppo import experience

    whole = dataclasses.replace(
        experience(3, 6, 4), scores=torch.tensor([1.0, 2.0, 9.0]), ended=torch.tensor([True, True, False])
    )
    row = of_heldout(whole, has_kl=False)
    assert row["heldout/scores"] == pytest.approx(4 / 3)
    assert "heldout/kl" not in row
    worse = dataclasses.replace(whole, scores=torch.tensor([1.0, 2.0, -9.0]))
    assert of_heldout(worse, has_kl=False)["heldout/scores"] == pytest.approx(-2)  # it is not raised to the worst
    assert of_heldout(whole, has_kl=False, own=True)["heldout/scores"] == pytest.approx(4)


def test_cut_answers_are_evaluated_by_the_rule_that_they_are_trained_by(tmp_path, tiny_model, jsonl):
    """--missing-eos-penalty none, with answers that hardly ever end: each was told to score as the worst that did."""
    body = "return [1.0 + 4.0 * (reason != 'stop') for reason in finish_reason]"
    reward = f"def score(prompts, responses, *, finish_reason, **_):\n    {body}\n"
    model, data, reward_fn = tiny_model(), jsonl(PROMPTS), write_reward_fn(tmp_path, reward)

    def evaluated(out, **flags):
        changes = {"out": out, "heldout": 0.2, "eval_every": 1, "optim": {"steps": 1}, **flags}
        return metrics(ppo(config(tmp_path, model, data, reward_fn, **changes)))[-1]

    share = evaluated("usual", missing_eos_penalty=1.0)
    assert 0 < share["heldout/missing_eos_rate"] < 1, "the task is not the one that is meant"
    assert share["heldout/scores"] == 1.0
    kept = evaluated("kept", missing_eos_penalty=None)
    assert kept["heldout/scores"] == pytest.approx(1 + 4 * kept["heldout/missing_eos_rate"])


def test_prompts_that_another_stage_was_trained_on_are_counted(tmp_path, tiny_model, jsonl):
    """Issue 19, item 6: duplicate prompts between stages."""
    data = jsonl([{**row, "response_ids": [5]} for row in PROMPTS[:6]], "sft.jsonl")
    files, run = DataFlags(data=(data,), max_length=32), RunFlags(out=str(tmp_path / "sft"))
    sft(SFTConfig(model=tiny_model(), data=files, run=run, optim=OptimFlags(lr=1e-3, steps=1), samples=0))
    rows = jsonl(PROMPTS[4:8], "prompts.jsonl")
    run = ppo(config(tmp_path, str(tmp_path / "sft"), rows, write_reward_fn(tmp_path, COUNT), optim={"steps": 1}))
    assert f"duplicate prompts: 2 of 4 were in the data of --actor {tmp_path / 'sft'}" in log_of(run)
    assert "duplicate prompts: 2 of 4" in (Path(run) / "report.html").read_text()


# --- KL and its reference -------------------------------------------------------------------------------------------


def test_without_a_kl_penalty_there_is_no_reference(task, monkeypatch):  # noqa: F811
    """Issue 19, item 17: at --kl-coef 0 it was loaded, and run over every answer."""
    from penstock.algorithms import experience as module

    works = []
    real = module.score
    monkeypatch.setattr(
        "penstock.algorithms.policy.score",
        lambda s, roles, *more, **flags: works.append(roles.reference) or real(s, roles, *more, **flags),
    )
    setup = task({3: 1.0})
    row = metrics(run := ppo(config(*setup, kl_coef=0.0, optim={"steps": 1})))[0]
    assert works == [None]
    assert "objective/kl" not in row
    assert "--kl-coef 0: no reference is loaded" in log_of(run)
    row = metrics(ppo(config(*setup, "measured", kl_coef=0.0, reference=setup[1], optim={"steps": 1})))[0]
    assert works[1] is not None
    assert row["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_the_plan_has_no_reference_where_the_run_has_none():
    roles = []
    for kl_coef in (0.05, 0.0):
        setting = setting_of(PlanConfig(model="s", kl_coef=kl_coef))
        roles.append(as_dict(setting, forecast_of(setting))["parameters"].keys())
    assert roles[0] - roles[1] == {"reference"}


@pytest.mark.parametrize(("changes", "message"), [
    ({"kl_coef": 0.0, "kl_target": 6.0}, "0 stays 0"), ({"kl_loss_coef": 0.1}, "--kl-estimator k2 or k3"),
])  # fmt: skip
def test_flags_of_kl_that_would_do_nothing_are_refused(task, changes, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        ppo(config(*task({3: 1.0}), **changes))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_penalty_is_of_the_estimator_that_is_named(name):
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    log_ratio = logprobs - ref_logprobs
    kl = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}[name]
    rewards = fn.shape_rewards(torch.tensor([3.0]), logprobs, ref_logprobs, torch.tensor([2]), 0.1, name)
    assert torch.allclose(rewards, -0.1 * kl + torch.tensor([[0.0, 3.0]]))


def test_kl_as_a_term_of_the_loss(tiny_model):
    from tests.algorithms.test_ppo import experience

    actor = Actor.from_pretrained(tiny_model())
    part = experience(2, 6, 4)
    part.ref_logprobs -= 2.5
    hidden = actor(part.tokens, None)
    flags = PPOFlags(kl_estimator="k3", kl_loss_coef=0.5)
    plain, stats = actor_loss(actor, hidden, part, PPOFlags(), 8, 0)
    loss, more = actor_loss(actor, hidden, part, flags, 8, 0)
    logprobs = actor.decoder.logits(hidden)[:, 1:5].log_softmax(-1).gather(-1, part.tokens[:, 2:, None])[..., 0]
    log_ratio = logprobs - part.ref_logprobs
    kl = ((-log_ratio).exp() - 1 + log_ratio).mean()
    assert float(more["kl_loss"].detach()) == pytest.approx(float(kl.detach()), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float((plain + 0.5 * kl).detach()), rel=1e-5)
    assert "kl_loss" not in stats


# --- the critic, and what the reward model reads --------------------------------------------------------------------


@pytest.fixture
def judged(tmp_path, jsonl):
    """judged(template, max_length, **flags): a run whose reward model has this template and so many positions."""
    rows = [{"messages": [{"role": "user", "content": "Hello there, how are you?" * n}]} for n in (1, 1, 9)]

    def run(template=CHATML, max_length=256, steps=1, **changes):
        sizes = {"vocab_size": 320, "hf": {"eos_token_id": 3, "bos_token_id": 0}}
        actor = save_tiny(tmp_path / "actor", max_length=256, **sizes)
        save_tokenizer(tmp_path / "actor", template=CHATML, eos_token="<|im_end|>")
        torch.manual_seed(0)
        source = save_tiny(tmp_path / "base", seed=1, max_length=max_length, **sizes)
        RewardModel.from_pretrained(source).save_pretrained(tmp_path / "reward")
        save_tokenizer(tmp_path / "reward", template=template, eos_token="<|im_end|>")
        data = DataFlags(data=(jsonl(rows),), max_length=128, skip_bad=changes.pop("skip_bad", False))
        setting = config(tmp_path, actor, "-", None, optim={"steps": steps, "batch_size": 4})
        return ppo(dataclasses.replace(setting, reward=str(tmp_path / "reward"), data=data, **changes))

    return run


def test_a_template_that_differs_by_a_space_is_no_other_vocabulary(judged):
    """Issue 19, item 17: the critic became a zero head, without a word."""
    run = judged(SPACED)
    log = log_of(run)
    assert "the critic starts as " in log
    assert "zero head" not in log
    assert "another tokenizer or chat template" in log


def test_a_critic_of_fewer_positions_starts_at_zero_and_says_why(judged):
    assert "zero head, because" in log_of(judged(SPACED, max_length=100))


def test_prompts_that_the_reward_model_cannot_hold_are_named_before_training(judged, tmp_path):
    """Issue 19, item 22: PPO died at step 2, --skip-bad was ignored, and resume died at the same place."""
    with pytest.raises(DataError, match=r"data.jsonl:3: .* That is how the reward model reads it") as raised:
        judged(SPACED, max_length=64)
    assert "data.jsonl:1" not in str(raised.value)
    assert not (tmp_path / "run").exists()
    run = judged(SPACED, max_length=64, skip_bad=True, steps=2)
    assert "--skip-bad left out 1 of 3 prompts" in log_of(run)
    assert len(metrics(run)) == 2
    assert all(math.isfinite(row["objective/scores"]) for row in metrics(run))


def test_reward_functions_read_the_records_of_the_answers_that_they_score(tmp_path, tiny_model, jsonl):
    """Of a shuffled batch, of the held-out prompts and of the report's: each answer with its own record's fields."""
    rows = [{"prompt_ids": [1, 3 + i], "last": 3 + i, "mood": "good"} for i in range(8)]
    text = (
        "def score(prompts, responses, *, prompt_ids, last, **_):\n"
        "    assert [ids[-1] for ids in prompt_ids] == last, (prompt_ids, last)\n    return [1.0 * x for x in last]\n"
    )
    functions = (write_reward_fn(tmp_path, text), "length:4")
    optim = {"steps": 2, "batch_size": 8}
    settings = {"reward_weights": (1.0, 2.0), "heldout": 0.5, "eval_every": 1, "samples": 2, "optim": optim}
    run = Path(ppo(config(tmp_path, tiny_model(), jsonl(rows), functions, **settings)))
    said = (run / "log.txt").read_text()
    assert "score: reads the records' last" in said
    assert "ignored fields: mood (8)" in said
    row = metrics(run)[-1]
    assert row["objective/scores"] == pytest.approx(row["rewards/score/mean"] + 2 * row["rewards/length/mean"])
    assert row["rewards/score/std"] > 0
