"""The capacity search on shapes of a few kilobytes."""

import json

import pytest
import torch

from penstock.cli import main
from penstock.commands.bench import capacity
from penstock.commands.bench.config import BenchConfig, CapacityConfig
from penstock.commands.bench.plain import Plain
from penstock.errors import ResourceError
from penstock.flags import parse
from penstock.models import weight_shapes
from tests.conftest import TINY

SHAPE = {"vocab_size": 64, "d_model": 64, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "d_ff": 256}


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 40])
def test_the_search_finds_the_deepest_and_tries_nothing_far_beyond(most):
    tried = []

    def fits(layers):
        tried.append(layers)
        return layers <= most

    assert capacity.most_layers(fits, 1, 40) == most
    assert max(tried) <= 2 * most + 1
    assert len(tried) <= 12


def test_not_even_one_block_is_an_error():
    with pytest.raises(ResourceError, match="not even 1 block fit"):
        capacity.most_layers(lambda layers: False, 1, 4)


def test_flags_survive_the_way_to_another_process():
    setting = {"strategy": "gemini_cpu", "recompute": True, "device_memory": "2GB"}
    config = BenchConfig("xl", experience_batch_size=2, layers=7, **setting)
    assert parse(BenchConfig, capacity.arguments_of(config), "bench") == config


@pytest.mark.parametrize("kind", capacity.KINDS)
def test_plain_pytorch_is_counted_with_all_that_it_holds(kind):
    """Weights, gradients and moments at the least; the gradients of one model at a time."""
    shape = capacity.dataclasses.replace(TINY, **SHAPE)
    count, seen = weight_shapes.count_of(shape, scalar=False), {}
    prompts = torch.randint(64, (1, 4))
    assert capacity.runs_plainly(shape, kind, 10**9, prompts, 2, seen)
    held = {"published": 4 * 4 + 2 * 8 + 4, "fair": 4 * 2 + 2 * 4 + 2 * 8 + 4}[kind]
    assert held * count <= seen[2] <= 1.5 * held * count
    assert not capacity.runs_plainly(shape, kind, held * count - 1, prompts, 2, {})


@pytest.mark.parametrize("kind", capacity.KINDS)
def test_plain_pytorch_learns(kind):
    torch.manual_seed(0)
    plain = Plain(TINY, kind, torch.device("cpu"))
    before = [p.detach().clone() for model in (plain.actor, plain.critic) for p in model.parameters()]
    for _ in range(200 if kind == "fair" else 1):  # bf16 shows a change when masters have gone half a step
        plain.step(torch.randint(16, (2, 4)), 3)
        now = [p.detach() for model in (plain.actor, plain.critic) for p in model.parameters()]
        if any(not torch.equal(a, b) for a, b in zip(before[: len(now) // 2], now[: len(now) // 2], strict=True)):
            break
    else:
        pytest.fail("the actor stood still")
    assert all(torch.isfinite(p).all() for p in now)


def test_ours_is_deeper_than_plain_pytorch_under_one_budget(tmp_path, tiny_model, capsys):
    out = tmp_path / "found.json"
    main([
        "bench", "capacity", "--device-memory", "5MB", "--model", tiny_model(**SHAPE), "--host-memory", "20MB",
        "--experience-batch-size", "1", "--prompt-length", "4", "--max-length", "6", "--json", str(out),
    ])  # fmt: skip
    found = json.loads(out.read_text())
    assert found["layers"]["ours"] > found["layers"]["fair"] >= 1
    assert found["ratios"]["published"] > 1
    assert found["ours"]["peak_device_bytes"] <= found["budget_bytes"]
    assert all(peak <= found["budget_bytes"] for peak in found["peak_device_bytes_of_plain"].values())
    assert found["runs_of_ours"][str(found["layers"]["ours"])] == "completed"
    assert "blocks" in capsys.readouterr().out


def test_a_run_that_fails_says_why_and_costs_only_itself(tiny_model):
    config = CapacityConfig("1MB", model=tiny_model(), prompt_length=4, max_length=6)
    assert "exit code 3" in capacity.run_apart(capacity.bench_config(config, "1kB", 2))
