"""Padding is told by lengths; the walk over the data is a permutation per epoch and resumes exactly."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data.batching import Shuffle, pad, split_by_prompt


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 2**40), max_size=9), min_size=1, max_size=6), pad_id=st.integers(0, 9))
def test_padding_keeps_every_row_and_fills_the_right(rows, pad_id):
    tokens, lengths = pad(rows, pad_id)
    assert tokens.dtype == lengths.dtype == torch.int64
    assert tokens.shape == (len(rows), max(map(len, rows)))
    for row, padded, length in zip(rows, tokens.tolist(), lengths.tolist(), strict=True):
        assert padded == row + [pad_id] * (len(padded) - len(row))
        assert length == len(row)


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 20), sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_every_epoch_of_a_walk_is_a_permutation(count, sizes, seed):
    walk = Shuffle(count, seed)
    taken = [walk.next(size) for size in sizes]
    assert [len(batch) for batch in taken] == sizes
    flat = list(itertools.chain(*taken))
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == list(range(count))
    assert walk.epochs == pytest.approx(len(flat) / count)


def test_epochs_have_different_orders_and_seeds_too():
    walk = Shuffle(50, seed=1)
    first, second = walk.next(50), walk.next(50)
    assert first != second
    assert Shuffle(50, seed=1).next(100) == first + second
    assert Shuffle(50, seed=2).next(50) != first


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 12), before=st.integers(0, 40), after=st.integers(0, 40))
def test_a_walk_resumes_exactly_from_its_state(count, before, after):
    walk = Shuffle(count, seed=7)
    walk.next(before)
    state = walk.state_dict()
    expected = walk.next(after)
    resumed = Shuffle(count, seed=8)  # the state decides, not the seed
    resumed.load_state_dict(state)
    assert resumed.next(after) == expected
    assert resumed.epochs == walk.epochs


def test_a_state_is_a_snapshot():
    walk = Shuffle(5, seed=0)
    walk.next(2)
    state = walk.state_dict()
    twin, again = Shuffle(5, seed=0), Shuffle(5, seed=0)
    twin.load_state_dict(state)
    indices = twin.next(20)
    again.load_state_dict(state)
    assert again.next(20) == indices


def test_a_walk_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    Shuffle(10, seed=1).next(25)
    assert torch.equal(torch.rand(3), expected)


def test_data_that_changed_its_size_does_not_resume():
    with pytest.raises(ValueError, match="walked over 5 rows and the data now has 6"):
        Shuffle(6, seed=0).load_state_dict(Shuffle(5, seed=0).state_dict())


def test_nothing_cannot_be_shuffled():
    with pytest.raises(ValueError, match="nothing to shuffle"):
        Shuffle(0, seed=0)


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.text("abc", max_size=2), max_size=30),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_no_prompt_is_on_both_sides_and_no_record_is_lost(prompts, fraction, seed, data):
    train, heldout = split_by_prompt(prompts, fraction, seed)
    assert sorted(train + heldout) == list(range(len(prompts)))
    assert train == sorted(train)
    assert heldout == sorted(heldout)
    assert not {prompts[i] for i in train} & {prompts[i] for i in heldout}
    count = len(set(prompts))
    if fraction == 0:
        assert not heldout
    elif count > 1:
        assert 1 <= len({prompts[i] for i in heldout}) <= count - 1
        assert abs(len({prompts[i] for i in heldout}) - fraction * count) <= 1
    shuffled = data.draw(st.permutations(prompts))  # the sides depend on the prompts, not on their order
    again, _ = split_by_prompt(shuffled, fraction, seed)
    assert {shuffled[i] for i in again} == {prompts[i] for i in train}


def test_seeds_hold_out_different_prompts():
    prompts = [str(i) for i in range(40)]
    assert split_by_prompt(prompts, 0.25, 0) != split_by_prompt(prompts, 0.25, 1)
    assert len(split_by_prompt(prompts, 0.25, 0)[1]) == 10
