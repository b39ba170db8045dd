"""How sure a measured mean is: its 95 % interval."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy

RESAMPLES = 10_000
Z = NormalDist().inv_cdf(0.975)


def of_mean(values: Any) -> list[float]:
    """Of the mean of values [n] of any size: the 2.5th to the 97.5th percentile of 10,000 resamples (Efron 1979). The
    same values give the same bounds."""
    rng, count = numpy.random.default_rng(0), len(values)  # one resample in memory at a time
    means = [values[rng.integers(count, size=count)].mean() for _ in range(RESAMPLES)]
    return [float(bound) for bound in numpy.percentile(means, [2.5, 97.5])]


def of_share(values: Sequence[float] | Any) -> list[float]:
    """Of the mean of values [n] within 0 and 1: yes or no, a tie one half, shares. It is inside 0 and 1, and never
    of no width: 128 wins of 128 are 97.1 % to 100 %, where all resamples of them are the same.

    Wilson's score interval (1927), with the values' own variance in place of p (1 - p), which it is for yes and no.
    """
    values, count = numpy.asarray(values, dtype=float), len(values)
    centre = (values.sum() + Z**2 / 2) / (count + Z**2)
    half = Z / (count + Z**2) * math.sqrt(count * values.var() + Z**2 / 4)
    return [max(float(centre - half), 0.0), min(float(centre + half), 1.0)]


def of_change(changes: Any) -> list[float]:
    """Of the mean of differences [n] of two values within 0 and 1."""
    return [2 * bound - 1 for bound in of_share((numpy.asarray(changes) + 1) / 2)]
