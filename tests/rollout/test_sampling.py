"""One token per row by inverting the CDF: the right distribution, the right number, the right stream."""

import pytest
import torch
import transformers

from penstock.kernels import compile as compiler
from penstock.rollout.sampling import Sampling, adjust, pick, stream
from tests.algorithms.oracle import token_logprobs

pytestmark = pytest.mark.usefixtures("both_ways")


def frequencies(logits, sampling, draws=20_000):
    """How often each token comes out, over evenly spaced uniforms (exact up to 1/draws)."""
    uniforms = (torch.arange(draws) + 0.5) / draws
    tokens, _ = pick(logits.expand(draws, -1), uniforms, sampling)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


LOGITS = torch.tensor([2.0, 0.5, -1.0, 1.5, 0.0, -torch.inf])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_come_as_often_as_the_softmax_says(temperature):
    expected = torch.softmax(LOGITS / temperature, dim=-1)
    assert torch.allclose(frequencies(LOGITS, Sampling(temperature=temperature)), expected, atol=2e-4)


def test_top_k_keeps_the_k_likeliest_and_renormalises():
    kept = torch.softmax(LOGITS.masked_fill(LOGITS < 1.5, -torch.inf), dim=-1)
    assert torch.allclose(frequencies(LOGITS, Sampling(top_k=2)), kept, atol=2e-4)


def test_top_p_keeps_the_smallest_set_that_holds_p():
    ordered = torch.softmax(LOGITS, dim=-1).sort(descending=True)
    assert ordered.values[0] < 0.6 <= ordered.values[:2].sum()  # so two are needed for 0.6
    kept = torch.zeros(6).scatter(0, ordered.indices[:2], ordered.values[:2])
    assert torch.allclose(frequencies(LOGITS, Sampling(top_p=0.6)), kept / kept.sum(), atol=2e-4)
    assert frequencies(LOGITS, Sampling(top_p=1e-6))[0] == 1  # the likeliest always stays


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("cut", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 12, "top_p": 0.9}, {"min_p": 0.05}])
def test_a_hundred_thousand_random_draws_pass_a_chi_square_test(temperature, cut):
    """With the engine's own random numbers, against probabilities that transformers' warpers leave."""
    draws = 100_000
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    warped = logits[None] / temperature
    if "top_k" in cut:
        warped = transformers.TopKLogitsWarper(cut["top_k"])(None, warped)
    if "top_p" in cut:
        warped = transformers.TopPLogitsWarper(cut["top_p"])(None, warped)
    if "min_p" in cut:
        warped = transformers.MinPLogitsWarper(cut["min_p"])(None, warped)
    expected = warped[0].softmax(-1) * draws
    uniforms = torch.cat([stream(11, episode, 1000) for episode in range(draws // 1000)])
    tokens, _ = pick(logits.expand(draws, -1), uniforms, Sampling(temperature=temperature, **cut))
    counts = torch.bincount(tokens, minlength=40).float()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5  # the rest is one cell, as the test wants it
    seen = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic, freedom = ((seen - wanted) ** 2 / wanted).sum().double(), torch.tensor(len(wanted) - 1.0).double()
    assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-3  # the probability of so much by chance


def test_greedy_is_the_argmax_whatever_the_number():
    tokens, logprobs = pick(LOGITS.expand(3, -1), torch.tensor([0.0, 0.5, 0.99]), Sampling(temperature=0.0))
    assert tokens.tolist() == [0, 0, 0]
    assert torch.allclose(logprobs, torch.log_softmax(LOGITS, -1)[0])


@pytest.mark.parametrize("number", [0.0, 1.0 - 2**-24])
def test_an_impossible_token_is_never_picked_at_the_ends_of_the_interval(number):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    tokens, _ = pick(logits, torch.tensor([number]), Sampling())
    assert tokens.item() in (1, 2)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6), Sampling(temperature=1.3, top_k=3)])
def test_the_logprob_is_the_trainers_number(sampling):
    """PPO.md 3: same temperature, same fp32 softmax, before truncation."""
    logits = torch.randn(8, 11, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = pick(logits, stream(0, 0, 8), sampling)
    expected, _ = token_logprobs(logits, tokens, sampling.temperature)  # the slow oracle, in fp64
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs.double(), expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("vocabulary", [1, 31, 1024, 50_257])
def test_a_row_chooses_alike_in_c_by_torch_alone_and_in_company(vocabulary, temperature, monkeypatch):
    logits = 3 * torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    numbers, sampling = stream(5, 0, 9), Sampling(temperature=temperature)
    tokens, logprobs = pick(logits, numbers, sampling)
    alone = [pick(logits[i : i + 1], numbers[i : i + 1], sampling) for i in range(9)]
    assert torch.equal(torch.cat([one for one, _ in alone]), tokens)
    assert torch.equal(torch.cat([one for _, one in alone]), logprobs)
    monkeypatch.setattr(compiler, "compiled", lambda *_: "no compiler")
    others, theirs = pick(logits, numbers, sampling)
    assert torch.equal(others, tokens)
    assert torch.allclose(theirs, logprobs, atol=1e-5)  # torch sums 50,257 shares in fp32


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_have_no_logprob_and_spoil_no_other_row(wrong, temperature):
    logits = torch.zeros(3, 40)
    logits[1, 33] = wrong
    logits[2] = -torch.inf
    logits[2, 7] = -3.0
    tokens, logprobs = pick(logits, torch.full((3,), 0.5), Sampling(temperature=temperature))
    assert logprobs.isnan().tolist() == [False, True, False]
    assert (tokens[2], logprobs[2]) == (7, 0.0)


def test_bf16_logits_are_sampled_in_fp32():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, logprobs = pick(logits, stream(0, 0, 4), Sampling())
    assert logprobs.dtype == torch.float32


def test_a_stream_depends_on_seed_and_episode_alone_and_begins_the_same_at_any_length():
    assert torch.equal(stream(3, 7, 5), stream(3, 7, 50)[:5])
    assert not torch.equal(stream(3, 7, 5), stream(3, 8, 5))
    assert not torch.equal(stream(3, 7, 5), stream(4, 7, 5))
    many = torch.stack([stream(0, episode, 4) for episode in range(500)])
    assert 0.45 < many.mean() < 0.55
    assert abs(torch.corrcoef(many[:, :2].T)[0, 1]) < 0.15
    assert abs(torch.corrcoef(torch.stack([many[:-1, 0], many[1:, 0]]))[0, 1]) < 0.15


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"max_new_tokens": 0}, {"n": 0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.3}, lambda: transformers.RepetitionPenaltyLogitsProcessor(1.3)),
        ({"repetition_penalty": 0.7}, lambda: transformers.RepetitionPenaltyLogitsProcessor(0.7)),
        ({"logit_bias": {3: 2.0, 5: -4.0}}, lambda: transformers.SequenceBiasLogitsProcessor({(3,): 2.0, (5,): -4.0})),
    ],
)  # fmt: skip
def test_adjusted_logits_are_those_of_transformers(ours, theirs):
    logits, said = torch.randn(1, 20), [4, 4, 7, 3]
    expected = theirs()(torch.tensor([said]), logits.clone())
    adjust(logits[0], Sampling(**ours), said[:2], said[2:])
    assert torch.allclose(logits, expected)


def test_presence_and_frequency_penalties_count_the_response_alone():
    """OpenAI's: logit[j] - c[j] * frequency - (c[j] > 0) * presence, with c the counts in what was generated."""
    logits = torch.zeros(6)
    adjust(logits, Sampling(presence_penalty=0.5, frequency_penalty=0.25), [1, 1, 5], [2, 3, 2])
    assert logits.tolist() == [0, 0, -1.0, -0.75, 0, 0]


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p_is_that_of_transformers(min_p):
    logits = torch.randn(1, 50) * 2
    kept = torch.isfinite(transformers.MinPLogitsWarper(min_p)(None, logits.clone()))[0]
    numbers = (torch.arange(2000) + 0.5) / 2000
    tokens, _ = pick(logits.expand(2000, -1), numbers, Sampling(min_p=min_p))
    assert set(tokens.tolist()) <= set(kept.nonzero()[:, 0].tolist())
    shares = logits[0].softmax(0) * kept
    counts = torch.bincount(tokens, minlength=50) / 2000
    assert torch.allclose(counts, shares / shares.sum(), atol=2e-3)


def test_answers_with_different_limits_and_seeds_have_the_same_rule():
    assert Sampling(n=3, seed=4, max_new_tokens=9, stop="x").rule == Sampling().rule
    assert Sampling(top_k=3).rule != Sampling().rule
