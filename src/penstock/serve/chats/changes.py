"""Changes of a conversation's tree beyond adding to it: an answer that a person rewrites, a message that is removed."""

import time

import sqlalchemy as sa

from penstock.serve.store import (
    MESSAGE,
    Row,
    Store,
    answer_row,
    below,
    conversation_row,
    message_row,
    new_id,
    only,
    store_vote,
    tree_query,
)
from penstock.serve.tables import conversations, messages

IDS = 500
"""In one statement; databases take some thousands of values."""


def rewrite_answer(store: Store, conversation_id: str, answer_id: str, content: str) -> Row:
    """Adds a person's wording of an answer beside it, and the vote that it is the better of the two.

    The first one stays, as another branch. ValueError: it is no answer, or is still being written.
    """
    with store.writing() as connection:
        message_row(connection, answer_id, conversation_id)
        answer = answer_row(connection, answer_id)
        now = time.time()
        row = {
            **only(answer, ("conversation_id", "parent_id", "role", "model")), "id": new_id("msg"), "content": content,
            "model_digest": None, "sampling": None, "finish_reason": "stop", "created_at": now, "usage": None,
            "edited_from": answer_id,
        }  # fmt: skip
        connection.execute(sa.insert(messages).values(row))
        connection.execute(sa.update(conversations).where(conversations.c.id == conversation_id).values(updated_at=now))
        store_vote(connection, "pair", [answer, row], value=None, chosen_id=row["id"])
        return only(row, MESSAGE)


def remove_message(store: Store, conversation_id: str, message_id: str) -> None:
    """Removes a message with all that follow it and the votes on them."""
    with store.writing() as connection:
        conversation_row(connection, conversation_id)
        message_row(connection, message_id, conversation_id)
        rows = [dict(row) for row in connection.execute(tree_query(conversation_id)).mappings()]
        ids = sorted(filter(None, below(rows, message_id)))
        for begin in range(0, len(ids), IDS):
            part = messages.c.id.in_(ids[begin : begin + IDS])
            connection.execute(sa.update(messages).where(part).values(parent_id=None))  # as remove_conversation
        for begin in range(0, len(ids), IDS):
            connection.execute(sa.delete(messages).where(messages.c.id.in_(ids[begin : begin + IDS])))


def set_title(store: Store, conversation_id: str, title: str) -> Row:
    """A model's title; one that a person chose stays. Returns the conversation."""
    unnamed = sa.and_(conversations.c.id == conversation_id, conversations.c.named.is_(sa.false()))
    with store.writing() as connection:
        connection.execute(sa.update(conversations).where(unnamed).values(title=title))
    return store.conversation(conversation_id)
