"""Every function of penstock.algorithms.functional against its oracle, on ragged batches with poison in the padding.

The oracle is beside this file (oracle.py). Where a number can be checked by hand, a small table does so as well: the
two were written apart from the source, and a mistake would have to be made three times to pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.algorithms import functional
from penstock.algorithms.reward import Ranking
from tests.algorithms import oracle

TOLERANCE = 1e-6
NAN, INF, HUGE = math.nan, math.inf, 3e38


# --- batches ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Batch:
    """A ragged shape and where its numbers come from: Batch(lengths=(1, 4), extra=1, seed=0, poison=nan)."""

    lengths: tuple[int, ...]
    extra: int = 0
    """Columns beyond the longest row, padding in every row."""
    seed: int = 0
    poison: float = NAN
    """What lies in the padding."""

    @property
    def width(self) -> int:
        return max(self.lengths) + self.extra

    @property
    def lens(self) -> Tensor:
        return torch.tensor(self.lengths)

    @property
    def mask(self) -> Tensor:
        return oracle.mask_of(self.lens, self.width)

    def generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + stream)

    def noise(self, stream: int, scale: float = 1.0) -> Tensor:
        """[B, width] normal numbers, poison in the padding; another stream, other numbers."""
        clean = scale * torch.randn(len(self.lengths), self.width, generator=self.generator(stream))
        return torch.where(self.mask, clean, self.poison)


BATCHES = st.builds(
    Batch,
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    extra=st.integers(0, 2),
    seed=st.integers(0, 2**20),
    poison=st.sampled_from([NAN, INF, -INF, HUGE, -HUGE]),
)


def on_ragged_batches(test: Callable[..., None]) -> Callable[..., None]:
    """Runs test(batch) on the shapes that go wrong first, then on generated ones."""
    for batch in (
        Batch((1,)), Batch((1,), extra=2), Batch((6,)), Batch((4, 4, 4)), Batch((1, 1), extra=1, poison=INF),
        Batch((1, 6, 3)), Batch((5, 2, 1), extra=2, poison=-INF), Batch((2, 3), poison=HUGE),
    ):  # fmt: skip
        test = example(batch=batch)(test)
    return settings(max_examples=20, deadline=None, derandomize=True)(given(batch=BATCHES)(test))


def agree(ours: Tensor | tuple[Tensor, ...], theirs: Tensor | tuple[Tensor, ...], tolerance: float = TOLERANCE) -> None:
    if isinstance(ours, tuple):
        for our_part, their_part in zip(ours, theirs, strict=True):
            agree(our_part, their_part, tolerance)
        return
    assert ours.dtype == torch.float32
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours.detach().double(), theirs.detach().double(), rtol=tolerance, atol=tolerance)


def gradients_of(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The result of function(*inputs) and the gradient of its weighted sum for each input, zeros where none flowed."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(7))
    if result.requires_grad:  # an oracle that found every token clipped has nothing to differentiate
        (result * weights.to(result.dtype)).sum().backward()
    return result, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def agree_with_gradients(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor, tolerance: float = TOLERANCE
) -> None:
    """Same value, and the same gradient for every input: finite everywhere, zero wherever the oracle never looked."""
    our_result, our_gradients = gradients_of(ours, *inputs)
    their_result, their_gradients = gradients_of(theirs, *inputs)
    assert our_result.requires_grad
    agree(our_result, their_result, tolerance)
    agree(tuple(our_gradients), tuple(their_gradients), tolerance)


def agree_by_name(name: str, x: Tensor, *arguments: object, **options: object) -> None:
    """functional.name and oracle.name: same value, the first of several, and the same gradient for x."""

    def value_of(module: object) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            result = getattr(module, name)(x, *arguments, **options)
            return result[0] if isinstance(result, tuple) else result

        return call

    agree_with_gradients(value_of(functional), value_of(oracle), x)


# --- layout -----------------------------------------------------------------------------------------------------
@on_ragged_batches
def test_masks_come_from_lengths(batch):
    ours = functional.mask_of(batch.lens, batch.width)
    assert ours.dtype == torch.bool
    assert torch.equal(ours, batch.mask)


def test_a_mask_row_may_be_empty_or_full():
    assert functional.mask_of(torch.tensor([0, 3, 1]), 3).tolist() == [[0, 0, 0], [1, 1, 1], [1, 0, 0]]


@on_ragged_batches
def test_packing_keeps_valid_tokens_row_by_row_and_unpacking_puts_zeros_in_the_padding(batch):
    x = batch.noise(0)
    packed = functional.pack(x, batch.lens)
    assert torch.equal(packed, oracle.pack(x, batch.lens))
    assert torch.equal(functional.unpack(packed, batch.lens, batch.width), torch.where(batch.mask, x, 0.0))
    assert torch.equal(functional.unpack(packed, batch.lens), oracle.unpack(packed, batch.lens))
    agree_by_name("pack", x, batch.lens)
    agree_by_name("unpack", packed, batch.lens, batch.width)


@on_ragged_batches
def test_response_states_are_those_before_each_response_token(batch):
    """Every other state is poison, that of the last response token too: it predicts nothing (PPO.md 2)."""
    prompts = torch.randint(1, 5, (len(batch.lengths),), generator=batch.generator(1))
    width = int((prompts + batch.lens).max()) + batch.extra
    hidden = torch.randn(len(batch.lengths), width, 3, generator=batch.generator(2))
    used = torch.zeros(len(batch.lengths), width, dtype=torch.bool)
    for row, column in oracle.valid(batch.lens):
        used[row, int(prompts[row]) + column - 1] = True
    hidden[~used] = batch.poison
    agree_by_name("response_states", hidden, prompts, batch.lens)


def test_response_states_by_hand():
    hidden = torch.arange(12.0).reshape(2, 6, 1)  # row 0 holds 0..5, row 1 holds 6..11
    states = functional.response_states(hidden, torch.tensor([1, 3]), torch.tensor([2, 3]))
    assert states.flatten().tolist() == [0, 1, 8, 9, 10]


def test_only_tokens_with_a_state_before_them_can_be_predicted():
    hidden, mask = torch.arange(8.0).reshape(2, 4, 1), torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 3] = mask[1, 1] = mask[1, 3] = True  # a dialogue: trained tokens need not be neighbours
    assert functional.states_before(hidden, mask).flatten().tolist() == [2, 4, 6]
    mask[1, 0] = True  # what stands before it is the last token of the row above
    with pytest.raises(ValueError, match="at least one token"):
        functional.states_before(hidden, mask)


def test_a_beginning_is_computed_in_the_first_row_that_has_it():
    rows = ["abcd", "abxy", "abxz", "zbxz", "zbx"]  # 6 of 19 tokens are shared
    tokens = torch.tensor([[ord(letter) for letter in row.ljust(5, "d")] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    own = functional.computed(tokens, functional.mask_of(lengths, 5), torch.tensor([3, 3, 3, 3, 1]))
    # the last row's state at 1 is read, so that it computes its own "b"; what is padded equals nothing
    shown = ["".join(".x"[flag] for flag in row) for row in own.tolist()]
    assert shown == ["xxxx.", "..xx.", "...x.", "xxxx.", ".xx.."]
    tokens, lengths = torch.tensor([[7, 8, 0, 0], [7, 8, 0, 0]]), torch.tensor([2, 4])
    own = functional.computed(tokens, functional.mask_of(lengths, 4), torch.tensor([1, 3]))
    assert own.tolist() == [[True, True, False, False], [False, False, True, True]], "padding is no beginning"


def test_little_that_is_shared_is_computed_again():
    tokens, lengths = torch.tensor([[1, 2, 3, 4], [1, 5, 6, 7]]), torch.tensor([4, 4])
    own = functional.computed(tokens, functional.mask_of(lengths, 4), torch.tensor([3, 3]))
    assert own.all()


@on_ragged_batches
def test_the_last_state_is_that_of_the_last_real_token(batch):
    hidden = torch.stack([batch.noise(0), batch.noise(1)], dim=-1)
    agree_with_gradients(
        lambda h: functional.last_states(h, batch.lens),
        lambda h: torch.stack([h[row, length - 1] for row, length in enumerate(batch.lengths)]),
        hidden,
    )


# --- distributions ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["kl_k1", "kl_k2", "kl_k3"])
@pytest.mark.parametrize("gap", [0.0, 0.3, -0.3, 5.0, -5.0, 19.5, -19.5])
def test_kl_estimators(name, gap):
    ref = torch.tensor([-21.0, -22.5])
    rtol = 2e-6 * (1 + abs(gap))  # an exponent of 19.5 in fp32 is itself only this exact

    def each(logps: Tensor, refs: Tensor) -> Tensor:
        return torch.stack([getattr(oracle, name)(*pair) for pair in zip(logps, refs, strict=True)])

    agree_with_gradients(getattr(functional, name), each, ref + gap, ref, tolerance=rtol)


@pytest.mark.parametrize("name", ["kl_k1", "kl_k2", "kl_k3"])
@pytest.mark.parametrize("gap", [25.0, -25.0, 300.0, -300.0])
def test_kl_estimators_clamp_the_log_ratio_at_20(name, gap):
    estimate = getattr(functional, name)
    zero = torch.zeros(1)
    at_the_clamp = estimate(torch.tensor([math.copysign(20.0, gap)]), zero)
    assert torch.equal(estimate(torch.tensor([gap]), zero), at_the_clamp)
    agree(at_the_clamp, getattr(oracle, name)(torch.tensor(math.copysign(20.0, gap)), torch.tensor(0.0))[None], 1e-5)


@pytest.mark.parametrize("name", ["kl_k1", "kl_k3"])
def test_k1_and_k3_are_unbiased_for_the_kl_of_the_policy_from_the_reference(name):
    """Schulman 2020: both average to KL(policy || reference) under the policy; k2 does not."""
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    kl = sum(p * math.log(p / r) for p, r in zip(policy.tolist(), reference.tolist(), strict=True))
    estimate = (policy * getattr(functional, name)(policy.log(), reference.log())).sum()
    assert float(estimate) == pytest.approx(kl, abs=TOLERANCE)


def test_k2_and_k3_are_never_negative_and_k1_is_signed():
    logp, ref = torch.tensor([-2.0, -1.0]), torch.tensor([-1.0, -2.0])
    assert functional.kl_k1(logp, ref).tolist() == [-1.0, 1.0]
    assert functional.kl_k2(logp, ref).tolist() == [0.5, 0.5]
    assert functional.kl_k3(logp, ref).tolist() == pytest.approx([math.e - 2, math.exp(-1)])


# --- masked statistics ------------------------------------------------------------------------------------------
@on_ragged_batches
def test_masked_mean(batch):
    for count in (None, 11, torch.tensor(11.0)):
        agree_by_name("masked_mean", batch.noise(0), batch.mask, count)


@on_ragged_batches
def test_whitening_sees_only_valid_tokens(batch):
    x = batch.noise(0, scale=2.0) + 3
    for shift_mean in (True, False):
        ours, theirs = (module.whiten(x, batch.mask, shift_mean=shift_mean) for module in (functional, oracle))
        agree(ours, theirs, tolerance=5e-6)  # the smallest batches have a variance near 0, and divide by its root


def test_whitening_by_hand():
    x = torch.tensor([[1.0, 3.0, NAN], [NAN, NAN, NAN], [5.0, INF, -INF]])
    mask = functional.mask_of(torch.tensor([2, 0, 1]), 3)
    # mean 3, unbiased variance ((-2)^2 + 0 + 2^2) / 2 = 4
    agree(functional.whiten(x, mask), torch.tensor([[-1.0, 0, 0], [0, 0, 0], [1, 0, 0]]))
    agree(functional.whiten(x, mask, shift_mean=False), torch.tensor([[2.0, 3, 0], [0, 0, 0], [4, 0, 0]]))
    agree(functional.whiten(x, mask, eps=12.0), torch.tensor([[-0.5, 0, 0], [0, 0, 0], [0.5, 0, 0]]))


@on_ragged_batches
def test_whitened_tokens_have_mean_0_and_unbiased_variance_1(batch):
    if sum(batch.lengths) > 3:
        tokens = functional.whiten(batch.noise(0), batch.mask)[batch.mask].double()
        assert float(tokens.mean()) == pytest.approx(0, abs=1e-5)
        assert float(tokens.var(unbiased=True)) == pytest.approx(1, abs=1e-5)


def test_equal_tokens_whiten_to_zero():
    x, mask = torch.tensor([[4.0, 4.0, NAN]]), torch.tensor([[True, True, False]])
    assert functional.whiten(x, mask).tolist() == [[0, 0, 0]]
    assert functional.whiten(x, mask, shift_mean=False).tolist() == [[4, 4, 0]]


@on_ragged_batches
def test_explained_variance(batch):
    returns, values = batch.noise(0), batch.noise(1, scale=0.5)
    ours = functional.explained_variance(values, returns, batch.mask)
    agree(ours, torch.tensor(oracle.explained_variance(values, returns, batch.mask)), 1e-5)


def test_explained_variance_of_good_and_useless_critics():
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 6.0, NAN]])
    explained = functional.explained_variance
    assert float(explained(returns, returns, mask)) == 1
    assert float(explained(returns + 7, returns, mask)) == pytest.approx(1)  # a constant offset costs nothing
    assert float(explained(torch.full((1, 4), 3.0), returns, mask)) == pytest.approx(0, abs=TOLERANCE)
    assert float(explained(0.5 * returns, returns, mask)) == pytest.approx(0.75)
    assert float(explained(-returns, returns, mask)) == pytest.approx(-3)
    assert float(explained(returns, torch.full((1, 4), 2.0), mask)) == 0  # nothing to explain
    assert float(explained(returns, returns, torch.tensor([[True, False, False, False]]))) == 0


# --- rewards and advantages -------------------------------------------------------------------------------------
@on_ragged_batches
def test_rewards_are_a_kl_penalty_per_token_and_the_score_once(batch):
    scores = torch.randn(len(batch.lengths), generator=batch.generator(3))
    logprobs, ref = batch.noise(0), batch.noise(1)
    for kl_coef in (0.0, 0.05, 1.5):
        agree(*(module.shape_rewards(scores, logprobs, ref, batch.lens, kl_coef) for module in (functional, oracle)))


def test_rewards_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, NAN, INF], [-3.0, NAN, NAN, NAN]])
    reference = torch.tensor([[-2.0, -1.5, NAN, INF], [-3.0, -INF, NAN, 0.0]])
    rewards = functional.shape_rewards(torch.tensor([10.0, 20.0]), logprobs, reference, torch.tensor([2, 1]), 0.5)
    assert rewards.tolist() == [[-0.5, 10.25, 0, 0], [20, 0, 0, 0]]


@on_ragged_batches
def test_the_undiscounted_return_does_not_grow_with_length_when_the_policy_is_the_reference(batch):
    """PPO.md 7: a score added to every token would make longer responses worth more."""
    logprobs, scores = batch.noise(0), torch.arange(1.0, len(batch.lengths) + 1)
    rewards = functional.shape_rewards(scores, logprobs, logprobs, batch.lens, 0.05)
    assert torch.equal(rewards.sum(dim=1), scores)


def test_a_missing_eos_replaces_the_score():
    scores, has_eos = torch.tensor([2.0, 3.0, NAN]), torch.tensor([True, False, False])
    assert functional.replace_missing_eos(scores, has_eos, -1.0).tolist() == [2, -1, -1]
    assert functional.replace_missing_eos(scores[:2], has_eos[:2], 0.0).tolist() == [2, 0]  # 0 is a score, not "off"
    assert functional.replace_missing_eos(scores[:2], has_eos[:2], None).tolist() == [2, 3]
    assert scores[:2].tolist() == [2, 3]  # the caller's scores are not written
    agree(functional.replace_missing_eos(scores, has_eos, -1.0), oracle.replace_missing_eos(scores, has_eos, -1.0))


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.booleans()), min_size=1, max_size=8), st.floats(0.01, 10))
def test_no_answer_that_was_cut_is_better_than_one_that_ended(rows, margin):
    scores, has_eos = torch.tensor([score for score, _ in rows]), torch.tensor([ended for _, ended in rows])
    used = functional.below_ended(scores, has_eos, margin)
    agree(used, oracle.below_ended(scores, has_eos, margin), tolerance=1e-4)
    assert torch.equal(used[has_eos], scores[has_eos])
    if has_eos.any() and not has_eos.all():
        assert used[~has_eos].max() < used[has_eos].min()
    elif not has_eos.any():
        assert len(set(used.tolist())) == 1  # nothing to learn from, and `has_spread` says so
        assert not functional.has_spread(used)


def test_a_cut_answer_keeps_its_own_score_where_no_margin_is_asked_for():
    scores, has_eos = torch.tensor([2.0, 30.0, -3.0]), torch.tensor([True, False, True])
    assert functional.below_ended(scores, has_eos, None) is scores
    assert functional.below_ended(scores, has_eos, 0.0).tolist() == [2, -3, -3]  # 0 is a margin, not "off"
    assert functional.below_ended(scores, has_eos, 1.0).tolist() == [2, -4, -3]


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), min_size=1, max_size=5))
@example([[1.0], [], [1.0, 4.0]])
def test_moments_of_batches_are_those_of_all_scores_at_once(batches):
    moments = functional.Moments()
    for batch in batches:
        moments.add(torch.tensor(batch))
    scores = torch.tensor([score for batch in batches for score in batch]).double()
    assert moments.count == len(scores)
    if len(scores) > 1:
        assert moments.mean == pytest.approx(float(scores.mean()), abs=1e-9)
        assert moments.std == pytest.approx(float(scores.std()), rel=1e-6, abs=2e-3)


@pytest.mark.parametrize("offset", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_normalised_scores_forget_offset_and_scale(offset, scale):
    plain, other = functional.Moments(), functional.Moments()
    for seed in range(3):
        scores = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        plain.add(scores)
        other.add(offset + scale * scores)
        assert torch.allclose(plain.normalise(scores), other.normalise(offset + scale * scores), atol=1e-4)


@pytest.mark.parametrize("score", [0.0, 1.0, -50.0, 1e-9])
def test_scores_without_spread_are_normalised_to_zero(score):
    """Rounding is no spread: dividing by it would make noise of unit size."""
    moments = functional.Moments()
    scores = torch.full((8,), score) * torch.tensor([1, 1 + 1e-7] * 4)
    for _ in range(2):
        moments.add(scores)
        assert moments.normalise(scores).tolist() == [0.0] * 8


def test_a_single_hit_after_many_zeros_stays_finite_and_its_scale_follows():
    moments, hit = functional.Moments(), torch.tensor([1.0])
    moments.add(torch.cat([torch.zeros(63), hit]))
    assert float(moments.normalise(hit)) == pytest.approx(63 / 8, abs=0.1)
    moments.add(torch.ones(64))
    assert float(moments.normalise(hit)) == pytest.approx(0.98, abs=0.02)


def test_scores_that_differ_have_spread_and_equal_ones_have_none():
    for scores in ([1.0, 1.0], [5.0], [0.0, 0.0], [50.0, 50.0001], [0.0, 1e-6]):
        assert not functional.has_spread(torch.tensor(scores))
    for scores in ([0.0, 1.0], [-3.0, -3.01], [0.0] * 63 + [0.1]):
        assert functional.has_spread(torch.tensor(scores))


def warm_up(explained, limit=10):
    """(whether the actor learns, what was said) at each step."""
    gate = functional.ValueWarmUp(limit)
    return [(gate.update(part), gate.over)[::-1] for part in explained]


def test_the_warm_up_does_not_end_by_one_lucky_batch():
    steps = warm_up([0.0007, 0.3, -0.2, 0.0, 0.05])
    assert [over for over, _ in steps] == [False] * 5
    assert "is held" in steps[0][1]
    assert "at most 10 steps" in steps[0][1]
    assert [text for _, text in steps[1:]] == [""] * 4


def test_the_warm_up_ends_when_the_critic_explains_returns_and_stays_ended():
    steps = warm_up([0.0, 0.2, 0.2, 0.2, 0.2, 0.2, -1.0, -1.0])
    assert [over for over, _ in steps] == [False, False, True, True, True, True, True, True]
    assert "learns from now on, after 2 steps: the critic explains 10%" in steps[2][1]
    assert not any(text for _, text in steps[3:])


def test_the_warm_up_ends_though_the_critic_never_explains_anything():
    steps = warm_up([0.0] * 5, limit=3)
    assert [over for over, _ in steps] == [False, False, False, True, True]
    assert "the most that it may be held: the critic explains 0%" in steps[3][1]


def test_without_a_warm_up_nothing_is_held_or_said():
    assert warm_up([0.0, 0.0], limit=0) == [(True, "")] * 2


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.5, 0.9), (1.0, 0.0), (0.7, 1.0), (1.0, 1.0)])
def test_generalised_advantages(gamma, lam):
    @on_ragged_batches
    def on(batch):
        rewards, values = batch.noise(0), batch.noise(1)
        ours, theirs = (module.gae(rewards, values, batch.lens, gamma, lam) for module in (functional, oracle))
        agree(ours, theirs, 2e-6)

    on()


def test_generalised_advantages_default_to_gamma_1_and_lambda_095():
    batch = Batch((1, 5, 3))
    rewards, values = batch.noise(0), batch.noise(1)
    ours = functional.gae(rewards, values, batch.lens)
    agree(ours, oracle.gae(rewards, values, batch.lens, gamma=1.0, lam=0.95))


def test_generalised_advantages_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0, NAN]]), torch.tensor([[0.5, 0.25, 9.0]])
    advantages, returns = functional.gae(rewards, values, torch.tensor([2]), gamma=0.9, lam=0.5)
    # delta_1 = 2 + 0.9 * 0 - 0.25 = 1.75; delta_0 = 1 + 0.9 * 0.25 - 0.5 = 0.725; A_0 = 0.725 + 0.45 * 1.75
    agree(advantages, torch.tensor([[1.5125, 1.75, 0.0]]))
    agree(returns, torch.tensor([[2.0125, 2.0, 0.0]]))


@on_ragged_batches
def test_with_lambda_1_returns_are_the_rewards_to_come_whatever_the_critic_says(batch):
    rewards = batch.noise(0)
    _, returns = functional.gae(rewards, batch.noise(1), batch.lens, gamma=1.0, lam=1.0)
    to_come = torch.where(batch.mask, rewards, 0.0).double().flip(1).cumsum(1).flip(1)
    agree(returns, torch.where(batch.mask, to_come, 0.0), 5e-6)


def test_advantages_are_fp32_for_half_precision_values():
    batch = Batch((2, 4))
    rewards, values = batch.noise(0).bfloat16(), batch.noise(1).bfloat16()
    agree(functional.gae(rewards, values, batch.lens), oracle.gae(rewards, values, batch.lens))


# --- losses -----------------------------------------------------------------------------------------------------
def experience(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """New log-probs, old ones near enough that about half of the tokens are clipped, and advantages of both signs."""
    old = batch.noise(0) - 2
    return old + batch.noise(1, scale=0.4), old, batch.noise(2)


@on_ragged_batches
def test_policy_loss(batch):
    logprobs, old, advantages = experience(batch)
    for clip, count in ((0.2, None), (0.1, 17), (0.2, torch.tensor(17.0))):
        agree_by_name("policy_loss", logprobs, old, advantages, batch.mask, clip=clip, count=count)


@on_ragged_batches
def test_policy_statistics_are_sums_over_valid_tokens(batch):
    logprobs, old, advantages = experience(batch)
    _, ours = functional.policy_loss(logprobs.requires_grad_(), old, advantages, batch.mask, clip=0.2, count=17)
    _, theirs = oracle.policy_loss(logprobs, old, advantages, batch.mask, clip=0.2)
    for name, want in theirs.items():
        agree(ours[name], torch.tensor(want), 2e-6)
    assert not any(stat.requires_grad for stat in ours.values())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 1.0, -1.2, 0.0, 1),  # better and already likelier: enough
        (0.5, 1.0, -0.5, -0.5, 0),  # better and less likely: pull it up
        (1.5, -1.0, 1.5, 1.5, 0),  # worse and likelier: push it down
        (0.5, -1.0, 0.8, 0.0, 1),  # worse and already less likely: enough
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.0, -3.0, 3.0, 3.0, 0),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, gradient, clipped):
    logprobs = torch.tensor([[math.log(ratio) - 1, NAN]], requires_grad=True)
    old, advantages = torch.tensor([[-1.0, INF]]), torch.tensor([[advantage, NAN]])
    ours, stats = functional.policy_loss(logprobs, old, advantages, torch.tensor([[True, False]]))  # clip 0.2
    ours.backward()
    agree(ours, torch.tensor(loss))
    agree(logprobs.grad, torch.tensor([[gradient, 0.0]]))
    assert float(stats["clipfrac"]) == clipped
    assert float(stats["ratio"]) == pytest.approx(ratio)
    assert float(stats["approxkl"]) == pytest.approx(0.5 * math.log(ratio) ** 2, abs=1e-7)
    assert float(stats["max_ratio_gap"]) == pytest.approx(abs(ratio - 1), abs=TOLERANCE)


@pytest.mark.parametrize("gap", [25.0, 200.0, -25.0, -200.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_policy_loss_clamps_the_log_ratio_at_20(gap, advantage):
    def loss_and_gradient(gap: float) -> tuple[Tensor, Tensor]:
        logprobs = torch.tensor([[gap]], requires_grad=True)
        advantages, mask = torch.full((1, 1), advantage), torch.ones(1, 1, dtype=torch.bool)
        loss, _ = functional.policy_loss(logprobs, torch.zeros(1, 1), advantages, mask)
        loss.backward()
        return loss, logprobs.grad

    loss, gradient = loss_and_gradient(gap)
    assert torch.equal(loss, loss_and_gradient(math.copysign(20.0, gap))[0])
    assert gradient.tolist() == [[0.0]]


def test_on_the_first_step_the_policy_gradient_is_minus_the_advantage():
    """Ratio exactly 1 (PPO.md 6): the loss is the vanilla policy gradient and nothing is clipped."""
    batch = Batch((3, 1, 4), extra=1)
    logprobs, advantages = batch.noise(0).requires_grad_(), batch.noise(1)
    loss, stats = functional.policy_loss(logprobs, logprobs.detach(), advantages, batch.mask)
    loss.backward()
    agree(loss, -oracle.masked_mean(advantages, batch.mask))
    agree(logprobs.grad, torch.where(batch.mask, -advantages / 8, 0.0))
    assert [float(stats[name]) for name in ("approxkl", "clipfrac", "ratio", "ratio_sq")] == [0, 0, 8, 8]


def criticism(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """New values, old values about a clip away, and returns around both."""
    old = batch.noise(0)
    return old + batch.noise(1, scale=0.4), old, old + batch.noise(2, scale=0.6)


@on_ragged_batches
def test_value_loss(batch):
    values, old, returns = criticism(batch)
    for clip, count in ((0.2, None), (0.05, 17), (None, 17), (None, None), (0.2, torch.tensor(17.0))):
        agree_by_name("value_loss", values, old, returns, batch.mask, clip=clip, count=count)


@on_ragged_batches
def test_value_clip_fraction_is_a_sum_over_valid_tokens(batch):
    values, old, returns = criticism(batch)
    for clip in (0.2, None):
        _, stats = functional.value_loss(values.requires_grad_(), old, returns, batch.mask, clip=clip, count=17)
        agree(stats["clipfrac"], torch.tensor(oracle.value_loss(values, old, returns, batch.mask, clip=clip)[1]))
        assert not any(stat.requires_grad for stat in stats.values())


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "gradient"),
    [
        (1.0, 0.0, 2.0, 0.2, 0.5 * 1.8**2, 0.0),  # moved far enough towards its target: held at 0.2
        (1.0, 0.0, -1.0, 0.2, 0.5 * 2.0**2, 2.0),  # moved away: the whole error counts
        (-1.0, 0.0, -2.0, 0.2, 0.5 * 1.8**2, 0.0),
        (-1.0, 0.0, 1.0, 0.2, 0.5 * 2.0**2, -2.0),
        (0.1, 0.0, 2.0, 0.2, 0.5 * 1.9**2, -1.9),  # within the clip
        (1.0, 0.0, 2.0, None, 0.5 * 1.0**2, -1.0),
    ],
)
def test_value_loss_by_hand(value, old, target, clip, loss, gradient):
    values = torch.tensor([[value, NAN]], requires_grad=True)
    fixed = torch.tensor([[old, INF]]), torch.tensor([[target, NAN]]), torch.tensor([[True, False]])
    ours, _ = functional.value_loss(values, *fixed, clip=clip)
    ours.backward()
    agree(ours, torch.tensor(loss))
    agree(values.grad, torch.tensor([[gradient, 0.0]]))


@pytest.mark.parametrize(("loss", "inputs"), [("policy_loss", experience), ("value_loss", criticism)])
def test_a_loss_moves_only_the_new_log_probs_or_values(loss, inputs):
    batch = Batch((3, 1, 4))
    _, (new, *fixed) = gradients_of(lambda *x: getattr(functional, loss)(*x, batch.mask)[0], *inputs(batch))
    assert (new != 0).any()
    assert all((gradient == 0).all() for gradient in fixed)


@on_ragged_batches
def test_sft_loss_of_packed_tokens(batch):
    for count in (None, 13, torch.tensor(13.0)):
        agree_with_gradients(
            lambda x, n=count: functional.sft_loss(functional.pack(x, batch.lens), n),
            lambda x, n=count: oracle.sft_loss(x, batch.mask, sum(batch.lengths) if n is None else n),
            batch.noise(0),
        )


def test_sft_loss_by_hand():
    assert functional.sft_loss(torch.tensor([-1.0, -4.0])).item() == 2.5
    assert functional.sft_loss(torch.tensor([-1.0, -4.0]), 10).item() == 0.5


# --- rankings ---------------------------------------------------------------------------------------------------
def loss_of_ranking(scores: Tensor, ranks: Tensor, margin: float = 0.0) -> tuple[Tensor, int, int]:
    """The loss over the pairs of a ranking of so many different responses."""
    ranking = Ranking([[i] for i in range(len(ranks))], tuple(ranks.tolist()), (1,) * len(ranks))
    return functional.pairwise_loss(scores, ranking.pairs, margin)


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("ranks", [(0, 1), (1, 0), (0, 0), (2, 0, 1), (0, 1, 1, 2), (3, 1, 0, 2, 4), (5, 5, 5), (0,)])
def test_pairwise_loss(ranks, margin):
    scores = 2 * torch.randn(len(ranks), generator=torch.Generator().manual_seed(len(ranks)))
    ranks = torch.tensor(ranks)
    agree_with_gradients(
        lambda x: loss_of_ranking(x, ranks, margin)[0], lambda x: oracle.pairwise_loss(x, ranks, margin)[0], scores
    )
    ours, theirs = loss_of_ranking(scores, ranks, margin), oracle.pairwise_loss(scores, ranks, margin)
    assert [int(count) for count in ours[1:]] == list(theirs[1:])


def test_pairwise_loss_by_hand():
    scores, ranks = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0, 1, 1])
    loss, correct, pairs = loss_of_ranking(scores, ranks, margin=0.5)
    # two pairs, for the last two are tied: 1 - 3 - 0.5 = -2.5 (wrong) and 1 - 0 - 0.5 = 0.5 (right)
    want = (math.log1p(math.exp(2.5)) + math.log1p(math.exp(-0.5))) / 2
    assert loss.item() == pytest.approx(want, rel=TOLERANCE)
    assert (int(correct), int(pairs)) == (1, 2)


def test_a_margin_does_not_change_which_pairs_are_right():
    _, correct, pairs = loss_of_ranking(torch.tensor([1.0, 0.9]), torch.tensor([0, 1]), margin=5.0)
    assert (int(correct), int(pairs)) == (1, 1)


def test_a_margin_asks_for_more():
    scores, ranks = torch.tensor([1.0, 0.0]), torch.tensor([0, 1])
    plain, wide = (loss_of_ranking(scores, ranks, margin)[0] for margin in (0.0, 1.0))
    assert plain < wide
    assert wide.item() == pytest.approx(math.log(2))


def test_ties_alone_give_zero_loss_that_can_still_be_differentiated():
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, correct, pairs = loss_of_ranking(scores, torch.tensor([0, 0]))
    loss.backward()
    assert (loss.item(), int(correct), int(pairs)) == (0, 0, 0)
    assert scores.grad.tolist() == [0, 0]


def test_pairwise_loss_of_distant_scores_is_their_distance():
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss, *_ = loss_of_ranking(scores, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert scores.grad.tolist() == [-1, 1]


def test_pairwise_loss_of_half_precision_scores_is_fp32():
    scores, ranks = torch.tensor([0.5, 0.25, 1.0], dtype=torch.bfloat16), torch.tensor([1, 0, 2])
    agree(loss_of_ranking(scores, ranks)[0], oracle.pairwise_loss(scores, ranks)[0])


# --- schedules --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.05),  # 10 % above the target: beta grows
        (5.4, 1 - 0.1 * 0.05),
        (60.0, 1 + 0.2 * 0.05),  # clipped
        (0.0, 1 - 0.2 * 0.05),
        (-60.0, 1 - 0.2 * 0.05),
    ],
)
def test_adaptive_kl_by_hand(kl, factor):
    controller = functional.KLController(0.15, target=6.0, horizon=10_000)
    controller.update(kl, 500)  # 500 / 10,000 = 0.05
    assert controller.beta == pytest.approx(0.15 * factor, rel=1e-9)


def test_adaptive_kl_follows_the_formula_and_beta_is_its_whole_state():
    controller, beta = functional.KLController(0.15, 6.0), 0.15
    for step, kl in enumerate((1.0, 7.0, 20.0, 5.9, 6.3)):
        controller.update(kl, 64 + step)
        beta = oracle.adaptive_kl(beta, kl, 6.0, 64 + step, 10_000)
        assert controller.beta == pytest.approx(beta, rel=1e-12)
    resumed = functional.KLController(controller.beta, 6.0)
    controller.update(9.0, 100)
    resumed.update(9.0, 100)
    assert resumed.beta == controller.beta


def test_without_a_target_the_kl_coefficient_stays():
    controller = functional.KLController(0.05)
    controller.update(100.0, 10_000)
    assert controller.beta == 0.05


@pytest.mark.parametrize(("total", "fraction"), [(100, 0.1), (100, 0.03), (40, 0.25), (7, 0.3), (10, 0.0), (1, 0.1)])
def test_learning_rate_rises_then_falls_in_straight_lines(total, fraction):
    """Updates count from 0: none is wasted at rate 0, the peak is 1, and 0 is reached at `total`, after the last."""
    factors = [float(functional.lr_schedule(step, total, fraction)) for step in range(total)]
    peak = factors.index(max(factors))
    assert max(factors) == pytest.approx(1.0)
    assert min(factors) > 0
    assert abs(peak - total * fraction) <= 1
    assert float(functional.lr_schedule(total, total, fraction)) == 0
    falling = [1 - factors[peak], *(a - b for a, b in zip(factors[peak:], [*factors[peak + 1 :], 0.0], strict=True))]
    rising = [b - a for a, b in zip([0.0, *factors[:peak]], factors[: peak + 1], strict=True)]
    assert rising == pytest.approx([1 / (peak + 1)] * (peak + 1))
    slopes = [slope for slope in falling if slope > 1e-12]  # the peak may last two steps
    assert slopes == pytest.approx([slopes[0]] * len(slopes))


# --- what must not matter ---------------------------------------------------------------------------------------
def per_row(batch: Batch, rows: list[int], extra: int, poison: float) -> tuple[Tensor, ...]:
    """The tensors of one PPO batch with its rows picked, columns of poison added and the old poison replaced."""
    tensors = (*experience(batch), *criticism(batch))
    mask = batch.mask[rows]
    tensors = tuple(torch.where(mask, x[rows], poison) for x in tensors)
    wide = [torch.cat([x, torch.full((len(rows), extra), poison)], dim=1) for x in tensors]
    return (*wide, batch.lens[rows])


def update_of(
    batch: Batch, rows: list[int], extra: int = 0, poison: float = NAN, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed policy and value loss of some rows, and the gradients of new log-probs and values, back in batch shape."""
    logprobs, old, advantages, values, old_values, returns, lengths = per_row(batch, rows, extra, poison)
    mask = functional.mask_of(lengths, logprobs.shape[1])
    logprobs.requires_grad_()
    values.requires_grad_()
    policy, _ = functional.policy_loss(logprobs, old, advantages, mask, count=count)
    value, _ = functional.value_loss(values, old_values, returns, mask, count=count)
    (policy + value).backward()
    home = [torch.zeros(len(batch.lengths), batch.width) for _ in range(2)]
    for out, gradient in zip(home, (logprobs.grad, values.grad), strict=True):
        out[rows] = gradient[:, : batch.width]
        assert (gradient[:, batch.width :] == 0).all()
    return (policy + value).detach(), home[0], home[1]


@on_ragged_batches
def test_order_of_rows_and_extra_padding_never_change_an_update(batch):
    rows = list(range(len(batch.lengths)))
    want = update_of(batch, rows)
    for update in (update_of(batch, rows[::-1]), update_of(batch, rows, extra=3, poison=-INF)):
        agree(update, want)


@on_ragged_batches
def test_micro_batches_with_the_global_count_add_up_to_the_whole_batch(batch):
    """PPO.md 15. A mean over each micro-batch would favour tokens of short responses."""
    rows, count = list(range(len(batch.lengths))), sum(batch.lengths)
    want = update_of(batch, rows)
    for size in (1, 2, 3):
        parts = [update_of(batch, rows[i : i + size], count=count) for i in range(0, len(rows), size)]
        agree(tuple(sum(part) for part in zip(*parts, strict=True)), want)


def test_a_micro_batch_without_tokens_adds_nothing():
    """A rank may run out of tokens: its loss is 0 and its gradients are zeros, not NaN."""
    x, none = torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    for loss in (
        lambda x: functional.policy_loss(x, x.detach(), x.detach(), none, count=8)[0],
        lambda x: functional.value_loss(x, x.detach(), x.detach(), none, count=8)[0],
        lambda x: functional.sft_loss(x[none], 8),
        lambda x: functional.sft_loss(x[none]),
        lambda x: functional.masked_mean(x, none, 8),
    ):
        value, (gradient,) = gradients_of(loss, x)
        assert float(value) == 0
        assert (gradient == 0).all()


@on_ragged_batches
def test_rewards_advantages_and_whitening_do_not_see_padding_or_the_order_of_rows(batch):
    order = list(range(len(batch.lengths)))[::-1]
    scores = torch.randn(len(order), generator=batch.generator(3))

    def advantages_of(rows: list[int], extra: int, poison: float) -> Tensor:
        logprobs, ref, _, values, *_, lengths = per_row(batch, rows, extra, poison)
        rewards = functional.shape_rewards(scores[rows], logprobs, ref, lengths, 0.05)
        advantages, _ = functional.gae(rewards, values, lengths)
        return functional.whiten(advantages, functional.mask_of(lengths, advantages.shape[1]))

    want = advantages_of(order[::-1], 0, 0.0)
    agree(advantages_of(order, 0, NAN)[order], want, 1e-5)
    wide = advantages_of(order[::-1], 3, INF)
    agree(wide[:, : batch.width], want, 1e-5)
    assert (wide[:, batch.width :] == 0).all()


def test_nothing_flows_back_through_advantages_or_returns():
    """The critic learns from the value loss alone, and from its new values alone."""
    batch = Batch((3, 1, 4))
    logprobs, old, _ = experience(batch)
    rewards, values = batch.noise(3), batch.noise(4).requires_grad_()
    advantages, returns = functional.gae(rewards, values, batch.lens)
    advantages = functional.whiten(advantages, batch.mask)
    functional.policy_loss(logprobs.requires_grad_(), old, advantages, batch.mask)[0].backward(retain_graph=True)
    assert values.grad is None or (values.grad == 0).all()
    values.grad = None
    functional.value_loss(values, values, returns, batch.mask)[0].backward()
    agree(values.grad, torch.where(batch.mask, (values - returns).detach() / 8, 0.0))
