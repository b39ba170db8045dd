"""Inputs of blocks: in host memory between forward and backward, and back with the same bits."""

import pytest
import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.distributed.world import World
from penstock.memory import plan
from penstock.memory.program import Inputs
from penstock.memory.strategy import Strategy
from penstock.memory.tiers import Ram
from penstock.models.roles import Actor
from tests.imagined import imagining
from tests.memory.test_stream import FAMILIES, batches, decoder, streamed
from tests.memory.test_tiers import Driver

CPU = torch.device("cpu")
CASES = [("gemini", "gpt2", "fp32"), *(("gemini_cpu", family, "bf16") for family in FAMILIES)]


@pytest.mark.parametrize(("name", "family", "dtype"), CASES)
def test_training_with_inputs_in_host_memory_leaves_the_same_bits(name, family, dtype):
    results, written = [], []
    for offloaded in (0, 1):
        strategy = Strategy.named(name, dtype=dtype, device="cpu", recompute=True)
        strategy.offloaded = offloaded
        results.append(streamed(Actor(decoder(family, strategy.dtype)), strategy, steps=3))
        written.append(strategy.tiers["host"].bytes_written)
    (losses, weights), (ours, moved) = results
    assert ours == losses
    assert all(torch.equal(moved[key], weight) for key, weight in weights.items())
    # Of each but the last block, of 2 rows of 9, 10 and 11 tokens, in 3 steps
    assert written[1] - written[0] == 3 * 60 * 16 * strategy.dtype.itemsize * (FAMILIES[family].num_layers - 1)


def test_so_it_does_on_a_device_that_is_no_cpu():
    losses = []
    for offloaded in (0, 1):
        with imagining("cuda") as device:
            strategy = Strategy.named("gemini_cpu", dtype="fp32", device=str(device), recompute=True)
            strategy.offloaded = offloaded
            model = Actor(decoder("gpt2"))
            stream = strategy.prepare(model)

            def loss_of(hidden, batch, model=model):
                return fn.sft_loss(response_logprobs(model, hidden, batch), 9), {}

            for step in range(3):
                rows = [Rows(batch.tokens.to(device), batch.trained.to(device)) for batch in batches(step)]
                losses.append(strategy.step(stream, rows, loss_of, lr=1e-2).sums["loss"])
    assert losses[:3] == losses[3:]


def test_what_leaves_comes_back_one_part_early_and_the_last_part_stays():
    host = Ram("host", CPU)
    inputs = Inputs(host, 4)
    read = [[torch.randn(2, width, 3) for width in (4, 5)] for _ in range(4)]
    tokens = [torch.arange(3)]
    kept = [tokens, *([x.clone().requires_grad_() for x in tensors] for tensors in read[1:])]
    for tensors in kept:
        inputs.keep(tensors)
        inputs.leave()
    assert [not part.tensors for part in inputs._kept] == [False, True, True, False]
    assert host.used == 2 * sum(x.nbytes for x in read[1])
    for i in (3, 2, 1):
        back = inputs.take()
        assert all(torch.equal(x, y) and x.requires_grad for x, y in zip(back, read[i], strict=True))
        assert inputs._kept[-1].tensors  # on its way
    assert inputs.take() is tokens


def test_the_first_part_that_learns_may_read_what_needs_no_gradient():
    """Adapters: the embedding is frozen. What blocks read leaves all the same, and comes back without a gradient."""
    inputs = Inputs(Ram("host", CPU), 2)
    first = torch.randn(2, 3)
    for x in (first, torch.randn(2, 3, requires_grad=True)):
        inputs.keep([x])
        inputs.leave()
    assert [x.requires_grad for x in inputs.take()] == [True]
    (back,) = inputs.take()
    assert torch.equal(back, first)
    assert not back.requires_grad
    assert back is not first


def test_the_pages_of_one_pass_are_the_next_ones(monkeypatch):
    """Models side by side have their own, and no pages are pinned twice."""
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    host = Ram("host", CPU, pins=True)
    for _ in range(3):
        passes = [Inputs(host, 2) for _ in range(2)]
        for inputs in passes:
            inputs.keep([torch.randn(4)])
        assert host.used == 32
        del passes, inputs
    assert host.used == host.peak == host.pinned == 32
    assert driver.calls == 2


def test_a_caches_pages_go_where_models_side_by_side_have_no_room_beside_them():
    """The first of them takes the pages, however many they are, and the second needs its own."""
    each = plan.UPDATE_ROOM + 1024
    tiers = {"device": Ram("device", CPU), "host": Ram("host", CPU, 2 * each + plan.UPDATE_ROOM)}
    strategy = Strategy("gemini_cpu", World(0, 1, CPU), torch.float32, offloaded=2 * each, further=each, tiers=tiers)
    cache = Inputs(None, 1)  # any object
    tiers["host"].lend(2 * each, "a cache", cache)
    del cache
    assert tiers["host"].used == 2 * each
    with strategy.phase("train"):
        passes = [Inputs(tiers["host"], 2) for _ in range(2)]
        for inputs in passes:
            inputs.keep([torch.zeros(each // 4)])
        assert tiers["host"].used == 2 * each


def test_a_rank_without_rows_offloads_nothing():
    host = Ram("host", CPU)
    inputs = Inputs(host, 3)
    for _ in range(3):
        inputs.keep([])
        inputs.leave()
    assert [inputs.take() for _ in range(3)] == [[], [], []]
    assert host.peak == 0
