"""How a process finds its device, its ranks and this attempt's name."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from penstock.distributed import heartbeat, world
from tests.conftest import PATIENCE


def test_every_attempt_has_a_name_of_its_own_whoever_comes_first():
    store = dist.HashStore()
    names = []
    with ThreadPoolExecutor(3) as ranks:
        for _ in range(4):
            early = ranks.submit(world.attempt, store, 2, 3)  # reads the last attempt's name first
            others = [ranks.submit(world.attempt, store, rank, 3) for rank in (0, 1)]
            agreed = {future.result(timeout=60) for future in (early, *others)}
            assert len(agreed) == 1
            names += agreed
    assert len(set(names)) == 4


def test_a_rank_that_waits_long_for_the_others_to_start_says_so(monkeypatch):
    lines, said = [], threading.Event()
    monkeypatch.setattr(heartbeat, "BEAT", 0.001)
    monkeypatch.setattr("builtins.print", lambda text, **_: (lines.append(text), said.set()))
    with world._said("rank 0 waits for all 2 ranks to start"):
        assert said.wait(PATIENCE)
    monkeypatch.setattr(heartbeat, "BEAT", 1.0)
    with world._said("nobody waits"):
        pass
    assert lines == ["penstock: rank 0 waits for all 2 ranks to start"]


@pytest.mark.parametrize(
    ("local", "visible", "count", "index"),
    [("3", "0,1,2,3", 4, 3), ("3", None, 4, 3), ("3", "2", 1, 0), ("3", "GPU-1b", 1, 0), (None, "1,2", 2, 0),
     ("1", None, 1, 1), ("1", "4,5", 2, 1)],
)  # fmt: skip
def test_where_slurm_shows_a_rank_one_gpu_that_is_its_own(monkeypatch, local, visible, count, index):
    for name, value in (("LOCAL_RANK", local), ("CUDA_VISIBLE_DEVICES", visible)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert world._local_index() == index


@pytest.mark.parametrize(("kind", "exact"), [("cpu", "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_sums_in_fp64_stay_on_the_device_but_for_apples(kind, exact):
    assert world.World(0, 1, torch.device(kind)).exact.type == exact
