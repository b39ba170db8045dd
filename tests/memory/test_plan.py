"""The pure decisions: which models share weights, and when a chunk of a schedule is needed next."""

import pytest

from penstock.memory.chunks import Weight, layout
from penstock.memory.plan import NEVER, Schedule, Slot, SlotTable, sharing_groups


class Home:
    """A home that is only a chunk."""

    def __init__(self, group):
        (self.chunk,) = layout([(group, [Weight(f"{group}.weight", (8,), "float32", True)])])


@pytest.mark.parametrize(
    ("keys", "groups"),
    [([], []), ([set(), set()], [[0], [1]]), (["a", "b", "a"], [[0, 2], [1]]), (["a", "b", "ab"], [[0, 1, 2]]),
     (["ab", "c", "bd", "d", "e"], [[0, 2, 3], [1], [4]])],
)  # fmt: skip
def test_models_with_a_common_key_are_one_group_directly_or_through_a_third(keys, groups):
    assert sharing_groups([set(key_set) for key_set in keys]) == groups


@pytest.mark.parametrize("repeats", [True, False])
def test_a_schedule_knows_the_next_use_of_each_chunk(repeats):
    homes = {group: [Home(group)] for group in "abc"}
    schedule = Schedule(homes, [("a",), ("b", "c"), ("a",)], repeats=repeats)

    def next_uses():
        return [schedule.next_use(homes[group][0]) for group in "abc"]

    assert next_uses() == [1, 2, 2]  # before the first visit
    schedule.advance(("b", "c"))
    assert next_uses() == ([1, 3, 3] if repeats else [1, NEVER, NEVER])
    schedule.advance(("x",))  # no such visit: nothing changes
    assert next_uses()[0] == 1
    assert schedule.next_use(Home("a")) == NEVER  # another model's


@pytest.mark.parametrize(("repeats", "claimed"), [(True, "cda"), (False, "cd")])
def test_the_next_visits_are_prefetched_into_slots_that_hold_nothing_needed_sooner(repeats, claimed):
    homes = {group: [Home(group)] for group in "abcd"}
    schedule = Schedule(homes, [("a",), ("b",), ("c",), ("d",)], repeats=repeats)
    schedule.advance(("b",))
    table = SlotTable(Slot(homes["a"][0].chunk.nbytes) for _ in range(4))
    table.claim(homes["b"][0], homes["b"][0].chunk.nbytes, schedule.next_use).users = 1  # the current visit
    assert "".join(home.chunk.group for home, _ in schedule.prefetch(table, ahead=3)) == claimed
    assert list(schedule.prefetch(table, ahead=3)) == []  # they are there, or on their way
