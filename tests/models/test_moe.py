"""Mixtures of experts against plain loops, transformers' own functions, and themselves where weights move."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from penstock.algorithms.sft import Rows
from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.models import pretrained
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.moe import experts, mxfp4
from penstock.models.roles import Actor
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling
from tests.models.test_families import CASES, NO_SPECIAL, ragged_batch, reference

QWEN = DecoderConfig(
    "qwen3_moe", 50, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64, max_length=64,
    position="rotary", rotary_dim=8, norm="rms", activation="silu", gated=True, qkv_bias=False, out_bias=False,
    mlp_bias=False, tied=False, qk_norm=True, num_experts=8, experts_per_token=2, expert_ff=24,
)  # fmt: skip


def decoder_of(config=QWEN, dtype=torch.float32):
    decoder = Decoder(config, dtype=dtype, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # louder than a fresh model, so that routes differ
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return decoder


@pytest.mark.parametrize("norm", [True, False])
def test_a_mixture_and_its_gradients_are_those_of_a_loop_over_tokens(norm):
    generator = torch.Generator().manual_seed(2)
    x, logits = (torch.randn(13, n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (6, 5))
    products = [nn.Linear(6, 6, dtype=torch.float64) for _ in range(5)]
    mixed = experts.mixture(x, logits, products, 2, norm, experts.ALONE)
    chances, rows = logits.softmax(-1), []
    for i in range(13):
        shares, chosen = chances[i].topk(2)
        shares = shares / shares.sum() if norm else shares
        rows.append(sum(share * products[int(e)](x[i]) for share, e in zip(shares, chosen, strict=True)))
    assert torch.allclose(mixed, torch.stack(rows), atol=1e-12, rtol=0)
    weights = [x, logits, *(p for product in products for p in product.parameters())]
    slopes = torch.randn(mixed.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(mixed, weights, slopes, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(torch.stack(rows), weights, slopes, allow_unused=True)
    for got, expected in zip(ours, theirs, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.allclose(got, expected, atol=1e-12, rtol=0)


def test_of_equal_logits_the_lower_numbers_are_chosen_whatever_the_batch():
    logits = torch.tensor([0.5, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 0.5]).repeat(300, 1)
    for rows in (1, 7, 300):
        assert experts.choose(logits[:rows], 4, True)[1].tolist() == [[1, 3, 5, 2]] * rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_routers_tie_the_engines_logprobs_are_the_trainers(dtype, both_ways):
    """Pairs of experts have the same row of the router, so every token's second choice is a tie between two others."""
    decoder = decoder_of(dtype=dtype)
    with torch.no_grad():
        for block in decoder.blocks:
            block.router.weight[1::2] = block.router.weight[::2]
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    odd = dataclasses.replace(QWEN, experts_per_token=3)
    decoder.config = odd
    for block in decoder.blocks:
        block.config = odd
    for answer in generate(decoder, prompts, Sampling(n=2, max_new_tokens=20, seed=5), eos_ids=()):
        row = torch.tensor([answer.prompt_ids + answer.response_ids])
        with torch.no_grad():
            logprobs = decoder.logits(decoder(row)[0, :-1]).float().log_softmax(-1)
        expected = logprobs.gather(1, row[0, 1:, None])[len(answer.prompt_ids) - 1 :, 0]
        gaps = (torch.tensor(answer.logprobs) - expected).abs()
        assert gaps.max() <= 2e-5 if dtype == torch.float32 else gaps.median() <= 0.02


@pytest.mark.parametrize("name", ["gemini_cpu", "gemini_nvme"])
def test_where_only_the_chosen_experts_come_answers_are_those_of_a_model_that_stays(name, tmp_path):
    """And fewer bytes come. The budget is below that of all experts."""
    wide = dataclasses.replace(QWEN, num_experts=32, num_layers=4)
    prompts, sampling = [[3, 1, 4], [1, 5]], Sampling(max_new_tokens=12, seed=5)
    read, answers = {}, {}
    for few in (None, 0, 64):
        place = "naive" if few is None else name
        disk = str(tmp_path) if place == "gemini_nvme" else None
        strategy = Strategy.named(place, device="cpu", disk=disk, device_memory=None if few is None else "1.2MB")
        strategy.few_tokens = few or 0
        actor = Actor(decoder_of(wide)).requires_grad_(False)
        strategy.prepare(actor)
        answers[few] = generate(actor.decoder, prompts, sampling, eos_ids=())
        if few is not None:
            assert sum(slot.nbytes for slot in strategy.arenas[0].slots) < 4 * 32 * 3 * 24 * 32 * 4
            read[few] = strategy.tiers["disk" if disk else "host"].bytes_read
    assert read[64] < 0.5 * read[0]
    for few in (0, 64):
        assert [a.response_ids for a in answers[few]] == [a.response_ids for a in answers[None]]
        assert [a.logprobs for a in answers[few]] == [a.logprobs for a in answers[None]]


def test_mxfp4_is_read_as_transformers_reads_it():
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 6, 3), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    got = mxfp4.dequantise(blocks, scales)
    assert torch.equal(got, expected)
    assert torch.equal(got.bfloat16().float(), got)


def packed_gpt_oss(directory):
    """gpt-oss as it is published: codes and scales in the place of the experts' products."""
    model_type, settings = CASES["gpt_oss"]
    config = transformers.AutoConfig.for_model(
        model_type, **(settings | NO_SPECIAL | {"hidden_size": 32, "intermediate_size": 64})
    )
    torch.manual_seed(4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(256, (count, outputs, inputs // 32, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(119, 125, (count, outputs, inputs // 32), dtype=torch.uint8)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    hf = json.loads((directory / "config.json").read_text())
    hf["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (directory / "config.json").write_text(json.dumps(hf))


def test_gpt_oss_as_it_is_published_loads_and_is_saved_in_full(tmp_path):
    packed_gpt_oss(tmp_path)
    ours = pretrained.load(tmp_path, dtype=torch.float32)[0]
    pretrained.save(ours, tmp_path / "full")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    expected = convert_moe_packed_tensors(weights[f"{name}_blocks"], weights[f"{name}_scales"], dtype=torch.float32)
    assert torch.equal(theirs.state_dict()[name], expected)
    tokens = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max() <= 1e-4
    again = pretrained.load(tmp_path / "full")[0]
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("change", "word"), [
    (lambda w: w.pop("model.layers.0.mlp.experts.down_proj_scales"), "down_proj"),
    (lambda w: w.update({k: v[:3] for k, v in w.items() if k.endswith("down_proj_bias")}), "down_proj_bias"),
])  # fmt: skip
def test_packed_experts_that_are_incomplete_are_refused_by_name(change, word, tmp_path):
    packed_gpt_oss(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=word):
        pretrained.load(tmp_path)


def test_a_checkpoint_without_one_expert_is_refused_by_name(tmp_path):
    reference("qwen3_moe").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing: model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_balancing_loss_is_that_of_transformers_over_the_whole_batch(recompute, parts, tmp_path):
    """With blocks run again whatever the micro-batches; else of one micro-batch."""
    theirs = reference("qwen3_moe")
    theirs.config.router_aux_loss_coef = 3.0
    theirs.save_pretrained(tmp_path)
    strategy = Strategy.named("naive", recompute=recompute)
    with strategy.init():
        actor = Actor.from_pretrained(str(tmp_path))
    stream = strategy.prepare(actor)
    tokens, lengths = ragged_batch(96)
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    rows = [Rows(*pair) for pair in zip(tokens.chunk(parts), valid.chunk(parts), strict=True)]
    plain = lambda hidden, batch: (hidden.sum() * 0.0, {})  # noqa: E731 (the balancing loss alone)
    stats = strategy.step(stream, rows, plain, lr=0.0, max_grad_norm=1e9)
    balance = actor.decoder.balance
    assert stats.metrics == {"grad_norm": stats.grad_norm, "aux_loss": float(balance.loss())}
    output = theirs(tokens, attention_mask=valid.long(), output_router_logits=True)
    (3.0 * output.aux_loss).backward()
    assert float(balance.loss()) == pytest.approx(float(output.aux_loss), rel=1e-5)
    if parts > 1 and not recompute:
        return  # the load of the micro-batches so far is another one than that of all
    expected = theirs.model.layers[1].mlp.gate.weight.grad
    home = next(home for home in stream.homes if any("blocks.1.router" in w.name for w in home.chunk.weights))
    at = next(i for i, w in enumerate(home.chunk.weights) if "blocks.1.router" in w.name)
    start = home.chunk.offsets[at]
    got = home.grads.tensor[start : start + expected.numel()].view(expected.shape)
    assert expected.abs().max() > 1e-4
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-8


def test_files_are_opened_once_for_all_experts(tmp_path, monkeypatch):
    reference("qwen3_moe").save_pretrained(tmp_path)
    strategy = Strategy.named("gemini_nvme", device="cpu", disk=str(tmp_path / "disk"))
    with strategy.init():
        actor = Actor.from_pretrained(str(tmp_path))
    opened = []
    opens = pretrained.open_weights
    monkeypatch.setattr(pretrained, "open_weights", lambda *args: opened.append(args) or opens(*args))
    stream = strategy.prepare(actor.requires_grad_(False))
    assert len(opened) == 1 < len(stream.homes)
    monkeypatch.setattr(pretrained, "MAPPED", 1)  # and as often as so many bytes were read
    with strategy.init():
        actor = Actor.from_pretrained(str(tmp_path))
    opened.clear()
    assert len(strategy.prepare(actor).homes) == len(opened) > 10


def test_the_weight_of_the_balancing_loss_is_the_flags_or_the_configs(tmp_path):
    reference("mixtral").save_pretrained(tmp_path)
    assert Actor.from_pretrained(str(tmp_path)).decoder.balance.coef == 0.001
    ours = Actor.from_pretrained(str(tmp_path), router_aux_loss_coef=0.5)
    assert ours.decoder.balance.coef == 0.5
    ours.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["router_aux_loss_coef"] == 0.5
    assert Actor.from_pretrained(str(tmp_path), router_aux_loss_coef=0.0).decoder.balance is None
    reference("gpt2").save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="--router-aux-loss-coef"):
        Actor.from_pretrained(str(tmp_path / "dense"), router_aux_loss_coef=0.5)
