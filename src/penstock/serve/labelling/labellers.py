"""Labellers: people with a name and a token that opens the labelling room alone. Tokens are stored as hashes."""

import time

import sqlalchemy as sa

from penstock.serve.labelling import audit
from penstock.serve.labelling.transaction import changing
from penstock.serve.store import Row, Store, new_id
from penstock.serve.tables import label_items, label_slots, labellers, sessions


def add(store: Store, name: str, sha256: str) -> Row:
    """A labeller with this token; for a name that is there already the token is a new one, and sessions end."""
    with changing(store) as connection:
        row = _named(connection, name)
        if row is None:
            row = _insert(connection, name)
        connection.execute(sa.update(labellers).where(labellers.c.id == row["id"]).values(sha256=sha256))
        connection.execute(sa.delete(sessions).where(sessions.c.labeller_id == row["id"]))
        audit.record(connection, audit.OWNER, "token", name=name)
    return row


def end(store: Store, labeller_id: str) -> None:
    """Takes a labeller's token and sessions away, and gives back what is held. Raises LookupError."""
    with changing(store) as connection:
        row = row_of(connection, labeller_id)
        connection.execute(sa.update(labellers).where(labellers.c.id == labeller_id).values(sha256=None))
        connection.execute(sa.delete(sessions).where(sessions.c.labeller_id == labeller_id))
        release(connection, labeller_id)
        audit.record(connection, audit.OWNER, "end labeller", name=row["name"])


def release(connection: sa.Connection, labeller_id: str) -> None:
    """Gives back what a labeller holds and has not judged."""
    held = sa.and_(label_slots.c.labeller_id == labeller_id, label_slots.c.outcome.is_(None))
    gold = sa.select(label_items.c.id).where(label_items.c.gold.is_not(None))
    connection.execute(sa.delete(label_slots).where(held, label_slots.c.item_id.in_(gold)))  # made for this labeller
    connection.execute(sa.update(label_slots).where(held).values(labeller_id=None, leased_until=None))


def row_of(connection: sa.Connection, labeller_id: str) -> Row:
    """Raises LookupError."""
    row = connection.execute(sa.select(labellers).where(labellers.c.id == labeller_id)).mappings().first()
    if row is None:
        raise LookupError("there is no such labeller.")
    return dict(row)


def name_of(store: Store, labeller_id: str) -> str:
    """Raises LookupError."""
    with store.reading() as connection:
        return row_of(connection, labeller_id)["name"]


def owner(store: Store) -> str:
    """The id under which the owner labels; made when first needed."""
    with store.reading() as connection:
        row = _named(connection, audit.OWNER)
    if row is None:
        with changing(store) as connection:
            row = _named(connection, audit.OWNER) or _insert(connection, audit.OWNER)
    return row["id"]


def token_hashes(store: Store) -> dict[str, str]:
    """Hash of each valid token -> its labeller."""
    query = sa.select(labellers.c.sha256, labellers.c.id).where(labellers.c.sha256.is_not(None))
    with store.reading() as connection:
        return {row.sha256: row.id for row in connection.execute(query)}


def _named(connection: sa.Connection, name: str) -> Row | None:
    row = connection.execute(sa.select(labellers).where(labellers.c.name == name)).mappings().first()
    return None if row is None else dict(row)


def _insert(connection: sa.Connection, name: str) -> Row:
    row = {"id": new_id("lab"), "name": name, "sha256": None, "created_at": time.time()}
    connection.execute(sa.insert(labellers).values(row))
    return row
