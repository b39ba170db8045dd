"""The tables: keys, sessions, conversations as trees of messages, votes, and those of the labelling room.

The same in SQLite and PostgreSQL.

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
    _belongs_to("labellers", "labeller_id"),  # null: the owner's
)  # fmt: skip

conversations = sa.Table(
    "conversations", metadata,
    sa.Column("place", COUNTER, sa.Identity(), primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("system", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("updated_at", sa.Float, nullable=False),
    sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
    # Whether a person chose the title: no model changes it then.
    sa.Column("named", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Index("ix_conversations_pinned", "pinned", "updated_at", "place"),
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
    # Of an answer: tokens of its prompt and its own, and the seconds that those took.
    sa.Column("usage", sa.JSON),
    # The answer that a person rewrote into this one. No foreign key: it is one, and learned as one, without the first.
    sa.Column("edited_from", sa.String(40)),
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

# --- the labelling room -----------------------------------------------------------------------------------------------

labellers = sa.Table(
    "labellers", metadata,
    sa.Column("place", COUNTER, sa.Identity(), primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("name", sa.String(60), nullable=False, unique=True),
    sa.Column("sha256", sa.String(64), unique=True),  # of the token; null: none is valid
    sa.Column("created_at", sa.Float, nullable=False),
)  # fmt: skip

label_settings = sa.Table(
    "label_settings", metadata,
    sa.Column("place", sa.Integer, primary_key=True),  # 1: there is one row
    sa.Column("guidelines", sa.Text, nullable=False),
    sa.Column("labellers_per_item", sa.Integer, nullable=False),
    sa.Column("lease_minutes", sa.Integer, nullable=False),
    sa.Column("gold_every", sa.Integer, nullable=False),
)  # fmt: skip

label_items = sa.Table(
    "label_items", metadata,
    sa.Column("place", COUNTER, sa.Identity(), primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),  # of what was imported: the same comes in once
    sa.Column("source_id", sa.Text, nullable=False),  # its id in the file that it came from
    sa.Column("prompt", sa.JSON, nullable=False),  # a text, or turns
    sa.Column("answers", sa.JSON, nullable=False),  # objects with content, and what made them; none yet: see draft
    sa.Column("gold", sa.JSON(none_as_null=True)),  # the known ranking of an item that tests labellers
    sa.Column("draft", sa.JSON(none_as_null=True)),  # how its answers are to be made
    sa.Column("problem", sa.Text),  # why they could not be made
    sa.Column("uncertainty", sa.Float),  # of the reward models; larger comes first
    sa.Column("scored_by", sa.String(64)),
    sa.Column("created_at", sa.Float, nullable=False),
)  # fmt: skip

label_slots = sa.Table(
    "label_slots", metadata,
    sa.Column("place", COUNTER, sa.Identity(), primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    _belongs_to("label_items", "item_id", nullable=False),
    _belongs_to("labellers", "labeller_id"),  # who holds it, or has judged; null: open
    sa.Column("leased_until", sa.Float),
    sa.Column("outcome", sa.String(8)),  # ranked or skipped; null: open or held
    sa.Column("ranking", sa.JSON(none_as_null=True)),
    sa.Column("edits", sa.JSON(none_as_null=True)),
    sa.Column("flag", sa.String(16)),
    sa.Column("note", sa.Text),
    sa.Column("seconds", sa.Float),
    sa.Column("judged_at", sa.Float),
    sa.UniqueConstraint("item_id", "labeller_id", name="uq_label_slots_item_labeller"),
)  # fmt: skip

label_events = sa.Table(
    "label_events", metadata,
    sa.Column("place", COUNTER, sa.Identity(), primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("actor", sa.String(60), nullable=False),  # a labeller's name, owner, or server
    sa.Column("action", sa.String(24), nullable=False),
    sa.Column("item_id", sa.String(40)),  # no foreign key: what was done stays when the item goes
    sa.Column("detail", sa.JSON, nullable=False),
)  # fmt: skip
"""Rows are added and never changed or removed: triggers refuse both."""
