"""The audit trail of the labelling room: who did what to which item, and when. Rows are added and never changed."""

import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from penstock.serve.store import Row, Store
from penstock.serve.tables import label_events

OWNER, SERVER = "owner", "server"
"""The actors that are no labellers."""


def record(connection: sa.Connection, actor: str, action: str, item_id: str | None = None, **detail: Any) -> None:
    """Adds an event to the transaction of what it tells."""
    event = {"at": time.time(), "actor": actor, "action": action, "item_id": item_id, "detail": detail}
    connection.execute(sa.insert(label_events).values(event))


def events(store: Store) -> Iterator[Row]:
    """All of it, oldest first."""
    query = sa.select(label_events).order_by(label_events.c.place)
    with store.reading() as connection:
        for row in connection.execute(query, execution_options={"yield_per": 1000}).mappings():
            yield dict(row)
