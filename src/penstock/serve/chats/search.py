"""Search in titles and messages, newest first: a scan in SQL, in windows and within seconds, without an index.

[Note: a search is a scan] An index of words misses parts of words and Chinese text, one of trigrams is three times the
size of the text, and both are written again every second while answers grow. A scan of 200,000 messages in 300 MB takes
0.4 s of a processor in SQLite; it stops after SECONDS and says how far back it came, and the next one goes on there.
Each window is a transaction of its own, on a thread and inside the database, which holds up neither answers nor writes.
"""

import re
import time

import sqlalchemy as sa

from penstock.serve.store import CONVERSATION, Row, Store, only, row_of
from penstock.serve.tables import conversations, messages

WINDOW = 2000
"""Messages that one query reads."""
SECONDS = 2.0
"""Of one search; another goes on where it stopped."""
TITLES, HITS = 200, 50
"""Conversations that one search returns at most, for their titles and for a message."""
MAX_WORDS = 8
BEFORE, AFTER = 40, 120
"""Characters that are shown around the first word."""
MARKS = re.compile(r"```\w*|\*\*|^#+ |^> |^[-*] ", re.MULTILINE)
"""Signs of markdown that say nothing in an excerpt."""


def search(store: Store, text: str, rest: int | None = None) -> tuple[list[Row], int | None]:
    """Conversations with all words of a text in their title, or in one message; and the last message (its place) that
    was not searched, None where all were. `rest`: that of an earlier search, which goes on there, without titles.

    A conversation has the newest message that holds the words as its `hit`, or None where the title does.
    """
    words = list(dict.fromkeys(text.split()))[:MAX_WORDS]
    deadline = time.monotonic() + SECONDS
    rows: dict[str, Row] = {}
    with store.reading() as connection:
        if rest is None:
            query = sa.select(conversations).where(_holds(connection, conversations.c.title, words))
            newest = query.order_by(conversations.c.updated_at.desc()).limit(TITLES)
            rows = {
                row["id"]: {**only(row, CONVERSATION), "hit": None} for row in connection.execute(newest).mappings()
            }
            rest = connection.scalar(sa.select(sa.func.max(messages.c.place))) or 0
    most = len(rows) + HITS
    while rest > 0 and len(rows) < most:
        with store.reading() as connection:
            rest = _search_window(connection, words, rest, rows, most)
        if time.monotonic() >= deadline:
            break
    return list(rows.values()), rest or None


def _search_window(connection: sa.Connection, words: list[str], high: int, rows: dict[str, Row], most: int) -> int:
    """Adds conversations with the words in messages up to a place, until there are `most`. Returns what is left."""
    low = (high - 1) // WINDOW * WINDOW
    place = sa.func.max(messages.c.place)
    inside = sa.and_(messages.c.place > low, messages.c.place <= high, _holds(connection, messages.c.content, words))
    query = sa.select(messages.c.conversation_id, place).where(inside).group_by(messages.c.conversation_id)
    for conversation_id, newest in connection.execute(query.order_by(place.desc())).all():
        if conversation_id not in rows:
            rows |= _hit(connection, conversation_id, newest, words)
            if len(rows) == most:
                return newest - 1
    return low


def _holds(connection: sa.Connection, column: sa.Column[str], words: list[str]) -> sa.ColumnElement[bool]:
    """Whether a text has all words in it, in capitals or not. SQLite's LIKE knows capitals of ASCII alone, PostgreSQL's
    those of its locale: of other letters the usual spellings are looked for."""
    like = column.ilike if connection.dialect.name == "postgresql" else column.like
    every = []
    for word in words:
        spellings = {word} if word.isascii() else {word, word.lower(), word.upper(), word.capitalize()}
        patterns = [re.sub(r"([%_/])", r"/\1", spelling) for spelling in sorted(spellings)]
        every.append(sa.or_(*(like(f"%{pattern}%", escape="/") for pattern in patterns)))
    return sa.and_(*every)


def _hit(connection: sa.Connection, conversation_id: str, place: int, words: list[str]) -> dict[str, Row]:
    """A conversation, by its id, with the message in it that holds the words; nothing if it has been removed since."""
    message = connection.execute(sa.select(messages).where(messages.c.place == place)).mappings().first()
    conversation = row_of(connection, conversations, conversation_id)
    if message is None or conversation is None:
        return {}
    hit = {"message_id": message["id"], "role": message["role"], "text": excerpt(message["content"], words)}
    return {conversation_id: {**only(conversation, CONVERSATION), "hit": hit}}


def excerpt(content: str, words: list[str]) -> str:
    """One line of a text around the first of the words in it."""
    starts = [match.start() for word in words if (match := re.search(re.escape(word), content, re.IGNORECASE))]
    begin = max(0, min(starts, default=0) - BEFORE)
    plain = MARKS.sub("", content[begin : begin + BEFORE + AFTER])
    line = " ".join(plain.split())
    return f"... {line}" if begin else line
