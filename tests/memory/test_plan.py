"""The pure decisions: which models share weights, and when a chunk of a schedule is needed next."""

import pytest

from penstock.memory.chunks import Weight, layout
from penstock.memory.placement import STRATEGIES
from penstock.memory.plan import Model, Placed, few_tokens, homes, place, sharing_groups
from penstock.memory.schedule import NEVER, Schedule, Slot, SlotTable


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


def mixture(experts, per_token, rows):
    """One block of `experts` experts of rows * 8 weights each."""
    shapes = {f"b.{i}": (rows, 8) for i in range(experts)}
    groups = [("b", [Weight("b.weight", (8, 8), "float32", False)])]
    groups += [(name, [Weight(f"{name}.weight", shape, "float32", False)]) for name, shape in shapes.items()]
    placed = tuple(Placed(chunk, STRATEGIES["gemini_cpu"]) for chunk in layout(groups))
    return Model("m", placed, (("b", *shapes),), (tuple(shapes),), per_token)


def test_experts_are_waited_for_where_few_tokens_choose_few_of_them():
    link, flops = 1e9, 1e12
    assert few_tokens(mixture(128, 128, 64), 1, link, flops) == 0  # all are chosen
    wide, narrow = (few_tokens(mixture(experts, 2, 64), 1, link, flops) for experts in (128, 8))
    assert wide > narrow > 0
    assert few_tokens(mixture(128, 2, 64), 1, 1e15, flops) == 0  # what moves costs nothing: nobody waits
    resident = Model("m", tuple(Placed(p.chunk, STRATEGIES["ddp"]) for p in mixture(8, 2, 64).placed), (("b",),))
    assert few_tokens(resident, 1, link, flops) == 0
    tokens = (
        3  # in seconds, by hand: the block's own weights, then the expected share of the others' and their products
    )
    own, each = 256 / link, 64 * 8 * 4 / link
    chosen = 1 - (1 - 2 / 8) ** tokens
    waits = max(own, tokens * 2 * 64 / flops) + chosen * 8 * each + tokens * 2 * 2 * 512 / flops
    assert (waits < own + 8 * each) == (few_tokens(mixture(8, 2, 64), 1, link, flops) >= tokens)


def test_what_may_be_chosen_is_kept_for_its_visit_and_not_prefetched():
    homes = {group: [Home(group)] for group in ("a", "a.0", "b", "b.0")}
    schedule = Schedule(homes, [("a",), ("b",)], repeats=True, choices=[("a.0",), ("b.0",)])
    schedule.advance(("a",))
    assert [schedule.next_use(homes[group][0]) for group in homes] == [2, 2, 1, 1]
    table = SlotTable(Slot(homes["a"][0].chunk.nbytes) for _ in range(4))
    assert [home.chunk.group for home, _ in schedule.prefetch(table, ahead=1)] == ["b"]


@pytest.mark.parametrize(("room", "on_host"), [(64, 7), (40, 1)])
def test_weights_that_may_be_on_a_disk_make_room_for_gradients_that_may_not(room, on_host):
    """room: MB of host memory beside the buffers of an update; weights and gradients take 34 each."""
    million, buffers = 10**6, 255_852_544
    groups = [(f"b.{i}", [Weight(f"b.{i}.weight", (1024, 1024), "float32", True)]) for i in range(8)]
    models = [(layout(groups), [(group,) for group, _ in groups])]
    budgets = {"device": 20 * million, "host": buffers + room * million, "disk": None}
    (placed,) = place("gemini_auto", models, 1, budgets)
    at_home = homes([placed], 1)
    assert at_home["host"] <= room * million
    assert at_home["device"] <= budgets["device"]
    assert [each.row.grads.tier for each in placed] == ["host"] * 8
    assert [each.row.params.tier for each in placed].count("host") == on_host
