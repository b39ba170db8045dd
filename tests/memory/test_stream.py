"""Every strategy against plain PyTorch and AdamW, and streaming against itself resident."""

import copy
import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from penstock.algorithms import functional as fn
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.errors import ResourceError
from penstock.memory import sink, tiers
from penstock.memory.strategy import Strategy
from penstock.memory.tiers import Disk
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor, Critic
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling
from penstock.units import show_bytes
from tests.conftest import ROWS, TINY
from tests.imagined import imagining
from tests.memory.test_tiers import LateDevice

BASE = dataclasses.replace(TINY, vocab_size=50, num_layers=3)
FAMILIES: dict[str, DecoderConfig] = {
    "gpt2": BASE,
    "opt": dataclasses.replace(BASE, family="opt", position_offset=2, activation="relu"),
    "opt-350m": dataclasses.replace(
        BASE, family="opt", position_offset=2, pre_norm=False, final_norm=False, embed_dim=8
    ),
    "bloom": dataclasses.replace(BASE, family="bloom", position="alibi", embed_norm=True),
    "llama": dataclasses.replace(
        BASE, family="llama", position="rotary", rotary_dim=8, norm="rms", activation="silu", gated=True,
        qkv_bias=False, out_bias=False, mlp_bias=False, tied=False, num_kv_heads=1,
    ),
    "experts": dataclasses.replace(
        BASE, family="qwen3_moe", position="rotary", rotary_dim=8, norm="rms", activation="silu", gated=True,
        qkv_bias=False, out_bias=False, mlp_bias=False, tied=False, num_layers=1,
        num_experts=3, experts_per_token=2, expert_ff=12,
    ),
    "one block": dataclasses.replace(BASE, num_layers=1, vocab_size=51),
}  # fmt: skip
STEPS = 20


def decoder(family, dtype=torch.float32):
    return Decoder(FAMILIES[family], dtype=dtype, generator=torch.Generator().manual_seed(0))


def batches(step, vocab=50, count=3):
    generator = torch.Generator().manual_seed(step)
    for width in range(9, 9 + count):
        tokens = torch.randint(3, vocab, (2, width), generator=generator)
        trained = torch.rand(tokens.shape, generator=generator) < 0.6
        trained[:, 0], trained[:, 1] = False, True
        yield Rows(tokens, trained)


def plain(model, steps=STEPS, count=3):
    """The oracle: one graph, torch's own clipping and AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [  # norms and biases do not decay
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-5)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        rows = list(batches(step, count=count))
        total = sum(int(batch.trained.sum()) for batch in rows)
        losses.append(0.0)
        for batch in rows:
            loss = fn.sft_loss(response_logprobs(model, model.decoder(batch.tokens), batch), total)
            loss.backward()
            losses[-1] += float(loss)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def streamed(model, strategy, steps=STEPS, count=3):
    """The same steps by the engine."""
    stream = strategy.prepare(model, weight_decay=0.1)
    losses = []
    for step in range(steps):
        rows = list(batches(step, count=count))
        total = sum(int(batch.trained.sum()) for batch in rows)

        def loss_of(hidden, batch, total=total):
            return fn.sft_loss(response_logprobs(model, hidden, batch), total), {}

        losses.append(strategy.step(stream, rows, loss_of, lr=1e-2, max_grad_norm=0.5).sums["loss"])
    return losses, weights_of(stream)


def weights_of(stream):
    weights = {}
    for group, names in stream.model.groups():
        with stream.visit(group):
            weights |= {name: stream.model.get_parameter(name).detach().cpu().clone() for name in names}
    return weights


def named(name, tmp_path, **more):
    return Strategy.named(name, device="cpu", disk=str(tmp_path) if name == "gemini_nvme" else None, **more)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ROWS)
def test_twenty_steps_are_those_of_plain_pytorch(name, family, tmp_path):
    losses, weights = plain(Actor(decoder(family)))
    ours, found = streamed(Actor(decoder(family)), named(name, tmp_path))
    assert ours == pytest.approx(losses, abs=1e-6)
    for key, weight in weights.items():
        assert torch.allclose(found[key], weight, atol=1e-6, rtol=0), key


BUDGETS = [("gemini_cpu", None), ("gemini_cpu", "1MB"), ("gemini_nvme", None), ("gemini_nvme", "1MB")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("resident", "streaming", "budgets"),
    [({"recompute": True}, {}, BUDGETS), ({}, {"recompute": False}, [*BUDGETS[:2], BUDGETS[3]])],
    ids=["recomputed", "kept"],
)
def test_streaming_from_host_and_disk_is_bit_equal_to_resident(family, dtype, tmp_path, resident, streaming, budgets):
    """Where the graph is kept, backward meets chunks in other slots than forward did, and still makes the same bits."""
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    losses, weights = streamed(Actor(decoder(family, kind)), named("gemini", tmp_path, dtype=dtype, **resident))
    for name, budget in budgets:
        strategy = named(name, tmp_path, dtype=dtype, device_memory=budget, **streaming)
        ours, found = streamed(Actor(decoder(family, kind)), strategy)
        assert ours == losses
        assert all(torch.equal(found[key], weight) for key, weight in weights.items())


@pytest.mark.parametrize("ahead", [1, 3])
def test_weights_that_pass_through_a_ring_to_a_late_device_are_the_same(ahead, tmp_path, monkeypatch):
    """Its copies are done when the engine waits for them: before a block computes, or a buffer is used again."""
    losses, weights = streamed(Actor(decoder("llama")), named("gemini", tmp_path, recompute=True), steps=3)
    device = LateDevice()
    monkeypatch.setattr(tiers, "copies_to", device.copies_to)
    strategy = named("gemini_nvme", tmp_path, device_memory="1MB")
    strategy.ahead = ahead
    ours, found = streamed(Actor(decoder("llama")), strategy, steps=3)
    assert device.begun > 20
    assert ours == losses
    assert all(torch.equal(found[key], weight) for key, weight in weights.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_update_from_disk_in_many_small_pieces_is_the_same_update(dtype, tmp_path, monkeypatch):
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    losses, weights = streamed(Actor(decoder("gpt2", kind)), named("gemini_nvme", tmp_path, dtype=dtype), steps=5)
    monkeypatch.setattr(sink, "PIECE", 2048)
    ours, found = streamed(Actor(decoder("gpt2", kind)), named("gemini_nvme", tmp_path, dtype=dtype), steps=5)
    assert ours == losses
    assert all(torch.equal(found[key], weight) for key, weight in weights.items())


@given(
    name=st.sampled_from(["zero2_cpu", "gemini_cpu", "gemini_nvme", "gemini_auto"]),
    family=st.sampled_from(sorted(FAMILIES)),
    chunk_size=st.sampled_from([None, 1, 300, 700, 3000]),
    room=st.integers(0, 400_000),
    rows=st.integers(1, 3),
    ahead=st.integers(1, 4),
    again=st.booleans(),
)
@settings(max_examples=40)
def test_any_budget_that_is_accepted_is_kept(name, family, chunk_size, room, rows, ahead, again, tmp_path):
    """Whatever the chunks and the device budget: refused with the least that works, or the same bits within it."""
    strategy = named(name, tmp_path, device_memory=f"{room + 1}B", chunk_size=chunk_size, recompute=again)
    strategy.ahead = ahead
    model = Actor(decoder(family))
    refused = ""
    try:
        losses, weights = streamed(model, strategy, steps=2, count=rows)
    except ResourceError as error:
        refused = str(error)
    assert strategy.tiers["device"].peak <= room + 1
    for tier in strategy.tiers.values():
        if isinstance(tier, Disk):
            tier.close()
    if refused:
        assert f"--device-memory {show_bytes(room + 1)}" in refused
        assert "at least" in refused
        return
    expected, resident = streamed(Actor(decoder(family)), named("gemini", tmp_path, recompute=again), 2, rows)
    assert losses == expected
    assert all(torch.equal(weights[key], weight) for key, weight in resident.items())


@pytest.mark.parametrize("name", ROWS)
def test_answers_do_not_depend_on_where_weights_live(name, tmp_path):
    prompts, sampling = [[1, 5, 6], [1, 7]], Sampling(max_new_tokens=12, seed=3)
    plain_answers = generate(decoder("gpt2"), prompts, sampling, eos_ids=[2])
    actor = Actor(decoder("gpt2"))
    named(name, tmp_path, device_memory="1MB").prepare(actor)
    assert generate(actor.decoder, prompts, sampling, eos_ids=[2]) == plain_answers


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("frozen", ["decoder.embed", "decoder.blocks.0", "qkv", "decoder.norm"])
def test_frozen_subsets_never_move_and_the_rest_learns_the_same(name, frozen, tmp_path):
    def model():
        actor = Actor(decoder("llama"))
        for key, parameter in actor.named_parameters():
            parameter.requires_grad_(frozen not in key)
        return actor

    before = {key: p.detach().clone() for key, p in model().named_parameters()}
    losses, weights = plain(model(), steps=5)
    ours, found = streamed(model(), named(name, tmp_path), steps=5)
    assert ours == pytest.approx(losses, abs=1e-6)
    for key, weight in weights.items():
        assert torch.allclose(found[key], weight, atol=1e-6, rtol=0), key
        if frozen in key:
            assert torch.equal(found[key], before[key])


@pytest.mark.parametrize("name", ROWS)
def test_models_made_inside_init_take_no_memory_before_prepare(name, tmp_path, tiny_model):
    source = tiny_model()
    strategy = named(name, tmp_path)
    with strategy.init():
        actor = Actor.from_pretrained(source)
        reference = actor.frozen()
        critic = Critic(copy.deepcopy(actor.decoder))
    assert all(p.is_meta for p in actor.parameters())
    eager = Actor.from_pretrained(source)
    for model in (actor, reference, critic):
        stream = strategy.prepare(model)
        found = weights_of(stream)
        for key, parameter in eager.named_parameters():
            assert torch.equal(found[key], parameter), key
        assert bool(stream.sink) == (model is not reference)


def test_a_model_may_come_after_others_have_been_used():
    """The slots are cut again, for all of them: a wider model has larger blocks."""
    strategy = Strategy.named("gemini_cpu", device="cpu", device_memory="2MB")
    before = streamed(Actor(decoder("gpt2")), strategy, steps=2)[0]
    config = dataclasses.replace(BASE, d_model=64, head_dim=32, d_ff=256)
    streamed(Actor(Decoder(config, generator=torch.Generator().manual_seed(1))), strategy, steps=2)
    assert streamed(Actor(decoder("gpt2")), strategy, steps=2)[0] == before
    assert strategy.tiers["device"].peak <= 2_000_000


@pytest.mark.parametrize(("host", "where"), [("255MB", "disk"), ("400MB", "host")])
def test_states_that_have_no_room_beside_their_weights_are_updated_elsewhere(host, where, tmp_path):
    """On an imagined GPU: weights come to states on a disk, and a shadow of them stands by states in host memory."""
    with imagining("cuda") as device:
        strategy = Strategy.named(
            "gemini_auto", device=str(device), device_memory="300kB", host_memory=host, disk=str(tmp_path)
        )
        model = Actor(decoder("gpt2"))
        stream = strategy.prepare(model, weight_decay=0.1)
        kinds = {(home.weights.tier.name, home.states["exp_avg"].tier.name) for home in stream.homes}
        assert kinds == {("device", "device"), ("device", where)}
        for step in range(2):
            rows = [Rows(batch.tokens.to(device), batch.trained.to(device)) for batch in batches(step)]
            total = sum(int(batch.trained.sum()) for batch in batches(step))

            def loss_of(hidden, batch, total=total):
                return fn.sft_loss(response_logprobs(model, hidden, batch), total), {}

            strategy.step(stream, rows, loss_of, lr=1e-2, max_grad_norm=0.5)
        weights = weights_of(stream)
    expected = plain(Actor(decoder("gpt2")), steps=2)[1]
    for key, weight in expected.items():
        assert torch.allclose(weights[key], weight, atol=1e-6, rtol=0), key


def reloaded(strategy, kind):
    """The weights after two steps, and after the second one is done again from what was saved before it."""
    model = Actor(decoder("gpt2", kind))
    stream = strategy.prepare(model, weight_decay=0.1)

    def step(number):
        def loss_of(hidden, batch):
            return fn.sft_loss(response_logprobs(model, hidden, batch), 30), {}

        strategy.step(stream, list(batches(number)), loss_of, lr=1e-2, max_grad_norm=0.5)

    step(1)
    names = [(weight.name, state) for weight in stream.sink.weights for state in sink.SAVED]
    saved = {name: state.clone() for name, state in zip(names, stream.sink.saved_states(), strict=True)}
    step(2)
    weights = weights_of(stream)
    stream.restore(1, lambda weight, state: saved[weight, state])
    step(2)
    return weights, weights_of(stream)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_8bit"])
def test_an_update_in_host_memory_is_the_one_on_the_device_to_the_bit(name, dtype, tmp_path, monkeypatch):
    """From a shadow of the weights, which a checkpoint refreshes, and from gradients that come down in pieces."""
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    weights, _ = reloaded(named(name, tmp_path, dtype=dtype), kind)
    monkeypatch.setattr(sink, "PIECE", 2048)
    stem, _, bits = name.partition("_")
    for again in reloaded(named("_".join(filter(None, (stem, "cpu", bits))), tmp_path, dtype=dtype), kind):
        assert all(torch.equal(again[key], weight) for key, weight in weights.items())


def test_a_visit_binds_weights_past_nn_modules_own_slow_setter(monkeypatch):
    model = Actor(decoder("gpt2"))
    Strategy.named("gemini_cpu", device="cpu").prepare(model)
    first = model.decoder.blocks[0].qkv
    assert first.weight.is_meta
    monkeypatch.setattr(torch.nn.Module, "__setattr__", lambda *_: pytest.fail("a weight was bound the slow way"))
    for _ in range(2):
        with model.decoder.feed.visit("blocks.0"):
            assert not first.weight.is_meta
            assert first._parameters["weight"] is first.weight
        assert first.weight.is_meta
