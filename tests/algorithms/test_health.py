"""Health: what is wrong while every number is finite is said once, when it begins and when it ends."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from penstock.algorithms.health import KEPT, health, remember
from penstock.algorithms.ppo import ppo
from penstock.config import DataFlags, RunFlags
from penstock.run.report import warnings
from tests.algorithms.test_ppo import config, experience, task  # noqa: F401
from tests.conftest import metrics, ppo_config

CONFIG = ppo_config(
    actor="-", data=DataFlags(data=()), run=RunFlags(out="-", dtype="fp32"), reward_clip=3.0, kl_target=6.0
)
GOOD = {
    "objective/kl": 1.0, "objective/scores": 0.5, "objective/response_length": 4.0, "objective/kl_coef": 0.05,
    "policy/entropy_avg": 2.0, "policy/clipfrac_avg": 0.1, "val/explained_variance": 0.5,
    "val/first_ratio_gap": 1e-6, "val/engine_logprob_gap": 1e-6, "objective/scores_clipfrac": 0.0,
    "heldout/scores": 0.5, "heldout/scores_stderr": 0.05,
}  # fmt: skip


def healthy(rows=32):
    """Answers of 4 tokens, all different, all ended, with scores and advantages that are noise."""
    rng = torch.Generator().manual_seed(0)
    whole = experience(rows, 6, 4)
    return dataclasses.replace(
        whole,
        tokens=torch.randint(3, 1000, (rows, 6), generator=rng),
        scores=torch.randn(rows, generator=rng),
        ended=torch.ones(rows, dtype=torch.bool),
        advantages=torch.randn(rows, 4, generator=rng),
    )


def names(whole, history=(GOOD,), **changes):
    return [text.partition(":")[0] for text in health(whole, CONFIG, history, {**GOOD, **changes})]


def test_nothing_is_wrong_with_a_healthy_step():
    assert names(healthy()) == []
    assert names(healthy(), history=()) == []


ILL = {
    "missing EOS": ({"ended": torch.arange(32) > 10}, {}),
    "no spread": ({"scaled_scores": torch.full((32,), -1.0)}, {}),
    "same answers": ({"tokens": torch.full((32, 6), 5)}, {}),
    "advantage": ({"advantages": torch.arange(4.0).repeat(32, 1)}, {}),
    "KL jump": ({}, {"objective/kl": 7.0}),
    "negative KL": ({}, {"objective/kl": -2.0}),
    "entropy collapse": ({}, {"policy/entropy_avg": 0.3}),
    "clipping": ({}, {"policy/clipfrac_avg": 0.5}),
    "first ratio": ({}, {"val/first_ratio_gap": 0.01}),
    "sampler": ({}, {"val/engine_logprob_gap": 0.3}),
    "reward clip": ({}, {"objective/scores_clipfrac": 0.6}),
    "KL controller": ({}, {"objective/kl_coef": 5.0}),
    "over-optimisation": ({}, {"heldout/scores": 0.1, "objective/scores": 0.9}),
}


@pytest.mark.parametrize("name", ILL)
def test_each_illness_has_its_own_line(name):
    columns, row = ILL[name]
    assert names(dataclasses.replace(healthy(), **columns), **row) == [name]


def test_a_held_out_score_that_falls_within_its_noise_is_no_warning():
    assert names(healthy(), **{"heldout/scores": 0.45, "objective/scores": 0.9}) == []
    assert names(healthy(), **{"heldout/scores": 0.1, "objective/scores": 0.2}) == []  # both fall: no over-optimisation


def test_length_drift_names_the_score_that_follows_length():
    whole = experience(32, 22, 20)
    whole.lengths, whole.scores = torch.arange(32) % 20 + 1, (torch.arange(32) % 20).float()
    text = health(dataclasses.replace(whole, ended=whole.ended | True), CONFIG, [GOOD], GOOD)
    assert any("length drift: answers have 9 tokens on average, from 4; the score follows" in line for line in text)


def test_a_critic_that_never_explains_is_named_after_some_steps():
    bad = {**GOOD, "val/explained_variance": -0.5}
    assert names(healthy(), history=[bad] * 3, **{"val/explained_variance": -0.5}) == []
    assert names(healthy(), history=[bad] * 9, **{"val/explained_variance": -0.5}) == ["critic"]


def test_history_keeps_the_first_step_and_the_last_ones():
    history = []
    for step in range(100):
        history = remember(history, {"objective/kl": float(step), "lr": 1.0})
    assert [row["objective/kl"] for row in history] == [0.0, *range(100 - KEPT, 100)]
    assert "lr" not in history[0]


def test_a_warning_is_said_once_and_its_steps_are_in_the_report(task):  # noqa: F811
    """Issue 19, item 6: it was said at every step, or not at all, and neither metrics nor report had it."""
    run = Path(ppo(config(*task({3: 1.0}), max_new_tokens=2, optim={"steps": 3})))
    assert all(row["health/warnings"] >= 1 for row in metrics(run))
    assert (run / "log.txt").read_text().count("WARNING: missing EOS: ") == 1
    rows = [json.loads(line) for line in (run / "health.jsonl").read_text().splitlines()]
    assert rows[0]["text"].startswith("missing EOS: ")
    assert f"from step 1: {rows[0]['text'][:20]}" in (run / "report.html").read_text()
    kept = Path(
        ppo(config(*task({3: 1.0}), out="kept", max_new_tokens=2, optim={"steps": 1}, missing_eos_penalty=None))
    )
    assert "missing EOS" not in (kept / "log.txt").read_text()  # their scores are learned from, as it was asked


def test_the_band_says_from_when_to_when():
    rows = [{"step": 2, "text": "critic: bad"}, {"step": 9, "ended": "critic", "last": 6}, {"step": 0, "text": "x: y"}]
    assert warnings(rows) == ["from step 2 to 6: critic: bad", "x: y"]
