"""What a budget leaves of plans, and what a trial makes of them."""

import pytest

from penstock.commands.align.choice import Duration, Route
from penstock.commands.align.planning import Plan, StagePlan, corrected, within
from penstock.commands.align.stages import Stage
from penstock.commands.align.trial import expected_seconds
from penstock.errors import ResourceError


def plan(*stages):
    """From (command, steps, seconds per step)."""
    planned = [StagePlan(Stage(name, {}), Duration(steps, each, 5.0), {}, 100, "") for name, steps, each in stages]
    return Plan(tuple(planned), Route(tuple(name for name, _, _ in stages), ()), "all")


PLANS = [plan(("reward", 100, 1.0), ("ppo", 100, 10.0)), plan(("dpo", 100, 1.0))]


def stages_and_steps(seconds):
    chosen, better = within(PLANS, seconds)
    return [(stage.stage.command, stage.duration.steps) for stage in chosen.stages], better


def test_without_a_budget_or_within_it_nothing_is_left_out():
    assert stages_and_steps(None) == stages_and_steps(2000) == ([("reward", 100), ("ppo", 100)], [])


def test_steps_are_left_out_while_half_of_them_remain():
    stages, (line,) = stages_and_steps(800)
    assert stages == [("reward", 71), ("ppo", 71)]
    assert line == "all steps with --budget 19m: 71% of them are left"


def test_then_a_cheaper_algorithm_is_taken():
    stages, (line,) = stages_and_steps(300)
    assert stages == [("dpo", 100)]
    assert line == "reward + ppo with --budget 19m"
    assert stages_and_steps(60)[0] == [("dpo", 55)]


def test_and_then_the_way_that_keeps_most():
    assert stages_and_steps(20)[0] == [("dpo", 15)]
    with pytest.raises(ResourceError, match=r"--budget 14s: too little; the nearest possible is --budget 15s, for dpo"):
        within(PLANS, 14)
    assert stages_and_steps(15)[0] == [("dpo", 10)]


def test_what_was_spent_already_counts():
    with pytest.raises(ResourceError, match=r"nearest possible is --budget 25s.*10s of it for the pre-flight"):
        within(PLANS, 20, [10.0] * len(PLANS))


def test_the_trial_of_a_better_way_does_not_keep_the_cheaper_one_from_its_budget():
    chosen, _ = within(PLANS, 20, [1000.0, 0.0])
    assert [stage.stage.command for stage in chosen.stages] == ["dpo"]


def test_a_trial_takes_a_few_steps_however_many_the_stage_has():
    long = plan(("reward", 500, 60.0), ("ppo", 500, 60.0))
    assert 2 * 6 * 60 < expected_seconds(long.stages) < 2 * 10 * 60


def test_a_trial_corrects_its_own_stages_and_scales_the_others():
    measured = [Duration(100, 2.0, 10.0), Duration(100, 20.0, 10.0)]  # twice of everything
    first, second = corrected(PLANS, PLANS[0], measured)
    assert [stage.duration for stage in first.stages] == measured
    assert second.stages[0].duration.per_step == pytest.approx(2.0)
    assert second.stages[0].duration.fixed == pytest.approx(10.0)
