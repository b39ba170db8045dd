"""Calls in turns, A B A B ...: what else the machine does meets all of them alike. Every comparison is timed here."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from penstock.commands.bench.clock import settle

Result = TypeVar("Result")
Calls = dict[str, Callable[[], Any]]
Seconds = dict[str, list[float]]


def alternate(calls: dict[str, Callable[[], Result]], rounds: int, warm_ups: int = 0) -> dict[str, list[Result]]:
    """What each call returns, round by round; the first `warm_ups` rounds are not kept."""
    results: dict[str, list[Result]] = {name: [] for name in calls}
    for turn in range(warm_ups + rounds):
        for name, call in calls.items():
            result = call()
            if turn >= warm_ups:
                results[name].append(result)
    return results


def seconds_of(call: Callable[[], Any], device: Any = "cpu") -> float:
    """Wall seconds of a call, until the device is done with it."""
    import torch

    settle(torch.device(device))
    began = time.perf_counter()
    call()
    settle(torch.device(device))
    return time.perf_counter() - began


def in_turns(calls: Calls, rounds: int, device: Any = "cpu", warm_ups: int = 1) -> Seconds:
    """Seconds of each call in turns, after the warm-ups of each."""
    return alternate({name: partial(seconds_of, call, device) for name, call in calls.items()}, rounds, warm_ups)


def medians(seconds: Seconds) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def rates(seconds: Seconds, amount: float) -> dict[str, float]:
    """Amount per second of each, by the median."""
    return {name: amount / median for name, median in medians(seconds).items()}


def ratios(seconds: Seconds, above: str, below: str) -> list[float]:
    """Round by round, the seconds of one call over those of another."""
    return [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]


def ratio(seconds: Seconds, above: str, below: str) -> float:
    """The median of the ratios of the rounds."""
    return statistics.median(ratios(seconds, above, below))
