"""Products of few rows and attention over a cache, in C, against torch in fp64."""

import ctypes
import os
import platform
import shutil
import subprocess

import pytest
import torch
from torch.nn import functional as F

from penstock.kernels import cpu_ops, prebuilt
from penstock.models import positions
from tests.conftest import PATIENCE

# where there is a compiler and it does not take the C files, all of these fail
pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def near(ours, exact, dtype, scale=1.0):
    assert ours.dtype == dtype
    scale = exact.abs().max() * scale
    assert (ours.double() - exact).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 64), (64, 33), (102, 40), (37, 9), (5, 1), (16, 3)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 11, 33, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_torch(dtype, inputs, outputs, rows, biased):
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    near(cpu_ops.product(x, weight, bias), exact, dtype)


@pytest.mark.parametrize("rows", [1, 5, 16, 40, 150])
@pytest.mark.parametrize("kept", [True, False])
def test_wide_activations_meet_a_bf16_weight_unrounded(rows, kept):
    """Widened states go to the matrix unit of processors that have one, others do not; neither is rounded."""
    x, weight = torch.randn(rows, 70), torch.randn(48, 70).bfloat16()
    x = x.bfloat16().float() if kept else x
    near(cpu_ops.product(x, weight), F.linear(x.double(), weight.double()), torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [1, 3, 8, 32])
def test_weights_of_8_bits_have_a_scale_per_output(dtype, rows):
    x, scales = torch.randn(rows, 100), torch.rand(17)
    weight = torch.randint(-127, 128, (17, 100)).to(dtype)
    exact = F.linear(x.double(), weight.double() * scales.double()[:, None])
    near(cpu_ops.product(x, weight, scales=scales), exact, torch.float32)


@pytest.mark.parametrize("level", ["native", *reversed(prebuilt.levels_of(platform.machine()))])
def test_every_number_of_fp8_is_read_as_torch_reads_it(level, tmp_path, monkeypatch):
    """In vectors and, behind them, one by one; on each set of instructions that this processor has."""
    if level != "native":
        march, instructions = prebuilt.LEVELS[level]
        if not instructions <= set(prebuilt.cpu_facts().split()):
            pytest.skip(f"{level} is more than this processor has")
        command = [os.environ.get("CC", "cc"), *prebuilt.FLAGS, *march, "-O1", str(prebuilt.HERE / "products.c")]
        subprocess.run([*command, "-o", str(tmp_path / "products.so"), "-lm"], check=True, timeout=PATIENCE)
        monkeypatch.setattr(cpu_ops, "_library", lambda: ctypes.CDLL(str(tmp_path / "products.so")))
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers.view(torch.uint8)[~numbers.float().isnan()].view(torch.float8_e4m3fn)
    weight = torch.stack([numbers, numbers.view(torch.uint8).flip(0).view(numbers.dtype)])
    ours = cpu_ops.product(torch.eye(254), weight, scales=torch.tensor([1.0, 0.5]))
    assert torch.equal(ours.t(), weight.float() * torch.tensor([[1.0], [0.5]]))


def test_leading_dimensions_and_gaps_in_the_activations_are_fine():
    x, weight = torch.randn(2, 3, 96)[:, ::2], torch.randn(10, 96)
    near(cpu_ops.product(x, weight), F.linear(x.double(), weight.double()), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_result_is_the_same_to_the_last_bit_whatever_its_company(dtype):
    x, weight, bias = torch.randn(64, 200).to(dtype), torch.randn(50, 200).to(dtype), torch.randn(50).to(dtype)
    together = cpu_ops.product(x, weight, bias)
    for rows in (1, 2, 3, 5, 8, 31):
        assert torch.equal(cpu_ops.product(x[7 : 7 + rows], weight, bias), together[7 : 7 + rows])


def test_results_are_rounded_as_torch_rounds():
    """To nearest, ties to even; infinities and NaN stay what they are."""
    sums = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, torch.inf, -torch.inf, torch.nan, 1e-40, 0.1])
    x, weight = torch.ones(1, 1).bfloat16(), sums[:, None]  # an fp32 weight, so that sums are what they are
    ours, rounded = cpu_ops.product(x, weight)[0], sums.bfloat16()
    assert torch.equal(ours.isnan(), rounded.isnan())
    assert torch.equal(ours.nan_to_num(7.0), rounded.nan_to_num(7.0))


def exact_attention(q, keys, values, last, slopes, window, softcap=0.0, sinks=None):
    """Row by row, head by head, in fp64."""
    rows, heads, _, width = q.shape
    y = torch.empty(rows, heads, 1, width, dtype=torch.float64)
    for b in range(rows):
        first = max(0, int(last[b]) - window + 1) if window else 0
        seen = slice(first, int(last[b]) + 1)
        for h in range(heads):
            g = h // (heads // keys.shape[1])
            scores = keys[b, g, seen].double() @ q[b, h, 0].double() / width**0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if slopes is not None:
                scores -= slopes[h].double() * (last[b] - torch.arange(seen.start, seen.stop))
            if sinks is not None:
                scores = torch.cat((scores, sinks[h].double()[None]))
            y[b, h, 0] = scores.softmax(0)[: seen.stop - seen.start] @ values[b, g, seen].double()
    return y


def put(keys, values, last):
    """What the cache holds at each row's last slot, as the new token's k and v; the cache forgets it."""
    row = torch.arange(len(last))
    k, v = keys[row, :, last][:, :, None].clone(), values[row, :, last][:, :, None].clone()
    keys[row, :, last], values[row, :, last] = 7.0, 7.0
    return k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (8, 2, 32), (3, 1, 20), (2, 2, 128), (1, 1, 7)])
@pytest.mark.parametrize("extra", [None, "alibi", "window", "softcap", "sinks"])
@pytest.mark.parametrize("joined", [True, False])
def test_attention_is_a_softmax_over_what_each_row_sees(dtype, heads, groups, width, extra, joined):
    generator = torch.Generator().manual_seed(heads * width)
    keys, values = torch.randn(2, 5, groups, 300, width, generator=generator).to(dtype)
    q = torch.randn(5, heads, 1, width, generator=generator).to(dtype) * 2
    last = torch.tensor([0, 63, 64, 200, 299])
    slopes = torch.rand(heads, generator=generator) if extra == "alibi" else None
    window, softcap = (70 if extra == "window" else 0), (3.0 if extra == "softcap" else 0.0)
    sinks = 9 * torch.randn(heads, generator=generator).to(dtype) if extra == "sinks" else None
    scores = cpu_ops.Scores(slopes, window, width**-0.5, softcap, sinks)
    exact = exact_attention(q, keys, values, last, slopes, window, softcap, sinks)
    whole = keys.clone(), values.clone()
    k, v = put(keys, values, last)
    if joined:  # as one product makes them
        q, k, v = torch.cat((q, k, v), dim=1).split((heads, groups, groups), dim=1)
    ours = cpu_ops.attention(q, k, v, (keys, values), last, scores)
    near(ours.view(5, heads, 1, width), exact, dtype)
    assert torch.equal(keys, whole[0])
    assert torch.equal(values, whole[1])
    cache = keys[2:4, :, :210], values[2:4, :, :210]
    part = cpu_ops.attention(q[2:4], k[2:4], v[2:4], cache, last[2:4], scores)
    assert torch.equal(part, ours[2:4])  # a part of the cache, among fewer rows: the same bits


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
def test_scores_of_any_size_are_weighed_right(size):
    keys, values = torch.randn(1, 1, 500, 16) * size, torch.randn(1, 1, 500, 16)
    q, last = torch.randn(1, 1, 1, 16) * 4, torch.tensor([499])
    exact = exact_attention(q, keys, values, last, None, 0)
    ours = cpu_ops.attention(q, *put(keys, values, last), (keys, values), last)
    near(ours.view(1, 1, 1, 16), exact, torch.float32, scale=max(size, 1.0))  # a score's rounding is in its exponent


def test_what_lies_beyond_a_rows_last_slot_is_never_read():
    keys, values = torch.randn(2, 1, 1, 64, 8)
    (q, k, v), last = torch.randn(3, 1, 1, 1, 8), torch.tensor([30])
    clean = cpu_ops.attention(q, k, v, (keys, values), last)
    keys[:, :, 31:], values[:, :, 31:] = torch.nan, torch.nan
    assert torch.equal(cpu_ops.attention(q, k, v, (keys, values), last), clean)


@pytest.mark.parametrize(("width", "slots"), [(513, [0, 3]), (8, [0, 4]), (8, [-1, 3]), (8, [1 << 62, 3])])
def test_attention_that_does_not_fit_is_refused_before_anything_is_written(width, slots):
    keys, values = torch.zeros(2, 2, 1, 4, width)
    q, k, v = torch.randn(3, 2, 1, 1, width)
    with pytest.raises(IndexError, match=f"heads of {width}.*a cache of 4"):
        cpu_ops.attention(q, k, v, (keys, values), torch.tensor(slots))
    assert not keys.any()
    assert not values.any()


def test_heads_that_do_not_fit_are_known_before():
    device = torch.device("cpu")
    with cpu_ops.one_token():
        assert [cpu_ops.attends(device, torch.float32, width) for width in (1, 512, 513)] == [True, True, False]
        assert not cpu_ops.attends(torch.device("meta"), torch.float32, 64)
    assert not cpu_ops.attends(device, torch.float32, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 16, 53, 70_000])
def test_gelu_and_its_slope_are_those_of_torch(dtype, count):
    x = (torch.linspace(-12, 12, count) if count > 1 else torch.tensor([-0.7])).to(dtype).requires_grad_()
    slopes = torch.randn(count).to(dtype)
    wide = x.detach().double().requires_grad_()
    exact = F.gelu(wide, approximate="tanh")
    ours = cpu_ops.gelu_tanh(x)
    near(ours.detach(), exact.detach(), dtype)
    ours.backward(slopes)
    exact.backward(slopes.double())
    near(x.grad, wide.grad, dtype)
    with torch.no_grad():
        assert torch.equal(cpu_ops.gelu_tanh(x), ours)
        with cpu_ops.one_token():
            again = cpu_ops.gelu_tanh(x)
    assert torch.equal(again, ours)
    assert again.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("count", [1, 17, 4096, 9_999])
def test_bf16_terms_are_added_to_fp32_sums_as_torch_adds_them(count):
    sums, terms = torch.randn(count), torch.randn(count).bfloat16()
    wanted = sums + terms
    cpu_ops.add(sums, terms)
    assert torch.equal(sums, wanted)
    every_other = torch.zeros(2 * count)[::2]  # with gaps, torch does it
    cpu_ops.add(every_other, terms)
    assert torch.equal(every_other, terms.float())


def test_gelu_by_torch_where_c_cannot(monkeypatch):
    apart = torch.randn(6, 4, 5).transpose(0, 2)
    assert torch.equal(cpu_ops.gelu_tanh(apart), F.gelu(apart, approximate="tanh"))
    assert cpu_ops.gelu_tanh(torch.tensor([torch.nan, 3.4e38])).isnan().tolist() == [True, False]
    monkeypatch.setattr(cpu_ops, "_library", lambda: "no compiler")
    x = torch.randn(40)
    assert torch.equal(cpu_ops.gelu_tanh(x.clone()), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 7), (3, 64), (5, 100), (40, 768)])
def test_rms_norm_is_exact_and_rounded_once(dtype, rows, width):
    x, weight = (3 * torch.randn(rows, 1, width)).to(dtype), torch.randn(width)
    for offset, kind in ((0.0, dtype), (1.0, dtype), (0.0, torch.float32), (0.0, torch.bfloat16)):
        w = weight.to(kind)
        wide = x.double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (w.double() + offset)
        near(cpu_ops.rms_norm(x, w, 1e-5, offset), exact, dtype)
    heads = torch.randn(rows, 1, 6, width).to(dtype).transpose(1, 2)[:, 1:4]  # with gaps, as one product makes them
    exact = F.rms_norm(heads.double(), (width,), weight.to(dtype).double(), 1e-5)
    assert cpu_ops.rms_norm(heads, weight.to(dtype), 1e-5, spare=True) is heads
    near(heads, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "offset"), [(1, 7, 0.0), (3, 64, 1.0), (5, 100, 0.0), (90, 768, 1.0)])
def test_gradients_of_rms_norm_are_exact_and_rounded_once(dtype, kind, rows, width, offset):
    x, weight = (3 * torch.randn(2, rows, width)).to(dtype), torch.randn(width).to(kind)
    grad = torch.randn(2, rows, width).to(dtype)
    wide, factor = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = torch.autograd.grad(F.rms_norm(wide, (width,), factor + offset, 1e-5), (wide, factor), grad.double())
    back, slopes = cpu_ops.rms_norm_back(x, weight, grad, 1e-5, offset, True)
    near(back, exact[0], dtype)
    assert slopes is not None
    assert float((slopes - exact[1]).abs().max() / exact[1].abs().max()) < 1e-6
    frozen, nothing = cpu_ops.rms_norm_back(x, weight, grad, 1e-5, offset, False)
    assert torch.equal(frozen, back)
    assert nothing is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "turned"), [(64, 64), (80, 20), (12, 6), (128, 128)])
@pytest.mark.parametrize("same", [True, False])
def test_heads_turn_in_place_to_the_bits_of_positions_rotate(dtype, width, turned, same):
    joined = torch.randn(5, 1, 7, width).to(dtype)
    angles = torch.randn(1 if same else 5, 1, 1, turned // 2).repeat(1, 1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    heads = joined.transpose(1, 2)[:, :4]
    exact = positions.rotate(heads.clone(), (cos, sin))
    beside = joined[:, :, 4:].clone()
    assert cpu_ops.rotate(heads, cos, sin) is heads
    assert torch.equal(heads, exact)
    assert torch.equal(joined[:, :, 4:], beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (3, 64), (2, 9000), (33, 515)])
@pytest.mark.parametrize("activation", cpu_ops.GATES)
def test_gates_are_those_of_torch(dtype, rows, width, activation):
    x = (5 * torch.randn(rows, 1, 2 * width)).to(dtype)
    x[0, 0, :2] = torch.tensor([-100.0, 100.0])
    gate, up = x.chunk(2, dim=-1)
    act = F.silu(gate) if activation == "silu" else cpu_ops.gelu_tanh(gate.contiguous())
    gated, expected = cpu_ops.gated(x, activation), act * up  # rounded twice in bf16, as whole rows are
    near(gated, expected.double(), dtype)
    assert dtype == torch.float32 or (gated != expected).sum() <= 1 + 0.01 * gated.numel()
