"""The tables: keys, sessions, conversations as trees of messages, and votes. The same in SQLite and PostgreSQL.

A change here needs a migration beside it (migrations/versions); tests/serve/test_store.py compares the two.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)
COUNTER = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts only in a column that is called INTEGER."""


def _belongs_to(table: str, name: str, nullable: bool = True) -> Column[str]:
    """A column that names a row of that table, and goes with it."""
    return Column(name, String(40), ForeignKey(f"{table}.id", ondelete="CASCADE"), nullable=nullable, index=True)


keys = Table(
    "keys", metadata, Column("sha256", String(64), primary_key=True), Column("created_at", Float, nullable=False)
)

sessions = Table(
    "sessions", metadata,
    Column("sha256", String(64), primary_key=True),
    Column("ends_at", Float, nullable=False),
)  # fmt: skip

conversations = Table(
    "conversations", metadata,
    Column("place", COUNTER, Identity(), primary_key=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("title", Text, nullable=False),
    Column("system", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Index("ix_conversations_updated_at", "updated_at", "place"),
)  # fmt: skip

messages = Table(
    "messages", metadata,
    Column("place", COUNTER, Identity(), primary_key=True),
    Column("id", String(40), nullable=False, unique=True),
    _belongs_to("conversations", "conversation_id", nullable=False),
    _belongs_to("messages", "parent_id"),
    Column("role", String(16), nullable=False),
    Column("content", Text, nullable=False),
    Column("model", Text),
    Column("model_digest", String(64)),
    Column("sampling", JSON),
    Column("finish_reason", String(16)),
    Column("created_at", Float, nullable=False),
)  # fmt: skip

votes = Table(
    "votes", metadata,
    Column("place", COUNTER, Identity(), primary_key=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("kind", String(8), nullable=False),
    _belongs_to("conversations", "conversation_id", nullable=False),
    # What was voted on: one answer (thumb) or two (pair), in the order of their ids, so that a second vote replaces.
    _belongs_to("messages", "message_id", nullable=False),
    _belongs_to("messages", "other_id"),
    Column("value", Integer),
    Column("chosen_id", String(40)),
    # The comparison itself, as it was seen: it stays true whatever becomes of the models.
    Column("prompt", JSON, nullable=False),
    Column("shown", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
)  # fmt: skip
