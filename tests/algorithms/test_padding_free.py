"""Rows end to end: the losses, gradients and log-probabilities of padded rows, for every family, task and strategy."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from penstock.algorithms import functional as fn
from penstock.algorithms import preference, reward, sft
from penstock.algorithms.config import DPOFlags
from penstock.algorithms.experience import Roles, score
from penstock.algorithms.reference import with_reference
from penstock.algorithms.setup import say_padding
from penstock.algorithms.sft import micro_batches, response_logprobs
from penstock.autochunk.meter import Meter
from penstock.config import OptimFlags, RunFlags
from penstock.data.chat import Example
from penstock.memory.strategy import Strategy
from penstock.models import linear, surgery
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.positions import ragged_rows
from penstock.models.roles import Actor, ActorCritic, Critic, RewardModel
from penstock.rollout.engine import Answer
from tests.algorithms.test_kto import iteration, models, ragged  # noqa: F401 (a fixture)
from tests.algorithms.test_preference import RANKINGS
from tests.algorithms.test_sft import COUNT, EXAMPLES, theirs
from tests.conftest import TINY, cli, demonstrations, metrics
from tests.planner.test_planning import FAMILIES

CPU = torch.device("cpu")
LENGTHS = [3, 40, 17, 17, 9, 2, 31]


def examples(lengths=LENGTHS, vocabulary=512, seed=0):
    """Rows of a prompt, an answer that is learned, and one more token that is not."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        tokens = torch.randint(3, vocabulary, (length + 1,), generator=rng).tolist()
        rows.append(Example(tokens, [max(length // 2, 1) <= i < length for i in range(length + 1)]))
    return rows


def branches(lengths=(30, 26, 33, 40, 8, 9, 7, 22), common=(0, 20, 20, 12, 5, 8, 6, 3), vocabulary=512):
    """Rows of which each begins with `common` tokens of the row before it; what follows is learned."""
    rows = []
    for seed, (length, begin) in enumerate(zip(lengths, common, strict=True)):
        own = torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        tokens = (rows[-1].tokens[:begin] if begin else []) + own[begin:] + [1]
        rows.append(Example(tokens, [max(begin, 1) <= i < length for i in range(length + 1)]))
    return rows


def prepared(config, padding_free, role=Actor, name="naive", dtype="fp32", rank=0, base=None, **options):
    """A strategy and the stream of a model whose weights, drawn from its seed, are the same each time."""
    strategy = Strategy.named(name, device="cpu", dtype=dtype, padding_free=padding_free, **options)
    with strategy.init():
        decoder = Decoder(config)
        decoder.seed = 7
        if base:
            surgery.quantise_base(decoder, base)
        if rank:
            surgery.add_adapters(decoder, LoraSpec(rank), seed=3)
        torch.manual_seed(0)
        model = role(decoder)
    return strategy, strategy.prepare(model)


def gradients(strategy, stream, batches, loss_of):
    """The sum of losses, and the gradients of all trained weights as they are in their homes, after a step of lr 0."""
    stats = strategy.step(stream, batches, loss_of, lr=0.0, max_grad_norm=1e9)
    return stats, {home.chunk.group: home.grads.tensor.float() for home in stream.homes if home.grads is not None}


def sft_gradients(config, padding_free, rows, size=4, **options):
    strategy, stream = prepared(config, padding_free, **options)
    count = sft.trained_tokens(rows)
    loss_of = lambda hidden, part: (fn.sft_loss(response_logprobs(stream.model, hidden, part), count), {})  # noqa: E731
    return gradients(strategy, stream, micro_batches(rows, size, CPU), loss_of)


def assert_equal_gradients(padded, free, most=1e-6):
    (stats, grads), (free_stats, free_grads) = padded, free
    assert free_stats.sums["loss"] == pytest.approx(stats.sums["loss"], rel=most)
    assert grads.keys() == free_grads.keys()
    for group, grad in grads.items():
        assert (free_grads[group] - grad).abs().max() <= most * max(float(grad.abs().max()), 1e-2), group


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_gradients_are_those_of_padded_rows(name):
    config = dataclasses.replace(FAMILIES[name], d_model=32, d_ff=48, expert_ff=FAMILIES[name].expert_ff and 24)
    config = dataclasses.replace(config, router_aux_loss_coef=0.5 if config.num_experts else 0.0)
    padded, free = (sft_gradients(config, padding_free, examples()) for padding_free in (False, True))
    assert_equal_gradients(padded, free)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_rows_share_is_computed_once_and_every_gradient_stays(name):
    config = dataclasses.replace(FAMILIES[name], d_model=32, d_ff=48, expert_ff=FAMILIES[name].expert_ff and 24)
    config = dataclasses.replace(config, router_aux_loss_coef=0.5 if config.num_experts else 0.0)
    rows, shapes, steps = branches(), [], []
    batches, count = [sft.rows_of(rows[:4], CPU), sft.rows_of(rows[4:], CPU)], sft.trained_tokens(rows)
    for free in (False, True):
        strategy, stream = prepared(config, free)
        strategy.evaluate(stream, batches, lambda hidden, part: shapes.append(tuple(hidden.shape[:2])))
        loss_of = lambda hidden, part: (fn.sft_loss(response_logprobs(stream.model, hidden, part), count), {})  # noqa: B023, E731
        steps.append(gradients(strategy, stream, batches, loss_of))
    # a row computes what follows its first `common` tokens, and the last of these, which predicts
    assert shapes == [(4, 41), (4, 23), (1, 30 + 7 + 14 + 29), (1, 8 + 2 + 2 + 20)]
    assert_equal_gradients(*steps)


def test_loss_and_gradient_are_those_of_transformers(tiny_model):
    address = tiny_model()
    loss, grads = theirs(address)
    strategy, actor = Strategy.named("naive", device="cpu", padding_free=True), Actor.from_pretrained(address)
    stream = strategy.prepare(actor)
    loss_of = lambda hidden, part: (fn.sft_loss(response_logprobs(actor, hidden, part), COUNT), {})  # noqa: E731
    stats, _ = gradients(strategy, stream, micro_batches(EXAMPLES, 4, CPU), loss_of)
    assert stats.sums["loss"] == pytest.approx(loss, abs=1e-6)
    embed, block = actor.decoder.embed, actor.decoder.blocks[0]
    assert torch.allclose(embed.tokens.grad, grads["transformer.wte.weight"], atol=1e-6)
    assert torch.allclose(embed.positions.grad, grads["transformer.wpe.weight"], atol=1e-6)
    assert torch.allclose(block.qkv.weight.grad, grads["transformer.h.0.attn.c_attn.weight"].T, atol=1e-6)


@pytest.mark.parametrize("options", [
    {"name": "gemini_cpu", "device_memory": "2MB"},
    {"name": "gemini_cpu", "device_memory": "2MB", "recompute": False},
    {"name": "gemini", "recompute": True},
    {"name": "gemini_cpu", "rank": 4, "base": "nf4"},
])  # fmt: skip
def test_strategies_recomputation_and_adapters_keep_the_gradients(options):
    config = dataclasses.replace(FAMILIES["mistral"], d_model=64, d_ff=96)
    padded, free = (sft_gradients(config, padding_free, examples(), **options) for padding_free in (False, True))
    assert_equal_gradients(padded, free)


def test_bf16_differs_by_rounding_alone():
    padded, free = (sft_gradients(FAMILIES["llama"], free, examples(), dtype="bf16") for free in (False, True))
    assert_equal_gradients(padded, free, most=2e-2)


def test_only_what_rows_hold_is_computed_and_rows_with_little_padding_stay_as_they_are():
    shapes, rows = [], examples([16, 32, 32, 32, 31, 31, 32, 32])
    strategy, stream = prepared(FAMILIES["gpt2"], True)
    batches = [sft.rows_of(rows[:4], CPU), sft.rows_of(rows[4:], CPU)]
    strategy.evaluate(stream, batches, lambda hidden, part: shapes.append(tuple(hidden.shape[:2])))
    assert shapes == [(1, 16 + 3 * 32), (4, 33)]
    assert ragged_rows(torch.ones(3, 5, dtype=torch.bool)) is None


def test_slices_and_layers_of_transformers_stay_padded(tmp_path, tiny_model, jsonl, capsys):
    data = jsonl(demonstrations(8))
    shared = ["--data", data, "--max-length", "32", "--steps", "1", "--samples", "0", "--heldout", "0"]
    assert cli("sft", "--model", tiny_model(), *shared, "--out", tmp_path / "a", "--activation-budget", "1GB") == 0
    assert "rows of a micro-batch are padded: blocks are cut into slices" in capsys.readouterr().err
    assert cli("sft", "--model", tiny_model(), *shared, "--out", tmp_path / "b") == 0
    assert "are padded" not in capsys.readouterr().err
    lines = []
    falcon = SimpleNamespace(foreign="its config.json", family="falcon")
    say_padding(falcon, RunFlags(out=""), SimpleNamespace(say=lines.append))
    assert "the layers of falcon are transformers' own" in lines[0]


def test_the_curve_of_a_run_is_that_of_padded_rows(tmp_path, tiny_model, jsonl):
    data, model = jsonl(demonstrations(20)), tiny_model()
    shared = ["--max-length", "32", "--batch-size", "6", "--micro-batch-size", "3", "--steps", "6", "--lr", "1e-2"]
    for flag in ("--padding-free", "--no-padding-free"):
        assert cli("sft", "--model", model, "--data", data, *shared, "--out", tmp_path / flag, flag) == 0
    for free, padded in zip(*(metrics(tmp_path / f"--{no}padding-free") for no in ("", "no-")), strict=True):
        assert free == pytest.approx(padded, rel=1e-4, abs=1e-5)


# --- rankings, votes, policies --------------------------------------------------------------------------------------


def assert_same_step(padded, free):
    assert free.sums == pytest.approx(padded.sums, abs=1e-5)
    assert free.grad_norm == pytest.approx(padded.grad_norm, rel=1e-5)


def test_rewards_and_preferences_are_those_of_padded_rows():
    optim = OptimFlags(lr=1e-3, batch_size=4, micro_batch_size=8)
    steps, scores, logprobs, preferences = {}, {}, {}, {}
    for free in (False, True):
        strategy, stream = prepared(TINY, free, RewardModel)
        steps[free] = reward.learn(strategy, stream, RANKINGS, optim, 0.0, 0.0)
        scores[free] = list(itertools.chain(*reward.score_rankings(strategy, stream, RANKINGS, 8)))
        strategy, stream = prepared(TINY, free)
        known = with_reference(strategy, stream, RANKINGS, optim)
        logprobs[free] = list(itertools.chain(*(ranking.ref_logprobs for ranking in known)))
        far = [
            dataclasses.replace(ranking, ref_logprobs=tuple(-1.0 * i for i in range(len(ranking.rows))))
            for ranking in known
        ]
        preferences[free] = preference.learn(strategy, stream, far, optim, DPOFlags(), 0.0)
    assert scores[True] == pytest.approx(scores[False], abs=1e-5)
    assert logprobs[True] == pytest.approx(logprobs[False], abs=1e-5)
    assert_same_step(steps[False], steps[True])
    assert_same_step(preferences[False], preferences[True])


def test_votes_are_those_of_padded_rows(models):  # noqa: F811
    steps = []
    for free in (False, True):
        task = iteration(models, micro=8)
        for stream in (task.policy, task.reference):
            stream.model.padding_free = free
        batch = task.score(ragged())
        steps.append((batch.kl, task.learn(batch, 1e-3)))
    assert steps[1][0] == pytest.approx(steps[0][0], abs=1e-5)
    assert_same_step(steps[0][1], steps[1][1])


def test_answers_are_scored_as_in_padded_rows():
    """PPO's four models, and an actor whose critic is a head: what a rollout learns from is the same."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(3, 16, (count,), generator=rng).tolist()  # noqa: E731
    answers = [Answer(draw(a), draw(b), [-1.0] * b, "stop") for a, b in ((2, 3), (12, 9), (4, 1), (3, 12))]
    seen = []
    for free in (False, True):
        strategy = Strategy.named("naive", device="cpu", padding_free=free)
        models_of = [
            role(Decoder(TINY, generator=torch.Generator().manual_seed(i)))
            for i, role in enumerate((Actor, Actor, Critic, RewardModel, ActorCritic))
        ]
        for i, model in enumerate(models_of[2:]):
            torch.nn.init.normal_(model.score, generator=torch.Generator().manual_seed(i))
        actor, reference, critic, judge, both = strategy.prepare_all(*models_of)
        with strategy.phase("score"):
            seen.append(score(strategy, Roles(actor, reference, critic, judge), answers, [None] * 4, 1.0, 4))
            seen.append(score(strategy, Roles(both, reference, reward=judge), answers, [None] * 4, 1.0, 4))
    for padded, free in (seen[::2], seen[1::2]):
        for name in ("logprobs", "ref_logprobs", "values", "entropy", "scores"):
            assert torch.allclose(getattr(free, name), getattr(padded, name), atol=1e-5), name


# --- memory, and the kernel of a GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen3", "gemma2", "gemma3", "bloom"])
@pytest.mark.parametrize("rows", [
    pytest.param(examples([62, 62, 62, 34] * 2), id="padding"),
    pytest.param(branches([62] * 8, [0, 33] * 4), id="shared"),
])  # fmt: skip
def test_ragged_rows_never_need_more_than_padded_ones(rows, name, recompute):
    """The plan counts rows without padding: it must stay the most that is needed where padding is least."""
    peaks = []
    for free in (False, True):
        strategy, stream = prepared(FAMILIES[name], free, recompute=recompute)
        batches, count = [sft.rows_of(rows[:4], CPU), sft.rows_of(rows[4:], CPU)], sft.trained_tokens(rows)
        assert not free or all(ragged_rows(batch.valid, batch.computed) for batch in batches)
        loss_of = lambda hidden, part: (fn.sft_loss(response_logprobs(stream.model, hidden, part), count), {})  # noqa: B023, E731
        with Meter() as meter:
            strategy.evaluate(stream, batches, loss_of)
            evaluation, meter.peaks["device"] = meter.peak, meter.used["device"]
            strategy.step(stream, batches, loss_of, lr=0.0)
        peaks.append((evaluation, meter.peak))
    assert peaks[1][0] <= peaks[0][0]
    assert peaks[1][1] <= peaks[0][1]


def slow_varlen(q, k, v, starts, key_starts, longest, longest_key, *, scale=None, window_size, enable_gqa=False):
    """What torch's kernel computes, a row and a head at a time: q [N, H, E], k and v [N, G, E]."""
    assert window_size == (-1, 0)
    assert starts.dtype == torch.int32
    assert enable_gqa or q.shape[1] == k.shape[1]
    rows = []
    places = zip(*(itertools.pairwise(x.tolist()) for x in (starts, key_starts)), strict=True)
    for (start, end), (first, last) in places:
        assert (end - start, last - first) <= (longest, longest_key)
        heads = []
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = q[start:end, head] @ k[first:last, group].T * (scale or q.shape[2] ** -0.5)
            behind = 1 + scores.shape[1] - scores.shape[0]  # flash attention's: the last query sees the last key
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(behind), -torch.inf)
            heads.append(scores.softmax(-1) @ v[first:last, group])
        rows.append(torch.stack(heads, dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["gpt2", "granite"])  # granite: heads in groups, a scale of its own
def test_one_kernel_for_all_rows_is_given_what_it_needs(name, monkeypatch):
    every = [examples(), branches()]
    padded = [sft_gradients(FAMILIES[name], False, rows) for rows in every]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", slow_varlen)
    monkeypatch.setattr(linear, "_fused_when_ragged", lambda *_: True)
    for rows, of_rows in zip(every, padded, strict=True):
        assert_equal_gradients(of_rows, sft_gradients(FAMILIES[name], True, rows))
