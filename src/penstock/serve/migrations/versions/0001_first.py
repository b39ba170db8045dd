"""Keys, sessions, conversations, messages, votes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

COUNTER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "keys",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_keys"),
    )
    op.create_table(
        "sessions",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("ends_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_sessions"),
    )
    op.create_table(
        "conversations",
        sa.Column("place", COUNTER, sa.Identity(), nullable=False),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("system", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("place", name="pk_conversations"),
        sa.UniqueConstraint("id", name="uq_conversations_id"),
    )
    op.create_index("ix_conversations_updated_at", "conversations", ["updated_at", "place"])
    op.create_table(
        "messages",
        sa.Column("place", COUNTER, sa.Identity(), nullable=False),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("conversation_id", sa.String(40), nullable=False),
        sa.Column("parent_id", sa.String(40)),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("model_digest", sa.String(64)),
        sa.Column("sampling", sa.JSON),
        sa.Column("finish_reason", sa.String(16)),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("place", name="pk_messages"),
        sa.UniqueConstraint("id", name="uq_messages_id"),
        _belongs("messages", "conversation_id", "conversations"),
        _belongs("messages", "parent_id", "messages"),
    )
    op.create_index("ix_messages_conversation_id", "messages", ["conversation_id"])
    op.create_index("ix_messages_parent_id", "messages", ["parent_id"])
    op.create_table(
        "votes",
        sa.Column("place", COUNTER, sa.Identity(), nullable=False),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("conversation_id", sa.String(40), nullable=False),
        sa.Column("message_id", sa.String(40), nullable=False),
        sa.Column("other_id", sa.String(40)),
        sa.Column("value", sa.Integer),
        sa.Column("chosen_id", sa.String(40)),
        sa.Column("prompt", sa.JSON, nullable=False),
        sa.Column("shown", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("place", name="pk_votes"),
        sa.UniqueConstraint("id", name="uq_votes_id"),
        _belongs("votes", "conversation_id", "conversations"),
        _belongs("votes", "message_id", "messages"),
        _belongs("votes", "other_id", "messages"),
    )
    for column in ("conversation_id", "message_id", "other_id"):
        op.create_index(f"ix_votes_{column}", "votes", [column])


def downgrade() -> None:
    """Removes them, and all that is in them."""
    for table in ("votes", "messages", "conversations", "sessions", "keys"):
        op.drop_table(table)


def _belongs(table: str, column: str, other: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{other}.id"], name=f"fk_{table}_{column}", ondelete="CASCADE")
