"""The labelling room as the owner sees it: its settings, items with a slot for each labeller they shall have, figures.

Raises LookupError for what is not there, as the store does.
"""

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from penstock.data import field_checks
from penstock.serve.labelling import agreement, audit
from penstock.serve.labelling.transaction import changing
from penstock.serve.store import Row, Store, new_id
from penstock.serve.tables import label_items, label_settings, label_slots, labellers

SETTINGS = {"guidelines": "", "labellers_per_item": 1, "lease_minutes": 30, "gold_every": 10}
ITEM, SLOT = label_items.c, label_slots.c
MOST_FLAGS = 200
"""Flagged judgements that an overview lists, the newest."""


def settings_of(connection: sa.Connection) -> Row:
    row = connection.execute(sa.select(label_settings)).mappings().first()
    return dict(SETTINGS) if row is None else {name: row[name] for name in SETTINGS}


def settings(store: Store) -> Row:
    """guidelines, labellers_per_item, lease_minutes, gold_every: one in so many items tests the labeller; 0: none."""
    with store.reading() as connection:
        return settings_of(connection)


def change_settings(store: Store, changes: Row) -> Row:
    """Sets some of them. Items that are there already get and lose open slots as labellers_per_item changes."""
    with changing(store) as connection:
        values = {**settings_of(connection), **changes}
        connection.execute(sa.delete(label_settings))
        connection.execute(sa.insert(label_settings).values(place=1, **values))
        if "labellers_per_item" in changes:
            _fit_slots(connection, values["labellers_per_item"])
        audit.record(connection, audit.OWNER, "settings", **changes)
        return values


def add_items(store: Store, items: Collection[Row]) -> int:
    """Stores items that are not there yet: digest, source_id, prompt, answers, gold, draft. Returns how many are."""
    with changing(store) as connection:
        digests = [item["digest"] for item in items]
        stored = set(connection.scalars(sa.select(ITEM.digest).where(ITEM.digest.in_(digests))))
        fresh = {item["digest"]: item for item in items if item["digest"] not in stored}
        count = settings_of(connection)["labellers_per_item"]
        for item in fresh.values():
            row = {"id": new_id("item"), "created_at": time.time(), **item}
            connection.execute(sa.insert(label_items).values(row))
            if item["gold"] is None and item["answers"]:
                add_slots(connection, row["id"], count)
        gold = sum(item["gold"] is not None for item in fresh.values())
        audit.record(connection, audit.OWNER, "import", items=len(fresh), gold=gold)
        return len(fresh)


def remove_item(store: Store, item_id: str) -> None:
    """Removes an item with its judgements; the audit trail keeps them. Raises LookupError."""
    with changing(store) as connection:
        if not connection.execute(sa.delete(label_items).where(ITEM.id == item_id)).rowcount:
            raise LookupError("there is no such item.")
        audit.record(connection, audit.OWNER, "remove", item_id)


def add_slots(connection: sa.Connection, item_id: str, count: int) -> None:
    """Lets so many more labellers judge an item."""
    if count > 0:
        rows = [{"id": new_id("slot"), "item_id": item_id} for _ in range(count)]
        connection.execute(sa.insert(label_slots), rows)


def ranks_of(ranking: Any, answers: Sequence[Any]) -> tuple[int, ...]:
    """[best, ..., worst], ties nested -> a rank per answer. Raises FieldError for a ranking that is none."""
    return field_checks.ranks(ranking, answers)


def overview(store: Store) -> Row:
    """Figures for the owner: items, judgements, agreement, each labeller's, what was flagged."""
    with store.reading() as connection:
        items = {row.id: row for row in connection.execute(sa.select(ITEM.id, ITEM.gold, ITEM.draft, ITEM.problem))}
        query = sa.select(
            SLOT.item_id, SLOT.labeller_id, SLOT.outcome, SLOT.ranking, SLOT.seconds, SLOT.flag, SLOT.note,
            SLOT.judged_at,
        )  # fmt: skip
        slots = [dict(row) for row in connection.execute(query.order_by(SLOT.place)).mappings()]
        people = [dict(row) for row in connection.execute(sa.select(labellers).order_by(labellers.c.place)).mappings()]
    ranked = [slot for slot in slots if slot["outcome"] == "ranked" and items[slot["item_id"]].gold is None]
    open_ids = {slot["item_id"] for slot in slots if slot["outcome"] is None and items[slot["item_id"]].gold is None}
    names = {row["id"]: row["name"] for row in people}
    flags = [slot for slot in slots if slot["flag"] is not None and slot["outcome"] is not None]
    return {
        "items": sum(row.gold is None and row.draft is None for row in items.values()),
        "gold_items": sum(row.gold is not None for row in items.values()),
        "drafts": sum(row.draft is not None and row.problem is None for row in items.values()),
        "problems": [{"item_id": row.id, "problem": row.problem} for row in items.values() if row.problem][:MOST_FLAGS],
        "open_items": len(open_ids),
        "judgements": len(ranked),
        **_agreement(ranked),
        "labellers": [_figures(row, slots, items) for row in people],
        "flags": [
            {"labeller": names[slot["labeller_id"]], **{key: slot[key] for key in ("item_id", "flag", "note")}}
            for slot in sorted(flags, key=lambda slot: slot["judged_at"], reverse=True)[:MOST_FLAGS]
        ],
    }  # fmt: skip


def _agreement(ranked: Iterable[Row]) -> Row:
    """Over the items that two or more labellers have ranked."""
    by_item = defaultdict(list)
    for slot in ranked:
        by_item[slot["item_id"]].append(_ranks(slot["ranking"]))
    rankings = [ranks for ranks in by_item.values() if len(ranks) > 1]
    return {
        "alpha": agreement.alpha(agreement.units_of(rankings)),
        "pair_agreement": agreement.pair_agreement(rankings),
        "items_compared": len(rankings),
    }


def _figures(labeller: Row, slots: Iterable[Row], items: dict[str, Any]) -> Row:
    """What the owner sees of a labeller."""
    judged = [slot for slot in slots if slot["labeller_id"] == labeller["id"] and slot["outcome"] is not None]
    ranked = [slot for slot in judged if slot["outcome"] == "ranked"]
    gold = [(items[slot["item_id"]].gold, slot["ranking"]) for slot in ranked if items[slot["item_id"]].gold]
    seconds = sorted(slot["seconds"] for slot in ranked if slot["seconds"] is not None)
    return {
        "id": labeller["id"],
        "name": labeller["name"],
        "active": labeller["sha256"] is not None or labeller["name"] == audit.OWNER,
        "ranked": len(ranked) - len(gold),
        "skipped": len(judged) - len(ranked),
        "gold_ranked": len(gold),
        "gold_accuracy": agreement.gold_accuracy([(_ranks(known), _ranks(ranking)) for known, ranking in gold]),
        "median_seconds": seconds[len(seconds) // 2] if seconds else None,
    }


def _ranks(ranking: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Of a stored ranking, whose levels are lists."""
    levels = {index: level for level, indices in enumerate(ranking) for index in indices}
    return tuple(levels[index] for index in range(len(levels)))


def _fit_slots(connection: sa.Connection, wanted: int) -> None:
    """Gives every item as many slots that were not skipped as wanted; slots that somebody has are kept."""
    kept = sa.or_(SLOT.outcome.is_(None), SLOT.outcome == "ranked")
    counts = sa.select(ITEM.id, sa.func.count(SLOT.id)).outerjoin(label_slots, sa.and_(SLOT.item_id == ITEM.id, kept))
    query = counts.where(ITEM.gold.is_(None), ITEM.draft.is_(None)).group_by(ITEM.id)
    for item_id, count in connection.execute(query).all():
        add_slots(connection, item_id, wanted - count)
        if count > wanted:
            spare = sa.select(SLOT.place).where(
                SLOT.item_id == item_id, SLOT.labeller_id.is_(None), SLOT.outcome.is_(None)
            )
            places = spare.order_by(SLOT.place.desc()).limit(count - wanted)
            connection.execute(sa.delete(label_slots).where(SLOT.place.in_(list(connection.scalars(places)))))
