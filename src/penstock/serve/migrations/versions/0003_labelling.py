"""The labelling room: labellers with tokens and sessions, items, who holds or judged them, and what was done."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0001"

COUNTER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Makes the tables."""
    _create(
        "labellers",
        _text("id", 40),
        _text("name", 60),
        sa.Column("sha256", sa.String(64)),
        _time("created_at"),
        unique=("id", "name", "sha256"),
    )
    with op.batch_alter_table("sessions") as sessions:
        sessions.add_column(sa.Column("labeller_id", sa.String(40)))
        sessions.create_foreign_key("fk_sessions_labeller_id", "labellers", ["labeller_id"], ["id"], ondelete="CASCADE")
        sessions.create_index("ix_sessions_labeller_id", ["labeller_id"])
    _create_items()
    _create_slots()
    _keep_events()


def downgrade() -> None:
    """Removes them, and all that is in them."""
    for table in ("label_events", "label_slots", "label_items", "label_settings"):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION penstock_keeps_events")
    with op.batch_alter_table("sessions") as sessions:
        sessions.drop_index("ix_sessions_labeller_id")
        sessions.drop_constraint("fk_sessions_labeller_id", type_="foreignkey")
        sessions.drop_column("labeller_id")
    op.drop_table("labellers")


def _create_items() -> None:
    op.create_table(
        "label_settings",
        sa.Column("place", sa.Integer, nullable=False),
        sa.Column("guidelines", sa.Text, nullable=False),
        *(
            sa.Column(name, sa.Integer, nullable=False)
            for name in ("labellers_per_item", "lease_minutes", "gold_every")
        ),
        sa.PrimaryKeyConstraint("place", name="pk_label_settings"),
    )
    _create(
        "label_items",
        _text("id", 40),
        _text("digest", 64),
        sa.Column("source_id", sa.Text, nullable=False),
        *(sa.Column(name, sa.JSON, nullable=False) for name in ("prompt", "answers")),
        *(sa.Column(name, sa.JSON) for name in ("gold", "draft")),
        sa.Column("problem", sa.Text),
        sa.Column("uncertainty", sa.Float),
        sa.Column("scored_by", sa.String(64)),
        _time("created_at"),
        unique=("id", "digest"),
    )


def _create_slots() -> None:
    _create(
        "label_slots",
        _text("id", 40),
        _text("item_id", 40),
        sa.Column("labeller_id", sa.String(40)),
        sa.Column("leased_until", sa.Float),
        sa.Column("outcome", sa.String(8)),
        *(sa.Column(name, sa.JSON) for name in ("ranking", "edits")),
        sa.Column("flag", sa.String(16)),
        sa.Column("note", sa.Text),
        *(sa.Column(name, sa.Float) for name in ("seconds", "judged_at")),
        sa.UniqueConstraint("item_id", "labeller_id", name="uq_label_slots_item_labeller"),
        *(
            sa.ForeignKeyConstraint([column], [f"{table}.id"], name=f"fk_label_slots_{column}", ondelete="CASCADE")
            for column, table in (("item_id", "label_items"), ("labeller_id", "labellers"))
        ),
        unique=("id",),
    )
    for column in ("item_id", "labeller_id"):
        op.create_index(f"ix_label_slots_{column}", "label_slots", [column])


def _keep_events() -> None:
    """What was done: the database itself refuses to change or remove it."""
    text = "what was done in the labelling room is not changed or removed"
    _create(
        "label_events",
        _time("at"),
        _text("actor", 60),
        _text("action", 24),
        sa.Column("item_id", sa.String(40)),
        sa.Column("detail", sa.JSON, nullable=False),
        unique=(),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION penstock_keeps_events() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{text}'; END $$"
        )
        op.execute(
            "CREATE TRIGGER label_events_stay BEFORE UPDATE OR DELETE ON label_events "
            "FOR EACH ROW EXECUTE FUNCTION penstock_keeps_events()"
        )
        return
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER label_events_stay_{change.lower()} BEFORE {change} ON label_events "
            f"BEGIN SELECT RAISE(ABORT, '{text}'); END"
        )


def _create(table: str, *columns: Any, unique: tuple[str, ...]) -> None:
    """A table whose rows have a number, `place`."""
    op.create_table(
        table,
        sa.Column("place", COUNTER, sa.Identity(), nullable=False),
        *columns,
        sa.PrimaryKeyConstraint("place", name=f"pk_{table}"),
        *(sa.UniqueConstraint(column, name=f"uq_{table}_{column}") for column in unique),
    )


def _text(column: str, length: int) -> sa.Column[str]:
    return sa.Column(column, sa.String(length), nullable=False)


def _time(column: str) -> sa.Column[float]:
    return sa.Column(column, sa.Float, nullable=False)
