"""RMSNorm and its gradients against doubles, by the C and by torch."""

import pytest
import torch
from torch.nn import functional as F

from penstock.kernels import cpu_ops
from penstock.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 7), (2, 6, 3, 40)])
def test_rms_norm_is_that_of_doubles_and_keeps_its_argument_alone(shape, offset, compiles, monkeypatch):
    if not compiles:
        monkeypatch.setattr(cpu_ops, "_library", lambda: "no compiler")
    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16().transpose(0, -2).requires_grad_()  # with gaps, as heads lie in a product
    weight = torch.randn(shape[-1], requires_grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    oracle = F.rms_norm(exact[0], shape[-1:], exact[1] + offset, 1e-6)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours = rms_norm(x, weight, 1e-6, offset)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
    upstream = torch.randn(oracle.shape).bfloat16()
    ours.backward(upstream)
    oracle.backward(upstream.double())
    for result, right, rounding in (
        (ours, oracle, 1e-2),
        (x.grad, exact[0].grad, 1e-2),
        (weight.grad, exact[1].grad, 1e-6),
    ):
        assert (result - right).abs().max() <= rounding * right.abs().max()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert (rms_norm(x, weight, 1e-6, offset) - oracle).abs().max() <= 1e-2 * oracle.abs().max()
