"""The page's routes for every day, on SQLite and PostgreSQL where the database matters: search, pins, answers that
people rewrite, messages removed, titles by a model, import and markdown."""

import json
import sqlite3
import threading
import urllib.parse

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

from penstock import cli
from penstock.data.formats import read
from penstock.serve import store as stores
from penstock.serve.chats import search as searching
from penstock.serve.chats import titles
from penstock.serve.chats.changes import remove_message, rewrite_answer, set_title
from penstock.serve.chats.importing import import_conversation
from penstock.serve.chats.markdown import as_markdown
from penstock.serve.chats.title_text import cleaned
from penstock.serve.store import open_store
from tests.serve.conftest import eventually, paused
from tests.serve.test_page_api import answer, begin, say, tree
from tests.serve.test_store import add_example, end

TALK = {"title": "", "system": "", "created_at": None}


def imported(*contents, **fields):
    """A conversation of these turns as an import sends it."""
    roles = ("user", "assistant")
    blank = {"model": None, "created_at": None, "finish_reason": None, "disliked": False}
    rows = [
        {"parent": i - 1 if i else None, "role": roles[i % 2], "content": content, **blank}
        for i, content in enumerate(contents)
    ]
    return {**TALK, "messages": rows, **fields}


def titles_of(rows):
    return [row["title"] for row in rows]


# --- search -----------------------------------------------------------------------------------------------------------
def test_a_search_has_titles_first_and_then_messages_newest_first(store):
    old, _ = import_conversation(store, imported("Rivers", "They run to the SEA."))
    import_conversation(store, imported("Lakes", "They rest."))
    new, _ = import_conversation(store, imported("Where do ships go", "Over the sea, and home."))
    named, _ = import_conversation(store, imported("Hello", "Hello.", title="By the sea"))
    rows, rest = searching.search(store, "sea")
    assert ([row["id"] for row in rows], rest) == ([named["id"], new["id"], old["id"]], None)
    assert [row["hit"] and row["hit"]["text"] for row in rows] == [
        None, "Over the sea, and home.", "They run to the SEA."
    ]  # fmt: skip
    assert [row["hit"]["role"] for row in rows[1:]] == ["assistant"] * 2
    assert searching.search(store, "sea home")[0][0]["id"] == new["id"]  # all words, in one message
    assert searching.search(store, "sea lakes")[0] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("100% of it", "0%"), ("under_score", "R_s"), ("a/b\\c", "a/b\\"), ("Straße nach Köln", "KÖLN"),
        ("Привет, мир", "привет"), ("水門は何ですか", "門は"), ("O'Hara said \"no\"", "'hara"),
    ],
)  # fmt: skip
def test_a_search_takes_every_letter_for_itself(store, content, words):
    wanted, _ = import_conversation(store, imported(content, "Yes."))
    import_conversation(store, imported("1000 of them, underscore, abc", "Yes."))
    assert [row["id"] for row in searching.search(store, words)[0]] == [wanted["id"]]


def test_a_search_goes_on_where_its_time_or_its_room_ended(store, monkeypatch):
    ids = [import_conversation(store, imported(f"Question {i}", f"The same words {i}"))[0]["id"] for i in range(9)]
    for limits in ({"SECONDS": -1.0, "WINDOW": 4}, {"HITS": 2}, {"HITS": 3, "WINDOW": 5}, {"WINDOW": 1}):
        with monkeypatch.context() as patch:
            for name, value in limits.items():
                patch.setattr(searching, name, value)
            rows, rest = searching.search(store, "same words")
            assert (rest is None) == (limits == {"WINDOW": 1})  # time and room for all of it
            while rest is not None:
                more, rest = searching.search(store, "same words", rest)
                rows += more
        assert [row["id"] for row in rows] == ids[::-1], limits


def test_an_excerpt_is_one_line_around_the_first_word():
    text = "x " * 400 + "here is\nthe gate" + " y" * 400
    line = searching.excerpt(text, ["gate"])
    assert line.startswith("... x")
    assert "here is the gate y" in line
    assert len(line) < 170


def test_a_search_holds_up_neither_health_nor_writes(server, monkeypatch):
    entered, leave = threading.Event(), threading.Event()

    def slow(*arguments):
        entered.set()
        assert leave.wait(60)
        return False

    @searching.sa.event.listens_for(server.service.store._engine, "connect")
    def _add(connection, _):
        connection.create_function("slow", 0, slow)

    server.service.store._engine.dispose()
    monkeypatch.setattr(searching, "_holds", lambda *_: searching.sa.text("slow()"))
    begin(server)
    thread = threading.Thread(target=lambda: server.ask("GET", "/api/search?q=x"))
    thread.start()
    try:
        assert entered.wait(60)
        assert server.ask("GET", "/health").status == 200
        begin(server)
    finally:
        leave.set()
        thread.join()
        searching.sa.event.remove(server.service.store._engine, "connect", _add)


def test_a_search_over_http(server):
    conversation, question = begin(server, "What is this? " + "x " * 40 + "A word: floccinaucinihilipilification")
    found = server.ask("GET", "/api/search?q=" + urllib.parse.quote("FLOCCINAUCI word")).json
    [row] = found["data"]
    assert (row["id"], row["hit"]["message_id"], found["rest"]) == (conversation, question, None)
    for query in ("", "%20", "%00", "x" * 201):
        assert server.ask("GET", f"/api/search?q={query}").error["param"] == "q"
    assert server.ask("GET", "/api/search?q=x&rest=0").error["param"] == "rest"


# --- pins and names ---------------------------------------------------------------------------------------------------
def test_pinned_conversations_come_first_on_every_page_of_the_list(store):
    ids = [store.add_conversation(f"{i}", "")["id"] for i in range(6)]
    for i in (1, 3):
        assert store.change_conversation(ids[i], {"pinned": True})["pinned"] is True
    seen, before = [], None
    while True:
        rows, has_more = store.list_conversations(2, before)
        seen += titles_of(rows)
        before = rows[-1]["id"]
        if not has_more:
            break
    assert seen == ["3", "1", "5", "4", "2", "0"]
    store.change_conversation(ids[3], {"pinned": False})
    assert titles_of(store.list_conversations(3, None)[0]) == ["1", "5", "4"]


def test_only_a_person_names_for_good(store):
    conversation, *_ = add_example(store)
    assert set_title(store, conversation, "Gates")["title"] == "Gates"
    store.change_conversation(conversation, {"system": "Be brief."})
    assert set_title(store, conversation, "Water gates")["title"] == "Water gates"
    assert store.change_conversation(conversation, {"title": "Mine"})["named"]
    assert set_title(store, conversation, "Theirs")["title"] == "Mine"


def test_tables_of_the_first_version_are_brought_up_to_date(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/penstock.db")
    config = Config()
    config.set_main_option("script_location", str(stores.Path(stores.__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    with sqlite3.connect(tmp_path / "penstock.db") as old:
        old.execute("INSERT INTO conversations VALUES (1, ?, 'Mine', '', 1.0, 1.0)", ("conv_" + "0" * 24,))
    store = open_store(str(tmp_path), None)
    [row], _ = store.list_conversations(5, None)
    assert (row["title"], row["pinned"], row["named"]) == ("Mine", False, True)
    store.close()


# --- answers that people rewrite, and what they remove ----------------------------------------------------------------
def test_a_rewritten_answer_is_a_branch_and_better_than_the_first(server, tmp_path, capsys):
    conversation, question = begin(server)
    first = answer(server, conversation, question)[-1]["message"]
    path = f"/api/conversations/{conversation}/messages/{first['id']}"
    reply = server.ask("POST", f"{path}/rewrite", {"content": "The pipe that feeds a turbine."})
    second = reply.json
    assert (reply.status, second["edited_from"], second["parent_id"]) == (201, first["id"], question)
    assert (second["finish_reason"], second["model"], second["sampling"]) == ("stop", "tiny", None)
    assert [message["id"] for message in tree(server, conversation)] == [question, first["id"], second["id"]]
    lines = server.ask("GET", f"/api/conversations/{conversation}/export").body.decode().splitlines()
    turns = [json.loads(line)["messages"][-1] for line in lines]
    assert turns[0]["weight"] == 0  # the first is read and not learned
    assert turns[1] == {"role": "assistant", "content": "The pipe that feeds a turbine."}
    data = str(server.service.config.data_dir)
    for kind in ("comparisons", "votes"):
        out = tmp_path / f"{kind}.jsonl"
        words = ["data", "export", "--votes", "--data-dir", data, "--out", str(out), "--kind", kind]
        cli.main(words)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        ours = [line for line in lines if second["content"] in json.dumps(line)]
        if kind == "comparisons":
            [line] = ours
            assert line["responses"][line["ranking"][0]] == second["content"]
            assert not read(str(out), "comparisons").bad
        else:
            assert [line["label"] for line in ours] == [True]
    assert server.ask("POST", f"{path}/rewrite", {"content": ""}).error["param"] == "content"
    wrong = f"/api/conversations/{conversation}/messages/{question}/rewrite"
    assert server.ask("POST", wrong, {"content": "x"}).status == 400
    server.ask("DELETE", f"/api/conversations/{conversation}")  # its vote would be counted by other tests


def test_an_answer_that_is_being_written_is_not_rewritten(store):
    conversation, question, _ = add_example(store)
    writing = store.add_message(conversation, question, "assistant", "")
    with pytest.raises(ValueError, match="being written"):
        rewrite_answer(store, conversation, writing["id"], "Better.")


def test_a_removed_message_takes_what_follows_it_and_its_votes(store):
    conversation, question, (left, right) = add_example(store)
    follow_up = store.add_message(conversation, left, "user", "Really?")["id"]
    store.vote_pair((left, right), left)
    store.vote_thumb(right, 1)
    with pytest.raises(LookupError):
        remove_message(store, add_example(store)[0], left)
    remove_message(store, conversation, left)
    assert [row["id"] for row in store.messages(conversation)] == [question, right]
    assert [vote["kind"] for vote in store.votes(conversation)] == ["thumb"]
    with pytest.raises(LookupError):
        store.message(follow_up, conversation)


def test_a_conversation_of_thousands_of_messages_can_be_cut_and_deleted(store):
    talk, _ = import_conversation(store, imported(*map(str, range(2500))))
    rows = store.messages(talk["id"])
    remove_message(store, talk["id"], rows[3]["id"])
    assert [row["content"] for row in store.messages(talk["id"])] == ["0", "1", "2"]
    other, _ = import_conversation(store, imported(*map(str, range(2501))))
    store.remove_conversation(other["id"])
    with pytest.raises(LookupError):
        store.messages(other["id"])


def test_removing_a_message_stops_the_answer_below_it(server):
    conversation, question = begin(server)
    model = server.service.catalogue.models["tiny"]
    gate = threading.Event()
    with paused(model, gate.is_set, after=1):
        thread = threading.Thread(target=lambda: answer(server, conversation, question, max_tokens=200))
        thread.start()
        assert eventually(lambda: server.service.answers.of(conversation))
        path = f"/api/conversations/{conversation}/messages/{question}"
        removal = threading.Thread(target=lambda: server.ask("DELETE", path))
        removal.start()
        assert eventually(lambda: all(a.generation.cancelled for a in server.service.answers.of(conversation)))
        gate.set()
        removal.join()
        thread.join()
    assert tree(server, conversation) == []
    assert server.ask("DELETE", path).status == 404


# --- tokens -----------------------------------------------------------------------------------------------------------
def test_an_answer_says_how_many_tokens_it_took(server):
    conversation, question = begin(server)
    first = answer(server, conversation, question)[-1]["message"]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "What is a penstock?"}], "max_tokens": 6}
    usage = server.post({**asked, "seed": 1}).json["usage"]
    assert first["usage"]["prompt_tokens"] == usage["prompt_tokens"]
    assert first["usage"]["completion_tokens"] == usage["completion_tokens"] == 6
    path = f"/api/conversations/{conversation}/messages/{first['id']}/continuation"
    more = server.ask("POST", path, {"max_tokens": 3}).events[-1]["message"]
    assert more["usage"]["completion_tokens"] == 9
    assert more["usage"]["seconds"] >= first["usage"]["seconds"]
    assert tree(server, conversation)[1]["usage"] == more["usage"]
    [card] = [card for card in server.ask("GET", "/v1/models").json["data"] if card["id"] == "tiny"]
    assert card["max_model_len"] == 256


# --- titles -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer_text", "title"),
    [
        ("The River", "The River"), ('"The River."', "The River"), ("**Title: The River**\n\nIt is", "The River"),
        ("# The River", "The River"), ("<think>What is it</think>\nThe River", "The River"), ("<think>What", ""),
        ("", ""), ("...", ""), ("x" * 61, ""), ("title: \u300cRiver\u300d", "\u300cRiver\u300d"),
    ],
)  # fmt: skip
def test_a_title_is_taken_out_of_an_answer(answer_text, title):
    assert cleaned(answer_text) == title


def speak_title(monkeypatch, text):
    """Models answer a request for a title with a text: those of the tests say noise."""

    async def answered(service, model, request):
        return text

    monkeypatch.setattr(titles, "_attempt", answered)
    monkeypatch.setattr(titles, "ASK", "{question}")  # the tiny context has no room for the instructions


def test_a_model_names_a_conversation_unless_a_person_did(server, monkeypatch):
    conversation, question = begin(server)
    path = f"/api/conversations/{conversation}"
    speak_title(monkeypatch, "**Water pipes**")
    unanswered = server.ask("POST", f"{path}/title", {"model": "tiny"})
    assert (unanswered.status, unanswered.json["title"]) == (200, "What is a penstock?")
    answer(server, conversation, question)
    assert server.ask("POST", f"{path}/title", {"model": "tiny"}).json["title"] == "Water pipes"
    server.ask("PATCH", path, {"title": "Mine"})
    assert server.ask("POST", f"{path}/title", {"model": "tiny"}).json["title"] == "Mine"
    assert server.ask("POST", f"{path}/title", {"model": "none"}).status == 404


def test_a_title_waits_until_nobody_does_and_leaves_for_who_comes(server, monkeypatch):
    """The title's generation is dropped for a request of a person's, and made again when that has its answer."""
    monkeypatch.setattr(titles, "ASK", "{question}")
    conversation, question = begin(server)
    answer(server, conversation, question)
    model, service = server.service.catalogue.models["tiny"], server.service
    begun, come, result = [], threading.Event(), {}
    submit = service.scheduler.submit
    monkeypatch.setattr(service.scheduler, "submit", lambda request: (begun.append(request), submit(request))[1])
    path = f"/api/conversations/{conversation}/title"
    ask_title = threading.Thread(target=lambda: result.update(server.ask("POST", path, {"model": "tiny"}).json))
    with paused(model, come.is_set):
        ask_title.start()
        assert eventually(lambda: begun)
        assert begun[0].background
        assert service.scheduler.outstanding == 0
        person = threading.Thread(target=lambda: begin_and_answer(server, result))
        person.start()
        assert eventually(lambda: len(begun) == 2)
        assert begun[0].cancelled
        assert not begun[1].background
        come.set()
        person.join()
    ask_title.join()
    assert result["answered"]["finish_reason"] in ("stop", "length")
    assert [request.background for request in begun] == [True, False, True]  # and again, for the title
    assert not service.background
    assert server.idle()


def begin_and_answer(server, result):
    result["answered"] = answer(server, *begin(server, "Another"))[-1]["message"]


# --- import and markdown ----------------------------------------------------------------------------------------------
def test_an_imported_conversation_is_there_once_with_its_times_and_dislikes(store):
    talk = imported("What is a weir?", "A dam.", "Sure?", "Yes.", title="Weirs", system="Be brief.", created_at=1e9)
    talk["messages"][1] |= {"model": "gpt-x", "created_at": 1e9 + 1, "disliked": True}
    talk["messages"][3] |= {"finish_reason": "length", "created_at": 1e9 + 9}
    talk["messages"][2]["created_at"] = talk["messages"][0]["created_at"] = 1e9
    row, existed = import_conversation(store, talk)
    assert not existed
    assert import_conversation(store, talk) == (row, True)
    assert (row["title"], row["named"], row["created_at"], row["updated_at"]) == ("Weirs", True, 1e9, 1e9 + 9)
    assert [message["model"] for message in store.messages(row["id"])] == [None, "gpt-x", None, None]
    [way] = store.leaves(row["id"])
    assert [turn.get("weight") for turn in way] == [None, None, 0, None, 0]
    [vote] = store.votes(row["id"])
    assert [turn["content"] for turn in vote["prompt"]] == ["Be brief.", "What is a weir?"]


def test_what_is_no_conversation_is_refused_by_its_message(server):
    good = imported("a", "b")
    cases = {
        "messages[1].parent": [{**good["messages"][0]}, {**good["messages"][1], "parent": 1}],
        "messages[0] is the assistant's": [{**good["messages"][1], "parent": None}],
        "messages[1] is the user's": [good["messages"][0], {**good["messages"][0], "parent": 0}],
        "only an answer is disliked": [{**good["messages"][0], "disliked": True}],
    }
    for words, messages in cases.items():
        reply = server.ask("POST", "/api/import", {**good, "messages": messages})
        assert (reply.status, words in reply.error["message"]) == (400, True), reply.error
    for fields in ({"messages": []}, {"title": "x" * 201}, {"created_at": 1e300}, {"more": 1}, {"system": "\0"}):
        assert server.ask("POST", "/api/import", {**good, **fields}).status == 400
    assert server.ask("POST", "/api/import", good).status == 201
    assert server.ask("POST", "/api/import", good).json["existed"]


def test_an_import_may_be_larger_than_other_bodies_and_has_its_limit(server):
    long = imported(*["x" * 400_000] * 4)
    assert server.ask("POST", "/api/import", long).status == 201
    reply = server.ask("POST", "/api/import", imported(*["x" * 400_000] * 12))
    assert (reply.status, "4 MiB" in reply.error["message"]) == (413, True)


def test_markdown_says_whose_words_and_when(store):
    conversation, question, (left, _) = add_example(store)
    other = rewrite_answer(store, conversation, left, "<think>Hm.</think>\nA pipe.")
    rows = {row["id"]: row for row in store.messages(conversation)}
    text = as_markdown(store.conversation(conversation), [rows[question], rows[other["id"]]])
    assert text.startswith("# What is a penstock?\n\n## System prompt\n\nBe brief.\n\n## You (20")
    assert "## tiny, rewritten by a person (20" in text
    assert text.endswith("<details>\n<summary>Thought</summary>\n\nHm.\n\n</details>\n\nA pipe.\n")
    end(store, rows[left], "A ga", "length")
    text = as_markdown(store.conversation(conversation), [rows[question], store.message(left, conversation)])
    assert text.endswith("A ga\n\n*(cut: length)*\n")


def test_markdown_is_of_the_branch_that_is_asked_for(server):
    conversation, question = begin(server)
    first = answer(server, conversation, question)[-1]["message"]
    say(server, conversation, "What is a weir?")
    path = f"/api/conversations/{conversation}/markdown"
    assert "## tiny" not in server.ask("GET", path).body.decode()
    reply = server.ask("GET", f"{path}?leaf={first['id']}")
    assert "## tiny" in reply.body.decode()
    assert reply.headers["content-type"].startswith("text/markdown")
    assert "filename*=UTF-8''What%20is%20a%20penstock%3F.md" in reply.headers["content-disposition"]
    assert server.ask("GET", f"{path}?leaf=msg_{'0' * 24}").status == 404
    empty = server.ask("POST", "/api/conversations", {}).json["id"]
    assert server.ask("GET", f"/api/conversations/{empty}/markdown").body == b"# Untitled\n"
