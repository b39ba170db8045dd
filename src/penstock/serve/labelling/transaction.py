"""Changes of the room, which take turns: SQLite has one writer at a time, and PostgreSQL gets a lock that says so.

[Note: the room's changes take turns] What a labeller may have depends on many rows. Rows that are locked one by one,
with those passed over that others look at, let a labeller go home while a place was open. People are slow enough.
"""

import contextlib
from collections.abc import Iterator

import sqlalchemy as sa

from penstock.serve.store import Store

LOCK = 20_220_305
"""Of PostgreSQL's advisory locks: the one of migrations, and one."""


@contextlib.contextmanager
def changing(store: Store) -> Iterator[sa.Connection]:
    """A transaction, while no other changes the room."""
    with store.writing() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        yield connection
