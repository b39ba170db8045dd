"""How long passes wait for updates that a thread makes beside them, against a walk over chunks."""

import dataclasses

import pytest

from penstock.planner.traffic import Rates
from penstock.planner.waits import Lap, waits
from penstock.planner.workload import Setting, forecast_of
from tests.planner.test_planning import work

LAP = Lap(frozenset({"actor"}), True, 4.0, 1.0, 1.0, 0.0, False, 10)


def walked(updates, forward, chunks):
    """Seconds that a forward waits: it reads chunk after chunk, each once its update has ended."""
    now = 0.0
    for i in range(1, chunks + 1):
        now = max(now, i * updates / chunks) + forward / chunks
    return now - forward


@pytest.mark.parametrize("updates", [0.0, 0.3, 1.0, 2.5, 40.0])
@pytest.mark.parametrize("chunks", [1, 2, 10])
def test_a_forward_waits_for_its_own_chunks(updates, chunks):
    lap = dataclasses.replace(LAP, updates=updates, chunks=chunks)
    (wait,), left = waits([lap], lap)
    assert wait == pytest.approx(walked(updates, 1.0, chunks))
    assert left is lap


def test_another_models_step_hides_updates_until_its_gradients_are_written():
    actor = dataclasses.replace(LAP, updates=3.0)
    critic = dataclasses.replace(LAP, models=frozenset({"critic"}), updates=5.0)
    assert waits([actor, critic], None)[0] == [0.0, 0.0]
    assert waits([actor, critic], critic)[0] == [1.0, 0.0]


def test_a_disk_that_is_read_for_a_pass_has_less_time_for_updates():
    actor = dataclasses.replace(LAP, updates=3.0, on_disk=True)
    critic = dataclasses.replace(LAP, models=frozenset({"critic"}), idle=0.25)
    assert waits([actor, critic], None)[0] == [0.0, 2.0]


def test_a_rollout_hides_the_critics_updates_and_waits_for_the_actors():
    rollout = dataclasses.replace(LAP, steps=False, whole=10.0, forward=0.5)
    critic = dataclasses.replace(LAP, models=frozenset({"critic"}), updates=12.0)
    waited, left = waits([rollout], critic)
    assert waited == [0.0]
    assert left.updates == 2.0
    assert waits([rollout], dataclasses.replace(LAP, updates=2.0))[0] == [pytest.approx(walked(2.0, 0.5, 10))]


@pytest.mark.parametrize(
    ("strategy", "world", "hidden"),
    [("gemini", 1, False), ("zero2_cpu", 1, True), ("zero2_cpu", 2, False), ("gemini_cpu", 1, True),
     ("gemini_cpu", 2, True)],
)  # fmt: skip
def test_only_updates_that_the_engine_overlaps_are_hidden(strategy, world, hidden):
    """sink.overlaps: not those where the states are on the device, nor those that end in a collective."""
    rates = Rates(flops=1e7, host=1e6, device=1e6)  # passes take much longer than updates
    setting = Setting(work(), strategy, "bf16", world, rates=rates)
    alone = forecast_of(dataclasses.replace(setting, rates=dataclasses.replace(rates, host=1e30, device=1e30))).seconds
    taken = forecast_of(setting).seconds
    waited = sum(taken[phase].total - alone[phase].total for phase in taken)
    optimizer = taken["train"].optimizer - alone["train"].optimizer
    assert optimizer > 0
    assert waited < 0.5 * optimizer if hidden else waited == pytest.approx(optimizer)
