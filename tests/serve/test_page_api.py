"""The page's routes, as the page uses them: conversations, answers that stream into them, votes, their export."""

import json
import re
import threading
from pathlib import Path

import pytest

from penstock import cli
from penstock.data.formats import read
from penstock.serve import openai_requests, static_files
from penstock.serve.errors import ApiError
from penstock.serve.scheduler import BusyError

SAMPLING = {"model": "tiny", "max_tokens": 6, "seed": 1}


def begin(server, text="What is a penstock?", **settings):
    """Ids of a new conversation and its message."""
    conversation = server.ask("POST", "/api/conversations", settings).json["id"]
    return conversation, say(server, conversation, text)


def say(server, conversation, text, parent=None):
    body = {"parent_id": parent, "role": "user", "content": text}
    reply = server.ask("POST", f"/api/conversations/{conversation}/messages", body)
    assert reply.status == 201
    return reply.json["id"]


def answer(server, conversation, parent, **sampling):
    """The events of an answer."""
    body = {"parent_id": parent, **SAMPLING, **sampling}
    reply = server.ask("POST", f"/api/conversations/{conversation}/replies", body)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    return reply.events


def tree(server, conversation):
    return server.ask("GET", f"/api/conversations/{conversation}").json["messages"]


def test_an_answer_streams_and_is_kept(server):
    conversation, question = begin(server, system="Be brief.")
    first, *deltas, last = answer(server, conversation, question, temperature=0.5, top_k=5)
    assert first["type"] == "message"
    message = first["message"]
    assert (message["role"], message["parent_id"]) == ("assistant", question)
    assert {delta["type"] for delta in deltas} <= {"delta"}
    assert last["type"] == "done"
    assert last["message"]["content"] == message["content"] + "".join(delta["content"] for delta in deltas)
    assert last["message"]["finish_reason"] in ("length", "stop")
    assert last["message"]["sampling"] == {"temperature": 0.5, "top_k": 5, "max_tokens": 6, "seed": 1}
    assert [message["role"] for message in tree(server, conversation)] == ["user", "assistant"]
    assert tree(server, conversation)[1] == last["message"]


def test_it_is_the_answer_that_the_api_gives(server):
    conversation, question = begin(server, system="Be brief.")
    reply_message = answer(server, conversation, question)[-1]["message"]
    follow_up = say(server, conversation, "Really?", reply_message["id"])
    texts = ["Be brief.", "What is a penstock?", reply_message["content"], "Really?"]
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, texts, strict=True)]
    body = {**SAMPLING, "messages": messages}
    whole = server.ask("POST", "/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    assert answer(server, conversation, follow_up)[-1]["message"]["content"] == whole


def test_without_a_seed_the_drawn_one_is_kept_and_gives_the_same_answer_again(server):
    conversation, question = begin(server)
    first = answer(server, conversation, question, seed=None)[-1]["message"]
    assert 0 <= first["sampling"]["seed"] < 2**53  # as JavaScript's numbers
    second = answer(server, conversation, question, seed=first["sampling"]["seed"])[-1]["message"]
    assert second["content"] == first["content"]
    assert second["id"] != first["id"]


def test_editing_makes_a_branch(server):
    conversation, question = begin(server)
    answer(server, conversation, question)
    edited = say(server, conversation, "What is a weir?")
    answer(server, conversation, edited)
    assert [message["parent_id"] for message in tree(server, conversation)] == [None, question, None, edited]


def test_many_short_messages_are_not_read_in_the_event_loop(server, monkeypatch):
    conversation, question = begin(server, "Hi")
    for i in range(130):
        role, text = (("assistant", ""), ("user", "Yes"))[i % 2]
        question = server.service.store.add_message(conversation, question, role, text)["id"]
        if not text:
            server.service.store.save_answers([{"id": question, "content": "No", "finish_reason": "stop"}])
    threads = []

    def encode(body, model):
        threads.append(threading.current_thread().name)
        raise ApiError(400, "read")

    monkeypatch.setattr(openai_requests, "encode_chat", encode)
    server.ask("POST", f"/api/conversations/{conversation}/replies", {"parent_id": question, **SAMPLING})
    assert threads[0].startswith("tokenizing")


def test_a_prompt_beyond_the_context_stores_no_answer(server):
    conversation, question = begin(server, "x" * 2000)
    reply = server.ask("POST", f"/api/conversations/{conversation}/replies", {"parent_id": question, **SAMPLING})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert len(tree(server, conversation)) == 1


def test_a_reply_that_is_turned_away_stores_no_answer(server, monkeypatch):
    def full(generation):
        raise BusyError("no room")

    conversation, question = begin(server)
    monkeypatch.setattr(server.service.scheduler, "submit", full)
    reply = server.ask("POST", f"/api/conversations/{conversation}/replies", {"parent_id": question, **SAMPLING})
    assert (reply.status, reply.error["code"]) == (429, "queue_full")
    assert len(tree(server, conversation)) == 1


def test_an_answer_that_fits_nowhere_is_not_generated(server):
    conversation, question = begin(server)
    reply_message = answer(server, conversation, question)[-1]["message"]["id"]
    body = {"parent_id": reply_message, **SAMPLING, "max_tokens": 200}
    reply = server.ask("POST", f"/api/conversations/{conversation}/replies", body)
    assert (reply.status, "the last turn is the assistant's" in reply.error["message"]) == (400, True)
    assert server.idle()
    assert len(tree(server, conversation)) == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("messages", {"role": "assistant", "content": "x"}, 400, "role"),
        ("messages", {"role": "user", "content": ""}, 400, "content"),
        ("messages", {"role": "user", "content": "a\0b"}, 400, "content"),
        ("messages", {"role": "user", "content": "x", "parent_id": "msg_" + "0" * 24}, 404, None),
        ("messages", {"role": "user", "content": "x", "more": 1}, 400, "more"),
        ("replies", {"parent_id": "msg_" + "0" * 24, "model": "tiny"}, 404, None),
        ("replies", {"parent_id": "x", "model": "nobody"}, 404, "model"),
        ("replies", {"parent_id": "x", "model": "tiny", "temperature": 9}, 400, "temperature"),
    ],
)
def test_bad_bodies_are_named(server, path, body, status, param):
    conversation, _ = begin(server)
    reply = server.ask("POST", f"/api/conversations/{conversation}/{path}", body)
    assert (reply.status, reply.error["param"]) == (status, param)


def test_conversations_are_listed_changed_and_removed(server):
    conversation, _ = begin(server, "  first\n words ")
    assert server.ask("GET", "/api/conversations?limit=1").json["data"][0]["title"] == "first words"
    changed = server.ask("PATCH", f"/api/conversations/{conversation}", {"title": "renamed"}).json
    assert (changed["title"], changed["system"]) == ("renamed", "")
    page = server.ask("GET", f"/api/conversations?limit=1&before={conversation}").json
    assert conversation not in [row["id"] for row in page["data"]]
    assert server.ask("DELETE", f"/api/conversations/{conversation}").status == 204
    assert server.ask("GET", f"/api/conversations/{conversation}").status == 404


def test_export_has_a_line_for_each_way_through_the_tree(server, tmp_path):
    conversation, question = begin(server, "\u6c34 </script>", system="Be brief.")
    for seed in (1, 2):
        answer(server, conversation, question, seed=seed)
    reply = server.ask("GET", f"/api/conversations/{conversation}/export")
    assert reply.headers["content-type"].startswith("application/jsonl")
    assert reply.headers["content-disposition"].startswith("attachment")
    lines = [json.loads(line) for line in reply.body.decode().splitlines()]
    assert [[turn["role"] for turn in line["messages"]] for line in lines] == [["system", "user", "assistant"]] * 2
    assert lines[0]["messages"][1]["content"] == "\u6c34 </script>"
    everything = server.ask("GET", "/api/export").body.decode().splitlines()
    assert {json.dumps(json.loads(line)) for line in everything} >= {json.dumps(line) for line in lines}


# --- votes ------------------------------------------------------------------------------------------------------------
def two_answers(server, text="What is a penstock?"):
    conversation, question = begin(server, text, system="Be brief.")
    ids = [answer(server, conversation, question, model=model)[-1]["message"]["id"] for model in ("tiny", "other")]
    return conversation, ids


def test_votes_become_comparisons_that_reward_reads(server, tmp_path, capsys):
    pair, (a, b) = two_answers(server)
    vote = server.ask("POST", "/api/votes", {"kind": "pair", "shown": [b, a], "chosen_id": a})
    assert (vote.status, vote.json["shown"], vote.json["chosen_id"]) == (200, [b, a], a)
    tie, (c, d) = two_answers(server, "And a weir?")
    server.ask("POST", "/api/votes", {"kind": "pair", "shown": [c, d], "chosen_id": None})
    thumbs, (e, f) = two_answers(server, "And a sluice?")
    server.ask("POST", "/api/votes", {"kind": "thumb", "message_id": e, "value": -1})
    server.ask("POST", "/api/votes", {"kind": "thumb", "message_id": f, "value": 1})
    _lonely, (g, _) = two_answers(server, "And a dam?")
    server.ask("POST", "/api/votes", {"kind": "thumb", "message_id": g, "value": 1})
    assert [v["value"] for v in server.ask("GET", f"/api/votes?conversation_id={thumbs}").json["data"]] == [-1, 1]

    out = tmp_path / "votes.jsonl"
    cli.main(["data", "export", "--votes", "--data-dir", server.service.config.data_dir, "--out", str(out)])
    assert "3 comparisons" in capsys.readouterr().out
    texts = {row["id"]: row["content"] for conversation in (pair, tie, thumbs) for row in tree(server, conversation)}
    records = read(str(out), "comparisons").records
    assert [(record.responses, record.ranks) for record in records] == [
        ((texts[b], texts[a]), (1, 0)), ((texts[c], texts[d]), (0, 0)), ((texts[f], texts[e]), (0, 1)),
    ]  # fmt: skip
    assert records[0].messages == (
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a penstock?"}
    )  # fmt: skip
    line = json.loads(out.read_text().splitlines()[0])
    digests = {name: model.digest for name, model in server.service.catalogue.models.items()}
    shown = [(answer["model"], answer["digest"], answer["sampling"]["seed"]) for answer in line["shown"]]
    assert shown == [("other", digests["other"], 1), ("tiny", digests["tiny"], 1)]
    ends = {row["id"]: row["finish_reason"] for row in tree(server, pair)}
    assert line["finish_reason"] == [ends[b], ends[a]]  # no end follows cut ones
    assert records[0].cut == tuple(i for i, name in enumerate((b, a)) if ends[name] != "stop") == (0, 1)


def test_votes_are_exported_one_by_one_as_kto_reads_them(server, tmp_path, capsys):
    """A thumb is one vote, without its opposite too; a pair is a liked and a disliked answer; a tie says nothing."""
    pair, (a, b) = two_answers(server, "Why is water wet?")
    server.ask("POST", "/api/votes", {"kind": "pair", "shown": [b, a], "chosen_id": a})
    _tie, (c, d) = two_answers(server, "Why is ice cold?")
    server.ask("POST", "/api/votes", {"kind": "pair", "shown": [c, d], "chosen_id": None})
    thumbs, (e, f) = two_answers(server, "Why is steam hot?")
    server.ask("POST", "/api/votes", {"kind": "thumb", "message_id": e, "value": -1})
    server.ask("POST", "/api/votes", {"kind": "thumb", "message_id": f, "value": 1})
    out = tmp_path / "votes.jsonl"
    folder = server.service.config.data_dir
    cli.main(["data", "export", "--votes", "--kind", "votes", "--data-dir", folder, "--out", str(out)])
    assert re.search(r"\d+ votes \(\d+ liked, \d+ disliked\) from \d+ votes of the page", capsys.readouterr().out)
    texts = {row["id"]: row["content"] for conversation in (pair, thumbs) for row in tree(server, conversation)}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    places = {line["shown"][0]["message_id"]: i for i, line in enumerate(lines)}
    assert {name: lines[places[name]]["label"] for name in (a, b, e, f)} == {a: True, b: False, e: False, f: True}
    assert not {c, d} & set(places)
    assert len({line["id"] for line in lines}) == len(lines)
    records = read(str(out), "votes").records
    assert [records[places[name]].response for name in (a, b, e, f)] == [texts[name] for name in (a, b, e, f)]
    assert {records[places[name]].cut for name in (a, b, e, f)} == {(0,)}  # all are at their limit
    system = {"role": "system", "content": "Be brief."}
    assert records[places[e]].messages == (system, {"role": "user", "content": "Why is steam hot?"})
    assert lines[places[a]]["shown"][0]["model"] == "tiny"
    tiny, run = str(Path(folder).parent / "tiny"), tmp_path / "kto"
    cli.main(["kto", "--model", tiny, "--data", str(out), "--out", str(run), "--steps", "2", "--batch-size", "4"])
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["count/chosen"] + row["count/rejected"] == 4


def test_disliked_and_cut_answers_are_exported_as_not_to_be_learned(server, tmp_path):
    conversation, (good, bad) = two_answers(server)
    rows = {row["id"]: row for row in tree(server, conversation)}
    finish = {name: rows[name]["finish_reason"] for name in (good, bad)}
    server.ask("POST", "/api/votes", {"kind": "thumb", "message_id": bad, "value": -1})
    lines = server.ask("GET", f"/api/conversations/{conversation}/export").body.decode().splitlines()
    answers = [json.loads(line)["messages"][-1] for line in lines]
    assert [turn["content"] for turn in answers] == [rows[good]["content"], rows[bad]["content"]]
    assert [turn.get("weight", 1) for turn in answers] == [int(finish[good] == "stop"), 0]
    assert [turn.get("finish_reason", "stop") for turn in answers] == [finish[good], finish[bad]]


@pytest.mark.parametrize(("body", "param"), [
    ({"kind": "pair", "shown": ["a"], "chosen_id": None}, "shown"),
    ({"kind": "thumb", "message_id": "x", "value": 2}, "value"), ({"kind": "wave"}, "kind"), ({}, "kind"),
])  # fmt: skip
def test_a_vote_that_says_nothing_is_refused(server, body, param):
    reply = server.ask("POST", "/api/votes", body)
    assert (reply.status, (reply.error["param"] or "").rpartition(".")[2]) == (400, param)


def test_there_is_nothing_to_export_from_nowhere(tmp_path, capsys):
    for arguments, says in (
        (["--votes", "--data-dir", str(tmp_path), "--out", str(tmp_path / "x")], "there is no penstock.db in it"),
        (["--out", str(tmp_path / "x")], "--votes, --rankings or both"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["data", "export", *arguments])
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err


# --- the page's files -------------------------------------------------------------------------------------------------
@pytest.fixture
def page(tmp_path, monkeypatch):
    (tmp_path / "vendor").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "index.html").write_text('  <!-- shared/head.html -->\n<link href="assets/no.css"> "assets"')
    (tmp_path / "shared" / "head.html").write_text('<script src="/assets/app.js"></script>')
    (tmp_path / "app.js").write_text("console.log(1)")
    (tmp_path / "vendor" / "x.js").write_text("2")
    (tmp_path / "secret.pem").write_text("not for the web")
    monkeypatch.setattr(static_files, "PAGE", tmp_path)
    static_files.files.cache_clear()
    yield tmp_path
    static_files.files.cache_clear()


def test_files_have_the_hash_of_their_bytes_and_are_kept_for_ever(server, page):
    reply = server.ask("GET", "/", key=None)
    version = static_files.files()["app.js"][1]
    linked = f'<script src="assets/app.js?v={version}"></script><link href="assets/no.css"> "assets"'
    assert reply.body.decode() == linked
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    again = server.ask("GET", "/", key=None, headers={"if-none-match": reply.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    script = server.ask("GET", f"/assets/app.js?v={version}", key=None)
    assert (script.body, script.headers["cache-control"]) == (b"console.log(1)", static_files.FOREVER)
    assert script.headers["content-type"].startswith("text/javascript")
    assert server.ask("GET", "/assets/app.js?v=old", key=None).headers["cache-control"] == "no-cache"
    assert server.ask("GET", "/assets/vendor/x.js", key=None).status == 200


@pytest.mark.parametrize(
    "path",
    ["secret.pem", "index.html", "shared/head.html", "../app.py", "%2e%2e/%2e%2e/app.py", "/etc/passwd", "nothing.js"],
)
def test_nothing_else_is_served(server, page, path):
    assert server.ask("GET", f"/assets/{path}", key=None).status == 404
