"""How far labellers agree: Krippendorff's alpha over the places of answers, and the share of pairs in the same order.

Numbers in, numbers out; knows no database.

[Note: alpha of places] A unit is one answer of one item, a value its place in a labeller's ranking: 0 the best, 1 the
worst, ties in the middle of the places that they share. The places of one ranking are the same numbers whoever ranks,
so chance agreement does not depend on the order in which answers were stored, as it would with pairs.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal

Level = Literal["nominal", "ordinal", "interval"]


def alpha(units: Collection[Sequence[float]], level: Level = "ordinal") -> float | None:
    """Krippendorff's alpha (Krippendorff 2011): 1 is perfect agreement, 0 what chance gives.

    units: the values that each unit was given; those with fewer than two are left out. None where no unit is left, or
    all values are the same: then there is nothing to agree on.
    """
    units = [unit for unit in units if len(unit) > 1]
    totals = Counter(itertools.chain.from_iterable(units))
    values, count = sorted(totals), totals.total()
    distance = _distances(values, totals, level)
    observed = math.fsum(
        times * other_times * distance[a, b] / (len(unit) - 1)
        for unit in units
        for counts in [Counter(unit)]
        for (a, times), (b, other_times) in itertools.permutations(counts.items(), 2)
    )
    expected = math.fsum(totals[a] * totals[b] * distance[a, b] for a, b in itertools.permutations(values, 2))
    return None if expected == 0 else 1 - (count - 1) * observed / expected


def _distances(values: Sequence[float], totals: Counter[float], level: Level) -> dict[tuple[float, float], float]:
    """Of each two values that differ, squared."""
    if level == "nominal":
        return dict.fromkeys(itertools.permutations(values, 2), 1.0)
    if level == "interval":
        return {(a, b): (a - b) ** 2 for a, b in itertools.permutations(values, 2)}
    ends = list(itertools.accumulate(totals[value] for value in values))
    # Half of the values that are equal to a, all between a and b, half of those that are equal to b.
    middles = {value: end - totals[value] / 2 for value, end in zip(values, ends, strict=True)}
    return {(a, b): (middles[a] - middles[b]) ** 2 for a, b in itertools.permutations(values, 2)}


def places(ranks: Sequence[int]) -> list[float]:
    """Of each answer, from 0 (the best) to 1 (the worst). Example: (0, 1, 1) -> [0.0, 0.75, 0.75]."""
    last = len(ranks) - 1
    return [
        (sum(other < rank for other in ranks) + (sum(other == rank for other in ranks) - 1) / 2) / last
        for rank in ranks
    ]


def units_of(rankings: Collection[Sequence[Sequence[int]]]) -> list[list[float]]:
    """The units of items: rankings[i] are the ranks of item i's answers, by each of its labellers."""
    return [list(unit) for item in rankings for unit in zip(*map(places, item), strict=True)]


def pair_agreement(rankings: Collection[Sequence[Sequence[int]]]) -> float | None:
    """The share of the pairs of answers on which two labellers say the same, ties too; None without such a pair."""
    same = total = 0
    for item in rankings:
        for one_ranks, other_ranks in itertools.combinations(item, 2):
            for i, j in itertools.combinations(range(len(one_ranks)), 2):
                total += 1
                same += _sign(one_ranks[i] - one_ranks[j]) == _sign(other_ranks[i] - other_ranks[j])
    return same / total if total else None


def gold_accuracy(judged: Collection[tuple[Sequence[int], Sequence[int]]]) -> float | None:
    """The share of the pairs that gold orders which a labeller ordered so. judged: (gold's ranks, the labeller's)."""
    right = total = 0
    for gold, ranks in judged:
        for i, j in itertools.permutations(range(len(gold)), 2):
            if gold[i] < gold[j]:
                total += 1
                right += ranks[i] < ranks[j]
    return right / total if total else None


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
