"""A rollout that leases all weights: they come once, are bound once, and the answers are those of a resident model."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from penstock.memory.arena import Parameters
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.roles import Actor, ActorCritic
from penstock.models.surgery import add_adapters
from penstock.rollout import engine as engines
from penstock.rollout.engine import Engine, generate
from penstock.rollout.sampling import Sampling
from tests.memory.test_stream import FAMILIES, batches, decoder, named
from tests.rollout.test_cuda_graphs import Recorded

PROMPTS, SAMPLING = [[1, 5, 6], [1, 7], [1, 9, 4, 4]], Sampling(max_new_tokens=12, seed=3)
MOVING = ("gemini_cpu", "gemini_nvme")


def actor_of(kind):
    """An actor of a family; or with adapters, or with a value head."""
    if kind == "lora":
        actor = Actor(decoder("llama"))
        add_adapters(actor.decoder, LoraSpec(4), seed=1)
        return actor
    return ActorCritic(decoder("gpt2")) if kind == "value head" else Actor(decoder(kind))


def rollout(strategy, actor, phase="rollout", **options):
    with strategy.phase(phase), torch.no_grad():
        return generate(actor.decoder, PROMPTS, SAMPLING, eos_ids=[2], **options)


def learn(strategy, stream, step):
    """One step that changes every weight."""
    rows = list(batches(step))
    strategy.step(stream, rows, lambda hidden, batch: (hidden.float().square().mean(), {}), lr=1e-2)


def fetched(strategy):
    return sum(strategy.tiers[name].bytes_read for name in ("host", "disk") if name in strategy.tiers)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "experts", "lora", "value head"])
@pytest.mark.parametrize("name", MOVING)
def test_a_rollout_fetches_and_binds_each_weight_once(name, kind, tmp_path, monkeypatch):
    strategy, actor = named(name, tmp_path), actor_of(kind)
    stream = strategy.prepare(actor)
    bound, put = [], Parameters._put

    def counted(self, chunk, weights):
        bound.append(chunk)
        put(self, chunk, weights)

    monkeypatch.setattr(Parameters, "_put", counted)
    visits = rollout(strategy, actor, phase="score")  # as if it had no end: a visit per part and token
    many = len(bound)
    strategy.arenas[0].forget(lambda home: True)
    bound.clear()
    before = fetched(strategy)
    assert rollout(strategy, actor) == visits
    least, most = (sum(home.chunk.nbytes for home in homes) for homes in (needed(stream), stream.moving_homes))
    assert least <= fetched(strategy) - before <= most
    assert len(bound) <= 2 * len(stream.homes) < many / 5
    assert not stream.leased
    assert all(not slot.users for slot in strategy.arenas[0].slots)


def needed(stream):
    """What text needs: all but a value head, which may be read ahead."""
    return [home for home in stream.moving_homes if home.chunk.group != "score"]


@pytest.mark.parametrize(("budget", "leases"), [(None, True), ("130KB", True), ("90KB", False)])
@pytest.mark.parametrize("name", MOVING)
def test_answers_between_updates_are_those_of_a_resident_actor(name, budget, leases, tmp_path):
    """Whether slots hold the whole actor or not; a new lease sees the new weights."""
    resident, answers = named("gemini", tmp_path, recompute=True), []
    actor = actor_of("gpt2")
    stream = resident.prepare(actor)
    for step in range(3):
        answers.append(rollout(resident, actor))
        learn(resident, stream, step)
    moving, streamed = named(name, tmp_path, device_memory=budget), actor_of("gpt2")
    moving.reserve = 0
    stream = moving.prepare(streamed)
    for step in range(3):
        assert rollout(moving, streamed) == answers[step]
        assert bool(stream._leases) is leases
        learn(moving, stream, step)


def test_what_is_in_slots_from_training_is_not_fetched_again(tmp_path):
    strategy, actor = named("gemini_cpu", tmp_path), actor_of("gpt2").requires_grad_(False)
    strategy.prepare(actor)
    first = rollout(strategy, actor)
    before = fetched(strategy)
    assert rollout(strategy, actor) == first
    assert fetched(strategy) == before


def test_an_error_ends_the_lease(tmp_path):
    strategy, actor = named("gemini_cpu", tmp_path), actor_of("gpt2")
    stream = strategy.prepare(actor)
    with contextlib.suppress(KeyboardInterrupt), strategy.phase("rollout"), stream.visit("tokens"):
        assert stream.leased
        raise KeyboardInterrupt
    assert not stream.leased
    learn(strategy, stream, 0)


def test_steps_are_recorded_anew_for_each_lease(no_compiler, tmp_path, monkeypatch):
    """A recording holds the addresses of its lease; the next one's weights may be elsewhere."""
    monkeypatch.setattr(engines, "Steps", Recorded)
    monkeypatch.setattr(Recorded, "made", 0)
    strategy, actor = named("gemini_cpu", tmp_path), actor_of("llama")
    stream = strategy.prepare(actor)
    engine = Engine(actor.decoder, eos_ids=(), rows=3, length=40, fixed=True)
    made = []
    for step in range(2):
        with strategy.phase("rollout"), torch.no_grad():
            answers = engine.generate(PROMPTS, SAMPLING)
        made.append(Recorded.made)
        with strategy.phase("score"), torch.no_grad():
            expected = Engine(actor.decoder, eos_ids=(), rows=3, length=40).generate(PROMPTS, SAMPLING)
        assert [answer.response_ids for answer in answers] == [answer.response_ids for answer in expected]
        learn(strategy, stream, step)
        other = named("gemini_cpu", tmp_path)  # moves what malloc gives next
        other.prepare(actor_of("gpt2"))
    assert made[1] == 2 * made[0] > 0


@pytest.mark.parametrize(("swap", "experts"), [(None, 0), ("host", 0), (None, 4)])
def test_a_gpu_decodes_at_fixed_addresses_where_weights_and_cache_stay(swap, experts, tmp_path):
    engine, config = Engine(Decoder(FAMILIES["gpt2"], device="meta")), SimpleNamespace(num_experts=experts)
    strategy, actor = named("gemini_cpu", tmp_path), actor_of("gpt2")
    stream = strategy.prepare(actor)
    engine._swap = swap

    def fixed(device):
        engine.decoder = SimpleNamespace(feed=stream, config=config, device=torch.device(device), row_adapters=None)
        return engine._is_fixed()

    assert not fixed("cuda")
    with strategy.phase("rollout"), stream.visit("tokens"):
        assert fixed("cuda") is (not swap and not experts)
        assert not fixed("cpu")
    assert not fixed("cuda")
