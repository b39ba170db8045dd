"""Keys, sessions, conversations, messages, votes."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

COUNTER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Makes the tables."""
    op.create_table("keys", _text("sha256", 64), _time("created_at"), sa.PrimaryKeyConstraint("sha256", name="pk_keys"))
    op.create_table(
        "sessions", _text("sha256", 64), _time("ends_at"), sa.PrimaryKeyConstraint("sha256", name="pk_sessions")
    )
    _create_with_ids(
        "conversations",
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("system", sa.Text, nullable=False),
        _time("created_at"),
        _time("updated_at"),
        foreign_keys={},
    )
    op.create_index("ix_conversations_updated_at", "conversations", ["updated_at", "place"])
    _create_with_ids(
        "messages",
        _text("conversation_id", 40),
        sa.Column("parent_id", sa.String(40)),
        _text("role", 16),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("model_digest", sa.String(64)),
        sa.Column("sampling", sa.JSON),
        sa.Column("finish_reason", sa.String(16)),
        _time("created_at"),
        foreign_keys={"conversation_id": "conversations", "parent_id": "messages"},
    )
    op.create_index("ix_messages_conversation_id", "messages", ["conversation_id"])
    op.create_index("ix_messages_parent_id", "messages", ["parent_id"])
    _create_with_ids(
        "votes",
        _text("kind", 8),
        _text("conversation_id", 40),
        _text("message_id", 40),
        sa.Column("other_id", sa.String(40)),
        sa.Column("value", sa.Integer),
        sa.Column("chosen_id", sa.String(40)),
        sa.Column("prompt", sa.JSON, nullable=False),
        sa.Column("shown", sa.JSON, nullable=False),
        _time("created_at"),
        foreign_keys={"conversation_id": "conversations", "message_id": "messages", "other_id": "messages"},
    )
    for column in ("conversation_id", "message_id", "other_id"):
        op.create_index(f"ix_votes_{column}", "votes", [column])


def downgrade() -> None:
    """Removes them, and all that is in them."""
    for table in ("votes", "messages", "conversations", "sessions", "keys"):
        op.drop_table(table)


def _create_with_ids(table: str, *columns: sa.Column[Any], foreign_keys: dict[str, str]) -> None:
    """A table whose rows have a number, `place`, and an `id` for clients. `foreign_keys`: column -> table."""
    op.create_table(
        table,
        sa.Column("place", COUNTER, sa.Identity(), nullable=False),
        _text("id", 40),
        *columns,
        sa.PrimaryKeyConstraint("place", name=f"pk_{table}"),
        sa.UniqueConstraint("id", name=f"uq_{table}_id"),
        *(
            sa.ForeignKeyConstraint([column], [f"{target}.id"], name=f"fk_{table}_{column}", ondelete="CASCADE")
            for column, target in foreign_keys.items()
        ),
    )


def _text(column: str, length: int) -> sa.Column[str]:
    return sa.Column(column, sa.String(length), nullable=False)


def _time(column: str) -> sa.Column[float]:
    return sa.Column(column, sa.Float, nullable=False)
