"""Intervals: published figures, and how often they cover the truth."""

import itertools
import math
import tracemalloc

import numpy
import pytest

from penstock.run import intervals


@pytest.mark.parametrize(("count", "of", "bounds"), [
    (81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (1, 29, (0.0061, 0.1718)),
])  # fmt: skip
def test_a_share_of_yes_and_no_has_the_published_bounds(count, of, bounds):
    """Newcombe 1998, Statistics in Medicine 17, Table I: the score method without continuity correction."""
    assert intervals.of_share([1.0] * count + [0.0] * (of - count)) == pytest.approx(bounds, abs=5e-5)
    swapped = intervals.of_share([0.0] * count + [1.0] * (of - count))
    assert swapped == pytest.approx([1 - bounds[1], 1 - bounds[0]], abs=5e-5)


def test_what_always_happened_is_not_certain():
    assert intervals.of_share(numpy.ones(128)) == [pytest.approx(0.9709, abs=5e-5), 1.0]
    assert intervals.of_mean(numpy.ones(128)) == [1.0, 1.0]  # what it was before
    low, high = intervals.of_change(numpy.zeros(128))
    assert (low, high) == (pytest.approx(-high), pytest.approx(0.0291, abs=5e-5))


def test_with_ties_it_covers_the_truth_as_often_as_it_says():
    """All outcomes of 20 comparisons by their probabilities."""
    count = 20
    outcomes = [(wins, ties) for wins in range(count + 1) for ties in range(count + 1 - wins)]
    bounds = {
        (wins, ties): intervals.of_share([1.0] * wins + [0.5] * ties + [0.0] * (count - wins - ties))
        for wins, ties in outcomes
    }
    covered = []
    for win, tie in itertools.product((0.1, 0.3, 0.5, 0.7), (0.0, 0.1, 0.3)):
        probability = 0.0
        for wins, ties in outcomes:
            low, high = bounds[wins, ties]
            ways = math.comb(count, wins) * math.comb(count - wins, ties)
            if low <= win + tie / 2 <= high:
                probability += ways * win**wins * tie**ties * (1 - win - tie) ** (count - wins - ties)
        covered.append(probability)
    assert min(covered) > 0.9
    assert numpy.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_a_mean_has_the_interval_of_the_normal_distribution_where_it_is_one():
    values = numpy.random.default_rng(1).normal(size=400)
    error = values.std() / 20
    bounds = [values.mean() - 1.96 * error, values.mean() + 1.96 * error]
    assert intervals.of_mean(values) == pytest.approx(bounds, abs=0.1 * error)
    shares = numpy.random.default_rng(1).beta(2, 3, size=400)
    error = shares.std() / 20
    bounds = [shares.mean() - 1.96 * error, shares.mean() + 1.96 * error]
    assert intervals.of_share(shares) == pytest.approx(bounds, abs=0.2 * error)


def test_a_mean_takes_no_memory_for_all_resamples_at_once():
    values = numpy.arange(1000) % 2
    tracemalloc.start()
    low, high = intervals.of_mean(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert low < 0.5 < high
    assert peak < intervals.RESAMPLES * len(values)  # bytes: an index has eight
