"""A conversation from elsewhere becomes one here: its messages, their times, and dislikes.

The page reads the files (ours, ChatGPT's, ShareGPT's) in the browser, and sends one conversation at a time. Its id is
drawn from what is in it: the same one again changes nothing.
"""

import hashlib
import json
import time
from typing import Any

import sqlalchemy as sa

from penstock.serve.chats.title_text import beginning
from penstock.serve.store import CONVERSATION, MESSAGE, Row, Store, new_id, only, row_of, store_vote
from penstock.serve.tables import conversations, messages

PARENTS = {"user": "an answer, or null", "assistant": "a user's message"}


def import_conversation(store: Store, talk: dict[str, Any]) -> tuple[Row, bool]:
    """Stores a conversation. `talk`: title, system, created_at, and messages whose `parent` is the number of an earlier
    one. Returns it, and whether it was there already. Raises ValueError for a message in a place where none can be."""
    text = json.dumps(talk, sort_keys=True).encode()
    conversation_id = "conv_" + hashlib.sha256(text).hexdigest()[:24]
    now = time.time()
    rows: list[Row] = []
    for i, message in enumerate(talk["messages"]):
        rows.append(_message_row(conversation_id, i, message, rows, now))
    began = talk["created_at"] or min((row["created_at"] for row in rows), default=now)
    first = next((row["content"] for row in rows), "")
    conversation = {
        "id": conversation_id, "title": talk["title"].strip() or beginning(first), "system": talk["system"],
        "created_at": began, "updated_at": max([began, *(row["created_at"] for row in rows)]), "pinned": False,
        "named": bool(talk["title"].strip()),
    }  # fmt: skip
    with store.writing() as connection:
        present = row_of(connection, conversations, conversation_id)
        if present is not None:
            return only(present, CONVERSATION), True
        connection.execute(sa.insert(conversations).values(conversation))
        if rows:
            connection.execute(sa.insert(messages), rows)
        tree = {row["id"]: row for row in rows}
        for row, message in zip(rows, talk["messages"], strict=True):
            if message["disliked"]:
                store_vote(connection, "thumb", [row], value=-1, chosen_id=None, tree=tree)
    return conversation, False


def _message_row(conversation_id: str, number: int, message: dict[str, Any], before: list[Row], now: float) -> Row:
    """The row of a message. `before`: those of the messages that it may be under."""
    role, place = message["role"], message["parent"]
    where = f"messages[{number}]"
    if place is not None and not 0 <= place < number:
        raise ValueError(f"{where}.parent is {place}; give the number of an earlier message, from 0, or null.")
    parent = None if place is None else before[place]
    above = None if parent is None else parent["role"]
    if above == role or (parent is None and role == "assistant"):
        raise ValueError(f"{where} is the {role}'s; its parent is {PARENTS[role]}.")
    if message["disliked"] and role != "assistant":
        raise ValueError(f"{where} is the user's; only an answer is disliked.")
    values = {
        "id": new_id("msg"), "conversation_id": conversation_id, "parent_id": parent and parent["id"], "role": role,
        "content": message["content"], "model": message["model"] if role == "assistant" else None, "sampling": None,
        "finish_reason": message["finish_reason"] or "stop" if role == "assistant" else None,
        "created_at": message["created_at"] or now, "usage": None, "edited_from": None,
    }  # fmt: skip
    return {**only(values, MESSAGE), "model_digest": None}
