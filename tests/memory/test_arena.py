"""Slots: fixed places, never two chunks in one, the chunk that is needed last goes first."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from penstock.errors import ResourceError
from penstock.memory.arena import Arena
from penstock.memory.tiers import Ram

CPU = torch.device("cpu")


def arena(*sizes, budget=None):
    return Arena(Ram("device", CPU, budget), sizes)


def test_an_arena_within_its_budget_or_none_at_all():
    assert arena(4096, 8192, budget=12288).slots
    with pytest.raises(ResourceError, match=r"--device-memory 12\.29 kB"):
        arena(4096, 8192, 1, budget=12288)


def test_the_smallest_slot_that_fits_is_taken_and_an_empty_one_first():
    slots = arena(4096, 8192, 8192)
    assert len(slots.claim("a", 100, lambda key: 0).memory) == 4096
    second, third = slots.claim("b", 5000, lambda key: 0), slots.claim("c", 5000, lambda key: 0)
    assert {second.key, third.key} == {"b", "c"}
    assert slots.find("b") is second


def test_the_chunk_that_is_needed_latest_makes_room():
    slots = arena(4096, 4096, 4096)
    for key in "abc":
        slots.claim(key, 4096, lambda key: 0)
    slots.claim("d", 4096, {"a": 3, "b": 9, "c": 4}.__getitem__)
    assert {slot.key for slot in slots.slots} == {"a", "c", "d"}


def test_a_leased_slot_is_never_taken():
    slots = arena(4096)
    slots.claim("a", 4096, lambda key: 0).users = 1
    assert slots.claim("b", 4096, lambda key: 0) is None
    assert slots.find("a").key == "a"
    assert "smaller or in use" in str(slots.too_small(4096))


def test_a_prefetch_that_nobody_came_for_lands_before_its_slot_is_reused():
    slots, landed = arena(4096), []
    slots.claim("a", 4096, lambda key: 0).landing = lambda: landed.append("a")
    slots.claim("b", 4096, lambda key: 0)
    assert landed == ["a"]


def test_forgetting_empties_the_slots_of_one_model_only():
    slots = arena(4096, 4096)
    slots.claim(("x", 0), 4096, lambda key: 0)
    slots.claim(("y", 0), 4096, lambda key: 0)
    slots.forget(lambda key: key[0] == "x")
    assert [slots.find(("x", 0)), slots.find(("y", 0)).key] == [None, ("y", 0)]


@given(
    sizes=st.lists(st.sampled_from([4096, 8192, 16384]), min_size=1, max_size=5),
    wanted=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 4096, 8000, 16384])), max_size=40),
)
def test_addresses_never_change_and_no_two_chunks_share_a_byte(sizes, wanted):
    slots = arena(*sizes)
    places = [slot.memory.data_ptr() for slot in slots.slots]
    sizes_of = {}
    for key, nbytes in wanted:
        nbytes = sizes_of.setdefault(key, nbytes)
        slot = slots.find(key) or slots.claim(key, nbytes, lambda key: key)
        assert slot is None or len(slot.memory) >= nbytes
        held = [slot.key for slot in slots.slots if slot.key is not None]
        assert len(held) == len(set(held))
        assert [slot.memory.data_ptr() for slot in slots.slots] == places
