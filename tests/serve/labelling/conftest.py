"""A room in SQLite and in a real PostgreSQL, and what labellers do in it."""

import contextlib

import pytest

from penstock.serve.labelling import labellers, leases, room
from penstock.serve.labelling.import_items import read_item
from penstock.serve.store import open_store

NOW = 1_000_000.0
"""The clock of these tests: the room is told what time it is."""


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, tmp_path):
    url = request.getfixturevalue("postgres")() if request.param == "postgresql" else None
    with contextlib.closing(open_store(str(tmp_path / "data"), url)) as opened:
        yield opened


@pytest.fixture
def small_store(tmp_path):
    """In SQLite alone, for what no database does differently."""
    with contextlib.closing(open_store(str(tmp_path / "data"), None)) as opened:
        yield opened


def fill(store, count, answers=2, gold=False):
    """Adds items; answer j of item i is "i.j", and gold ranks the first one best."""
    rows = [
        {"prompt": f"{'gold' if gold else 'question'} {i}", "responses": [f"{i}.{j}" for j in range(answers)]}
        for i in range(count)
    ]
    rows = [row | {"ranking": list(range(answers))} if gold else row for row in rows]
    return room.add_items(store, [read_item(row, gold=gold, draft=None) for row in rows])


def add_labeller(store, name):
    return labellers.add(store, name, name.ljust(64, "0"))["id"]


def ranked(item, key, **more):
    """A ranking by the key of each answer's text, smallest first; equal keys are ties."""
    keys = [key(text) for text in item["answers"]]
    levels = [[i for i, value in enumerate(keys) if value == level] for level in sorted(set(keys))]
    return {"outcome": "ranked", "ranking": levels, "edits": {}, "flag": None, "note": None, "seconds": 1.0, **more}


def skipped(**more):
    return {"outcome": "skipped", "ranking": None, "edits": {}, "flag": None, "note": None, "seconds": 1.0, **more}


def judge_all(store, labeller, key=str, now=NOW):
    """Ranks until nothing is left. Returns the ids of the items."""
    ids = []
    while item := leases.next_item(store, labeller, now):
        leases.judge(store, labeller, item["id"], ranked(item, key), now + len(ids))
        ids.append(item["id"])
    return ids
