"""Items that wait for the server: for answers of the models, or for what the reward models say of their answers."""

from collections.abc import Sequence

import sqlalchemy as sa

from penstock.serve.labelling import audit, room
from penstock.serve.labelling.transaction import changing
from penstock.serve.store import Row, Store
from penstock.serve.tables import label_items, label_slots

ITEM, SLOT = label_items.c, label_slots.c


def next_draft(store: Store) -> Row | None:
    """The first item without answers, but those where they failed."""
    query = sa.select(label_items).where(ITEM.draft.is_not(None), ITEM.problem.is_(None)).order_by(ITEM.place).limit(1)
    with store.reading() as connection:
        row = connection.execute(query).mappings().first()
    return None if row is None else dict(row)


def finish_draft(store: Store, item_id: str, answers: Sequence[Row]) -> None:
    """Gives an item its answers, and lets labellers have it."""
    with changing(store) as connection:
        change = sa.update(label_items).where(ITEM.id == item_id, ITEM.draft.is_not(None))
        if connection.execute(change.values(answers=list(answers), draft=None)).rowcount:
            room.add_slots(connection, item_id, room.settings_of(connection)["labellers_per_item"])
            models = sorted({str(answer["model"]) for answer in answers})
            audit.record(connection, audit.SERVER, "answers", item_id, answers=len(answers), models=models)


def fail_draft(store: Store, item_id: str, problem: str) -> None:
    """Says why an item gets no answers."""
    with changing(store) as connection:
        connection.execute(sa.update(label_items).where(ITEM.id == item_id).values(problem=problem))
        audit.record(connection, audit.SERVER, "no answers", item_id, problem=problem)


def unscored(store: Store, scorers: str, limit: int) -> list[Row]:
    """Open items of which these reward models have said nothing yet."""
    is_open = sa.exists().where(SLOT.item_id == ITEM.id, SLOT.outcome.is_(None))
    other = sa.or_(ITEM.scored_by.is_(None), ITEM.scored_by != scorers)
    query = sa.select(label_items).where(ITEM.gold.is_(None), ITEM.draft.is_(None), other, is_open)
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(query.order_by(ITEM.place).limit(limit)).mappings()]


def store_uncertainty(store: Store, values: dict[str, float | None], scorers: str) -> None:
    """Of items by id; None where the reward models cannot read an item."""
    with changing(store) as connection:
        for item_id, value in values.items():
            change = sa.update(label_items).where(ITEM.id == item_id)
            connection.execute(change.values(uncertainty=value, scored_by=scorers))
