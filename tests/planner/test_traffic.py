"""What ranks send each other, by hand; bytes of tiers are compared with the engine's in test_planning."""

import pytest

from penstock.planner.config import PlanConfig
from penstock.planner.from_flags import setting_of
from penstock.planner.workload import forecast_of


def forecast(strategy, **flags):
    return forecast_of(setting_of(PlanConfig(model="s", stage="sft", dtype="fp32", strategy=strategy, **flags)))


WEIGHTS = 124_439_808 * 4
"""Bytes of GPT-2's weights in fp32, and of their gradients."""
TABLE = 50_257 * 768 * 4 / WEIGHTS


@pytest.mark.parametrize(
    ("strategy", "copies"),
    [
        ("ddp", 2),  # gradients are scattered and gathered
        ("zero1", 3),  # and the weights that each rank has updated
        ("zero2", 2 + TABLE),  # gradients are scattered at each visit (the token table has two), weights gathered
        ("gemini", 2 + TABLE),  # weights are gathered once where slots hold them all
    ],
)
def test_bytes_between_ranks_of_one_step(strategy, copies):
    moved = forecast(strategy, world=4, batch_size=16, micro_batch_size=4).traffic["train"]["ranks"]
    assert moved == pytest.approx(copies * WEIGHTS * 3 / 4, rel=0.01)  # padding
    assert forecast(strategy).traffic["train"]["ranks"] == 0


def test_what_is_waited_for_is_not_counted_as_overlapped():
    """A sum over ranks comes after the backward, and a pass begins with shards that nothing was computed beside."""
    waited = {"ddp": 2, "gemini": 1 + TABLE + TABLE}
    for strategy, copies in waited.items():
        slow, fast = (
            forecast(strategy, world=4, batch_size=16, network=network, tflops=0.01).seconds["train"]
            for network in ("1GB", "25GB")
        )
        seconds = copies * WEIGHTS * 3 / 4 * (1 / 1e9 - 1 / 25e9)
        assert slow.total - fast.total == pytest.approx(seconds, rel=0.02)


def test_shards_are_joined_while_blocks_compute_and_not_before_they_have_come():
    flags = {"world": 4, "batch_size": 16, "network": "1GB", "link": "1GB"}
    slow, fast = (forecast("gemini_cpu", tflops=tflops, **flags).seconds["train"] for tflops in (0.01, 1e9))
    assert slow.total - slow.compute < 0.8 * slow.network
    assert fast.total == pytest.approx(fast.link + fast.network, rel=0.01)


def test_states_on_the_device_are_updated_at_its_bandwidth():
    device, host = (forecast(name, host_bandwidth="38GB").seconds["train"] for name in ("ddp", "zero1_cpu"))
    assert (host.optimizer - host.link) / device.optimizer == pytest.approx(1500 / 38, rel=0.01)


def test_a_network_inside_a_machine_and_one_between_machines():
    inside = {"network_inside": "250GB", "network": "25GB", "batch_size": 64, "world": 16}
    one, two = (forecast("fsdp", nodes=nodes, **inside).seconds["train"].network for nodes in (1, 2))
    assert two == pytest.approx(10 * one)
    hybrid = forecast("hsdp", nodes=2, **inside).seconds["train"].network
    assert one < hybrid < two
