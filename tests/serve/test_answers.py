"""Answers that live on the server: who watches may leave and come back, what is written is stored as it comes, and what
ends one is said.
"""

import contextlib
import http.client
import json
import threading

import pytest

from penstock.serve import answers as answers_module
from penstock.serve import service as service_module
from penstock.serve.answers import Answers
from penstock.serve.scheduler import Piece
from tests.conftest import PATIENCE
from tests.serve.conftest import KEY, eventually, paused, running, save_chatty
from tests.serve.test_page_api import answer, begin, say, tree

LONG = {"model": "tiny", "max_tokens": 200, "seed": 5}
IDS = [f"msg_{number:024x}" for number in range(100)]


class Viewer:
    """A connection that watches an answer: events as they come."""

    def __init__(self, server, method, path, body=None):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        head = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        self.connection.request(method, path, None if body is None else json.dumps(body), head)
        self.response = self.connection.getresponse()

    def __iter__(self):
        for line in self.response:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))

    def until(self, kind):
        """The events up to the first of this type."""
        events = []
        for event in self:
            events.append(event)
            if event["type"] == kind:
                return events
        raise AssertionError(f"the stream ended without {kind}: {events}")

    def close(self):
        self.response.close()
        self.connection.close()


def reply(server, conversation, parent, **changes):
    body = {"parent_id": parent, **LONG, **changes}
    return Viewer(server, "POST", f"/api/conversations/{conversation}/replies", body)


def watch(server, conversation, message):
    return Viewer(server, "GET", f"/api/conversations/{conversation}/messages/{message}/events")


def stop(server, conversation, message):
    return server.ask("POST", f"/api/conversations/{conversation}/messages/{message}/stop")


def go_on(server, conversation, message, **sampling):
    return server.ask("POST", f"/api/conversations/{conversation}/messages/{message}/continuation", sampling)


def text_of(events):
    """What a viewer has on the screen after these events."""
    return events[0]["message"]["content"] + "".join(event.get("content", "") for event in events)


@contextlib.contextmanager
def held(server, after=40, answers=1):
    """The model waits for so many answers, takes `after` steps, and goes on when the event that it yields is set."""
    let_go, scheduler = threading.Event(), server.service.scheduler

    def may_go():
        return let_go.is_set() or (len(steps) <= after and scheduler.outstanding >= answers)

    with paused(server.service.catalogue.models["tiny"], may_go) as steps:
        yield let_go
        let_go.set()
        assert server.idle()


def written(server, message):
    """Characters of an answer so far."""
    writing = server.service.answers.find(message)
    return 0 if writing is None else len(writing.message["content"])


# --- watching ---------------------------------------------------------------------------------------------------------
def test_who_leaves_does_not_stop_an_answer_and_any_number_see_it_to_its_end(server):
    conversation, question = begin(server)
    with held(server) as let_go:
        first = reply(server, conversation, question)
        message = first.until("delta")[0]["message"]["id"]
        first.close()
        viewers = [watch(server, conversation, message) for _ in range(3)]
        starts = [viewer.until("message") for viewer in viewers]
        assert eventually(lambda: written(server, message) > 0)
        late = watch(server, conversation, message)
        so_far = late.until("message")
        assert so_far[0]["message"]["content"]
        assert so_far[0]["message"]["finish_reason"] is None
        let_go.set()
        shown = [text_of(start + viewer.until("done")) for start, viewer in zip(starts, viewers, strict=True)]
        shown.append(text_of(so_far + late.until("done")))
    whole = answer(server, conversation, question, max_tokens=200, seed=5)[-1]["message"]
    assert shown == [whole["content"]] * 4
    assert tree(server, conversation)[1]["content"] == whole["content"]
    again = list(watch(server, conversation, message))  # after its end too
    assert [event["type"] for event in again] == ["message", "done"]
    assert again[1]["message"] == tree(server, conversation)[1]


def test_an_answer_that_ends_while_a_viewer_comes_is_shown_as_it_ended(server, monkeypatch):
    conversation, question = begin(server)
    store = server.service.store
    read = store.message
    with held(server) as let_go:
        message = reply(server, conversation, question).until("delta")[0]["message"]["id"]

        def read_slowly(*names):
            row = read(*names)
            let_go.set()
            assert eventually(lambda: server.service.answers.find(message) is None)
            return row

        monkeypatch.setattr(store, "message", read_slowly)
        viewer = watch(server, conversation, message)
        let_go.set()
        events = list(viewer)
        monkeypatch.undo()
    ended = tree(server, conversation)[1]
    assert ended["finish_reason"] is not None
    assert (text_of(events[:-1]), events[-1]["message"]) == (ended["content"], ended)


def test_an_answer_is_shown_in_its_own_conversation_alone(server):
    (conversation, question), (other, asked) = begin(server), begin(server)
    with held(server):
        message = reply(server, conversation, question).until("delta")[0]["message"]["id"]
        assert reply(server, other, asked, id=message).response.status == 400
        assert watch(server, other, message).response.status == 404


def test_the_text_is_stored_as_it_comes(server, monkeypatch):
    monkeypatch.setattr(answers_module, "SAVE_SECONDS", 0.05)
    conversation, question = begin(server)
    with held(server) as let_go:
        viewer = reply(server, conversation, question)
        message = viewer.until("delta")[0]["message"]["id"]
        assert eventually(lambda: tree(server, conversation)[1]["content"])
        stored = tree(server, conversation)[1]
        assert (stored["id"], stored["finish_reason"]) == (message, None)
        let_go.set()
        ended = viewer.until("done")[-1]["message"]
    assert ended["content"].startswith(stored["content"])
    assert tree(server, conversation)[1] == ended


def test_a_database_that_is_slow_or_fails_delays_no_text_and_the_end_is_told_when_it_is_stored(server, monkeypatch):
    monkeypatch.setattr(answers_module, "SAVE_SECONDS", 0.05)
    store, opened, calls = server.service.store, threading.Event(), []
    save = store.save_answers

    def slow(rows):
        calls.append(len(rows))
        assert opened.wait(PATIENCE)
        if len(calls) == 1:
            raise OSError("the disk is full")
        return save(rows)

    monkeypatch.setattr(store, "save_answers", slow)
    conversation, question = begin(server)
    with held(server) as let_go:
        viewer = reply(server, conversation, question)
        viewer.until("delta")
        assert eventually(lambda: calls)
        let_go.set()
        writing = server.service.answers.find(tree(server, conversation)[1]["id"])
        assert eventually(lambda: writing.finish_reason is not None)  # all text has come, and nothing is stored
        assert not writing.over.is_set()
        assert tree(server, conversation)[1]["content"] == ""
        opened.set()
        ended = viewer.until("done")[-1]["message"]
    assert len(calls) > 1
    assert tree(server, conversation)[1] == ended


def test_an_end_stores_what_ended_and_not_all_that_grew(server, monkeypatch):
    monkeypatch.setattr(answers_module, "SAVE_SECONDS", 3600.0)
    stored, save = [], server.service.store.save_answers
    monkeypatch.setattr(server.service.store, "save_answers", lambda rows: stored.append(rows) or save(rows))
    talks = [begin(server) for _ in range(2)]
    with held(server, answers=2):
        viewers = [reply(server, *talk) for talk in talks]
        ids = [viewer.until("delta")[0]["message"]["id"] for viewer in viewers]
        stop(server, talks[0][0], ids[0])
        alone = [[row["id"] for row in rows] for rows in stored]
    assert alone == [[ids[0]]]


def test_a_viewer_of_an_answer_that_waits_hears_something(server, monkeypatch):
    monkeypatch.setattr(answers_module, "PING_SECONDS", 0.05)
    conversation, question = begin(server)
    with held(server, after=0):
        viewer = reply(server, conversation, question)
        lines = [viewer.response.readline() for _ in range(4)]
        assert lines[2:] == [b": still here\n", b"\n"]


# --- stopping ---------------------------------------------------------------------------------------------------------
def test_stopping_is_said_and_keeps_what_was_written(server):
    conversation, question = begin(server)
    with held(server):
        viewer = reply(server, conversation, question)
        message = viewer.until("delta")[0]["message"]["id"]
        stopped = stop(server, conversation, message)
        assert (stopped.status, stopped.json["finish_reason"]) == (200, "cancelled")
        assert viewer.until("done")[-1]["message"] == stopped.json
    assert stopped.json["content"]
    whole = answer(server, conversation, question, max_tokens=200, seed=5)[-1]["message"]["content"]
    assert whole.startswith(stopped.json["content"])
    assert len(stopped.json["content"]) < len(whole)
    assert stop(server, conversation, message).json == stopped.json == tree(server, conversation)[1]
    assert stop(server, conversation, IDS[0]).status == 404


def test_deleting_a_conversation_stops_its_answers_and_no_others(server):
    conversation, question = begin(server)
    other, their_question = begin(server)
    with held(server, answers=2) as let_go:
        viewer, theirs = reply(server, conversation, question), reply(server, other, their_question)
        for stream in (viewer, theirs):
            stream.until("delta")
        assert server.ask("DELETE", f"/api/conversations/{conversation}").status == 204
        assert viewer.until("done")[-1]["message"]["finish_reason"] == "cancelled"
        assert server.service.answers.of(conversation) == []
        let_go.set()
        assert theirs.until("done")[-1]["message"]["finish_reason"] in ("stop", "length")


def test_an_answer_whose_conversation_went_another_way_is_given_up(server, monkeypatch):
    """As when another server deletes it."""
    monkeypatch.setattr(answers_module, "SAVE_SECONDS", 0.05)
    conversation, question = begin(server)
    with held(server):
        viewer = reply(server, conversation, question)
        viewer.until("delta")
        server.service.store.remove_conversation(conversation)
        assert viewer.until("done")[-1]["message"]["finish_reason"] == "cancelled"


def test_editing_a_message_stops_the_answers_below_it(server):
    conversation, question = begin(server)
    first = answer(server, conversation, question)[-1]["message"]["id"]
    second = say(server, conversation, "And a weir?", first)
    beside = answer(server, conversation, question, seed=2)[-1]["message"]["id"]
    third = say(server, conversation, "And a sluice?", beside)
    with held(server, answers=2) as let_go:
        below, other = reply(server, conversation, second), reply(server, conversation, third)
        for stream in (below, other):
            stream.until("delta")
        say(server, conversation, "And a dam?", first)  # another wording of the second
        assert below.until("done")[-1]["message"]["finish_reason"] == "cancelled"
        let_go.set()
        assert other.until("done")[-1]["message"]["finish_reason"] != "cancelled"


def test_a_message_below_an_answer_that_is_being_written_ends_it_first(server):
    conversation, question = begin(server)
    with held(server):
        viewer = reply(server, conversation, question)
        message = viewer.until("delta")[0]["message"]["id"]
        say(server, conversation, "Enough.", message)
        assert tree(server, conversation)[1]["finish_reason"] == "cancelled"


# --- the same request again -------------------------------------------------------------------------------------------
def test_a_message_and_an_answer_that_are_sent_again_are_there_once(server):
    conversation = server.ask("POST", "/api/conversations", {}).json["id"]
    said = {"id": IDS[1], "parent_id": None, "role": "user", "content": "Hello"}
    path = f"/api/conversations/{conversation}"
    with held(server) as let_go:
        assert server.ask("POST", f"{path}/messages", said).status == 201
        streams = [reply(server, conversation, IDS[1], id=IDS[2]) for _ in range(3)]
        starts = [stream.until("message") for stream in streams]
        assert server.ask("POST", f"{path}/messages", said).json["id"] == IDS[1]  # stops nothing that answers it
        assert server.service.scheduler.outstanding == 1
        let_go.set()
        shown = {text_of(start + stream.until("done")) for start, stream in zip(starts, streams, strict=True)}
    shown.add(text_of(list(reply(server, conversation, IDS[1], id=IDS[2]))))  # when it has ended, too
    stored = tree(server, conversation)
    assert [message["id"] for message in stored] == IDS[1:3]
    assert shown == {stored[1]["content"]}
    for changes in ({"content": "Bye"}, {"id": IDS[2]}):
        refused = server.ask("POST", f"{path}/messages", {**said, **changes})
        assert (refused.status, "draw another id" in refused.error["message"]) == (400, True)
    assert server.ask("POST", f"{path}/messages", {**said, "id": "mine"}).error["param"] == "id"


# --- going on ---------------------------------------------------------------------------------------------------------
def test_an_answer_goes_on_in_place_as_the_api_goes_on_with_it(server):
    conversation, question = begin(server, system="Be brief.")
    cut = answer(server, conversation, question, temperature=0.5, top_k=40)[-1]["message"]
    assert cut["finish_reason"] == "length"
    went_on = go_on(server, conversation, cut["id"], seed=9, max_tokens=8).events
    assert went_on[0]["message"]["content"].startswith(cut["content"])
    ended = went_on[-1]["message"]
    assert text_of(went_on[:-1]) == ended["content"]
    assert tree(server, conversation)[1] == ended
    turns = [("system", "Be brief."), ("user", "What is a penstock?"), ("assistant", cut["content"])]
    body = {"model": "tiny", "messages": [{"role": role, "content": text} for role, text in turns], "seed": 9}
    body |= {"temperature": 0.5, "top_k": 40, "max_tokens": 8, "continue_final_message": True}
    rest = server.post(body).json["choices"][0]["message"]["content"]
    assert ended["content"] == cut["content"] + rest
    digest = server.service.catalogue.models["tiny"].digest
    part = {"temperature": 0.5, "top_k": 40, "max_tokens": 8, "seed": 9}
    continued = [{"at": len(cut["content"]), **part, "model_digest": digest}]
    assert ended["sampling"] == {**cut["sampling"], "continued": continued}
    twice = go_on(server, conversation, cut["id"]).events[-1]["message"]  # as before, with a new seed
    assert len(twice["sampling"]["continued"]) == 2
    assert twice["sampling"]["continued"][1]["max_tokens"] == 6


def test_an_answer_without_a_word_begins_in_place(server):
    conversation, question = begin(server)
    with held(server, after=0):
        message = reply(server, conversation, question).until("message")[0]["message"]["id"]
        assert stop(server, conversation, message).json["content"] == ""
    ended = go_on(server, conversation, message, seed=5, max_tokens=6).events[-1]["message"]
    assert (ended["id"], len(tree(server, conversation))) == (message, 2)
    assert ended["content"] == answer(server, conversation, question, seed=5)[-1]["message"]["content"]


def test_what_cannot_go_on_stays_as_it_is(server):
    conversation, question = begin(server)
    ended = answer(server, conversation, question)[-1]["message"]["id"]
    say(server, conversation, "Really?", ended)
    before = tree(server, conversation)
    for message, status, says in (
        (ended, 400, "a message follows this answer"), (question, 404, "there is no model"), (IDS[0], 404, "no message")
    ):  # fmt: skip
        refused = go_on(server, conversation, message)
        assert (refused.status, says in refused.error["message"]) == (status, True)
    assert tree(server, conversation) == before
    assert server.idle()


def test_an_answer_that_is_being_written_is_shown_and_not_begun_again(server):
    conversation, question = begin(server)
    with held(server) as let_go:
        viewer = reply(server, conversation, question)
        message = viewer.until("delta")[0]["message"]["id"]
        path = f"/api/conversations/{conversation}/messages/{message}/continuation"
        other = Viewer(server, "POST", path, {})
        start = other.until("message")
        let_go.set()
        ended = viewer.until("done")[-1]["message"]
        assert text_of(start + other.until("done")) == ended["content"]
    assert "continued" not in ended["sampling"]


def test_an_empty_answer_is_no_turn_of_a_prompt_or_an_export(server):
    conversation, question = begin(server)
    with held(server, after=0):
        message = reply(server, conversation, question).until("message")[0]["message"]["id"]
        stop(server, conversation, message)
    follow_up = say(server, conversation, "Hello?", message)
    turns = server.service.store.turns(follow_up, conversation)
    assert [turn["role"] for turn in turns] == ["user", "user"]
    line = json.loads(server.ask("GET", f"/api/conversations/{conversation}/export").body)
    assert [turn["role"] for turn in line["messages"]] == ["user", "user"]


def test_an_answer_that_is_being_written_has_no_votes(server):
    conversation, question = begin(server)
    with held(server):
        message = reply(server, conversation, question).until("message")[0]["message"]["id"]
        refused = server.ask("POST", "/api/votes", {"kind": "thumb", "message_id": message, "value": 1})
        assert (refused.status, "is being written" in refused.error["message"]) == (400, True)


# --- the end of a server ----------------------------------------------------------------------------------------------
def test_what_the_end_of_a_server_cut_is_marked_and_goes_on_in_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "DRAIN_SECONDS", 0.2)
    model = save_chatty(tmp_path / "tiny", max_length=20_000)
    with running(tmp_path / "data", model) as server:
        conversation, question = begin(server)
        viewer = reply(server, conversation, question, max_tokens=19_000, temperature=0)
        message = viewer.until("delta")[0]["message"]["id"]
    cut = viewer.until("done")[-1]["message"]
    assert (cut["finish_reason"], bool(cut["content"])) == ("interrupted", True)
    with running(tmp_path / "data", model) as server:
        assert tree(server, conversation)[1] == cut
        line = json.loads(server.ask("GET", f"/api/conversations/{conversation}/export").body)
        assert line["messages"][1] == {
            "role": "assistant", "content": cut["content"], "weight": 0, "finish_reason": "interrupted"
        }  # fmt: skip
        ended = go_on(server, conversation, message, max_tokens=5).events[-1]["message"]
        assert ended["content"].startswith(cut["content"])
        assert ended["finish_reason"] in ("length", "stop")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_answers_that_end_together_are_stored_together(monkeypatch):
    """A store that counts transactions, and generations that have ended before anybody looks."""
    transactions = []

    class CountingStore:
        def save_answers(self, rows):
            transactions.append([(row["content"], row["finish_reason"]) for row in rows])
            return set()

    class EndedGeneration:
        prompts, tokens_made, first_token_at = ((1, 2),), 3, None

        async def pieces(self):
            return [Piece(0, "all", finish_reason="stop")]

    counted = []
    answers = Answers(CountingStore(), cancel=lambda generation: None, count=counted.append)
    row = {"conversation_id": "c", "content": "", "finish_reason": None}
    begun = [answers.begin({**row, "id": name}, EndedGeneration()) for name in IDS]
    await answers.close()
    assert transactions == [[("all", "stop")] * 100]
    assert len(counted) == 100
    assert all(answer.over.is_set() for answer in begun)
    assert answers.of("c") == []
