"""The decoder against itself: padding, decoding, feeding a block from elsewhere, construction. No other library."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from penstock.models import presets, surgery
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Block, Decoder, Norm, Positions
from penstock.models.lora_targets import LoraSpec

PLAIN = DecoderConfig(
    family="gpt2", vocab_size=50, d_model=24, num_layers=3, num_heads=6, num_kv_heads=6, head_dim=4, d_ff=40,
    max_length=32,
)  # fmt: skip
ROTARY: dict[str, Any] = {"position": "rotary", "rotary_dim": 4, "norm": "rms"}
GROWING = tuple({"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 3}.items())
KINDS = {
    "learned": PLAIN,
    "post-norm, projected": dataclasses.replace(PLAIN, pre_norm=False, final_norm=False, embed_dim=12),
    "alibi": dataclasses.replace(PLAIN, position="alibi", embed_norm=True),
    "rotary, grouped, gated, qk-norm": dataclasses.replace(
        PLAIN, **ROTARY, num_kv_heads=2, gated=True, activation="silu", qk_norm=True, tied=False
    ),
    "rotary twice, wide qk-norm, grown queries": dataclasses.replace(
        PLAIN,
        **ROTARY,
        num_kv_heads=2,
        qk_norm=True,
        qk_norm_wide=True,
        windows=(0, 4, 0),
        rope_scaling=GROWING,
        window_rope=(("rope_theta", 50.0),),
    ),
    "rotary, windows by layer": dataclasses.replace(PLAIN, **ROTARY, windows=(0, 4, 7)),
    "partly rotary, parallel": dataclasses.replace(PLAIN, position="rotary", rotary_dim=2, parallel_residual=True),
}
LENGTHS = torch.tensor([5, 11, 1, 8])


@pytest.fixture(params=KINDS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """A small decoder whose weights are all random and large enough to matter."""
    made = Decoder(KINDS[request.param])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def batch() -> Tensor:
    return torch.randint(50, (4, 11), generator=torch.Generator().manual_seed(2))


def empty_cache(decoder: Decoder, rows: int, slots: int) -> list[tuple[Tensor, Tensor]]:
    c = decoder.config
    shape = (rows, c.num_kv_heads, slots, c.head_dim)
    return [(torch.full(shape, 1e4), torch.full(shape, 1e4)) for _ in range(c.num_layers)]  # garbage in unused slots


@torch.no_grad()
def test_what_stands_in_the_padding_changes_no_valid_state(decoder):
    valid = torch.arange(11) < LENGTHS[:, None]
    tokens = batch()
    garbage = torch.where(valid, tokens, (tokens + 17) % 50)
    assert torch.equal(decoder(tokens, LENGTHS)[valid], decoder(garbage, LENGTHS)[valid])


@torch.no_grad()
def test_decoding_token_by_token_gives_the_states_of_the_whole_row(decoder):
    tokens = batch()
    expected = decoder(tokens)
    cache = empty_cache(decoder, 4, 16)
    for position in range(11):
        got = decoder.decode(tokens[:, position], cache, torch.full((4,), position))
        assert (got - expected[:, position]).abs().max() < 1e-4


@torch.no_grad()
def test_rows_go_on_from_a_ragged_prefill_each_at_its_own_position(decoder):
    tokens, more = batch(), torch.tensor([[3, 9], [4, 8], [5, 7], [6, 6]])
    cache = empty_cache(decoder, 4, 16)
    decoder(tokens, LENGTHS, cache)
    for step in range(2):
        got = decoder.decode(more[:, step], cache, LENGTHS + step)
        for row, length in enumerate(LENGTHS):
            whole = torch.cat((tokens[row, :length], more[row, : step + 1]))[None]
            assert (got[row] - decoder(whole)[0, -1]).abs().max() < 1e-4


def test_a_block_computes_with_weights_fed_from_elsewhere(decoder):
    """What streaming needs: one template on the meta device, the weights as arguments, gradients for each of them."""
    with torch.device("meta"):
        template = Block(decoder.config)
    weights = {name: p.detach().clone().requires_grad_() for name, p in decoder.blocks[1].named_parameters()}
    x = torch.randn(2, 7, decoder.config.d_model, generator=torch.Generator().manual_seed(3))
    rotary = None
    if decoder.config.position == "rotary":
        angles = torch.linspace(0, 3, 7)[:, None].expand(7, decoder.config.rotary_dim)[None, None]
        rotary = (angles.cos(), angles.sin())
    positions = Positions(rotary, None, None)
    got = functional_call(template, weights, (x, positions))
    expected = decoder.blocks[1](x, positions)
    assert torch.equal(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in decoder.blocks[1].named_parameters():
        assert torch.equal(weights[name].grad, parameter.grad), name


def test_on_the_meta_device_nothing_is_allocated_and_copies_are_free():
    copied = copy.deepcopy(Decoder(presets.named("175b"), dtype=torch.bfloat16, device="meta"))
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in copied.parameters())
    assert sum(parameter.numel() for parameter in copied.parameters()) == pytest.approx(175e9, rel=0.01)


def test_gpt2_small_has_the_124_million_weights_of_the_paper():
    decoder = Decoder(presets.named("s"), device="meta")
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 124_439_808


@pytest.mark.parametrize("name", presets.NAMES)
def test_every_size_can_be_built(name):
    config = presets.named(name)
    assert config.num_heads * config.head_dim == config.d_model


@pytest.mark.parametrize(
    ("name", "millions"),
    [("opt-125m", 125.24), ("opt-350m", 331.2), ("opt-6.7b", 6658.5), ("bloom-560m", 559.2), ("bloom-7b1", 7069.0),
     ("llama-7b", 6738.4), ("llama-3-8b", 8030.3)],
)  # fmt: skip
def test_published_sizes_have_the_weights_of_the_published_models(name, millions):
    weights = sum(p.numel() for p in Decoder(presets.named(name), device="meta").parameters())
    assert weights / 1e6 == pytest.approx(millions, rel=1e-4)


def test_an_unknown_size_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no size 'opt-6.6b'; there are opt-66b"):
        presets.named("opt-6.6b")
    with pytest.raises(ValueError, match=r"no size 'huge'; there are s, m, l, xl"):
        presets.named("huge")


def test_random_weights_are_gpt2s_and_depend_on_the_generator_alone():
    config = dataclasses.replace(PLAIN, d_model=192, num_heads=6, head_dim=32, d_ff=768)
    before = torch.get_rng_state()
    one, two = (Decoder(config, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    block = one.blocks[0]
    assert float(block.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.down.weight.detach().std()) == pytest.approx(0.02 / 6**0.5, rel=0.05)  # sqrt(2 * 3 layers)
    assert block.qkv.bias.eq(0).all()
    assert block.norm1.weight.eq(1).all()


def test_a_row_longer_than_the_learned_positions_is_refused():
    with pytest.raises(ValueError, match="33 tokens does not fit the model's 32 positions"):
        Decoder(PLAIN)(torch.zeros(1, 33, dtype=torch.int64))


@torch.no_grad()
@torch.enable_grad()
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("rows", [2048, 16384])
def test_gradients_of_norms_in_bf16_are_those_of_fp64(rows, kind):
    """Item 13: torch's LayerNorm lost 26 % of a bias's gradient at 2,048 rows on a CPU, 87 % at 16,384."""
    generator = torch.Generator().manual_seed(0)
    norm = Norm(64, PLAIN, kind)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    norm.bfloat16()
    exact = copy.deepcopy(norm).double()
    x = (torch.randn(4, rows // 4, 64, generator=generator) + 0.3).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    upstream = (torch.randn(x.shape, generator=generator) + 0.5).bfloat16()
    result, expected = norm(x), exact(wide)
    result.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(result.detach(), expected.detach()), (x.grad, wide.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(norm.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 0.004


@torch.enable_grad()
@pytest.mark.parametrize("adapted", [False, True])
def test_a_frequent_tokens_gradient_in_bf16_is_that_of_fp64(adapted):
    """Item 12: 2,048 occurrences of a token were summed in bf16, one by one."""
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(dataclasses.replace(PLAIN, position="alibi"), generator=generator)
    if adapted:
        surgery.add_adapters(decoder, LoraSpec(2, targets=("wte",)), seed=0)
        nn.init.normal_(decoder.embed.lora[0].b, generator=generator)
    embed = decoder.bfloat16().embed
    exact = copy.deepcopy(embed).double()
    tokens, positions = torch.full((1, 2048), 7), torch.arange(2048)[None]
    upstream = (torch.randn(1, 2048, 24, generator=generator) + 0.3).bfloat16()
    embed(tokens, positions).backward(upstream)
    exact(tokens, positions).backward(upstream.double())
    pairs = [(a.grad, b.grad) for a, b in zip(embed.parameters(), exact.parameters(), strict=True) if b.requires_grad]
    assert pairs
    for ours, theirs in pairs:
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 0.005


def test_bf16_weights_give_nearly_the_fp32_states(decoder):
    rounded = copy.deepcopy(decoder).bfloat16()
    expected, got = copy.deepcopy(rounded).float()(batch()), rounded(batch()).float()
    assert (got - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("tied", [True, False])
def test_a_gradient_that_has_a_place_is_added_there(tied):
    """Where a gradient has room, the embedding's rows are added in place; twice gives twice, as autograd's own does."""
    config = dataclasses.replace(PLAIN, tied=tied)
    ours, plain = (Decoder(config, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.tensor([[1, 3, 3, 5], [1, 3, 9, 0]])
    for decoder in (ours, plain):
        for _ in range(2):
            decoder.logits(decoder(tokens, torch.tensor([4, 3]))).square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6), name
