"""What a labeller does: gets an item, judges or skips it, takes the last judgement back.

An item has a slot for each labeller that it shall have. Getting an item is one UPDATE of one slot, which writes who
holds it and until when; see [Note: the room's changes take turns].

[Note: a lease that ran out] The slot stays its holder's until somebody else gets it: who comes back late is not told
that the work is lost unless it is. Judging takes the holder's own slot, or else any open one of the item.
"""

import hashlib
from typing import Any

import sqlalchemy as sa

from penstock.serve.labelling import audit, labellers, room
from penstock.serve.labelling.room import ranks_of
from penstock.serve.labelling.transaction import changing
from penstock.serve.store import Row, Store, new_id
from penstock.serve.tables import label_items, label_slots

SLOT = label_slots.c
JUDGEMENT = ("ranking", "edits", "flag", "note")


class TakenError(ValueError):
    """Somebody else has the item by now, or the labeller has judged it already."""


def next_item(store: Store, labeller_id: str, now: float) -> Row | None:
    """The item that a labeller holds, or else a new one; None when nothing is left for this labeller.

    An item: id, prompt, answers (texts in this labeller's order), leased_until, and what was said before it was
    reopened (`judgement`). Raises LookupError for a labeller who is not there.
    """
    with changing(store) as connection:
        name = labellers.row_of(connection, labeller_id)["name"]
        settings = room.settings_of(connection)
        until = now + 60 * settings["lease_minutes"]
        slot = _hold(connection, labeller_id, until, SLOT.labeller_id == labeller_id)
        if slot is None:
            slot = _open_gold(connection, labeller_id, until, settings["gold_every"])
            slot = slot or _open_item(connection, labeller_id, now, until)
            if slot is None:
                return None
            audit.record(connection, name, "lease", slot["item_id"], until=until)
        return _shown(connection, slot)


def judge(store: Store, labeller_id: str, item_id: str, judgement: Row, now: float) -> None:
    """Stores a judgement: outcome (ranked or skipped), ranking (best first, ties nested, as the labeller's order
    numbers them), edits, flag, note, seconds. The same one again changes nothing.

    Raises LookupError without such an item, FieldError for a ranking that is none, TakenError where others have it.
    """
    with changing(store) as connection:
        name = labellers.row_of(connection, labeller_id)["name"]
        item = _item(connection, item_id)
        stored = _in_stored_order(judgement, item, labeller_id)
        earlier = _mine(connection, labeller_id, item_id)
        if earlier is not None and earlier["outcome"] is not None:
            if all(earlier[key] == stored[key] for key in ("outcome", *JUDGEMENT)):
                return
            raise TakenError("you have judged this item already; undo that first.")
        slot = _take(connection, labeller_id, item_id, now, stored)
        if slot is None:
            raise TakenError("the time for this item was over, and somebody else has it now; nothing was stored.")
        if stored["outcome"] == "skipped" and item["gold"] is None:
            room.add_slots(connection, item_id, 1)
        audit.record(connection, name, stored["outcome"], item_id, slot=slot, **_without(stored, "outcome"))


def undo(store: Store, labeller_id: str, now: float) -> Row | None:
    """Reopens a labeller's last judgement, and gives back what is held; None where nothing was judged.

    Raises TakenError for a skipped item that others have taken over.
    """
    with changing(store) as connection:
        name = labellers.row_of(connection, labeller_id)["name"]
        own = sa.and_(SLOT.labeller_id == labeller_id, SLOT.outcome.is_not(None))
        query = sa.select(label_slots).where(own).order_by(SLOT.judged_at.desc(), SLOT.place.desc()).limit(1)
        slot = connection.execute(query).mappings().first()
        if slot is None:
            return None
        item = _item(connection, slot["item_id"])
        if slot["outcome"] == "skipped" and item["gold"] is None:
            spare = _first(sa.and_(SLOT.item_id == item["id"], _is_open(now)))
            if not connection.execute(sa.delete(label_slots).where(SLOT.place == spare)).rowcount:
                raise TakenError("others have taken over the item that you skipped last.")
        labellers.release(connection, labeller_id)
        until = now + 60 * room.settings_of(connection)["lease_minutes"]
        changes = {"outcome": None, "judged_at": None, "leased_until": until}
        connection.execute(sa.update(label_slots).where(SLOT.place == slot["place"]).values(changes))
        audit.record(connection, name, "undo", item["id"], slot=slot["id"], outcome=slot["outcome"])
        return _shown(connection, {**slot, **changes})


def progress(store: Store, labeller_id: str, now: float) -> Row:
    """done: items that a labeller has ranked; left: those that this labeller can still get, the held one too."""
    with store.reading() as connection:
        own = SLOT.labeller_id == labeller_id
        count = sa.select(sa.func.count()).select_from(label_slots)
        done = connection.scalar(count.where(own, SLOT.outcome == "ranked"))
        held = connection.scalar(count.where(own, SLOT.outcome.is_(None)))
        free = sa.select(sa.func.count(sa.distinct(SLOT.item_id))).where(_is_new(labeller_id, now))
        return {"done": done, "left": (held or 0) + (connection.scalar(free) or 0)}


def order_for(item_id: str, labeller_id: str, count: int) -> list[int]:
    """In which order a labeller sees an item's answers: shuffled, the same at every look."""
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{item_id} {labeller_id} {i}".encode()).digest())


def is_gold_turn(labeller_id: str, judged: int, every: int) -> bool:
    """Whether an item with a known ranking comes after so many judged ones: one in `every`, at a place that a labeller
    cannot foresee."""
    if every == 0:
        return False
    window, place = divmod(judged, every)
    return place == int.from_bytes(hashlib.sha256(f"{labeller_id} {window}".encode()).digest()) % every


# --- slots ------------------------------------------------------------------------------------------------------------


def _is_open(now: float) -> sa.ColumnElement[bool]:
    return sa.and_(SLOT.outcome.is_(None), sa.or_(SLOT.labeller_id.is_(None), SLOT.leased_until < now))


def _is_new(labeller_id: str, now: float) -> sa.ColumnElement[bool]:
    """Open, of an item that tests nobody and of which the labeller has had no slot."""
    had = label_slots.alias("had")
    seen = sa.select(had.c.item_id).where(had.c.labeller_id == labeller_id)
    gold = sa.select(label_items.c.id).where(label_items.c.gold.is_not(None))
    return sa.and_(_is_open(now), SLOT.item_id.not_in(seen), SLOT.item_id.not_in(gold))


def _first(condition: sa.ColumnElement[bool], *order: Any) -> sa.ScalarSelect[int]:
    """The place of the first such slot."""
    query = sa.select(SLOT.place).join(label_items, label_items.c.id == SLOT.item_id).where(condition)
    query = query.order_by(*order, label_items.c.uncertainty.desc().nulls_last(), label_items.c.place, SLOT.place)
    return query.limit(1).correlate(None).scalar_subquery()


def _hold(connection: sa.Connection, labeller_id: str, until: float, which: sa.ColumnElement[bool]) -> Row | None:
    """Gives a labeller a slot until then."""
    values = {"labeller_id": labeller_id, "leased_until": until}
    change = sa.update(label_slots).where(which, SLOT.outcome.is_(None)).values(values).returning(label_slots)
    row = connection.execute(change).mappings().first()
    return None if row is None else dict(row)


def _open_item(connection: sa.Connection, labeller_id: str, now: float, until: float) -> Row | None:
    return _hold(connection, labeller_id, until, SLOT.place == _first(_is_new(labeller_id, now)))


def _open_gold(connection: sa.Connection, labeller_id: str, until: float, every: int) -> Row | None:
    """A slot of an item that tests the labeller, where it is time for one; only beside items that test nobody."""
    own = sa.select(SLOT.item_id).where(SLOT.labeller_id == labeller_id)
    judged = connection.scalar(sa.select(sa.func.count()).select_from(own.subquery())) or 0
    if not is_gold_turn(labeller_id, judged, every):
        return None
    unseen = sa.and_(label_items.c.gold.is_not(None), label_items.c.id.not_in(own))
    item_id = connection.scalar(sa.select(label_items.c.id).where(unseen).order_by(label_items.c.place).limit(1))
    if item_id is None:
        return None
    slot = {"id": new_id("slot"), "item_id": item_id, "labeller_id": labeller_id, "leased_until": until}
    connection.execute(sa.insert(label_slots).values(slot))
    return {**slot, **dict.fromkeys(JUDGEMENT)}


def _mine(connection: sa.Connection, labeller_id: str, item_id: str) -> Row | None:
    query = sa.select(label_slots).where(SLOT.labeller_id == labeller_id, SLOT.item_id == item_id)
    row = connection.execute(query).mappings().first()
    return None if row is None else dict(row)


def _take(connection: sa.Connection, labeller_id: str, item_id: str, now: float, judgement: Row) -> str | None:
    """Writes a judgement into the labeller's slot of an item, or into an open one. Returns the slot's id."""
    is_mine = sa.and_(SLOT.labeller_id == labeller_id, SLOT.outcome.is_(None))
    is_free = sa.and_(_is_open(now), SLOT.item_id.in_(sa.select(label_items.c.id).where(label_items.c.gold.is_(None))))
    slot = _first(sa.and_(SLOT.item_id == item_id, sa.or_(is_mine, is_free)), is_mine.desc().nulls_last())
    values = {"labeller_id": labeller_id, "leased_until": None, "judged_at": now, **judgement}
    return connection.scalar(sa.update(label_slots).where(SLOT.place == slot).values(values).returning(SLOT.id))


# --- items ------------------------------------------------------------------------------------------------------------


def _item(connection: sa.Connection, item_id: str) -> Row:
    row = connection.execute(sa.select(label_items).where(label_items.c.id == item_id)).mappings().first()
    if row is None:
        raise LookupError("there is no such item; the owner may have removed it.")
    return dict(row)


def _shown(connection: sa.Connection, slot: Row) -> Row:
    """An item as its labeller sees it: nothing says who wrote an answer, or whether the ranking is known."""
    item, labeller_id = _item(connection, slot["item_id"]), slot["labeller_id"]
    order = order_for(item["id"], labeller_id, len(item["answers"]))
    judgement = None
    if slot["ranking"] is not None or slot["note"] is not None or slot["flag"] is not None:
        position = {index: place for place, index in enumerate(order)}
        judgement = {key: slot[key] for key in JUDGEMENT} | {
            "ranking": slot["ranking"] and [[position[index] for index in level] for level in slot["ranking"]],
            "edits": {str(position[int(index)]): text for index, text in (slot["edits"] or {}).items()},
        }
    return {
        "id": item["id"], "prompt": item["prompt"], "answers": [item["answers"][index]["content"] for index in order],
        "leased_until": slot["leased_until"], "judgement": judgement,
    }  # fmt: skip


def _in_stored_order(judgement: Row, item: Row, labeller_id: str) -> Row:
    """A judgement whose numbers are those of the stored answers. Raises FieldError for a ranking that is none."""
    order = order_for(item["id"], labeller_id, len(item["answers"]))
    texts = [item["answers"][index]["content"] for index in order]
    ranking = judgement["ranking"]
    if ranking is not None:
        ranks = ranks_of(ranking, texts)
        ranking = [sorted(order[i] for i in range(len(order)) if ranks[i] == level) for level in sorted(set(ranks))]
    edits = {str(order[int(place)]): text for place, text in judgement["edits"].items() if int(place) < len(order)}
    return {**judgement, "ranking": ranking, "edits": edits}


def _without(row: Row, *names: str) -> Row:
    return {key: value for key, value in row.items() if key not in names and value not in (None, {}, "")}
