"""Strategy.step: one sum whatever the micro-batches, one clip, and no step on what is not finite."""

import pytest
import torch
from torch import nn

from penstock.errors import UserError
from penstock.memory.shard import World
from penstock.memory.strategy import STRATEGIES, Strategy

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


def trained(parts, *, steps=3, max_grad_norm=1.0, scale=1.0):
    torch.manual_seed(1)
    net = nn.Linear(4, 2)
    strategy = Strategy.named("naive", device="cpu")
    sink = strategy.prepare(net)

    def loss_of(rows):
        loss = scale * net(rows).square().sum() / len(X)
        return loss, {"rows": torch.tensor(len(rows)), "max_row": rows.max()}

    stats = [strategy.step(sink, X.split(parts), loss_of, lr=1e-2, max_grad_norm=max_grad_norm) for _ in range(steps)]
    return net, stats


@pytest.mark.parametrize("parts", [1, 2, 4, 5])
def test_micro_batches_never_change_the_gradient(parts):
    whole, one = trained(12)
    net, many = trained(parts)
    assert torch.allclose(net.weight, whole.weight, atol=1e-6)
    for a, b in zip(one, many, strict=True):
        assert a.grad_norm == pytest.approx(b.grad_norm, abs=1e-6)
        assert a.sums["loss"] == pytest.approx(b.sums["loss"], abs=1e-6)
        assert b.sums["rows"] == 12
        assert b.sums["max_row"] == pytest.approx(float(X.max()))


@pytest.mark.parametrize("max_grad_norm", [0.01, 1.0, 1e9])
def test_clipping_is_by_the_global_norm(max_grad_norm):
    """Against torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW."""
    torch.manual_seed(1)
    oracle = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        (5 * oracle(X).square().sum() / len(X)).backward()
        nn.utils.clip_grad_norm_(oracle.parameters(), max_grad_norm)
        optimizer.step()
    net, _ = trained(3, max_grad_norm=max_grad_norm, scale=5.0)
    assert torch.allclose(net.weight, oracle.weight, atol=1e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nothing_moves_when_something_is_not_finite(poison):
    net = nn.Linear(4, 2)
    before = net.weight.detach().clone()
    strategy = Strategy.named(device="cpu")
    sink = strategy.prepare(net)
    stats = strategy.step(sink, [X], lambda rows: (net(rows).sum() * poison, {}), lr=1.0)
    assert not stats.applied
    assert torch.equal(net.weight, before)
    assert strategy.step(sink, [X], lambda rows: (net(rows).square().sum(), {}), lr=1.0).applied


def test_phases_switch_gradients_and_keep_time():
    strategy = Strategy.named(device="cpu")
    for phase, wanted in (("rollout", False), ("score", False), ("train", True)):
        with strategy.phase(phase):
            assert torch.is_grad_enabled() == wanted
    assert set(strategy.take_seconds()) == {"timing/rollout_seconds", "timing/score_seconds", "timing/train_seconds"}
    assert strategy.take_seconds() == {}


def test_models_are_born_in_the_strategys_dtype():
    strategy = Strategy.named(dtype="bf16", device="cpu")
    with strategy.init():
        assert nn.Linear(2, 2).weight.dtype == torch.bfloat16
    assert nn.Linear(2, 2).weight.dtype == torch.float32


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(UserError, match=", ".join(STRATEGIES)):
        Strategy.named("zero9")
    with pytest.raises(UserError, match="fp32 or bf16"):
        Strategy.named(dtype="fp8")


def test_naive_is_one_process(monkeypatch):
    monkeypatch.setattr(World, "join", staticmethod(lambda device: World(0, 2, torch.device("cpu"))))
    with pytest.raises(UserError, match="ddp"):
        Strategy.named("naive")


def test_shares_of_ranks_are_disjoint_and_cover_everything():
    items = list(range(11))
    shares = [World(rank, 3, torch.device("cpu")).mine(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_a_collective_returns_at_once():
    world, x = World(0, 1, torch.device("cpu")), torch.ones(2)
    assert world.sum(x) is x
    assert world.max(x) is x
    assert world.gather("a") == ["a"]
    assert world.broadcast("a") == "a"
