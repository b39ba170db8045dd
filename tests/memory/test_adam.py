"""The flat AdamW against torch.optim.AdamW on fp32 copies of the same parameters."""

import copy

import pytest
import torch
from torch import nn

from penstock.memory.adam import AdamW


def model(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    return net.to(dtype)


def give_grads(net, step):
    generator = torch.Generator().manual_seed(step)
    grads = [torch.randn(p.shape, generator=generator) for p in net.parameters()]
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(grad)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_updates_are_those_of_torch(weight_decay):
    ours, theirs = model(), model()
    sink = AdamW(ours.parameters(), weight_decay=weight_decay)
    oracle = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), eps=1e-5, weight_decay=weight_decay)
    for step in range(5):
        sink.zero_grad()
        give_grads(ours, step)
        give_grads(theirs, step)
        for group in oracle.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        sink.update(1e-2 / (step + 1))
        oracle.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_bf16_weights_are_rounded_masters_so_small_updates_add_up():
    """PPO.md 18: 800 updates of 1e-5 move a bf16 weight near 1, though each alone is below its rounding."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(net.weight)
    sink = AdamW(net.parameters(), eps=1e-12)
    for _ in range(800):
        sink.zero_grad()
        net.weight.grad.fill_(1.0)
        sink.update(1e-5)
    assert sink.flats[0].master.item() == pytest.approx(1 - 800e-5, abs=1e-4)
    assert net.weight.item() == torch.tensor(1 - 800e-5).bfloat16().item() != 1.0


def test_grad_norm_is_global_over_dtypes_and_clipping_is_the_callers_factor():
    net = nn.ParameterList([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))])
    sink = AdamW(net.parameters())
    net[0].grad.fill_(1.0)
    net[1].grad.fill_(2.0)
    assert float(sink.grad_norm()) == pytest.approx((3 * 1 + 4 * 4) ** 0.5)


def test_gradients_accumulate_in_the_flat_buffer_through_autograd():
    net = model()
    sink = AdamW(net.parameters())
    x = torch.randn(4, 7)
    net(x).sum().backward()
    once = sink.flats[0].grads.clone()
    net(x).sum().backward()
    assert torch.allclose(sink.flats[0].grads, 2 * once)
    sink.zero_grad()
    assert not any(p.grad.any() for p in net.parameters())
    assert all(p.grad.data_ptr() >= sink.flats[0].grads.data_ptr() for p in net.parameters())


def test_frozen_parameters_stay_where_they_are():
    net = model()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    sink = AdamW(net.parameters(), weight_decay=0.5)
    give_grads(net[1:], 0)
    sink.update(0.1)
    assert torch.equal(net[0].weight, before)
    assert sink.flats[0].weights.numel() == sum(p.numel() for p in net[1:].parameters())


def test_tied_parameters_are_one():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    assert AdamW(net.parameters()).flats[0].weights.numel() == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_and_comes_back_bit_by_bit(dtype):
    one, other = model(dtype), model(dtype)
    first, second = AdamW(one.parameters()), AdamW(other.parameters())
    for step in range(3):
        give_grads(one, step)
        first.update(1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(3, 6):
        for net, sink in ((one, first), (other, second)):
            give_grads(net, step)
            sink.update(1e-2)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_model_is_refused():
    with pytest.raises(ValueError, match="another size"):
        AdamW(model().parameters()).load_state_dict(AdamW(nn.Linear(2, 2).parameters()).state_dict())


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable"):
        AdamW(model().requires_grad_(False).parameters())
