"""The tables: keys, sessions, conversations as trees of messages, and votes. The same in SQLite and PostgreSQL.

A change here needs a migration beside it (migrations/versions); tests/serve/test_store.py compares the two.
"""

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)
COUNTER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""SQLite numbers rows only in a column of type INTEGER."""


def _belongs_to(table: str, name: str, nullable: bool = True) -> sa.Column[str]:
    """A foreign key: its rows are deleted with the row that it names."""
    return sa.Column(
        name, sa.String(40), sa.ForeignKey(f"{table}.id", ondelete="CASCADE"), nullable=nullable, index=True
    )


keys = sa.Table(
    "keys",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
)

sessions = sa.Table(
    "sessions", metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("ends_at", sa.Float, nullable=False),
)  # fmt: skip

conversations = sa.Table(
    "conversations", metadata,
    sa.Column("place", COUNTER, sa.Identity(), primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("system", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("updated_at", sa.Float, nullable=False),
    sa.Index("ix_conversations_updated_at", "updated_at", "place"),
)  # fmt: skip

messages = sa.Table(
    "messages", metadata,
    sa.Column("place", COUNTER, sa.Identity(), primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    _belongs_to("conversations", "conversation_id", nullable=False),
    _belongs_to("messages", "parent_id"),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("model", sa.Text),
    sa.Column("model_digest", sa.String(64)),
    sa.Column("sampling", sa.JSON),
    sa.Column("finish_reason", sa.String(16)),
    sa.Column("created_at", sa.Float, nullable=False),
)  # fmt: skip

votes = sa.Table(
    "votes", metadata,
    sa.Column("place", COUNTER, sa.Identity(), primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("kind", sa.String(8), nullable=False),
    _belongs_to("conversations", "conversation_id", nullable=False),
    # One answer (thumb) or two (pair) in the order of their ids, so that a second vote finds and replaces the first.
    _belongs_to("messages", "message_id", nullable=False),
    _belongs_to("messages", "other_id"),
    sa.Column("value", sa.Integer),
    sa.Column("chosen_id", sa.String(40)),
    # The comparison as it was shown: it stays valid when the models change.
    sa.Column("prompt", sa.JSON, nullable=False),
    sa.Column("shown", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)  # fmt: skip
