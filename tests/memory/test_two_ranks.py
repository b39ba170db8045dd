"""Every strategy on two ranks, with work as uneven as it gets, against plain PyTorch on one."""

from pathlib import Path

import pytest
import torch

from penstock.memory.placement import NAMES
from penstock.models.roles import Actor
from tests.conftest import torchrun
from tests.memory.test_stream import FAMILIES, decoder, plain

STEPS = 20
OURS = ["gpt2", "llama", *(name for name in FAMILIES if name not in ("gpt2", "llama", "opt-350m"))]
EVERYWHERE = ["zero2_cpu", "gemini", "gemini_cpu", "gemini_nvme", "fsdp"]
"""Strategies of all families: one of each way to keep weights. One rank runs all under all (test_stream)."""
SHARED = [*(name for name in NAMES if name != "naive"), "gemini kept", "gemini_cpu kept", "fsdp kept"]
WORKER = """
import sys, torch
from penstock.algorithms import functional as fn
from penstock.algorithms.sft import response_logprobs
from penstock.memory.strategy import Strategy
from penstock.models.packed import pack
from penstock.models.roles import Actor
from penstock.models.surgery import packed_copy
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling
from tests.memory.test_stream import batches, decoder, weights_of

out, disk, steps, *names = sys.argv[1:]
found = {}
for name in names:
    for family in FAMILIES if name in EVERYWHERE else FAMILIES[:2]:
        placement, _, kept = name.partition(" ")
        on = disk if name == "gemini_nvme" else None
        strategy = Strategy.named(placement, device="cpu", disk=on, recompute=False if kept else None)
        actor = Actor(decoder(family))
        stream = strategy.prepare(actor, weight_decay=0.1)
        losses = []
        for step in range(int(steps)):
            rows = list(batches(step))
            total = sum(int(one.trained.sum()) for one in rows)
            # Three micro-batches for two ranks: one rank has two of them, and in every fifth step all three.
            mine = rows if step % 5 == 0 else rows[: 3 - 1]
            mine = mine if strategy.world.rank == step % 2 else [one for one in rows if not any(one is x for x in mine)]
            def loss_of(hidden, one):
                return fn.sft_loss(response_logprobs(actor, hidden, one), total), {}
            losses.append(strategy.step(stream, mine, loss_of, lr=1e-2, max_grad_norm=0.5).sums["loss"])
        prompts = [[1, 5, 6], [1, 7], [1, 9, 9, 9]][strategy.world.rank :: 2]
        new = 12 if strategy.world.rank else 5
        with strategy.phase("rollout" if family == "llama" else "score"):  # all weights at once, or visit by visit
            answers = generate(actor.decoder, prompts, Sampling(max_new_tokens=new, temperature=0.0), eos_ids=[2])
        if family == "llama" and not placement.startswith(("fsdp", "hsdp")):
            copied = packed_copy(actor.decoder, "nf4").blocks[0].qkv
            packed = pack(weights_of(stream)["decoder.blocks.0.qkv.weight"], "nf4")
            assert torch.equal(copied.weight, packed[0]) and torch.equal(copied.scales, packed[1])
        found[name, family] = {
            "losses": losses, "weights": weights_of(stream),
            "answers": strategy.world.gather([one.response_ids for one in answers]),
        }
if strategy.world.first:
    torch.save(found, out)
strategy.world.leave()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every strategy, and every family under some of them, in one pair of processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER.replace("FAMILIES", repr(OURS)).replace("EVERYWHERE", repr(EVERYWHERE)))
    root = Path(__file__).parents[2]
    command = (folder / "worker.py", folder / "out.pt", folder / "disk", STEPS, *SHARED)
    torchrun(*command, PYTHONPATH=f"{root / 'src'}:{root}")
    return torch.load(folder / "out.pt", weights_only=False)


@pytest.mark.parametrize("family", OURS)
def test_twenty_steps_on_two_ranks_are_those_of_plain_pytorch_on_one(found, family):
    losses, weights = plain(Actor(decoder(family)))
    for name in SHARED if family in OURS[:2] else EVERYWHERE:
        ours = found[name, family]
        assert ours["losses"] == pytest.approx(losses, abs=1e-5), name
        for key, weight in weights.items():
            assert torch.allclose(ours["weights"][key], weight, atol=1e-5, rtol=0), (name, key)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ranks_whose_answers_differ_in_length_wait_for_each_other(found, family):
    for name in SHARED:
        answers = found[name, family]["answers"]
        assert all(len(ids) <= limit for rank, limit in zip(answers, (5, 12), strict=True) for ids in rank)
        assert any(len(ids) > 5 for ids in answers[1])
        assert answers == found["ddp", family]["answers"], name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_updates_in_host_memory_are_those_on_the_device_to_the_bit(found, family):
    for name in ("zero1", "zero2"):
        on_device, on_host = found[name, family], found[f"{name}_cpu", family]
        assert on_host["losses"] == on_device["losses"]
        assert all(torch.equal(on_host["weights"][key], weight) for key, weight in on_device["weights"].items())
