"""The update rule against torch.optim.AdamW, and the split master bit by bit; in C and in torch operations."""

import pytest
import torch
from torch import nn

from penstock.kernels import compile as compiler
from penstock.memory.adamw import SOURCE, TILE, AdamW, _in_one_pass, join, split, states_of, sum_of_squares

SIZES = [1, 1000, TILE, TILE + 1, 2 * TILE + 77]


@pytest.fixture(autouse=True, params=["c", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(compiler, "compiled", lambda *source: "a machine without a compiler")
    elif isinstance(compiler.compiled(SOURCE), str):
        pytest.skip(compiler.compiled(SOURCE))
    return request.param


def oracle(weights, weight_decay=0.0):
    parameter = nn.Parameter(weights.clone())
    settings = {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": weight_decay}
    return parameter, torch.optim.AdamW([parameter], **settings, fused=True)


def step_of(parameter, optimizer, grads, lr):
    optimizer.param_groups[0]["lr"] = lr
    parameter.grad = grads.float()
    optimizer.step()


def decayed_and_updated(rule, weights, states, grads, **move):
    rule.decay(weights, states, [slice(0, len(weights))], move["lr"])
    rule.update(weights, states, grads, **move)


def fresh(weights):
    return {name: torch.zeros(len(weights), dtype=dtype) for name, (dtype, _) in states_of(weights.dtype).items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("numel", SIZES)
def test_fp32_updates_are_those_of_torch(numel, weight_decay):
    generator = torch.Generator().manual_seed(numel)
    ours = torch.randn(numel, generator=generator)
    theirs, optimizer = oracle(ours, weight_decay)
    states, rule = fresh(ours), AdamW(weight_decay=weight_decay)
    for step in range(1, 6):
        grads = torch.randn(numel, generator=generator)
        step_of(theirs, optimizer, grads, 1e-2 / step)
        before = grads.clone()
        decayed_and_updated(rule, ours, states, grads, lr=1e-2 / step, scale=1.0, step=step)
        assert torch.equal(grads, before)
        assert torch.equal(ours, theirs.detach())
    assert torch.equal(states["exp_avg"], optimizer.state[theirs]["exp_avg"])
    assert torch.equal(states["exp_avg_sq"], optimizer.state[theirs]["exp_avg_sq"])


def test_the_clip_factor_multiplies_the_gradients():
    weights, grads = torch.randn(5000), torch.randn(5000)
    other, states, others = weights.clone(), fresh(weights), fresh(weights)
    AdamW().update(weights, states, grads, lr=1e-2, scale=0.37, step=1)
    AdamW().update(other, others, grads * 0.37, lr=1e-2, scale=1.0, step=1)
    assert torch.allclose(weights, other, atol=1e-6, rtol=0)
    assert torch.allclose(states["exp_avg"], others["exp_avg"], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("lr", [1e-2, 1e-6])
@pytest.mark.parametrize("numel", [4096, TILE + 77])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_split_master_is_an_fp32_copy_fed_the_same_gradients_bit_by_bit(dtype, numel, lr):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(numel, generator=generator).bfloat16()
    theirs, optimizer = oracle(weights.float(), 0.1)
    states, rule, master = fresh(weights), AdamW(weight_decay=0.1), torch.empty(numel)
    for step in range(1, 101 if numel < TILE else 11):
        grads = torch.randn(numel, generator=generator).to(dtype)
        step_of(theirs, optimizer, grads, lr)
        decayed_and_updated(rule, weights, states, grads, lr=lr, scale=1.0, step=step)
    join(weights, states["remainder"], master)
    assert torch.equal(master, theirs.detach())


def test_small_updates_add_up():
    """PPO.md 18: 800 updates of 1e-5 move a bf16 weight near 1, though each alone is below its rounding."""
    weights, rule = torch.ones(1, dtype=torch.bfloat16), AdamW(eps=1e-12)
    states, master = fresh(weights), torch.empty(1)
    for step in range(1, 801):
        rule.update(weights, states, torch.ones(1, dtype=torch.bfloat16), lr=1e-5, scale=1.0, step=step)
    join(weights, states["remainder"], master)
    assert float(master) == pytest.approx(1 - 800e-5, abs=1e-4)
    assert weights.item() == torch.tensor(1 - 800e-5).bfloat16().item() != 1.0


def test_joining_gives_back_every_bit_that_was_split():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (300_000,), generator=generator).to(torch.int32)
    low = torch.arange(1 << 16, dtype=torch.int32) - (1 << 15)  # every remainder, ties included, around 1.0 and -2.5
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.4028e38, -3.4028e38, float("inf"), -float("inf")])
    bits = torch.cat([bits, 0x3F80_0000 + low, low + torch.tensor(-2.5).view(torch.int32), special.view(torch.int32)])
    master = bits.view(torch.float32)
    master = master[~master.isnan()]
    weights, remainder = torch.empty(len(master), dtype=torch.bfloat16), torch.empty(len(master), dtype=torch.int16)
    split(master.clone(), weights, remainder)
    again = torch.empty_like(master)
    join(weights, remainder, again)
    assert torch.equal(again.view(torch.int32), master.view(torch.int32))
    nearest = master.bfloat16()  # to even in a tie
    normal = master.abs() < 3e38
    assert ((weights.float() - master).abs() <= (nearest.float() - master).abs())[normal].all()


@pytest.mark.parametrize("beta1", [0.0, 0.4, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_every_beta_and_every_clip_gives_the_bits_of_torch(beta1, scale):
    generator = torch.Generator().manual_seed(1)
    ours = torch.randn(10_000, generator=generator)
    theirs = ours.clone()
    states, others, rule = fresh(ours), fresh(ours), AdamW(betas=(beta1, 0.99), weight_decay=0.01)
    for step in range(1, 4):
        grads = torch.randn(10_000, generator=generator)
        decayed_and_updated(rule, ours, states, grads, lr=1e-3, scale=scale, step=step)
        torch._fused_adamw_(
            [theirs], [grads.clone()], [others["exp_avg"]], [others["exp_avg_sq"]], [], [torch.tensor(float(step))],
            lr=1e-3, beta1=beta1, beta2=0.99, weight_decay=0.01, eps=1e-5, amsgrad=False, maximize=False,
            grad_scale=torch.tensor(1 / scale),
        )  # fmt: skip
    assert torch.equal(ours, theirs)
    assert all(torch.equal(states[name], others[name]) for name in states)


def test_c_takes_whole_vectors_of_cpu_tensors_only(way):
    rule = AdamW()._rule(1e-3, 1.0, 1)
    done = [_in_one_pass([torch.zeros(n, device=at) for _ in range(4)], rule) for n, at in ((130, "cpu"), (63, "cpu"))]
    assert done == ([128, 0] if way == "c" else [0, 0])
    assert _in_one_pass([torch.zeros(64, device="meta") for _ in range(4)], rule) == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work_and_change_nothing(threads):
    before = torch.get_num_threads()
    weights, grads = torch.randn(100_003).bfloat16(), torch.randn(100_003).bfloat16()
    alone, states, others = weights.clone(), fresh(weights), fresh(weights)
    try:
        torch.set_num_threads(threads)
        AdamW().update(weights, states, grads, lr=1e-2, scale=0.5, step=1)
    finally:
        torch.set_num_threads(before)
    for part in (slice(0, 50_048), slice(50_048, None)):
        here = {name: state[part] for name, state in others.items()}
        AdamW().update(alone[part], here, grads[part], lr=1e-2, scale=0.5, step=1)
    assert torch.equal(weights, alone)
    assert all(torch.equal(states[name], others[name]) for name in states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 1023, 65_537, 3_000_000])
def test_squares_are_summed_without_loss_and_alike_by_any_number_of_threads(dtype, count, way, monkeypatch):
    grads = (1e-4 * torch.randn(count, generator=torch.Generator().manual_seed(1))).to(dtype)
    found = sum_of_squares(grads)
    assert found.dtype == torch.float64
    ours = way == "c"  # torch sums a million squares in fp32
    assert found == pytest.approx(float(grads.double().square().sum()), rel=1e-6 if ours else 1e-4)
    if ours:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert torch.equal(sum_of_squares(grads), found)
    if count:
        grads[count // 2] = torch.inf
        assert sum_of_squares(grads) == torch.inf
