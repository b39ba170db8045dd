"""Agreement, verdicts and ways, by numbers that are worked out by hand."""

import random

import pytest

from penstock.commands.improve import rule
from penstock.commands.improve.labels import Label
from penstock.commands.improve.rule import Agreement, agreement, no_worse, promoted, verdict, ways
from penstock.data.records import Comparison, Vote
from penstock.run.versions import REFUSED, TRUSTED, WAITING


def compared(ranks, opening="a"):
    record = Comparison(where="-", prompt="p", responses=tuple(map(str, ranks)), ranks=tuple(ranks))
    return Label(record, "-", opening, False, 1)


def voted(liked, opening):
    return Label(Vote(where="-", prompt="p", response="r", label=liked), "-", str(opening), False, 1)


def test_a_comparison_is_the_share_of_its_pairs_in_the_right_order():
    assert agreement([compared((0, 1, 2))], [[3.0, 1.0, 2.0]]).mean == pytest.approx(2 / 3)
    assert agreement([compared((0, 1))], [[1.0, 1.0]]).mean == 0.5
    assert agreement([compared((0, 0, 1))], [[1.0, 5.0, 0.0]]).mean == 1.0
    unread = agreement([compared((0, 1))], [[None, 1.0]])
    assert (unread.conversations, unread.interval) == (0, (0.0, 1.0))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_votes_agree_by_chance_with_scores_that_know_nothing_whatever_their_balance(share):
    rng = random.Random(0)
    labels = [voted(rng.random() < share, i) for i in range(4000)]
    result = agreement(labels, [[rng.random()] for _ in labels])
    assert result.interval[0] < 0.5 < result.interval[1]
    liked_higher = agreement(labels, [[rng.random() + label.record.label] for label in labels])
    assert liked_higher.mean > 0.58


def test_labels_of_a_conversation_count_once():
    same = [compared((0, 1), "x")] * 100 + [compared((0, 1), "y")]
    result = agreement(same, [[1.0, 0.0]] * 100 + [[0.0, 1.0]])
    assert (result.mean, result.conversations) == (0.5, 2)


def test_an_interval_covers_the_mean_in_nineteen_of_twenty_samples():
    rng, covered = random.Random(1), 0
    for _ in range(40):
        labels = [compared((0, 1), str(i)) for i in range(60)]
        low, high = agreement(labels, [[float(rng.random() < 0.7), 0.5] for _ in labels]).interval
        covered += low <= 0.7 <= high
    assert covered >= 33


def test_flipped_votes_are_refused_and_unclear_ones_wait():
    good = Agreement(0.7, (0.62, 0.78), 100)
    assert verdict(None, None)[0] == TRUSTED
    assert verdict(Agreement(0.68, (0.6, 0.76), 100), good)[0] == TRUSTED
    assert verdict(Agreement(0.31, (0.24, 0.4), 100), good)[0] == REFUSED
    assert verdict(Agreement(0.52, (0.4, 0.63), 20), good)[0] == WAITING
    knows_nothing = Agreement(0.52, (0.4, 0.6), 60)
    state, why = verdict(Agreement(0.31, (0.24, 0.4), 100), knows_nothing)
    assert state == TRUSTED
    assert "no better than chance" in why


def test_the_way_is_by_how_much_of_what_there_is(monkeypatch):
    monkeypatch.setattr(rule, "ENOUGH", 1000)

    def stages(compared, voted, judged=0):
        trusted = {"comparisons": judged or compared, "votes": voted}
        return [way.stages for way in ways({"comparisons": compared, "votes": voted}, trusted)]

    assert stages(0, 200) == [("kto",)]
    assert stages(20, 200) == [("kto",)]
    assert stages(100, 200) == [("dpo",)]
    assert stages(300, 0) == [("dpo",)]
    assert stages(200, 0, 1200) == [("reward", "ppo"), ("reward", "grpo"), ("dpo",)]
    assert [way.stages for way in ways({"comparisons": 200, "votes": 0}, {"comparisons": 1200}, True)] == [("dpo",)]


@pytest.mark.parametrize(
    ("new", "known", "expected"),  # rounds of the demo; gold rose by 0.94 and 1.20, and fell by 0.25 and 0.71
    [((0.663, 0.722), (0.689, 0.814), False), ((0.680, 0.740), (0.689, 0.814), False),
     ((0.532, 0.598), (0.713, 0.804), True), ((0.528, 0.594), (0.687, 0.780), True)],
)  # fmt: skip
def test_new_votes_that_a_reward_model_surely_knows_worse_are_learned_directly(new, known, expected):
    sides = {"new": {"interval": list(new)}, "known": {"interval": list(known)}}
    assert rule.known_worse(sides) is expected
    assert not rule.known_worse({})


def test_fresh_answers_must_not_lose_where_their_judge_knows_what_was_voted():
    knows, guesses = Agreement(0.64, (0.6, 0.68), 600), Agreement(0.52, (0.48, 0.56), 600)
    lose, even = Agreement(0.43, (0.37, 0.49), 250), Agreement(0.48, (0.42, 0.54), 250)
    assert promoted(rule.fresh_answers_win(even, knows, ["dpo"]))[0]
    passed, why = promoted(rule.fresh_answers_win(lose, knows, ["dpo"]))
    assert (passed, "43.0%" in why) == (False, True)
    assert rule.fresh_answers_win(lose, guesses, ["reward", "ppo"]) == []


def test_what_a_reward_model_made_must_win():
    knows = Agreement(0.64, (0.6, 0.68), 600)
    hardly, surely = Agreement(0.52, (0.46, 0.58), 250), Agreement(0.57, (0.51, 0.63), 250)
    assert not promoted(rule.fresh_answers_win(hardly, knows, ["reward", "ppo"]))[0]
    assert promoted(rule.fresh_answers_win(surely, knows, ["reward", "ppo"]))[0]


def test_all_conditions_must_be_met():
    better = Agreement(0.6, (0.53, 0.67), 150)
    against = Agreement(0.45, (0.4, 0.52), 90)
    few = Agreement(0.3, (0.1, 0.6), 5)
    assert promoted(rule.moves_with_votes(better, None))[0]
    assert promoted(rule.moves_with_votes(better, few))[0]
    passed, why = promoted(rule.moves_with_votes(better, against))
    assert (passed, why.startswith("not met: not against those of earlier rounds")) == (False, True)
    assert not promoted(rule.moves_with_votes(Agreement(0.56, (0.49, 0.63), 150), None))[0]
    assert no_worse("facts", -0.02, (-0.08, 0.04), 0.1).passed
    assert not no_worse("facts", -0.02, (-0.12, 0.08), 0.1).passed
