"""--rollout-dtype: a packed copy of the actor answers, and the loss weighs what it chose by importance."""

import contextlib
import dataclasses
import gc
import math
import weakref

import pytest
import torch

from benchmarks.reliability.runs import outcome
from penstock.algorithms import functional as fn
from penstock.algorithms import policy
from penstock.algorithms.experience import Experience, weighted
from penstock.algorithms.grpo import GRPO, grpo
from penstock.algorithms.policy import PolicyState
from penstock.algorithms.ppo import PPO, ppo
from penstock.config import LoraFlags, RolloutFlags
from penstock.data.batching import Shuffle
from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.models.packed import pack
from penstock.models.roles import Actor
from penstock.models.surgery import packed_copy, quantise_base
from penstock.rollout.engine import generate
from tests.algorithms import test_grpo, test_ppo
from tests.algorithms.test_ppo import next_token_distribution, task  # noqa: F401
from tests.algorithms.test_resume import whole_and_cut
from tests.conftest import last_model, metrics, stage_config
from tests.imagined import Imagined, imagining
from tests.memory.test_stream import named
from tests.rollout.test_lease import MOVING, PROMPTS, SAMPLING, actor_of, fetched

STAGES = {"ppo": (ppo, test_ppo.config), "grpo": (grpo, test_grpo.config)}
STREAMED = {"strategy": "gemini_cpu"}
GAP, WEIGHT = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"


# --- the copy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "experts", "lora", "value head"])
@pytest.mark.parametrize("name", [*MOVING, "naive"])
def test_a_copy_is_the_packed_model_and_every_weight_comes_once(name, kind, dtype, tmp_path):
    strategy, actor, expected = named(name, tmp_path), actor_of(kind), actor_of(kind).decoder
    stream = strategy.prepare(actor)
    before = fetched(strategy)
    with strategy.phase("score"):  # visit by visit
        copied = packed_copy(actor.decoder, dtype)
    assert fetched(strategy) - before <= sum(home.chunk.nbytes for home in stream.moving_homes)
    quantise_base(expected, dtype)
    theirs = dict(expected.named_parameters())
    for key, weight in copied.named_parameters():
        assert torch.equal(*map(comparable, (weight, theirs.pop(key)))), key
        assert not weight.requires_grad
    assert not theirs
    assert actor.decoder.feed is stream
    assert actor.decoder.base_dtype is None
    answers = [generate(decoder, PROMPTS, SAMPLING, eos_ids=[2]) for decoder in (copied, expected)]
    assert answers[0] == answers[1]


def test_weights_are_packed_some_rows_at_a_time(monkeypatch):
    weight = torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    for dtype in ("int8", "fp8", "nf4"):
        whole = pack(weight, dtype)
        monkeypatch.setattr("penstock.models.packed.PACK_TILE", 100)
        assert all(torch.equal(*map(comparable, both)) for both in zip(pack(weight, dtype), whole, strict=True))
        monkeypatch.undo()


def test_a_copy_in_fp8_answers_on_a_gpu_that_multiplies_it(tiny_model, monkeypatch):
    """On an imagined one: near the unpacked copy of the CPU, from which the rounded states differ."""
    source, multiply, multiplied, answers = tiny_model(), torch._scaled_mm, [], []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *x, **to: multiplied.append(x) or multiply(*x, **to))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for device in ("cpu", "cuda"):
        with imagining(device) if device == "cuda" else contextlib.nullcontext():
            strategy = Strategy.named("gemini_cpu", device=device, dtype="bf16")
            with strategy.init():
                actor = Actor.from_pretrained(source)
            strategy.prepare(actor)
            with strategy.phase("rollout"):
                copied = packed_copy(actor.decoder, "fp8")
                answers.append(generate(copied, PROMPTS, SAMPLING, eos_ids=[2]))
        assert bool(multiplied) == (device == "cuda")
    assert {type(x) for x, *_ in multiplied} == {Imagined}
    ours, theirs = (torch.tensor([answer.logprobs[0] for answer in each]) for each in answers)
    assert 0 < (ours - theirs).abs().max() < 0.1


def comparable(weight):
    """Its bytes, where torch compares no numbers of its dtype."""
    return weight.view(torch.uint8) if weight.dtype.itemsize == 1 else weight


@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_is_gone_when_its_rollout_ends(stage, task, monkeypatch):  # noqa: F811
    made, left = [], []

    def tracked(decoder, dtype):
        copied = packed_copy(decoder, dtype)
        made.append(weakref.ref(copied))
        return copied

    scored = Strategy.evaluate_all
    monkeypatch.setattr(policy, "packed_copy", tracked)
    monkeypatch.setattr(
        Strategy, "evaluate_all", lambda self, works: left.append([each() for each in made]) or scored(self, works)
    )
    train, config = STAGES[stage]
    gc.disable()
    try:
        train(config(*task({3: 1.0, 5: -1.0}, test_ppo.RAGGED), rollout_dtype="int8", run=STREAMED))
    finally:
        gc.enable()
    assert len(made) >= 3
    assert all(copy is None for copies in left for copy in copies)


# --- the weights ----------------------------------------------------------------------------------------------------


def test_weights_are_ratios_to_the_sampler_up_to_the_cap():
    numbers, sampling = (
        torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]]),
        torch.tensor([[-1.5, -1.0, -4.0], [-2.0, 0.0, 0.0]]),
    )
    weights = fn.truncated_weights(numbers.clone().requires_grad_(), sampling, 2.0)
    for row in range(2):
        for i in range(3):
            ratio = math.exp(float(numbers[row, i]) - float(sampling[row, i]))
            assert float(weights[row, i]) == pytest.approx(min(ratio, 2.0))
    assert not weights.requires_grad


@pytest.mark.parametrize("kind", ["clip", "cispo"])
def test_the_expected_gradient_over_a_samplers_tokens_is_the_actors_own(kind):
    """All of 7 tokens, each as likely as the sampler makes it: what REINFORCE under the actor would give."""
    generator = torch.Generator().manual_seed(0)
    logits, others, advantages = torch.randn(3, 7, generator=generator)
    logits.requires_grad_()

    def gradient(shares, sampling):
        logits.grad = None
        logprobs = torch.log_softmax(logits, dim=0)
        old = logprobs.detach()[:, None]
        part = experience(old, sampling[:, None], advantages[:, None])
        used = weighted(part.advantages, part, RolloutFlags(rollout_dtype="int8", importance_sampling_cap=1e6))
        loss, _ = fn.policy_loss(logprobs[:, None], old, used, part.mask, kind=kind, weights=shares[:, None])
        loss.backward()
        return logits.grad.clone()

    own, sampler = torch.log_softmax(logits.detach(), dim=0), torch.log_softmax(others, dim=0)
    expected = gradient(own.exp(), own)
    assert torch.allclose(gradient(sampler.exp(), sampler), expected, atol=1e-6)
    assert not torch.allclose(gradient(sampler.exp(), own), expected, atol=1e-2)  # unweighted it is another


def experience(logprobs, sampling, advantages):
    zeros, ones = torch.zeros_like(logprobs), torch.ones(len(logprobs), dtype=torch.int64)
    return Experience(
        tokens=torch.ones(len(ones), 2, dtype=torch.int64), prompt_lengths=ones, lengths=ones, logprobs=logprobs,
        ref_logprobs=zeros, values=zeros, entropy=zeros, sampling_logprobs=sampling, scores=zeros[:, 0],
        ended=ones > 0, advantages=advantages, returns=zeros, scaled_scores=zeros[:, 0], part_scores=zeros[:, :0],
    )  # fmt: skip


def test_without_a_copy_nothing_is_weighed():
    part = experience(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), torch.tensor([[0.5]]))
    assert weighted(part.advantages, part, RolloutFlags()) is part.advantages
    assert float(weighted(part.advantages, part, RolloutFlags(rollout_dtype="nf4"))) == 1.0  # the default cap is 2


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("stage", STAGES)
def test_metrics_show_how_far_the_copy_is_and_the_old_policy_is_the_actor(stage, dtype, task):  # noqa: F811
    train, config = STAGES[stage]
    setup = task({3: 1.0, 5: -1.0}, test_ppo.RAGGED)
    for row in metrics(train(config(*setup, rollout_dtype=dtype, run=STREAMED))):
        assert 0 < row[f"{GAP}/mean"] <= row[f"{GAP}/max"] == row["val/engine_logprob_gap"]
        assert row[f"{WEIGHT}/min"] < 1 < row[f"{WEIGHT}/max"] <= 2
        assert row[f"{WEIGHT}/mean"] == pytest.approx(1.0, abs=row[f"{GAP}/max"])
        assert row["val/first_ratio_gap"] <= 1e-5
    for row in metrics(train(config(*setup, "exact", run=STREAMED))):
        assert not [name for name in row if name.startswith("sampling/")]


@pytest.fixture
def coarse(monkeypatch):
    """A copy that is far from the actor: its last norm is another."""

    def copied(decoder, dtype):
        copied = packed_copy(decoder, dtype)
        generator = torch.Generator().manual_seed(5)
        copied.norm.weight.mul_(1 + 2 * torch.randn(copied.norm.weight.shape, generator=generator))
        return copied

    monkeypatch.setattr(policy, "packed_copy", copied)


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_weighs_every_token_that_a_copy_chose(stage, task, coarse, monkeypatch):  # noqa: F811
    """At the first update all ratios are 1, and what is left of the loss is the weighed advantages' mean."""
    train, config = STAGES[stage]
    iteration, seen = {"ppo": PPO, "grpo": GRPO}[stage], []
    learn = iteration.learn

    def watched(self, experience, index, *args, **options):
        stats = learn(self, experience, index, *args, **options)
        seen.append((experience.rows(index), stats["policy"] if stage == "ppo" else stats))
        return stats

    monkeypatch.setattr(iteration, "learn", watched)
    setup = task({3: 1.0, 5: -1.0}, test_ppo.RAGGED)
    train(config(*setup, rollout_dtype="nf4", importance_sampling_cap=1.2, run=STREAMED))
    part, stats = seen[0]
    weights = (part.logprobs - part.sampling_logprobs).exp().clamp(max=1.2)
    assert weights[part.mask].max() > 1
    weighed, plain = (
        float(-x[part.mask].sum() / part.lengths.sum()) for x in (weights * part.advantages, part.advantages)
    )
    assert stats.sums["policy"] == pytest.approx(weighed, abs=1e-6)
    assert abs(weighed - plain) > 1e-3


@pytest.mark.slow
def test_the_same_optimum_is_reached_from_another_policys_answers(task, coarse):  # noqa: F811
    """As in test_grpo: weighed, what a copy answers leads to the actor's own optimum."""
    beta, table = 0.5, {3: 1.0, 4: 0.5, 5: -0.5, 6: 0.25}
    setup = task(table)
    optim = {"batch_size": 512, "micro_batch_size": 512, "steps": 80, "lr": 4e-3}
    changes = {"kl_coef": beta, "kl_in": "loss", "kl_estimator": "k3", "group_size": 128, "advantage": "dr_grpo"}
    flags = {**test_grpo.ONE_TOKEN, **changes, "rollout_dtype": "nf4"}
    run = grpo(test_grpo.config(*setup, **flags, importance_sampling_cap=100.0, optim=optim, run=STREAMED))
    assert metrics(run)[-1][f"{GAP}/mean"] > 0.1
    rewards = torch.tensor([table.get(i, 0.0) for i in range(16)])
    optimum = torch.softmax(next_token_distribution(setup[1]).log() + rewards / beta, dim=-1)
    assert 0.5 * (next_token_distribution(last_model(run)) - optimum).abs().sum() < 0.03


def test_a_killed_run_goes_on_exactly(tmp_path):
    def copied(stage, out):
        config = stage_config(tmp_path, stage, out, steps=5)
        return dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, rollout_dtype="fp8"))

    whole, config = whole_and_cut("ppo", copied)
    assert outcome(ppo(config, resume=True)) == whole


def test_an_experience_of_an_earlier_release_is_read():
    state, part = PolicyState(Shuffle(4, 0)), experience(*torch.tensor([[[-1.0]], [[-1.5]], [[0.5]]]))
    saved = dataclasses.replace(state, experience=part).save()
    saved["experience"] = {**saved["experience"], "engine_gap": torch.tensor([[0.25]])}
    del saved["experience"]["sampling_logprobs"]
    state.load(saved)
    assert state.experience is not None
    assert (state.experience.sampling_logprobs - state.experience.logprobs).abs().item() == 0.25


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"importance_sampling_cap": 2.0}, "give --rollout-dtype int8 too"),
        ({"rollout_dtype": "int8", "importance_sampling_cap": 0.0}, "must be above 0"),
        ({"rollout_dtype": "nf4", "peft": LoraFlags(lora=2, base_dtype="int8")}, "packed already"),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_what_cannot_be_copied_is_refused(stage, changes, why, task):  # noqa: F811
    train, config = STAGES[stage]
    with pytest.raises(UserError, match=why):
        train(config(*task({3: 1.0}), **changes))
