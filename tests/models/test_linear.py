"""bf16 products widened to fp32 agree with PyTorch's own, forward and backward, and keep nothing wide."""

import pytest
import torch
from torch.nn import functional as F

from penstock.models import linear as module


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    """Take the path of a processor without bf16 instructions, whatever runs the tests."""
    monkeypatch.setattr(module, "slow_in_bf16", lambda device_type: True)


@pytest.mark.parametrize("tile", [1 << 22, 14, 1])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_a_widened_product_is_the_rounded_exact_one(shape, with_bias, tile, monkeypatch):
    monkeypatch.setattr(module, "PRODUCT_TILE", tile)
    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16().requires_grad_()
    weight = torch.randn(4, 7).bfloat16().requires_grad_()
    bias = torch.randn(4).bfloat16().requires_grad_() if with_bias else None
    given = [t for t in (x, weight, bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in given]
    ours = module.linear(x, weight, bias)
    oracle = F.linear(*exact)
    upstream = torch.randn(oracle.shape).bfloat16()
    ours.backward(upstream)
    oracle.backward(upstream.double())
    assert ours.dtype == torch.bfloat16
    for mine, theirs in [(ours, oracle), *((a.grad, b.grad) for a, b in zip(given, exact, strict=True))]:
        assert mine.dtype == torch.bfloat16
        assert torch.allclose(mine.double(), theirs, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1 << 22, 14])
def test_a_gradient_that_has_a_place_is_added_there_and_twice_gives_twice(dtype, tile, monkeypatch):
    monkeypatch.setattr(module, "PRODUCT_TILE", tile)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 3, 7), (4, 7), (4,)))
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    places = [torch.ones_like(t) for t in (weight, bias)]
    weight.grad, bias.grad = places
    upstream = torch.randn(2, 3, 4).to(dtype)
    for _ in range(2):
        module.linear(x, weight, bias).backward(upstream)
        F.linear(*exact).backward(upstream.double())
    assert weight.grad is places[0]
    assert bias.grad is places[1]
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs, start in ((x, exact[0], 0), (weight, exact[1], 1), (bias, exact[2], 1)):
        assert torch.allclose(ours.grad.double(), theirs.grad + start, rtol=tolerance, atol=tolerance)


def test_fp32_and_gpus_take_the_plain_path(monkeypatch):
    monkeypatch.setattr(module._Product, "apply", lambda *arguments: pytest.fail("widened"))
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    assert torch.equal(module.linear(x, weight), F.linear(x, weight))
    monkeypatch.undo()
    assert not module.slow_in_bf16("cuda")


def test_frozen_inputs_get_no_gradient():
    x = torch.randn(2, 3).bfloat16()
    weight = torch.randn(4, 3).bfloat16().requires_grad_()
    module.linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("biased", [True, False])
def test_attention_is_torchs_own(biased):
    q, k, v = torch.randn(2, 4, 5, 8).bfloat16(), torch.randn(2, 2, 5, 8).bfloat16(), torch.randn(2, 2, 5, 8).bfloat16()
    bias = torch.randn(2, 1, 5, 5).bfloat16() if biased else None
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), None if bias is None else bias.double(), is_causal=not biased,
        enable_gqa=True,
    )  # fmt: skip
    ours = module.attention(q, k, v, bias, module.cpu_ops.Scores())
    assert ours.dtype == torch.bfloat16
    assert torch.allclose(ours.double(), exact, rtol=2**-7, atol=2**-7)


@pytest.fixture
def calls(monkeypatch):
    """The calls of torch's attention as on a GPU, which this machine only imagines: (key, mask, enable_gqa) of each."""
    calls, torchs_own = [], F.scaled_dot_product_attention

    def spy(q, k, v, mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        assert q.dtype != torch.float32 or q.shape[:2] == k.shape[:2]
        calls.append((k, mask, enable_gqa))
        return torchs_own(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with module.computing("narrow"):
        yield calls


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("bias", [None, (1, 1), (3, 1), (1, 4), (3, 4)])
@pytest.mark.parametrize("length", [1, 6])
def test_heads_that_share_keys_are_attended_to_in_a_form_that_gpus_have_a_kernel_for(length, bias, sinks, calls):
    """With a mask or in fp32 torch has none for shared heads. Values and gradients are those of the plain formula."""
    rng = torch.Generator().manual_seed(0)
    seen = length if bias is None else 7
    q = torch.randn(3, length, 8, 8, generator=rng)[:, :, :4].transpose(1, 2)  # with gaps, as one product makes them
    k, v = (torch.randn(3, seen, 4, 8, generator=rng)[:, :, 1:3].transpose(1, 2) for _ in range(2))
    mask = None if bias is None else torch.randn(*bias, length, seen, generator=rng)
    logits = torch.randn(4, generator=rng) if sinks else None
    ours, exact = (
        [tensor.to(dtype).detach().requires_grad_() for tensor in (q, k, v)] for dtype in (q.dtype, torch.double)
    )
    result = module.attention(*ours, mask, module.cpu_ops.Scores(sinks=logits))
    scores = exact[0] @ exact[1].repeat_interleave(2, dim=1).transpose(2, 3) / 8**0.5
    scores = scores + (mask if mask is not None else torch.full((length, seen), -torch.inf).triu(1))
    column = (
        torch.full((3, 4, length, 1), -torch.inf) if logits is None else logits[:, None, None].expand(3, 4, length, 1)
    )
    shares = torch.cat((scores, column), dim=3).softmax(3)[..., :seen]
    wanted = shares @ exact[2].repeat_interleave(2, dim=1)
    assert result.shape == wanted.shape
    assert torch.allclose(result.double(), wanted, atol=1e-5)
    upstream = torch.randn(wanted.shape, generator=rng)
    result.backward(upstream)
    wanted.backward(upstream.double())
    for mine, theirs in zip(ours, exact, strict=True):
        assert torch.allclose(mine.grad.double(), theirs.grad, atol=1e-5)
    ((key, _, enable_gqa),) = calls
    assert not enable_gqa
    assert length == 1 or key.stride(1) == 0  # repeated without memory


def test_in_16_bits_and_without_a_mask_flash_attention_takes_shared_heads_as_they_are(calls):
    q, k = torch.randn(2, 4, 6, 8).bfloat16(), torch.randn(2, 2, 6, 8).bfloat16()
    module.attention(q, k, k, None, module.cpu_ops.Scores())
    ((key, mask, enable_gqa),) = calls
    assert (key.shape, mask, enable_gqa) == (k.shape, None, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_attention_is_called_as_ever(dtype, monkeypatch):
    q, k = torch.randn(2, 4, 1, 8).to(dtype), torch.randn(2, 2, 6, 8).to(dtype)
    mask, plain = torch.randn(2, 1, 1, 6).to(dtype), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: plain(*a, **o) if o["enable_gqa"] else None)
    assert module.attention(q, k, k, mask, module.cpu_ops.Scores()).dtype == dtype


def test_without_a_compiler_a_few_rows_without_gradient_take_the_plain_path(monkeypatch):
    monkeypatch.setattr(module.cpu_ops, "ready", lambda *tensors: False)
    monkeypatch.setattr(module._Product, "apply", lambda *arguments: torch.ones(()))
    weight = torch.randn(4, 3).bfloat16()
    with torch.no_grad():
        assert module.linear(torch.randn(module.FEW, 3).bfloat16(), weight).shape == (module.FEW, 4)
        assert module.linear(torch.randn(module.FEW + 1, 3).bfloat16(), weight).shape == ()
