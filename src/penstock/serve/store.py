"""The server's database, SQLite (WAL, in --data-dir) or PostgreSQL: rows in and out as plain dicts.

Every method is one transaction and may be called from any thread. The store does not know HTTP: it raises LookupError
for a row that does not exist and ValueError for a change that cannot be, each with a message for the client.
"""

import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError

from penstock.errors import DataError, UserError
from penstock.serve.chats.title_text import beginning
from penstock.serve.tables import conversations, keys, messages, sessions, votes

ID = re.compile(r"[a-z]+_[0-9a-f]{24}")
READS = "penstock_reads"
"""The option of a connection whose transaction writes nothing."""
BUSY_SECONDS = 30.0
"""How long a write waits for another program's."""
MAX_MESSAGES = 100_000
"""Messages that are read of a conversation."""

Row = dict[str, Any]
CONVERSATION = ("id", "title", "system", "created_at", "updated_at", "pinned", "named")
MESSAGE = (
    "id", "conversation_id", "parent_id", "role", "content", "model", "sampling", "finish_reason", "created_at",
    "usage", "edited_from",
)  # fmt: skip


class Store:
    """An open database, made by `open_store`."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine, self._reader = engine, engine.execution_options(**{READS: True})
        self._turn = threading.Lock() if engine.dialect.name == "sqlite" else nullcontext()

    def close(self) -> None:
        self._engine.dispose()

    def reading(self) -> AbstractContextManager[sa.Connection]:
        """A transaction that writes nothing, and waits for nobody."""
        return self._reader.connect()

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is stored at its end. SQLite's writers would sleep for each other: here they queue."""
        with self._turn, self._engine.begin() as connection:
            yield connection

    # --- keys and sessions --------------------------------------------------------------------------------------------

    def key_hashes(self) -> list[str]:
        with self.reading() as connection:
            return list(connection.scalars(sa.select(keys.c.sha256)))

    def replace_key(self, sha256: str) -> None:
        """Makes this the only key and ends all sessions."""
        with self.writing() as connection:
            connection.execute(sa.delete(sessions))
            connection.execute(sa.delete(keys))
            connection.execute(sa.insert(keys).values(sha256=sha256, created_at=time.time()))

    def add_session(self, sha256: str, ends_at: float, labeller_id: str | None = None) -> None:
        """Stores a session, a labeller's or the owner's, and removes those that have ended."""
        with self.writing() as connection:
            connection.execute(sa.delete(sessions).where(sessions.c.ends_at < time.time()))
            connection.execute(sa.insert(sessions).values(sha256=sha256, ends_at=ends_at, labeller_id=labeller_id))

    def session(self, sha256: str) -> Row | None:
        """When a session ends (seconds since 1970) and whose it is, or None if there is no such session."""
        with self.reading() as connection:
            row = connection.execute(sa.select(sessions).where(sessions.c.sha256 == sha256)).mappings().first()
        return None if row is None else dict(row)

    def remove_session(self, sha256: str) -> None:
        with self.writing() as connection:
            connection.execute(sa.delete(sessions).where(sessions.c.sha256 == sha256))

    # --- conversations ------------------------------------------------------------------------------------------------

    def list_conversations(self, limit: int, before: str | None) -> tuple[list[Row], bool]:
        """Pinned ones, then others, each newest first, after the conversation `before`; and whether there are more."""
        order = (conversations.c.pinned, conversations.c.updated_at, conversations.c.place)
        query = sa.select(conversations).order_by(*(column.desc() for column in order)).limit(limit + 1)
        with self.reading() as connection:
            if before is not None:
                last = conversation_row(connection, before)
                query = query.where(sa.tuple_(*order) < sa.tuple_(*(last[column.name] for column in order)))
            rows = [only(row, CONVERSATION) for row in connection.execute(query).mappings()]
        return rows[:limit], len(rows) > limit

    def add_conversation(self, title: str, system: str) -> Row:
        """A new conversation without messages. Its first message becomes the title if `title` is empty."""
        now = time.time()
        row = {
            "id": new_id("conv"), "title": title, "system": system, "created_at": now, "updated_at": now,
            "pinned": False, "named": False,
        }  # fmt: skip
        with self.writing() as connection:
            connection.execute(sa.insert(conversations).values(row))
        return row

    def conversation(self, conversation_id: str) -> Row:
        with self.reading() as connection:
            return only(conversation_row(connection, conversation_id), CONVERSATION)

    def change_conversation(self, conversation_id: str, changes: Row) -> Row:
        """Sets the title, which a person chose then, the system prompt, or whether it is pinned."""
        changes = {**changes, "named": True} if "title" in changes else changes
        with self.writing() as connection:
            conversation_row(connection, conversation_id)
            if changes:
                change = sa.update(conversations).where(conversations.c.id == conversation_id)
                connection.execute(change.values(changes))
            return only(conversation_row(connection, conversation_id), CONVERSATION)

    def remove_conversation(self, conversation_id: str) -> None:
        """Removes a conversation with its messages and votes."""
        with self.writing() as connection:
            conversation_row(connection, conversation_id)
            # Without parents first: SQLite deletes what hangs on what in 1,000 steps at most.
            inside = messages.c.conversation_id == conversation_id
            connection.execute(sa.update(messages).where(inside).values(parent_id=None))
            connection.execute(sa.delete(conversations).where(conversations.c.id == conversation_id))

    # --- messages -----------------------------------------------------------------------------------------------------

    def messages(self, conversation_id: str) -> list[Row]:
        """The whole tree, oldest first."""
        with self.reading() as connection:
            conversation_row(connection, conversation_id)
            query = tree_query(conversation_id).limit(MAX_MESSAGES)
            return [only(row, MESSAGE) for row in connection.execute(query).mappings()]

    def message(self, message_id: str, conversation_id: str) -> Row:
        with self.reading() as connection:
            return only(message_row(connection, message_id, conversation_id), MESSAGE)

    def below(self, message_id: str | None, conversation_id: str) -> set[str | None]:
        """Ids of a message and of all that follow it; of all messages for None."""
        return below(self.messages(conversation_id), message_id)

    def add_message(
        self, conversation_id: str, parent_id: str | None, role: str, content: str, *, model: str | None = None,
        model_digest: str | None = None, sampling: Row | None = None, message_id: str | None = None,
    ) -> Row:  # fmt: skip
        """A user's message under an answer or at the top, or an answer under a user's. ValueError: any other place.

        With an id of the caller's, adding it again returns what is there: a lost reply can be asked for twice.
        """
        now = time.time()
        row = {
            "id": message_id or new_id("msg"), "conversation_id": conversation_id, "parent_id": parent_id,
            "role": role, "content": content, "model": model, "model_digest": model_digest, "sampling": sampling,
            "finish_reason": None, "created_at": now, "usage": None, "edited_from": None,
        }  # fmt: skip
        with self.writing() as connection:
            conversation = conversation_row(connection, conversation_id)
            changes: Row = {"updated_at": now}
            if not conversation["title"] and role == "user":
                changes["title"] = beginning(content)
            # First: PostgreSQL locks the row, and so adds no message twice at once.
            connection.execute(sa.update(conversations).where(conversations.c.id == conversation_id).values(changes))
            same = None if message_id is None else row_of(connection, messages, message_id)
            if same is not None:
                _check_same(same, row)
                return only(same, MESSAGE)
            parent = None if parent_id is None else message_row(connection, parent_id, conversation_id)
            if role == "assistant" and (parent is None or parent["role"] != "user"):
                raise ValueError("an answer belongs under a user's message.")
            if role == "user" and parent is not None and parent["role"] != "assistant":
                raise ValueError("a user's message belongs under an answer, or at the top (parent_id null).")
            connection.execute(sa.insert(messages).values(row))
        return only(row, MESSAGE)

    def save_answers(self, rows: Collection[Row]) -> set[str]:
        """Stores text, finish_reason and usage of answers. Returns the ids of those that have been deleted."""
        missing = set()
        with self.writing() as connection:
            for row in rows:
                changes = {**only(row, ("content", "finish_reason")), "usage": row.get("usage")}
                update = sa.update(messages).where(messages.c.id == row["id"]).values(changes)
                if not connection.execute(update).rowcount:
                    missing.add(row["id"])
        return missing

    def reopen_answer(self, message_id: str, conversation_id: str, part: Row) -> Row:
        """Lets an answer go on in place. `part`: how; it is kept with the answer's sampling. ValueError: it cannot."""
        with self.writing() as connection:
            answer = message_row(connection, message_id, conversation_id, lock=True)
            follows = sa.select(messages.c.id).where(messages.c.parent_id == message_id).limit(1)
            if answer["role"] != "assistant":
                raise ValueError(f"{message_id} is no answer; only an answer is gone on with.")
            if connection.scalar(follows) is not None:
                raise ValueError("a message follows this answer; answer again instead.")
            if answer["finish_reason"] is None:  # it goes on already
                return only(answer, MESSAGE)
            sampling = answer["sampling"] or {}
            parts = [*sampling.get("continued", ()), {"at": len(answer["content"]), **part}]
            changes = {"finish_reason": None, "sampling": {**sampling, "continued": parts}}
            connection.execute(sa.update(messages).where(messages.c.id == message_id).values(changes))
            return only({**answer, **changes}, MESSAGE)

    def turns(self, message_id: str, conversation_id: str) -> list[dict[str, str]]:
        """The system prompt and the messages from the top down to this one, as roles and contents."""
        with self.reading() as connection:
            conversation = conversation_row(connection, conversation_id)
            message_row(connection, message_id, conversation_id)
            return _path(_tree(connection, conversation), conversation, message_id)

    def leaves(self, conversation_id: str | None = None) -> Iterator[list[dict[str, Any]]]:
        """Each path through the tree of one conversation or of all, from the top to a message without a successor.

        An answer that was disliked, rewritten or cut short (its finish_reason says why) has weight 0: training reads
        it and does not learn it.
        """
        with self.reading() as connection:
            if conversation_id is not None:
                rows = [conversation_row(connection, conversation_id)]
            else:
                rows = [dict(row) for row in connection.execute(sa.select(conversations).order_by("place")).mappings()]
            dislikes = sa.select(votes.c.message_id).where(votes.c.kind == "thumb", votes.c.value == -1)
            rewritten = sa.select(messages.c.edited_from).where(messages.c.edited_from.is_not(None))
            disliked = {*connection.scalars(dislikes), *connection.scalars(rewritten)}
            for conversation in rows:
                tree = _tree(connection, conversation)
                parents = {row["parent_id"] for row in tree.values()}
                for leaf in (message_id for message_id in tree if message_id not in parents):
                    yield _path(tree, conversation, leaf, disliked)

    def end_unfinished(self) -> None:
        """Marks the answers that a killed server did not end as interrupted."""
        unfinished = sa.and_(messages.c.role == "assistant", messages.c.finish_reason.is_(None))
        with self.writing() as connection:
            connection.execute(sa.update(messages).where(unfinished).values(finish_reason="interrupted"))

    # --- votes --------------------------------------------------------------------------------------------------------

    def vote_thumb(self, message_id: str, value: int) -> Row:
        """Likes (1) or dislikes (-1) an answer; 0 removes the vote."""
        with self.writing() as connection:
            return store_vote(connection, "thumb", [answer_row(connection, message_id)], value=value, chosen_id=None)

    def vote_pair(self, shown: tuple[str, str], chosen_id: str | None) -> Row:
        """Prefers one of two answers to the same message, or neither. Raises ValueError for any other pair."""
        if shown[0] == shown[1] or chosen_id not in (None, *shown):
            raise ValueError("a pair is two different answers, and the chosen one is one of them, or null.")
        with self.writing() as connection:
            rows = {message_id: answer_row(connection, message_id) for message_id in sorted(shown)}
            if rows[shown[0]]["parent_id"] != rows[shown[1]]["parent_id"]:
                raise ValueError("these two answers do not answer the same message.")
            return store_vote(connection, "pair", [rows[name] for name in shown], value=None, chosen_id=chosen_id)

    def votes(self, conversation_id: str | None = None) -> list[Row]:
        """All votes, or those in one conversation, oldest first, with prompt and answers."""
        query = sa.select(votes).order_by(votes.c.place)
        with self.reading() as connection:
            if conversation_id is not None:
                conversation_row(connection, conversation_id)
                query = query.where(votes.c.conversation_id == conversation_id)
            return [dict(row) for row in connection.execute(query).mappings()]


# --- rows -------------------------------------------------------------------------------------------------------------


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def only(row: Any, columns: tuple[str, ...]) -> Row:
    return {column: row[column] for column in columns}


def row_of(connection: sa.Connection, table: sa.Table, row_id: str, lock: bool = False) -> Row | None:
    if not ID.fullmatch(row_id):
        return None
    query = sa.select(table).where(table.c.id == row_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    return None if row is None else dict(row)


def conversation_row(connection: sa.Connection, conversation_id: str) -> Row:
    row = row_of(connection, conversations, conversation_id)
    if row is None:
        raise LookupError(f"there is no conversation {ascii(conversation_id)[:60]}.")
    return row


def message_row(connection: sa.Connection, message_id: str, within: str | None = None, lock: bool = False) -> Row:
    row = row_of(connection, messages, message_id, lock)  # others that write what depends on it wait; SQLite has one
    if row is None or within not in (None, row["conversation_id"]):
        raise LookupError(f"there is no message {ascii(message_id)[:60]} here.")
    return row


def _check_same(stored: Row, row: Row) -> None:
    """Raises ValueError unless a message that is added again is the one that is stored."""
    columns = ("conversation_id", "parent_id", "role") + (("content",) if row["role"] == "user" else ())
    if any(stored[column] != row[column] for column in columns):
        raise ValueError(f"there is another message {row['id']} already; draw another id.")


def answer_row(connection: sa.Connection, message_id: str) -> Row:
    row = message_row(connection, message_id, lock=True)
    if row["role"] != "assistant":
        raise ValueError(f"{message_id} is no answer; votes are about answers.")
    if row["finish_reason"] is None:
        raise ValueError("this answer is being written; vote when it has ended.")
    return row


def below(rows: Iterable[Row], message_id: str | None) -> set[str | None]:
    """Ids of a message and of all that follow it, out of a conversation's messages, oldest first."""
    ids = {message_id}
    for row in rows:  # a parent comes before its children
        ids |= {row["id"]} if row["parent_id"] in ids else set()
    return ids


def tree_query(conversation_id: str) -> sa.Select[Any]:
    return sa.select(messages).where(messages.c.conversation_id == conversation_id).order_by(messages.c.place)


def _tree(connection: sa.Connection, conversation: Row) -> dict[str, Row]:
    """All messages of a conversation by id, oldest first."""
    return {row["id"]: dict(row) for row in connection.execute(tree_query(conversation["id"])).mappings()}


def _path(
    tree: dict[str, Row], conversation: Row, message_id: str, disliked: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """The turns from the top of a tree down to a message, the system prompt first, without empty answers.

    With the disliked, these and what was cut have weight 0, and what was cut its finish_reason.
    """
    turns: list[dict[str, Any]] = []
    message = tree.get(message_id)
    while message is not None:
        turn = {"role": message["role"], "content": message["content"]}
        if disliked is not None and message["role"] == "assistant":
            cut = message["finish_reason"] != "stop"
            turn |= {"weight": 0} if cut or message["id"] in disliked else {}
            turn |= {"finish_reason": message["finish_reason"] or "interrupted"} if cut else {}
        if message["role"] != "assistant" or message["content"]:
            turns.append(turn)
        message = tree.get(message["parent_id"])
    if conversation["system"]:
        turns.append({"role": "system", "content": conversation["system"]})
    return turns[::-1]


def store_vote(
    connection: sa.Connection, kind: str, shown: list[Row], *, value: int | None, chosen_id: str | None,
    tree: dict[str, Row] | None = None,
) -> Row:  # fmt: skip
    """Stores a vote in the place of an earlier one on the same answers. `shown`: the answers, left one first.

    `tree`: the conversation's messages, where they have been read.
    """
    first, second = [*sorted(row["id"] for row in shown), None][:2]
    same = sa.and_(votes.c.kind == kind, votes.c.message_id == first, votes.c.other_id.is_not_distinct_from(second))
    connection.execute(sa.delete(votes).where(same))
    conversation = conversation_row(connection, shown[0]["conversation_id"])
    columns = ("content", "model", "sampling", "finish_reason")
    answers = [{"message_id": row["id"], "digest": row["model_digest"], **only(row, columns)} for row in shown]
    vote = {
        "id": new_id("vote"), "kind": kind, "conversation_id": conversation["id"], "message_id": first,
        "other_id": second, "value": value, "chosen_id": chosen_id,
        "prompt": _path(tree or _tree(connection, conversation), conversation, shown[0]["parent_id"]),
        "shown": answers, "created_at": time.time(),
    }  # fmt: skip
    if value != 0:
        connection.execute(sa.insert(votes).values(vote))
    return vote


# --- opening ----------------------------------------------------------------------------------------------------------


def open_store(data_dir: str, database: str | None, *, move_damaged: bool = False, create: bool = True) -> Store:
    """Opens the database, and makes it if it does not exist. Brings its tables up to date.

    Raises DataError for a damaged SQLite file unless `move_damaged`, and UserError for a database that cannot be
    reached, that a newer penstock wrote, or that does not exist when `create` is false.
    """
    if database is not None:
        engine = _postgres(database)
        name = f"--database {engine.url.render_as_string(hide_password=True)}"
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
        engine, name = _sqlite(path), str(path)
    try:
        _migrate(engine, name)
    except OperationalError as error:
        reason = " ".join(str(error.orig).split())
        raise UserError(f"{name}: cannot be opened ({reason}); check the address and its permissions.") from error
    return Store(engine)


def _sqlite(path: Path) -> sa.Engine:
    # As many connections as threads that routes run in: a read never waits for the connection of a write that waits.
    options: Row = {"pool_size": 40, "connect_args": {"timeout": BUSY_SECONDS}}
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), **options)

    @event.listens_for(engine, "connect")
    def _settings(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # _begin begins transactions, not the driver
        for line in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {line}")

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # A reader sees the last state that was written and waits for nobody. What writes says so from the start:
        # SQLite refuses a reader that turns writer after another connection has written.
        reads = connection.get_execution_options().get(READS)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _postgres(url: str) -> sa.Engine:
    scheme, separator, address = url.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg") or not separator:
        raise UserError(f"--database {scheme}: give postgresql://USER:PASSWORD@HOST/NAME, or none for SQLite.")
    try:
        return sa.create_engine(f"postgresql+psycopg://{address}", pool_pre_ping=True, pool_size=10)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise UserError("--database: PostgreSQL needs psycopg: pip install 'penstock[postgres]'.") from error
    except (ArgumentError, ValueError) as error:
        raise UserError("--database: is no address; give postgresql://USER:PASSWORD@HOST/NAME.") from error


def _check_whole(path: Path, move_damaged: bool) -> None:
    """Reads the whole file. Raises DataError when SQLite calls it damaged, unless `move_damaged`."""
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=30)
        try:
            result = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        text = f"{path}: cannot be opened ({error}); mend its permissions, or name another --data-dir."
        raise UserError(text) from error
    except sqlite3.DatabaseError as error:
        result = str(error)
    if result == "ok":
        return
    if not move_damaged:
        raise DataError(
            f"{path}: the database is damaged ({' '.join(result.split())}); restore it from a copy, or start with "
            "--move-damaged to move it aside and begin with an empty one."
        )
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        if (log := path.with_name(path.name + suffix)).exists():
            log.rename(aside.with_name(aside.name + suffix))
    print(f"{path}: was damaged, and is now {aside}", flush=True)


def _migrate(engine: sa.Engine, name: str) -> None:
    """Brings the tables to this version's, in one transaction."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # two servers that start together take turns
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(20_220_304)))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise UserError(f"{name}: was written by a newer penstock ({error}); update this one.") from error
        except DatabaseError as error:
            if isinstance(error, OperationalError):
                raise
            raise UserError(f"{name}: its tables are not penstock's ({error.orig}); name another database.") from error
