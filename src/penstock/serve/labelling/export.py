"""What goes out of the room: rankings that `penstock reward` and `penstock dpo` read, rewritten answers that `penstock
sft` reads, records of Argilla and tasks of Label Studio.

`rankings` is the one way from the room's judgements to training data: `penstock data export --rankings`, the page's
export and `penstock improve` all call it.
"""

import itertools
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa

from penstock.serve.labelling import label_studio
from penstock.serve.store import Row, Store
from penstock.serve.tables import label_items, label_slots, labellers

SLOT = label_slots.c
QUESTION = "ranking"
NAMESPACE = uuid.UUID("6a2f2b5e-4d0c-5f0e-9a53-1d6f3f1f7c11")
"""Of the ids that labellers have in Argilla's records, which want UUIDs."""


def rankings(store: Store) -> Iterator[dict[str, Any]]:
    """A line per judgement, oldest first: prompt, responses and ranking (best first, ties nested), and whose it is.

    An answer that a labeller rewrote is a line of its own, the new text above the old. Items that test labellers are
    left out; what was flagged has weight 0, which training reads and does not learn.
    """
    for item, slot in _judged(store):
        texts = [answer["content"] for answer in item["answers"]]
        judged = {"labeller": slot["name"], "created_at": slot["judged_at"]} | ({"weight": 0} if slot["flag"] else {})
        judged |= {key: slot[key] for key in ("flag", "note") if slot[key]}
        judged |= {"source_id": item["source_id"]} if item["source_id"] else {}
        shown = [{key: value for key, value in answer.items() if key != "content"} for answer in item["answers"]]
        line = {"prompt": item["prompt"], "responses": texts, "ranking": slot["ranking"], "shown": shown}
        yield {"id": slot["id"], **line, **judged}
        for index, text in (slot["edits"] or {}).items():
            pair = {"prompt": item["prompt"], "responses": [text, texts[int(index)]], "ranking": [0, 1]}
            if len(set(pair["responses"])) == 2:
                yield {"id": f"{slot['id']}+{index}", **pair, **judged}


def rewritten(store: Store) -> Iterator[dict[str, Any]]:
    """A demonstration for each answer that a labeller rewrote: messages, or prompt and response for a plain text."""
    for item, slot in _judged(store):
        for index, text in () if slot["flag"] else (slot["edits"] or {}).items():
            line: Row = {"prompt": item["prompt"], "response": text}
            if not isinstance(item["prompt"], str):
                line = {"messages": [*item["prompt"], {"role": "assistant", "content": text}]}
            yield {"id": f"{slot['id']}+{index}", **line, "labeller": slot["name"], "created_at": slot["judged_at"]}


def argilla(store: Store) -> Iterator[dict[str, Any]]:
    """Records of Argilla 2.x, as Dataset.from_disk reads them: fields prompt and response_1 ..., question ranking."""
    for item, slots in _items(store):
        names = [f"response_{i + 1}" for i in range(len(item["answers"]))]
        texts = [answer["content"] for answer in item["answers"]]
        models = {f"{name}_model": a["model"] for name, a in zip(names, item["answers"], strict=True) if a["model"]}
        responses = [
            {"value": _options(slot["ranking"], names), "user_id": str(uuid.uuid5(NAMESPACE, slot["labeller_id"]))}
            for slot in slots
        ]
        fields = {"prompt": item["prompt"], **dict(zip(names, texts, strict=True))}
        yield {
            "id": item["source_id"] or item["id"], "fields": fields,
            "metadata": models, "suggestions": {}, "responses": {QUESTION: responses} if responses else {},
            "vectors": {},
            "status": "completed" if responses else "pending", "_server_id": None,
        }  # fmt: skip


def label_studio_tasks(store: Store) -> Iterator[dict[str, Any]]:
    """Tasks of Label Studio with annotations."""
    return itertools.starmap(label_studio.task_of, _items(store))


EXPORTS: dict[str, Callable[[Store], Iterator[dict[str, Any]]]] = {
    "rankings": rankings, "rewritten": rewritten, "argilla": argilla, "label-studio": label_studio_tasks,
}  # fmt: skip
ARRAYS = ("argilla", "label-studio")
"""Those that are read as one JSON array."""


def _items(store: Store) -> Iterator[tuple[Row, list[Row]]]:
    """All items that have answers and test nobody, each with its rankings' slots, in the order of their import."""
    judged = defaultdict(list)
    for item, slot in _judged(store):
        judged[item["id"]].append(slot)
    query = sa.select(label_items).where(label_items.c.gold.is_(None), label_items.c.draft.is_(None))
    with store.reading() as connection:
        for row in connection.execute(query.order_by(label_items.c.place)).mappings():
            yield dict(row), judged[row["id"]]


def _options(ranking: list[list[int]], names: list[str]) -> list[dict[str, Any]]:
    """Argilla's value of a ranking: options by rank from 1, equal ranks for ties."""
    ranks = [1 + sum(map(len, ranking[:level])) for level in range(len(ranking))]
    return [{"value": names[i], "rank": ranks[level]} for level, indices in enumerate(ranking) for i in indices]


def _judged(store: Store) -> Iterator[tuple[Row, Row]]:
    """(item, slot with its labeller's name) of each ranking, oldest first, of items that test nobody."""
    query = sa.select(label_slots, labellers.c.name).join(labellers, labellers.c.id == SLOT.labeller_id)
    query = query.where(SLOT.outcome == "ranked").order_by(SLOT.judged_at, SLOT.place)
    with store.reading() as connection:
        items = {
            row["id"]: dict(row)
            for row in connection.execute(sa.select(label_items).where(label_items.c.gold.is_(None))).mappings()
        }
        for row in connection.execute(query).mappings():
            if row["item_id"] in items:
                yield items[row["item_id"]], dict(row)
