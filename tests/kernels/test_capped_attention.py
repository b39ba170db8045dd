"""Soft-capped attention against the plain formula in fp64: values and gradients, in tiles of any height."""

import pytest
import torch

from penstock.kernels import capped_attention
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor


def exact(q, k, v, scale, softcap, window):
    """All scores at once; queries are those of the last keys."""
    length, share = k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)
    distance = torch.arange(length - q.shape[2], length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("tile", [1, 4, 11])
@pytest.mark.parametrize("window", [0, 1, 3, 50])
@pytest.mark.parametrize(("heads", "groups", "queries"), [(4, 4, 11), (4, 2, 11), (6, 1, 11), (4, 2, 5)])
def test_values_and_gradients_are_those_of_the_plain_formula(heads, groups, queries, window, tile):
    generator = torch.Generator().manual_seed(heads + window)
    shapes = [(2, heads, queries, 8), (2, groups, 11, 8), (2, groups, 11, 8)]
    ours = [(2 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]
    plain = [x.detach().double().requires_grad_() for x in ours]
    upstream = torch.randn(shapes[0], generator=generator)
    mixed = capped_attention.attention(*ours, None, scale=0.3, softcap=1.5, window=window, tile=tile)
    expected = exact(*plain, 0.3, 1.5, window)
    assert (mixed - expected).abs().max() <= 2e-6
    (mixed * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for x, other in zip(ours, plain, strict=True):
        assert (x.grad - other.grad).abs().max() <= 2e-5


def test_one_query_over_a_cache_reads_its_bias():
    q, (k, v) = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 2, 11, 8)
    bias = torch.zeros(2, 1, 1, 11)
    bias[:, :, :, 7:], bias[:, :, :, :3] = -torch.inf, -torch.inf
    mixed = capped_attention.attention(q, k, v, bias, scale=0.3, softcap=1.5, window=0, tile=1)
    padded = torch.cat((torch.zeros(2, 4, 6, 8), q), dim=2)
    assert torch.allclose(mixed, exact(padded, k[:, :, :7], v[:, :, :7], 0.3, 1.5, 4)[:, :, -1:], atol=2e-6)


def test_blocks_in_slices_attend_alike_and_window_by_window():
    """Layers whose positions differ in the window alone do not share what was traced."""
    config = DecoderConfig(
        "gemma2", 64, 32, 3, 4, 2, 8, 48, 64, position="rotary", rotary_dim=8, norm="rms", gated=True, qkv_bias=False,
        out_bias=False, mlp_bias=False, out_norms=True, norm_offset=1.0, embed_scale=5.6, attention_scale=2.0,
        attention_softcap=1.5, logit_softcap=3.0, windows=(5, 0, 9),
    )  # fmt: skip
    actor = Actor(Decoder(config, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(12.0)  # attention is far from uniform
    tokens, lengths = torch.arange(60)[None].repeat(2, 1), torch.tensor([60, 60])
    results, upstream = [], torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(1))
    for budget in (None, 150_000):
        if budget is not None:
            actor.slice(budget)
        actor.zero_grad()
        states = actor(tokens, lengths)
        (states * upstream).sum().backward()
        results.append([states.detach(), *(parameter.grad.clone() for parameter in actor.decoder.blocks.parameters())])
    assert any("slice" in str(report) for report in actor.decoder.slicer.reports.values())
    for whole, sliced in zip(*results, strict=True):
        assert (whole - sliced).abs().max() <= 1e-4 * whole.abs().max()
