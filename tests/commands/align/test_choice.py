"""Which stages are chosen from which data, and how long they are: a table, without a model."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.commands.align import choice
from penstock.commands.align.choice import Duration, Facts, routes
from penstock.commands.align.config import AlignConfig, seconds_of, show_seconds
from penstock.errors import UserError
from tests.conftest import PATIENCE

MANY = choice.ENOUGH
FIRST = [
    # records by kind, what scores, and the stages of the best route
    ({"demonstrations": 100}, None, ("sft",)),
    ({"comparisons": 200}, None, ("dpo",)),
    ({"comparisons": MANY}, None, ("reward", "ppo")),
    ({"demonstrations": 100, "comparisons": MANY}, None, ("sft", "reward", "ppo")),
    ({"demonstrations": 100, "comparisons": 200, "votes": 900}, None, ("sft", "dpo")),
    ({"votes": 200}, None, ("kto",)),
    ({"demonstrations": 50, "votes": 200}, None, ("sft", "kto")),
    ({"prompts": 30}, "function", ("grpo",)),
    ({"prompts": 30}, "answers", ("grpo",)),
    ({"prompts": 30, "comparisons": MANY}, "model", ("grpo",)),
    ({"prompts": 30, "demonstrations": 10}, "model", ("sft", "grpo")),
]


@pytest.mark.parametrize(("counts", "score", "stages"), FIRST)
def test_the_best_route_follows_from_the_data(counts, score, stages):
    facts = Facts({"prompts": sum(counts.values()), **counts}, score, chats=True)
    assert routes(facts)[0].stages == stages


def test_cheaper_routes_follow_the_best():
    facts = Facts({"comparisons": MANY, "prompts": MANY}, None, chats=True)
    assert [route.stages for route in routes(facts)] == [("reward", "ppo"), ("reward", "grpo"), ("dpo",)]


def test_what_more_data_would_allow_is_named():
    (route,) = routes(Facts({"comparisons": 200, "prompts": 200}, None, chats=True))
    assert "reward + ppo with 1,000 comparisons instead of 200" in route.better


def test_prompts_alone_teach_nothing():
    with pytest.raises(UserError, match="which answer is good"):
        routes(Facts({"prompts": 30}, None, chats=True))


REFUSED = [
    (("kto",), "has none"),
    (("ppo",), "needs a score"),
    (("ppo", "reward"), "needs a score"),
    (("sft", "sft"), "twice"),
    (("reward",), "aligns nothing"),
]


@pytest.mark.parametrize(("stages", "problem"), REFUSED)
def test_stages_that_the_data_do_not_allow_are_refused(stages, problem):
    facts = Facts({"comparisons": 5, "demonstrations": 5, "prompts": 10}, None, chats=False)
    with pytest.raises(UserError, match=problem):
        choice.chosen(stages, facts)
    assert choice.chosen(("sft", "reward", "ppo"), facts).stages == ("sft", "reward", "ppo")


def test_data_that_no_stage_reads_are_named():
    facts = Facts({"comparisons": 5, "votes": 7, "prompts": 12}, None, chats=False)
    (line,) = choice.unused(routes(facts)[0], facts)
    assert line.startswith("7 votes are not learned from")


@given(st.integers(1, 10**6))
def test_a_pass_over_little_data_has_steps_enough(count):
    batch = choice.batch_of("dpo", count)
    assert 1 <= batch <= 32
    assert batch <= count
    assert choice.batch_of("reward", count) == min(batch, 16)
    assert choice.steps_of("dpo", count, batch, 1) >= min(count // 4, choice.FEWEST_STEPS)


def test_prompts_are_passed_twice_within_bounds():
    assert choice.steps_of("grpo", 10, 64, 1) == 20
    assert choice.steps_of("grpo", 400, 64, 1) == 100
    assert choice.steps_of("ppo", 10**6, 64, 2) == 500


def test_small_models_learn_faster():
    assert choice.lr_of("sft", 1e-5, 8_000_000_000) == 1e-5
    assert choice.lr_of("dpo", 1e-6, 135_000_000) == 3.1e-6
    assert choice.lr_of("sft", 1e-5, 1_000_000) == choice.lr_of("sft", 1e-5, 10_000) == 1.5e-3  # the demo's
    assert choice.lr_of("ppo", 1e-5, 1_000_000) == 3e-4


def test_answers_may_be_half_as_long_again_as_those_in_the_data():
    assert choice.answer_tokens([20] * 99 + [500], 1000) == 32
    assert choice.answer_tokens([], 1000) == 128
    assert choice.answer_tokens([900], 1000) == 256
    assert choice.answer_tokens([900], 40) == 40


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 10), st.floats(0, 60)), min_size=1, max_size=3),
    st.floats(1, 10_000),
)
def test_a_budget_is_kept_or_refused(stages, seconds):
    durations = [Duration(*stage) for stage in stages]
    steps = choice.trimmed(durations, seconds)
    if steps is None:
        assert choice.least(durations) > seconds
        assert choice.trimmed(durations, choice.least(durations)) is not None  # what is named is possible
        return
    assert sum(d.seconds(n) for d, n in zip(durations, steps, strict=True)) <= seconds
    assert all(d.fewest <= n <= d.steps for d, n in zip(durations, steps, strict=True))


def test_time_is_read_as_people_write_it():
    assert [seconds_of(text) for text in ("2h", "1h30m", "90s", "1.5h", "45m")] == [7200, 5400, 90, 5400, 2700]
    for text in ("2", "", "h", "0m", "1d", "5m2h"):
        with pytest.raises(UserError, match="--budget"):
            seconds_of(text)


@given(st.floats(0.1, 10**6))
def test_time_that_is_shown_is_enough_as_a_budget(seconds):
    assert seconds_of(show_seconds(seconds)) >= seconds


def test_a_setting_of_a_stage_names_its_stage():
    for text in ("lr=1", "sft.lr", "sft.=1", ".lr=1"):
        with pytest.raises(UserError, match=r"STAGE\.FLAG=VALUE"):
            AlignConfig(model="m", data=("d",), out="o", set=(text,))


def test_the_rules_need_no_torch():
    code = "import sys, penstock.commands.align.choice\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == 0
