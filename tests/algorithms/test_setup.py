"""Flags that a run cannot use are said."""

import dataclasses

import pytest

from penstock.algorithms.setup import reserve_activations
from penstock.distributed.world import World
from penstock.errors import ResourceError
from penstock.memory.strategy import Strategy
from penstock.planner.workload import RoleSpec, Workload
from penstock.run.directory import SIGNATURE
from tests.conftest import TINY, cli, demonstrations


def test_fsdp_keeps_to_a_device_budget_by_refusing_what_the_plan_says_is_more():
    strategy = Strategy.named("gemini", device="cpu", device_memory="1MB")
    strategy.name, strategy.world = "fsdp", Second(1, 2, strategy.world.device)
    work = Workload("sft", (RoleSpec("model", TINY, True, False),), 2, 2, 2, 1, 16, 0)
    reserve_activations(strategy, work)
    strategy.tiers["device"].budget = 30_000
    with pytest.raises(ResourceError, match=r"--device-memory 30.00 kB: under --strategy fsdp each rank needs \d"):
        reserve_activations(strategy, work)


@dataclasses.dataclass(frozen=True)
class Second(World):
    """The second of two ranks; `changes`: what the first one has planned otherwise."""

    changes: dict = dataclasses.field(default_factory=dict)

    def broadcast(self, item):
        return dataclasses.replace(item, **self.changes)


def test_ranks_reserve_what_the_first_one_plans_whatever_each_of_them_has_measured():
    strategy = Strategy.named("gemini_cpu", device="cpu", device_memory="1MB", host_memory="1GB")
    strategy.world = Second(1, 2, strategy.world.device, {"activations": 1234, "offloaded": 56, "further": 7})
    work = Workload("sft", (RoleSpec("model", TINY, True, False),), 2, 2, 2, 1, 16, 0)
    reserve_activations(strategy, work)
    assert (strategy.reserve, strategy.offloaded, strategy.further) == (1234, 56, 7)


def test_a_disk_that_the_strategy_has_no_use_for_is_said(tmp_path, tiny_model, jsonl, capsys):
    files = ("--model", tiny_model(), "--data", jsonl(demonstrations(4)), "--out", tmp_path / "run")
    flags = ("--steps", 1, "--batch-size", 2, "--heldout", 0, "--max-length", 20, "--disk", tmp_path)
    assert cli("sft", *files, *flags, "--strategy", "ddp") == 0
    assert "--strategy ddp keeps nothing on a disk, and does not use it" in capsys.readouterr().err
    assert cli("sft", *files[:-1], tmp_path / "other", *flags, "--strategy", "gemini_nvme") == 0
    assert "keeps nothing on a disk" not in capsys.readouterr().err


def test_a_run_from_before_rows_lay_end_to_end_goes_on_with_padded_ones(tmp_path, tiny_model, jsonl):
    files = ("--model", tiny_model(), "--data", jsonl(demonstrations(8)), "--heldout", 0, "--max-length", 20)
    runs = {}
    for name, last in (("whole", 2), ("old", 1)):
        runs[name] = tmp_path / name
        flags = ("--steps", last, "--batch-size", 4, "--no-padding-free", "--lr-schedule", "constant")
        assert cli("sft", *files, "--out", runs[name], *flags) == 0
    config = runs["old"] / "config.toml"
    config.write_text(config.read_text().partition(SIGNATURE)[0].replace("padding_free = false\n", ""))
    assert cli("resume", runs["old"], "--steps", 2) == 0
    assert (runs["old"] / "metrics.jsonl").read_bytes() == (runs["whole"] / "metrics.jsonl").read_bytes()
