"""Who gets which item: never two the same slot, whatever the order and the clock; undo, skip, gold."""

import threading
from collections import Counter

import pytest

from penstock.data.jsonl import FieldError
from penstock.serve.labelling import audit, export, labellers, leases, room
from penstock.serve.labelling.leases import TakenError
from tests.serve.labelling.conftest import NOW, add_labeller, fill, judge_all, ranked, skipped

LEASE = 30 * 60


def test_an_item_is_held_until_it_is_judged_and_nobody_else_gets_it(store):
    fill(store, 2)
    ada, bo = add_labeller(store, "ada"), add_labeller(store, "bo")
    first, other = leases.next_item(store, ada, NOW), leases.next_item(store, bo, NOW)
    assert first["id"] != other["id"]
    again = leases.next_item(store, ada, NOW + 60)
    assert again == first | {"leased_until": NOW + 60 + LEASE}
    with pytest.raises(TakenError, match="somebody else has it"):
        leases.judge(store, ada, other["id"], ranked(other, str), NOW)
    leases.judge(store, ada, first["id"], ranked(first, str), NOW)
    assert leases.next_item(store, ada, NOW) is None
    assert leases.progress(store, ada, NOW) == {"done": 1, "left": 0}
    assert leases.progress(store, bo, NOW) == {"done": 0, "left": 1}


def test_a_lease_that_ran_out_goes_to_the_next_and_who_is_late_is_told(store):
    fill(store, 1)
    ada, bo = add_labeller(store, "ada"), add_labeller(store, "bo")
    item = leases.next_item(store, ada, NOW)
    assert leases.next_item(store, bo, NOW + LEASE - 1) is None
    theirs = leases.next_item(store, bo, NOW + LEASE + 1)
    assert theirs["id"] == item["id"]
    with pytest.raises(TakenError, match="nothing was stored"):
        leases.judge(store, ada, item["id"], ranked(item, str), NOW + LEASE + 2)
    leases.judge(store, bo, item["id"], ranked(theirs, str), NOW + LEASE + 3)
    with pytest.raises(TakenError):
        leases.judge(store, ada, item["id"], ranked(item, str), NOW + LEASE + 4)
    assert len(list(export.rankings(store))) == 1


def test_who_is_late_is_not_refused_where_nobody_took_the_item_or_another_place_is_open(store):
    fill(store, 1)
    ada, bo = add_labeller(store, "ada"), add_labeller(store, "bo")
    item = leases.next_item(store, ada, NOW)
    leases.judge(store, ada, item["id"], ranked(item, str), NOW + 10 * LEASE)
    room.change_settings(store, {"labellers_per_item": 3})
    mine = leases.next_item(store, bo, NOW)
    cy, di = add_labeller(store, "cy"), add_labeller(store, "di")
    for late in (cy, di):  # the third place, and then bo's, whose time is over
        assert leases.next_item(store, late, NOW + LEASE + 1)["id"] == item["id"]
    with pytest.raises(TakenError):
        leases.judge(store, bo, item["id"], ranked(mine, str), NOW + LEASE + 2)
    leases.judge(store, cy, item["id"], skipped(), NOW + LEASE + 2)
    leases.judge(store, bo, item["id"], ranked(mine, str), NOW + LEASE + 3)
    assert {line["labeller"] for line in export.rankings(store)} == {"ada", "bo"}


def test_the_same_judgement_again_changes_nothing_and_another_is_refused(store):
    fill(store, 1, answers=3)
    ada = add_labeller(store, "ada")
    item = leases.next_item(store, ada, NOW)
    judgement = ranked(item, str, edits={"0": "better"}, note="hm")
    for _ in range(2):
        leases.judge(store, ada, item["id"], judgement, NOW)
    with pytest.raises(TakenError, match="already"):
        leases.judge(store, ada, item["id"], ranked(item, lambda text: -ord(text[-1])), NOW)
    actions = Counter(event["action"] for event in audit.events(store))
    assert actions == {"token": 1, "import": 1, "lease": 1, "ranked": 1}


def test_a_ranking_names_each_answer_once_and_ties_are_kept(store):
    fill(store, 1, answers=4)
    ada = add_labeller(store, "ada")
    item = leases.next_item(store, ada, NOW)
    for ranking in ([[0], [1], [2]], [[0, 1], [1], [2, 3]], [[0, 1, 2, 4]], [[0], [1], [2], "3"]):
        with pytest.raises(FieldError):
            leases.judge(store, ada, item["id"], ranked(item, str) | {"ranking": ranking}, NOW)
    leases.judge(store, ada, item["id"], ranked(item, lambda text: text in ("0.1", "0.3")), NOW)
    assert next(export.rankings(store))["ranking"] == [[0, 2], [1, 3]]


def test_answers_are_shuffled_for_each_labeller_and_the_same_at_every_look(store):
    fill(store, 30, answers=5)
    room.change_settings(store, {"labellers_per_item": 2})
    orders = []
    for name in ("ada", "bo"):
        labeller = add_labeller(store, name)
        item = leases.next_item(store, labeller, NOW)
        assert leases.next_item(store, labeller, NOW)["answers"] == item["answers"]
        orders.append(item["answers"])
        judge_all(store, labeller)
    assert orders[0] != orders[1]
    assert all(line["ranking"] == [[0], [1], [2], [3], [4]] for line in export.rankings(store))


def test_a_skipped_item_is_somebody_elses_and_comes_back_by_undo(store):
    fill(store, 1)
    ada, bo = add_labeller(store, "ada"), add_labeller(store, "bo")
    item = leases.next_item(store, ada, NOW)
    leases.judge(store, ada, item["id"], skipped(flag="unclear", note="which fox?"), NOW)
    assert leases.next_item(store, ada, NOW) is None
    assert room.overview(store)["flags"] == [
        {"labeller": "ada", "item_id": item["id"], "flag": "unclear", "note": "which fox?"}
    ]
    assert leases.undo(store, ada, NOW)["judgement"]["note"] == "which fox?"
    assert leases.next_item(store, bo, NOW) is None
    leases.judge(store, ada, item["id"], skipped(), NOW)
    leases.next_item(store, bo, NOW)
    with pytest.raises(TakenError, match="taken over"):
        leases.undo(store, ada, NOW)


def test_undo_reopens_the_last_judgement_and_the_one_before(store):
    fill(store, 3)
    ada = add_labeller(store, "ada")
    items = []
    for i in range(2):
        items.append(leases.next_item(store, ada, NOW))
        leases.judge(store, ada, items[i]["id"], ranked(items[i], str, edits={"1": "mine"}), NOW + i)
    held = leases.next_item(store, ada, NOW)
    back = leases.undo(store, ada, NOW + 9)
    assert back["id"] == items[1]["id"]
    assert back["judgement"]["ranking"] == ranked(items[1], str)["ranking"]
    assert back["judgement"]["edits"] == {"1": "mine"}
    assert leases.next_item(store, ada, NOW + 9)["id"] == back["id"]
    assert leases.next_item(store, add_labeller(store, "bo"), NOW + 9)["id"] == held["id"]
    assert leases.undo(store, ada, NOW + 9)["id"] == items[0]["id"]
    assert list(export.rankings(store)) == []
    assert leases.undo(store, ada, NOW + 9) is None
    assert leases.progress(store, ada, NOW + 9) == {"done": 0, "left": 2}


def test_gold_items_come_once_in_so_many_and_to_every_labeller(store):
    room.change_settings(store, {"gold_every": 5, "labellers_per_item": 2})
    fill(store, 40)
    fill(store, 6, gold=True)
    first = {}
    for name, key in (("ada", str), ("bo", lambda text: -float(text))):
        judged = judge_all(store, add_labeller(store, name), key)
        with store.reading() as connection:
            prompts = [leases._item(connection, item_id)["prompt"] for item_id in judged]
        gold = [i for i, prompt in enumerate(prompts) if prompt.startswith("gold")]
        assert len(gold) == 6
        assert [place // 5 for place in gold] == list(range(6))  # one in each five
        first[name] = [place % 5 for place in gold]
        assert len(set(prompts)) == 46
    assert first["ada"] != first["bo"]
    figures = {row["name"]: row for row in room.overview(store)["labellers"]}
    assert (figures["ada"]["gold_accuracy"], figures["bo"]["gold_accuracy"]) == (1.0, 0.0)
    assert (figures["ada"]["gold_ranked"], figures["ada"]["ranked"]) == (6, 40)
    assert len(list(export.rankings(store))) == 80


def test_an_undone_gold_item_and_one_that_is_held_leave_nothing_behind(store):
    room.change_settings(store, {"gold_every": 1})
    fill(store, 2)
    fill(store, 1, gold=True)
    ada = add_labeller(store, "ada")
    gold = leases.next_item(store, ada, NOW)
    assert gold["prompt"].startswith("gold")
    leases.judge(store, ada, gold["id"], skipped(), NOW)
    held = leases.next_item(store, ada, NOW)
    assert leases.undo(store, ada, NOW)["id"] == gold["id"]
    leases.judge(store, ada, gold["id"], skipped(), NOW)
    assert leases.next_item(store, ada, NOW)["id"] == held["id"]
    labellers.end(store, ada)
    assert len(judge_all(store, add_labeller(store, "bo"))) == 3


def test_a_labeller_who_ends_gives_back_what_is_held_and_what_was_judged_stays(store):
    fill(store, 2)
    ada = add_labeller(store, "ada")
    item = leases.next_item(store, ada, NOW)
    leases.judge(store, ada, item["id"], ranked(item, str), NOW)
    leases.next_item(store, ada, NOW)
    labellers.end(store, ada)
    assert len(judge_all(store, add_labeller(store, "bo"))) == 1
    assert [line["labeller"] for line in export.rankings(store)] == ["ada", "bo"]


def test_more_or_fewer_labellers_per_item_change_what_is_open_and_keep_what_was_judged(store):
    fill(store, 3)
    ada, bo, cy = (add_labeller(store, name) for name in ("ada", "bo", "cy"))
    assert len(judge_all(store, ada)) == 3
    assert judge_all(store, bo) == []
    room.change_settings(store, {"labellers_per_item": 3})
    item = leases.next_item(store, bo, NOW)
    room.change_settings(store, {"labellers_per_item": 1})
    assert leases.next_item(store, cy, NOW) is None
    leases.judge(store, bo, item["id"], ranked(item, str), NOW)
    assert room.overview(store)["judgements"] == 4


def test_what_was_done_can_be_neither_changed_nor_removed(store):
    fill(store, 1)
    for text in ("UPDATE label_events SET actor = 'nobody'", "DELETE FROM label_events"):
        with pytest.raises(Exception, match="not changed or removed"), store.writing() as connection:
            connection.exec_driver_sql(text)
    assert [event["action"] for event in audit.events(store)] == ["import"]


def test_labellers_at_once_lose_nothing_and_get_nothing_twice(store):
    """Eight of them, some skipping and some taking back; and in the end each item has its two judgements."""
    room.change_settings(store, {"labellers_per_item": 2})
    fill(store, 60)
    people = [add_labeller(store, f"labeller {i}") for i in range(8)]
    held, lock, clashes = Counter(), threading.Lock(), []

    def work(number):
        labeller, rounds = people[number], 0
        while item := leases.next_item(store, labeller, NOW):
            with lock:
                held[item["id"]] += 1
                if held[item["id"]] > 2:
                    clashes.append(item["id"])
            rounds += 1
            with lock:
                held[item["id"]] -= 1
            leases.judge(store, labeller, item["id"], ranked(item, str), NOW + rounds)
            if rounds % 7 == number % 7:
                back = leases.undo(store, labeller, NOW + rounds)
                assert back["id"] == item["id"]
                leases.judge(store, labeller, item["id"], ranked(item, str), NOW + rounds)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = list(export.rankings(store))
    judged = Counter(line["prompt"] for line in lines)
    assert not clashes
    assert set(judged.values()) == {2}
    assert len(judged) == 60
    assert len({(line["prompt"], line["labeller"]) for line in lines}) == 120
    assert room.overview(store)["alpha"] == 1.0
