"""What a server remembers, in SQLite (WAL, beside the runs) or PostgreSQL: rows in and out as plain dicts.

Every method is one transaction and may be called from any thread. Nothing here knows HTTP: what is not there is a
LookupError, what cannot be is a ValueError, and both say it in words.
"""

import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, and_, create_engine, delete, event, func, insert, or_, select, update
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError

from penstock.errors import DataError, UserError
from penstock.serve.tables import conversations, keys, messages, sessions, votes

ID = re.compile(r"[a-z]+_[0-9a-f]{24}")
TITLE_LENGTH = 60
"""Characters of the first message that become a conversation's title."""
MOST_TURNS = 100_000
"""Messages of a conversation that are read."""

Row = dict[str, Any]
CONVERSATION = ("id", "title", "system", "created_at", "updated_at")
MESSAGE = ("id", "conversation_id", "parent_id", "role", "content", "model", "sampling", "finish_reason", "created_at")
VOTE = ("id", "kind", "conversation_id", "message_id", "other_id", "value", "chosen_id", "created_at")


class Store:
    """An open database. Make it with `open_store`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()

    # --- keys and sessions --------------------------------------------------------------------------------------------

    def key_hashes(self) -> list[str]:
        """sha256 of every key."""
        with self._engine.connect() as connection:
            return list(connection.scalars(select(keys.c.sha256)))

    def replace_key(self, sha256: str) -> None:
        """Makes this the only key and ends all sessions."""
        with self._engine.begin() as connection:
            connection.execute(delete(sessions))
            connection.execute(delete(keys))
            connection.execute(insert(keys).values(sha256=sha256, created_at=time.time()))

    def add_session(self, sha256: str, ends_at: float) -> None:
        """Keeps a session, and forgets those that have ended."""
        with self._engine.begin() as connection:
            connection.execute(delete(sessions).where(sessions.c.ends_at < time.time()))
            connection.execute(insert(sessions).values(sha256=sha256, ends_at=ends_at))

    def session_ends(self, sha256: str) -> float | None:
        """When a session ends (seconds since 1970), or None if there is no such session."""
        with self._engine.connect() as connection:
            return connection.scalar(select(sessions.c.ends_at).where(sessions.c.sha256 == sha256))

    def remove_session(self, sha256: str) -> None:
        """Ends a session."""
        with self._engine.begin() as connection:
            connection.execute(delete(sessions).where(sessions.c.sha256 == sha256))

    # --- conversations ------------------------------------------------------------------------------------------------

    def list_conversations(self, limit: int, before: str | None) -> tuple[list[Row], bool]:
        """The most recently used ones, from behind `before` on, and whether there are more."""
        table = conversations
        wanted = select(table).order_by(table.c.updated_at.desc(), table.c.place.desc()).limit(limit + 1)
        with self._engine.connect() as connection:
            if before is not None:
                last = _conversation(connection, before)
                earlier = and_(table.c.updated_at == last["updated_at"], table.c.place < last["place"])
                wanted = wanted.where(or_(table.c.updated_at < last["updated_at"], earlier))
            rows = [_only(row, CONVERSATION) for row in connection.execute(wanted).mappings()]
        return rows[:limit], len(rows) > limit

    def add_conversation(self, title: str, system: str) -> Row:
        """A new conversation without messages; it is named by its first one if `title` is empty."""
        now = time.time()
        row = {"id": _new_id("conv"), "title": title, "system": system, "created_at": now, "updated_at": now}
        with self._engine.begin() as connection:
            connection.execute(insert(conversations).values(row))
        return row

    def conversation(self, conversation_id: str) -> Row:
        """One conversation."""
        with self._engine.connect() as connection:
            return _only(_conversation(connection, conversation_id), CONVERSATION)

    def change_conversation(self, conversation_id: str, changes: Row) -> Row:
        """Sets its title or system prompt."""
        with self._engine.begin() as connection:
            _conversation(connection, conversation_id)
            if changes:
                connection.execute(update(conversations).where(conversations.c.id == conversation_id).values(changes))
            return _only(_conversation(connection, conversation_id), CONVERSATION)

    def remove_conversation(self, conversation_id: str) -> None:
        """Removes it with its messages and votes."""
        with self._engine.begin() as connection:
            _conversation(connection, conversation_id)
            connection.execute(delete(conversations).where(conversations.c.id == conversation_id))

    # --- messages -----------------------------------------------------------------------------------------------------

    def messages(self, conversation_id: str) -> list[Row]:
        """The whole tree, oldest first."""
        with self._engine.connect() as connection:
            _conversation(connection, conversation_id)
            wanted = select(messages).where(messages.c.conversation_id == conversation_id).order_by(messages.c.place)
            return [_only(row, MESSAGE) for row in connection.execute(wanted.limit(MOST_TURNS)).mappings()]

    def add_message(
        self, conversation_id: str, parent_id: str | None, role: str, content: str, *, model: str | None = None,
        model_digest: str | None = None, sampling: Row | None = None,
    ) -> Row:  # fmt: skip
        """A new message under a parent: a user's under an answer or at the top, an answer under a user's.

        Raises ValueError when it does not fit there.
        """
        now = time.time()
        row = {
            "id": _new_id("msg"), "conversation_id": conversation_id, "parent_id": parent_id, "role": role,
            "content": content, "model": model, "model_digest": model_digest, "sampling": sampling,
            "finish_reason": None, "created_at": now,
        }  # fmt: skip
        with self._engine.begin() as connection:
            talk = _conversation(connection, conversation_id)
            parent = None if parent_id is None else _message(connection, parent_id, conversation_id)
            if role == "assistant" and (parent is None or parent["role"] != "user"):
                raise ValueError("an answer belongs under a user's message.")
            if role == "user" and parent is not None and parent["role"] != "assistant":
                raise ValueError("a user's message belongs under an answer, or at the top (parent_id null).")
            connection.execute(insert(messages).values(row))
            changes: Row = {"updated_at": now}
            if not talk["title"] and role == "user":
                changes["title"] = " ".join(content.split())[:TITLE_LENGTH]
            connection.execute(update(conversations).where(conversations.c.id == conversation_id).values(changes))
        return _only(row, MESSAGE)

    def end_message(self, message_id: str, content: str, finish_reason: str) -> Row | None:
        """What an answer came to, and why it ended; None when it has been deleted meanwhile."""
        with self._engine.begin() as connection:
            changes = {"content": content, "finish_reason": finish_reason}
            connection.execute(update(messages).where(messages.c.id == message_id).values(changes))
            row = connection.execute(select(messages).where(messages.c.id == message_id)).mappings().first()
            return None if row is None else _only(row, MESSAGE)

    def turns(self, message_id: str, conversation_id: str) -> list[dict[str, str]]:
        """The system prompt and the messages from the top down to this one, as roles and contents."""
        with self._engine.connect() as connection:
            talk = _conversation(connection, conversation_id)
            _message(connection, message_id, conversation_id)
            return _turns(connection, talk, message_id)

    def leaves(self, conversation_id: str | None = None) -> Iterator[list[dict[str, str]]]:
        """Each way through the tree of one conversation or of all, down to a message that nothing follows."""
        with self._engine.connect() as connection:
            if conversation_id is not None:
                talks = [_conversation(connection, conversation_id)]
            else:
                talks = [dict(row) for row in connection.execute(select(conversations).order_by("place")).mappings()]
            for talk in talks:
                wanted = select(messages).where(messages.c.conversation_id == talk["id"]).order_by(messages.c.place)
                tree = {row["id"]: dict(row) for row in connection.execute(wanted).mappings()}
                parents = {row["parent_id"] for row in tree.values()}
                for name in tree:
                    if name not in parents:
                        yield _way(tree, talk, name)

    def end_unfinished(self) -> None:
        """Marks answers that a killed server left without an end."""
        lost = and_(messages.c.role == "assistant", messages.c.finish_reason.is_(None))
        with self._engine.begin() as connection:
            connection.execute(update(messages).where(lost).values(finish_reason="cancelled"))

    # --- votes --------------------------------------------------------------------------------------------------------

    def vote_thumb(self, message_id: str, value: int) -> Row:
        """Likes (1) or dislikes (-1) an answer; 0 takes that back."""
        with self._engine.begin() as connection:
            answer = _answer(connection, message_id)
            return _vote(connection, "thumb", [answer], value=value, chosen_id=None)

    def vote_pair(self, shown: tuple[str, str], chosen_id: str | None) -> Row:
        """Prefers one of two answers to the same message, or neither. Raises ValueError for others."""
        if shown[0] == shown[1] or chosen_id not in (None, *shown):
            raise ValueError("a pair is two different answers, and the chosen one is one of them, or null.")
        with self._engine.begin() as connection:
            pair = [_answer(connection, one) for one in shown]
            if pair[0]["parent_id"] != pair[1]["parent_id"]:
                raise ValueError("these two answers do not answer the same message.")
            return _vote(connection, "pair", pair, value=None, chosen_id=chosen_id)

    def votes(self, conversation_id: str | None = None) -> list[Row]:
        """All votes, or those in one conversation, oldest first, with prompt and answers."""
        wanted = select(votes).order_by(votes.c.place)
        with self._engine.connect() as connection:
            if conversation_id is not None:
                _conversation(connection, conversation_id)
                wanted = wanted.where(votes.c.conversation_id == conversation_id)
            return [dict(row) for row in connection.execute(wanted).mappings()]


# --- rows -------------------------------------------------------------------------------------------------------------


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def _only(row: Any, names: tuple[str, ...]) -> Row:
    return {name: row[name] for name in names}


def _conversation(connection: Connection, name: str) -> Row:
    row = None
    if ID.fullmatch(name):
        row = connection.execute(select(conversations).where(conversations.c.id == name)).mappings().first()
    if row is None:
        raise LookupError(f"there is no conversation {ascii(name)[:60]}.")
    return dict(row)


def _message(connection: Connection, name: str, conversation_id: str | None = None) -> Row:
    row = None
    if ID.fullmatch(name):
        row = connection.execute(select(messages).where(messages.c.id == name)).mappings().first()
    if row is None or conversation_id not in (None, row["conversation_id"]):
        raise LookupError(f"there is no message {ascii(name)[:60]} here.")
    return dict(row)


def _answer(connection: Connection, name: str) -> Row:
    row = _message(connection, name)
    if row["role"] != "assistant":
        raise ValueError(f"{name} is no answer; votes are about answers.")
    return row


def _turns(connection: Connection, talk: Row, leaf: str) -> list[dict[str, str]]:
    wanted = select(messages).where(messages.c.conversation_id == talk["id"])
    tree = {row["id"]: dict(row) for row in connection.execute(wanted).mappings()}
    return _way(tree, talk, leaf)


def _way(tree: dict[str, Row], talk: Row, leaf: str) -> list[dict[str, str]]:
    """From the top of a tree down to one message, the system prompt first."""
    turns, at = [], tree.get(leaf)
    while at is not None:
        turns.append({"role": at["role"], "content": at["content"]})
        at = tree.get(at["parent_id"])
    return [{"role": "system", "content": talk["system"]}] * bool(talk["system"]) + turns[::-1]


def _vote(connection: Connection, kind: str, shown: list[Row], *, value: int | None, chosen_id: str | None) -> Row:
    """Stores a vote in the place of an earlier one on the same answers. `shown`: the answers, left one first."""
    first, other = [*sorted(row["id"] for row in shown), None][:2]
    same = and_(votes.c.kind == kind, votes.c.message_id == first, votes.c.other_id.is_not_distinct_from(other))
    connection.execute(delete(votes).where(same))
    talk = _conversation(connection, shown[0]["conversation_id"])
    answers = [
        {
            "message_id": row["id"], "content": row["content"], "model": row["model"], "digest": row["model_digest"],
            "sampling": row["sampling"], "finish_reason": row["finish_reason"],
        }
        for row in shown
    ]  # fmt: skip
    vote = {
        "id": _new_id("vote"), "kind": kind, "conversation_id": talk["id"], "message_id": first, "other_id": other,
        "value": value, "chosen_id": chosen_id, "prompt": _turns(connection, talk, shown[0]["parent_id"]),
        "shown": answers, "created_at": time.time(),
    }  # fmt: skip
    if value != 0:
        connection.execute(insert(votes).values(vote))
    return vote


# --- opening ----------------------------------------------------------------------------------------------------------


def open_store(data_dir: str, database: str | None, *, move_damaged: bool = False, create: bool = True) -> Store:
    """Opens the database, brings its tables up to date and, if there is none yet, makes it.

    Raises DataError for a damaged SQLite file (unless it may be moved aside), UserError for what cannot be reached, for
    one that a newer penstock wrote, and, without `create`, for one that is not there.
    """
    if database is not None:
        engine = _postgres(database)
        where = f"--database {engine.url.render_as_string(hide_password=True)}"
    else:
        path = Path(data_dir) / "penstock.db"
        if not create and not path.exists():
            raise UserError(f"--data-dir {data_dir}: there is no {path.name} in it; name the one of penstock serve.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--data-dir {data_dir}: cannot be made ({error.strerror}); choose another.") from error
        if path.exists():
            _check_whole(path, move_damaged)
        engine, where = _sqlite(path), str(path)
    try:
        _migrate(engine, where)
    except OperationalError as error:
        reason = " ".join(str(error.orig).split())
        raise UserError(
            f"{where}: cannot be opened ({reason}); check the address and whether it may be written."
        ) from error
    return Store(engine)


def _sqlite(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def _settings(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        for line in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=30000"):
            connection.execute(f"PRAGMA {line}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A reader that turns writer would be refused if somebody wrote meanwhile.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _postgres(url: str) -> Engine:
    scheme, separator, rest = url.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg") or not separator:
        raise UserError(f"--database {scheme}: give postgresql://USER:PASSWORD@HOST/NAME, or none for SQLite.")
    try:
        return create_engine(f"postgresql+psycopg://{rest}", pool_pre_ping=True, pool_size=10)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise UserError("--database: PostgreSQL needs psycopg: pip install 'penstock[postgres]'.") from error
    except (ArgumentError, ValueError) as error:
        raise UserError("--database: is no address; give postgresql://USER:PASSWORD@HOST/NAME.") from error


def _check_whole(path: Path, move_damaged: bool) -> None:
    """Reads the whole file once. Raises DataError when SQLite finds it damaged and it must not be moved."""
    try:
        connection = sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=30)
        try:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        raise UserError(
            f"{path}: cannot be opened ({error}); mend its permissions, or name another --data-dir."
        ) from error
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found == "ok":
        return
    if not move_damaged:
        raise DataError(
            f"{path}: the database is damaged ({' '.join(found.split())}); restore it from a copy, or start with "
            "--move-damaged to move it aside and begin with an empty one."
        )
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    path.rename(aside)
    for extra in ("-wal", "-shm"):
        if (log := path.with_name(path.name + extra)).exists():
            log.rename(aside.with_name(aside.name + extra))
    print(f"{path}: was damaged, and is now {aside}", flush=True)


def _migrate(engine: Engine, where: str) -> None:
    """Brings the tables to this version's, in one transaction."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # two servers that start at once take turns
            connection.execute(select(func.pg_advisory_xact_lock(20_220_304)))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise UserError(f"{where}: was written by a newer penstock ({error}); update this one.") from error
        except DatabaseError as error:
            if isinstance(error, OperationalError):
                raise
            raise UserError(f"{where}: its tables are not penstock's ({error.orig}); name another database.") from error
