"""Online DPO: its known optimum, what becomes of a step's answers, exact resume, ranks, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import torch

from penstock.algorithms.config import DPOConfig, DPOFlags
from penstock.algorithms.preference import dpo
from penstock.algorithms.reward import reward
from penstock.config import DataFlags, LoraFlags, OptimFlags, RewardConfig, RunFlags
from tests.algorithms.test_ppo import next_token_distribution, write_reward_fn
from tests.conftest import cli, comparisons, last_model, metrics, torchrun

TABLE = {3: 1.0, 4: 0.5, 5: -0.5, 6: 0.25}
NOISY = """
import math, random
def score(prompts, responses, *, response_ids, **_):
    return [{table}.get(ids[0], 0.0) - math.log(-math.log(random.random())) for ids in response_ids]
"""
COUNT = "def score(prompts, responses, *, response_ids, **_):\n    return [ids.count(5) for ids in response_ids]\n"
PROMPTS = [{"prompt_ids": [1, 3 + i, *range(3, 3 + i % 3)]} for i in range(12)]


def config(tmp_path, model, data, out="run", **changes):
    optim = {"lr": 1e-2, "batch_size": 6, "micro_batch_size": 4, "steps": 4} | changes.pop("optim", {})
    run = {"checkpoint_every": 1000} | changes.pop("run", {})
    flags = DPOFlags(**{"max_new_tokens": 6, **changes.pop("dpo", {})})
    return DPOConfig(
        model=model, data=DataFlags(data=(data,), max_length=32), online=True, dpo=flags, optim=OptimFlags(**optim),
        run=RunFlags(out=str(tmp_path / out), **run), **{"samples": 2, "heldout": 0.0, **changes},
    )  # fmt: skip


SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 3, 4))]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_one_token_task_ends_at_its_optimum(seed, tmp_path, tiny_model, jsonl):
    """ref * exp(r / beta) / Z, where the judge prefers a to b with probability s(r_a - r_b), as DPO assumes: that is
    the order of r + Gumbel noise (Luce 1959; Yellott 1977)."""
    beta, model = 0.5, tiny_model(seed=seed)
    judge = write_reward_fn(tmp_path, NOISY.format(table=TABLE))
    optim = {"batch_size": 24, "micro_batch_size": 1536, "steps": 80, "lr": 4e-3}
    flags = {"beta": beta, "group_size": 64, "max_new_tokens": 1, "missing_eos_penalty": None}
    run = dpo(config(tmp_path, model, jsonl([{"prompt_ids": [1, 3]}] * 4), reward_fn=judge, samples=0, dpo=flags,
                     optim=optim, run={"seed": seed}))  # fmt: skip
    rewards, start = torch.tensor([TABLE.get(i, 0.0) for i in range(16)]), next_token_distribution(model)
    optimum = torch.softmax(start.log() + rewards / beta, dim=-1)
    assert 0.5 * (start - optimum).abs().sum() > 0.2
    assert 0.5 * (next_token_distribution(last_model(run)) - optimum).abs().sum() <= 0.03


def test_it_answers_ranks_and_learns(tmp_path, tiny_model, jsonl, drawn):
    judge = write_reward_fn(tmp_path, COUNT)
    changes = {"optim": {"batch_size": 32, "micro_batch_size": 64, "steps": 30, "lr": 1e-2}, "heldout": 0.4}
    changes |= {"dpo": {"group_size": 4, "pairs": "best-worst", "missing_eos_penalty": None}}
    run = dpo(config(tmp_path, tiny_model(), jsonl(PROMPTS), reward_fn=judge, **changes))
    rows = metrics(run)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the engine's answers, read by model and reference alike
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 1
    assert rows[-1]["heldout/kl"] > 0
    assert "WARNING: missing EOS: " in (Path(run) / "log.txt").read_text()
    assert 0 < rows[0]["frac_ties"] < 1
    assert [row["episode"] for row in rows[:2]] == [128, 256]
    assert (Path(run) / "report.html").stat().st_size > 10_000


def test_a_step_whose_answers_all_tie_learns_nothing_and_says_so(tmp_path, tiny_model, jsonl):
    judge = write_reward_fn(tmp_path, "def score(prompts, responses, **_):\n    return [0.0 for _ in responses]\n")
    model = tiny_model()
    changes = {"reward_fn": judge, "dpo": {"missing_eos_penalty": None}}
    run = Path(dpo(config(tmp_path, model, jsonl(PROMPTS), **changes)))
    assert all(row["frac_ties"] == 1 and "loss" not in row for row in metrics(run))
    assert "WARNING: ties: all answers of this step" in (run / "log.txt").read_text()
    assert torch.equal(next_token_distribution(last_model(run)), next_token_distribution(model))


def test_answers_that_did_not_end_lose_to_those_that_did(tmp_path, tiny_model, jsonl, monkeypatch):
    from penstock.algorithms import preference

    seen = []
    real = preference.ranked
    monkeypatch.setattr(
        preference, "ranked", lambda answers, scores: seen.append((answers, scores)) or real(answers, scores)
    )
    judge = write_reward_fn(tmp_path, COUNT)
    dpo(config(tmp_path, tiny_model(), jsonl(PROMPTS), reward_fn=judge, dpo={"group_size": 8, "max_new_tokens": 12}))
    pairs = [pair for answers, scores in seen for pair in zip(answers, scores, strict=True)]
    cut, ended = (
        [score for answer, score in pairs if (answer.finish_reason == "stop") == kind] for kind in (False, True)
    )
    assert cut
    assert ended
    assert max(cut) < min(ended)


@pytest.mark.parametrize("changes", [{}, {"peft": LoraFlags(lora=4), "dpo": {"group_size": 3}}], ids=["full", "lora"])
def test_a_killed_run_goes_on_exactly(changes, tmp_path, tiny_model, jsonl):
    """The judge draws from the global generator."""
    judge, model, data = write_reward_fn(tmp_path, NOISY.format(table=TABLE)), tiny_model(), jsonl(PROMPTS)
    setting = {
        "reward_fn": judge,
        "run": {"checkpoint_every": 2, "keep": 9},
        "heldout": 0.4,
        "eval_every": 2,
        **changes,
    }
    whole, cut = (Path(dpo(config(tmp_path, model, data, out, **{**setting}))) for out in ("whole", "cut"))
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    assert cli("resume", cut) == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    for file in last_model(whole).glob("*.safetensors"):
        assert (last_model(cut) / file.name).read_bytes() == file.read_bytes()


def test_two_ranks_learn_what_one_learns(tmp_path, tiny_model, jsonl):
    judge = write_reward_fn(tmp_path, COUNT)
    flags = "--batch-size 5 --micro-batch-size 4 --steps 3 --lr 1e-3 --max-new-tokens 6 --group-size 3 --max-length 32"
    command = ["dpo", "--online", "--model", tiny_model(), "--reward-fn", judge, "--data", jsonl(PROMPTS)]
    command += [*flags.split(), "--heldout", "0.4", "--device", "cpu"]
    assert cli(*command, "--out", tmp_path / "1") == 0
    torchrun("-m", "penstock", *command, "--out", str(tmp_path / "2"))
    for a, b in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("strategy", [{}, {"strategy": "gemini_cpu", "device_memory": "1MB"}], ids=["ddp", "streamed"])
def test_a_reward_model_judges(strategy, tmp_path, tiny_model, jsonl):
    """It stands on the base of model and reference; the plan leaves room for all of them."""
    model = tiny_model()
    judge = RewardConfig(
        model=model, data=DataFlags(data=(jsonl(comparisons(40), "ranked.jsonl"),), max_length=32),
        run=RunFlags(out=str(tmp_path / "reward")), peft=LoraFlags(lora=4),
        optim=OptimFlags(lr=5e-3, batch_size=8, steps=10),
    )  # fmt: skip
    run = config(tmp_path, model, jsonl(PROMPTS), reward=str(reward(judge)), peft=LoraFlags(lora=4), run=strategy)
    rows = metrics(dpo(run))
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[0]["objective/scores_std"] > 0


@pytest.mark.parametrize(("flags", "words"), [
    (["--online"], "dpo --online needs a score"),
    (["--online", "--reward-fn", "FN", "--precompute-reference"], "are new in each step"),
    (["--online", "--reward-fn", "FN", "--group-size", "1"], "at least 2"),
    (["--online", "--reward-fn", "FN", "--temperature", "0"], "--temperature 0"),
    (["--reward-fn", "FN"], "--reward-fn: is for answers of --online"),
    (["--max-new-tokens", "64"], "--max-new-tokens: is for answers of --online"),
    (["--group-size", "4"], "--group-size: is for answers of --online"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_refused(flags, words, tmp_path, tiny_model, jsonl, capsys):
    flags = [write_reward_fn(tmp_path, COUNT) if flag == "FN" else flag for flag in flags]
    assert cli("dpo", "--model", tiny_model(), "--data", jsonl(PROMPTS), "--out", tmp_path / "run", *flags) == 2
    assert words in capsys.readouterr().err
