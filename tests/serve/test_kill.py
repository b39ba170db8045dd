"""`kill -9` of the server in the middle of many answers: what was said to be there is there, once, and goes on.

The clients draw the ids, as the page does, so that what was lost on its way can be sent again.
"""

import contextlib
import http.client
import json
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field

import pytest

from penstock.serve.store import open_store
from tests.conftest import PATIENCE
from tests.serve.conftest import KEY, eventually, save_chatty
from tests.serve.test_server import is_up, start

LOST = (OSError, http.client.HTTPException, json.JSONDecodeError)
"""What a client sees of a server that is gone."""


@dataclass
class Talk:
    """A conversation with one question and its answer, as its client knows them."""

    conversation: str
    question: str
    answer: str
    seed: int
    asked: bool = False
    """Whether the server said that it has the question."""
    begun: bool = False
    """Whether it said that it has the answer."""
    text: str = ""
    """What was shown of the answer."""
    ended: dict | None = None
    """The message, where the server said that it is over."""
    status: list[int] = field(default_factory=list)


def send(address, path, body):
    head = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    request = urllib.request.Request(address + path, json.dumps(body).encode(), head)
    return urllib.request.urlopen(request, timeout=PATIENCE)


def talk_on(address, talk, shown):
    """Asks, and watches the answer for as long as there is a server. `shown`: is told every piece of text."""
    path = f"/api/conversations/{talk.conversation}"
    with contextlib.suppress(*LOST):
        said = {"id": talk.question, "parent_id": None, "role": "user", "content": f"Question {talk.seed}?"}
        send(address, f"{path}/messages", said).close()
        talk.asked = True
        how = {"id": talk.answer, "parent_id": talk.question, "model": "tiny", "max_tokens": 120, "seed": talk.seed}
        with send(address, f"{path}/replies", how) as stream:
            for line in stream:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if event["type"] == "message":
                    talk.begun, talk.text = True, event["message"]["content"]
                elif event["type"] == "delta":
                    talk.text += event["content"]
                    shown()
                elif event["type"] == "done":
                    talk.ended = event["message"]


def talks(address, numbers):
    """A new conversation for each number."""
    made = [json.loads(send(address, "/api/conversations", {}).read())["id"] for _ in numbers]
    return [Talk(made[i], f"msg_{2 * n:024x}", f"msg_{2 * n + 1:024x}", n) for i, n in enumerate(numbers)]


def killed_in_the_middle(process, address, numbers, pieces):
    """Begins an answer for each number, and kills the server after so many pieces of text, or when all have ended."""
    middle, lock, count = threading.Event(), threading.Lock(), [0]

    def shown():
        with lock:
            count[0] += 1
        if count[0] >= pieces:
            middle.set()

    begun = talks(address, numbers)
    threads = [threading.Thread(target=talk_on, args=(address, talk, shown)) for talk in begun]
    for thread in threads:
        thread.start()
    while not middle.wait(0.05) and any(thread.is_alive() for thread in threads):
        pass
    process.kill()
    process.wait(PATIENCE)
    for thread in threads:
        thread.join(PATIENCE)
    return begun


def check(store, begun, *, restarted):
    """Every message that the server had is there, once, and nothing else is."""
    for talk in begun:
        rows = store.messages(talk.conversation)
        names = [row["id"] for row in rows]
        assert names == [talk.question, talk.answer][: len(names)]
        assert len(names) >= talk.asked + talk.begun
        if talk.ended is not None:
            assert {**talk.ended, "created_at": 0} == {**rows[1], "created_at": 0}
        elif len(rows) == 2:
            stored = rows[1]["content"]
            assert stored.startswith(talk.text) or talk.text.startswith(stored)
            reasons = ("interrupted", "stop", "length") if restarted else (None, "stop", "length")
            assert rows[1]["finish_reason"] in reasons


def rounds(tmp_path, url, count, answers):
    """Kills a server so often, in the middle of so many answers. Returns all conversations."""
    model = save_chatty(tmp_path / "tiny", max_length=1000)
    flags = ["--key", KEY, "--rows", "16", "--queue", str(answers), *(["--database", url] if url else [])]
    everything, middles = [], 0
    for i in range(count):
        process, address, _ = start(tmp_path, model, *flags)
        try:
            assert eventually(lambda address=address: is_up(address))
            pieces = 1 + 97 * i % (20 * answers)  # some at once, some late
            begun = killed_in_the_middle(process, address, range(i * answers, (i + 1) * answers), pieces)
        finally:
            process.kill()
        with contextlib.closing(open_store(str(tmp_path / "data"), url)) as store:
            check(store, begun, restarted=False)
            check(store, everything, restarted=True)
        everything += begun
        middles += sum(talk.begun and talk.ended is None for talk in begun)
    assert middles  # answers were cut
    return model, flags, everything


@pytest.mark.parametrize(("count", "answers"), [
    (2, 8), pytest.param(100, 100, marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_killed_server_loses_no_message_and_doubles_none(tmp_path, request, database, count, answers):
    url = request.getfixturevalue("postgres")() if database == "postgresql" else None
    model, flags, everything = rounds(tmp_path, url, count, answers)
    process, address, _ = start(tmp_path, model, *flags)
    try:
        assert eventually(lambda: is_up(address))
        last = everything[-answers:]
        for talk in last:  # as a page does that lost the server: everything again, with the same ids
            talk_on(address, talk, lambda: None)
            assert talk.ended is not None
        with contextlib.closing(open_store(str(tmp_path / "data"), url)) as store:
            check(store, everything, restarted=True)
            assert all(len(store.messages(talk.conversation)) == 2 for talk in last)
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
