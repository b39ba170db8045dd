"""Krippendorff's alpha equals a reference implementation's: the PyPI package krippendorff 0.9.0, whose values are kept
here, and which is asked again where it is installed.
"""

import itertools
import random

import numpy as np
import pytest

from penstock.serve.labelling.agreement import alpha, gold_accuracy, pair_agreement, places, units_of

LEVELS = ("nominal", "ordinal", "interval")
TEXTBOOK = [  # Krippendorff 2011, example C: four observers, twelve units, a dot where one said nothing
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
]
REFERENCE = {  # made by units(seed) below and krippendorff.alpha(reliability_data=..., level_of_measurement=...)
    0: [0.4278959810874705, 0.4278959810874705, 0.4278959810874705],
    1: [0.36087539079946407, 0.38952843635885503, 0.39102416570771004],
    2: [0.44076624293785316, 0.3992608586873113, 0.40662774021716863],
    3: [0.2885044642857144, 0.10884779861414418, 0.10037878787878796],
}


def units(seed):
    """Ragged units with a common tendency, of 2 to 5 different values."""
    draw = random.Random(seed).random  # the one method whose sequence Python promises to keep
    values = [0.0, 0.25, 0.5, 0.75, 1.0][: 2 + seed]

    def value(i):
        return values[int(draw() * len(values))] if draw() < 0.5 else values[i % len(values)]

    return [[value(i) for _ in range(1 + int(draw() * 5))] for i in range(30)]


def test_it_is_the_textbooks_number():
    columns = zip(*(line.split() for line in TEXTBOOK), strict=True)
    given = [[float(value) for value in unit if value != "."] for unit in columns]
    assert [round(alpha(given, level), 3) for level in LEVELS] == [0.743, 0.815, 0.849]


@pytest.mark.parametrize("seed", REFERENCE)
def test_it_is_the_reference_implementations(seed):
    assert [alpha(units(seed), level) for level in LEVELS] == pytest.approx(REFERENCE[seed], rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_the_package_says_today(seed):
    krippendorff = pytest.importorskip("krippendorff", reason="not a part of the development tools")
    given = units(seed)
    table = np.array(list(itertools.zip_longest(*given, fillvalue=np.nan)))
    for level in LEVELS:
        theirs = krippendorff.alpha(reliability_data=table, level_of_measurement=level)
        assert alpha(given, level) == pytest.approx(theirs, rel=1e-9)


def test_perfect_agreement_is_one_and_nothing_to_agree_on_is_none():
    assert alpha([[0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.5]]) == 1.0
    assert alpha([]) is None
    assert alpha([[0.0], [1.0]]) is None
    assert alpha([[0.5, 0.5], [0.5, 0.5]]) is None


def test_random_rankings_agree_by_chance_however_the_answers_were_stored():
    draw = random.Random(0).random
    rankings = [[sorted(range(4), key=lambda _: draw()) for _ in range(3)] for _ in range(2000)]
    assert alpha(units_of(rankings)) == pytest.approx(0, abs=0.02)
    leaning = [[[0, 1] if draw() < 0.9 else [1, 0] for _ in range(2)] for _ in range(2000)]  # the first is often better
    assert alpha(units_of(leaning)) == pytest.approx(0.64, abs=0.05)  # 1 - 0.18 / 0.5: the order stored tells nothing


def test_places_lie_between_best_and_worst_and_ties_share_them():
    assert places((0, 1, 2)) == [0, 0.5, 1]
    assert places((2, 0, 0)) == [1, 0.25, 0.25]
    assert places((0, 0)) == [0.5, 0.5]
    assert places((0, 1, 1, 1, 2)) == [0, 0.5, 0.5, 0.5, 1]


def test_pairs_agree_where_two_labellers_say_the_same_of_two_answers():
    assert pair_agreement([[(0, 1, 2), (0, 1, 2)]]) == 1
    assert pair_agreement([[(0, 1, 2), (2, 1, 0)]]) == 0
    assert pair_agreement([[(0, 1, 1), (0, 1, 2)]]) == pytest.approx(2 / 3)  # a tie is not an order
    assert pair_agreement([[(0, 1), (0, 1), (1, 0)]]) == pytest.approx(1 / 3)
    assert pair_agreement([[(0, 1)]]) is None


def test_gold_accuracy_counts_the_pairs_that_gold_orders():
    assert gold_accuracy([((0, 1, 2), (0, 1, 2)), ((0, 1), (1, 0))]) == pytest.approx(3 / 4)
    assert gold_accuracy([((0, 0, 1), (1, 0, 2))]) == 1
    assert gold_accuracy([((0, 1), (0, 0))]) == 0  # a tie is not gold's order
    assert gold_accuracy([]) is None
