"""Packed weights: what they give back, and that answering with them is one computation on every path."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from penstock.errors import UserError
from penstock.memory import prepare
from penstock.memory.strategy import Strategy
from penstock.models import linear as linear_module
from penstock.models import packed as packed_module
from penstock.models import pretrained, surgery
from penstock.models.decoder import Decoder
from penstock.models.linear import linear
from penstock.models.lora_targets import LoraSpec, groups_of
from penstock.models.packed import NF4, dense, pack
from penstock.models.roles import Actor
from penstock.models.surgery import quantise, quantise_base
from penstock.models.weight_shapes import packed_shapes
from penstock.planner.workload import RoleSpec
from penstock.rollout.engine import Engine, generate
from penstock.rollout.sampling import Sampling
from tests.imagined import imagining
from tests.models.test_decoder import KINDS, decoder  # noqa: F401  (the fixture)

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


def restored(original: Decoder) -> Decoder:
    """A plain decoder with the values that int8 weights stand for: the oracle."""
    made, small = copy.deepcopy(original), copy.deepcopy(original)
    quantise(small)
    with torch.no_grad():
        for one, two in zip(made.modules(), small.modules(), strict=True):
            if isinstance(one, torch.nn.Linear):
                one.weight.copy_(two.weight.float() * two.scales[:, None])
        made.embed.tokens.copy_(small.embed.tokens.float() * small.embed.scales[:, None])
        if made.head is not None:
            made.head.copy_(small.head.float() * small.head_scales[:, None])
    return made


def test_every_weight_comes_back_within_half_a_level(decoder):  # noqa: F811
    made = restored(decoder)
    for (name, before), after in zip(decoder.named_parameters(), made.parameters(), strict=True):
        level = before.abs().amax(-1, keepdim=True) / 127 if before.dim() == 2 and "positions" not in name else 0.0
        assert ((before - after).abs() <= 0.51 * torch.as_tensor(level) + 1e-9).all(), name


def test_answers_are_those_of_the_restored_weights(decoder, both_ways):  # noqa: F811
    small, prompts = copy.deepcopy(decoder), [[1, 5, 6], [7], [9, 8, 7, 6, 5]]
    quantise(small)
    assert small.dtype == torch.float32
    expected = generate(restored(decoder), prompts, GREEDY, eos_ids=())
    for ours, theirs in zip(generate(small, prompts, GREEDY, eos_ids=()), expected, strict=True):
        assert ours.response_ids == theirs.response_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_an_engine_reads_a_directory_into_int8(tiny_model):
    source = tiny_model()
    small, plain = (Engine.from_pretrained(source, dtype=dtype, device="cpu") for dtype in ("int8", "bf16"))
    assert {p.dtype for n, p in small.decoder.named_parameters() if n.endswith("qkv.weight")} == {torch.int8}
    assert small.decoder.dtype == torch.bfloat16
    one, two = (engine.generate([[1, 3, 4]], GREEDY)[0] for engine in (small, plain))
    assert one.error is None
    assert one.logprobs[0] == pytest.approx(two.logprobs[0], abs=0.1)


# --- under adapters ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "worst"), [("int8", 1 / 254), ("fp8", 16 / 448), ("nf4", (NF4[1] - NF4[0]) / 2)])
@pytest.mark.parametrize("shape", [(24, 128), (7, 96), (5, 6)])
def test_packed_weights_come_back_within_half_a_level_and_pack_to_themselves(kind, worst, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    packed = pack(weight, kind)
    assert [(tuple(one.shape), str(one.dtype)[6:]) for one in packed] == packed_shapes(kind, *shape)
    found = dense(*packed, slice(None), torch.float32)
    blocks = packed_shapes(kind, *shape)[1][0][1] if kind == "nf4" else 1
    size = weight.view(shape[0], blocks, -1).abs().amax(-1, keepdim=True)
    assert ((found - weight).view(shape[0], blocks, -1).abs() <= (worst + 1e-6) * size + 1e-9).all()
    for one, other in zip(pack(found, kind), packed, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=1e-6)
    assert torch.equal(dense(*packed, slice(1, 4), torch.float32), found[1:4])


def test_numbers_of_fp8_are_those_of_torchs_own_cast():
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 6, 9)[:, None]
    numbers, scales = pack(weight, "fp8")
    assert torch.allclose(scales * 448, weight.abs().amax(1))
    assert torch.equal(numbers.float(), (weight / scales[:, None]).to(torch.float8_e4m3fn).float())
    assert torch.equal(pack(-weight.bfloat16(), "fp8")[0].float().abs().amax(1), torch.full((9,), 448.0))


@pytest.fixture
def hopper(monkeypatch):
    """An imagined GPU that multiplies in fp8."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with imagining("cuda") as device:
        yield device


@torch.no_grad()
@pytest.mark.parametrize("tile", [64, 1 << 22])
@pytest.mark.parametrize("biased", [False, True])
def test_a_gpu_multiplies_fp8_as_it_lies_and_each_token_has_a_scale(tile, biased, hopper, monkeypatch):
    """Against both factors as torch's cast rounds them, in fp64."""
    monkeypatch.setattr(packed_module, "PRODUCT_TILE", tile)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(48, 32, generator=generator)
    bias = torch.randn(48, generator=generator).bfloat16() if biased else None
    x = (torch.randn(3, 5, 32, generator=generator) * torch.logspace(-3, 3, 5)[:, None]).bfloat16()
    x[0, 0] = 0
    numbers, scales = pack(weight, "fp8")
    multiplied = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, of=torch._scaled_mm, **b: multiplied.append(a) or of(*a, **b))
    y = linear(*(each if each is None else each.to(hopper) for each in (x, numbers, bias, scales)))
    assert y.device == hopper
    assert y.dtype == torch.bfloat16
    assert len(multiplied) == (8 if tile == 64 else 1)
    size = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    states = (x / size).to(torch.float8_e4m3fn).double() * size.double()
    exact = states @ (numbers.double() * scales.double()[:, None]).t() + (0 if bias is None else bias.double())
    assert ((y.cpu().double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * x.double().abs().amax(-1, True)).all()
    assert ((states - x.double()).abs() <= 17 / 448 * x.double().abs().amax(-1, True)).all()


def test_what_a_gpu_cannot_multiply_in_fp8_is_unpacked(hopper, monkeypatch):
    monkeypatch.setattr(packed_module, "fp8_product", lambda *_: pytest.fail("multiplied in fp8"))

    def product(dtype, shape=(16, 32)):
        numbers, scales = pack(torch.randn(shape), "fp8")
        x = torch.randn(2, shape[1]).to(dtype)
        y = linear(x.to(hopper), numbers.to(hopper), None, scales.to(hopper))
        expected = x.float() @ dense(numbers, scales, slice(None), dtype).float().t()
        assert torch.allclose(y.detach().cpu().float(), expected, atol=1e-1 if dtype == torch.bfloat16 else 1e-4)

    product(torch.bfloat16)  # for a gradient, states stay what they are
    with torch.no_grad():
        product(torch.float32)
        product(torch.bfloat16, (16, 24))
        product(torch.bfloat16, (24, 32))
        for capability in ((8, 6), (12, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, is_=capability: is_)
            product(torch.bfloat16)


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("tile", [64, 1 << 22])
def test_products_and_gradients_are_those_of_the_restored_weight(kind, tile, monkeypatch):
    monkeypatch.setattr(linear_module, "PRODUCT_TILE", tile)
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(20, 32, generator=generator), torch.randn(20, generator=generator)
    packed, x = pack(weight, kind), torch.randn(3, 7, 32, generator=generator)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = linear(ours, packed[0], bias, packed[1])
    expected = F.linear(theirs, dense(*packed, slice(None), torch.float32), bias)
    assert torch.allclose(y, expected, atol=1e-5)
    slope = torch.randn(3, 7, 20, generator=generator)
    y.backward(slope)
    expected.backward(slope)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


class Tokens:
    def __init__(self, seed):
        self.tokens = torch.randint(3, 16, (2, 9), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_packed_base_streams_and_learns_as_its_restored_values_do(kind, tiny_model, tmp_path):
    """Adapters on a packed base, resident, from the host and from a disk, against the same on the restored weights."""
    source, ends = tiny_model(), {}
    for name in ("oracle", "naive", "gemini_cpu", "gemini_nvme"):
        disk = {"disk": str(tmp_path)} if name == "gemini_nvme" else {}
        strategy = Strategy.named("naive" if name == "oracle" else name, device="cpu", recompute=True, **disk)
        with strategy.init():
            actor = Actor.from_pretrained(source, lora=LoraSpec(2), base_dtype=None if name == "oracle" else kind)
        if name == "oracle":
            full = Actor.from_pretrained(source).decoder
            with torch.no_grad():
                for module in full.blocks.modules():
                    if isinstance(module, torch.nn.Linear):
                        module.weight.copy_(dense(*pack(module.weight, kind), slice(None), torch.float32))
            pretrained.save(full, tmp_path / "restored")
            with strategy.init():
                actor = Actor.from_pretrained(str(tmp_path / "restored"), lora=LoraSpec(2))
        stream = strategy.prepare(actor)

        def loss_of(hidden, batch, actor=actor):
            flat = hidden[:, :-1].flatten(0, 1)
            return -actor.decoder.logprobs(flat, batch.tokens[:, 1:].flatten())[0].mean(), {}

        losses = [strategy.step(stream, [Tokens(i)], loss_of, lr=1e-2).sums["loss"] for i in range(6)]
        ends[name] = losses
        answers = generate(actor.decoder, [[1, 5, 6], [7]], GREEDY, eos_ids=())
        ends[name, "answers"] = [one.response_ids for one in answers]
    assert ends["naive"] == ends["gemini_cpu"] == ends["gemini_nvme"]
    assert ends["naive"] == pytest.approx(ends["oracle"], abs=1e-5)
    assert ends["naive"][-1] < ends["naive"][0]
    assert ends["naive", "answers"] == ends["oracle", "answers"] == ends["gemini_nvme", "answers"]


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_the_plan_knows_every_packed_weight(decoder, kind):  # noqa: F811
    config = decoder.config
    if kind == "nf4" and (config.d_model % 2 or config.d_ff % 2):
        pytest.skip("odd widths do not pack")
    recipe = Decoder(config, device="meta")
    quantise_base(recipe, kind)
    surgery.add_adapters(recipe, LoraSpec(2))
    actor = Actor(recipe)
    said = groups_of(config, "float32", LoraSpec(2), trained=True, scalar=False, packed=kind)
    real = prepare.groups_of(actor)
    for (_, planned), (_, made) in zip(said, real, strict=True):
        facts = [[(w.shape, w.dtype, w.trained) for w in sorted(ws, key=lambda w: w.name)] for ws in (planned, made)]
        assert facts[0] == facts[1]
    assert dataclasses.replace(RoleSpec("x", config, True, False), base_dtype=kind).base_dtype == kind


def test_what_does_not_pack_is_said(decoder):  # noqa: F811
    odd = Decoder(dataclasses.replace(decoder.config, d_ff=33), device="meta")
    with pytest.raises(UserError, match="must be even"):
        quantise_base(odd, "nf4")
    made = copy.deepcopy(decoder)
    quantise_base(made, "int8")
    surgery.add_adapters(made, LoraSpec(2))
    with pytest.raises(ValueError, match="load the base in full"):
        surgery.merge_adapters(made)
