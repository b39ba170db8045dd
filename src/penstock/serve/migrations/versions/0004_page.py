"""Pins, titles that people chose, tokens and seconds of answers, and which answer a person rewrote."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds the columns. A title that is there already may be a person's, and stays."""
    op.add_column("conversations", sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("conversations", sa.Column("named", sa.Boolean, nullable=False, server_default=sa.false()))
    op.execute("UPDATE conversations SET named = TRUE")
    op.drop_index("ix_conversations_updated_at", "conversations")
    op.create_index("ix_conversations_pinned", "conversations", ["pinned", "updated_at", "place"])
    op.add_column("messages", sa.Column("usage", sa.JSON))
    op.add_column("messages", sa.Column("edited_from", sa.String(40)))


def downgrade() -> None:
    """Removes them."""
    op.drop_column("messages", "edited_from")
    op.drop_column("messages", "usage")
    op.drop_index("ix_conversations_pinned", "conversations")
    op.create_index("ix_conversations_updated_at", "conversations", ["updated_at", "place"])
    op.drop_column("conversations", "named")
    op.drop_column("conversations", "pinned")
