"""Versions over HTTP: what there is, rolling back while it serves, and a round that the page begins."""

import json
import os
import subprocess

import pytest

from penstock.commands.improve.config import ImproveConfig
from penstock.flags import parse
from penstock.run.versions import TRUSTED, WITHDRAWN, Versions
from penstock.serve.config import ServeConfig
from penstock.serve.versions.rounds import Rounds
from tests.serve.conftest import eventually, running, save_chatty


def say(server, question="Hello"):
    chat = {"model": "live", "messages": [{"role": "user", "content": question}], "max_tokens": 4, "seed": 1}
    return server.post(chat).json


@pytest.fixture
def live(tmp_path):
    """A folder of versions: the start, and one that was promoted."""
    first, second = (save_chatty(tmp_path / name, seed) for seed, name in enumerate(("start", "better")))
    versions = Versions.begin(tmp_path / "live", first)
    new = {"comparisons": 3, "votes": 0, "sha256": "0" * 16}
    versions.add(
        version=1, parent=0, decision="promoted", why="it is better", state=TRUSTED, learned=[1], model=second, new=new
    )
    return versions


def test_a_version_is_rolled_back_while_the_server_answers(tmp_path, live):
    with running(tmp_path / "data", str(live.path), follow=True) as server:
        (row,) = server.ask("GET", "/api/versions").json["data"]
        assert (row["model"], row["current"], row["follows"], row["busy"]) == ("live", 1, True, False)
        assert [version["decision"] for version in row["versions"]] == ["start", "promoted"]
        before = say(server)
        reply = server.post({"model": "live", "version": 0}, "/api/versions/serve")
        assert (reply.status, reply.json["current"], reply.json["states"]) == (200, 0, {"1": WITHDRAWN})
        assert eventually(lambda: say(server)["system_fingerprint"] != before["system_fingerprint"])
        assert server.post({"model": "live", "version": 0}, "/api/versions/serve").status == 400
        server.post({"model": "live", "version": 1}, "/api/versions/serve")
        assert eventually(lambda: say(server)["system_fingerprint"] == before["system_fingerprint"])
        assert say(server)["choices"] == before["choices"]
        reply = server.post({"model": "live", "version": 1, "trusted": False}, "/api/versions/trust")
        assert reply.json["states"] == {"1": "refused"}
    assert [row.get("event") for row in Versions(live.path).rows] == [None, None, "serve", "serve", "distrust"]


def test_what_cannot_be_is_refused(tmp_path, live, server):
    assert server.ask("GET", "/api/versions").json == {"data": []}
    bodies = {"serve": {"version": 0}, "trust": {"version": 1, "trusted": True}, "rounds": {}, "rounds/stop": {}}
    for path, more in bodies.items():
        reply = server.post({"model": "tiny", **more}, f"/api/versions/{path}")
        assert (reply.status, "no folder of versions 'tiny'" in reply.error["message"]) == (404, True)
        assert server.post({"model": "tiny", **more}, f"/api/versions/{path}", key=None).status == 401
    with running(tmp_path / "data", str(live.path)) as one:
        assert one.post({"model": "live", "version": 7}, "/api/versions/serve").status == 400
        assert (
            "no votes came"
            in one.post({"model": "live", "version": 7, "trusted": True}, "/api/versions/trust").error["message"]
        )
        assert "no round runs" in one.post({"model": "live"}, "/api/versions/rounds/stop").error["message"]
        with live.round():
            assert one.ask("GET", "/api/versions").json["data"][0]["busy"]
            assert "running already" in one.post({"model": "live"}, "/api/versions/rounds").error["message"]


def test_the_page_begins_a_round_of_the_server_s_own_votes(tmp_path, live):
    with running(tmp_path / "data", str(live.path)) as server:
        reply = server.post({"model": "live"}, "/api/versions/rounds")
        assert (reply.status, reply.json["busy"]) == (202, True)
        described = {}

        def ended():
            described.update(server.ask("GET", "/api/versions").json["data"][0])
            return not described["busy"]

        assert eventually(ended)
        assert "0 new votes and comparisons, and a round waits for 100" in described["log"], described["log"]
    settings = (live.path / "improve.toml").read_text()
    assert json.dumps(str(tmp_path / "data")) in settings


def test_a_round_gets_the_database_s_password_where_ps_does_not_show_it(live, monkeypatch):
    started, secret = [], "postgresql://votes:password@localhost/votes"
    monkeypatch.setattr(subprocess, "Popen", lambda words, env, **streams: started.append((words, env)))
    Rounds(ServeConfig(model=(str(live.path),), database=secret)).begin(str(live.path))
    ((words, environment),) = started
    assert not [word for word in words if "password" in word]
    monkeypatch.setattr(os, "environ", environment)
    assert parse(ImproveConfig, words[4:], "improve", "run").database == secret
    assert parse(ImproveConfig, ["runs/live", "--database", "another"], "improve", "run").database == "another"
    environment["PENSTOCK_KEY"] = "a key from the environment"
    assert parse(ServeConfig, ["model"], "serve", "model").key == "a key from the environment"


def test_the_page_of_versions_is_a_file_without_a_secret(server):
    page = server.ask("GET", "/versions", key=None)
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"assets/versions/versions.js?v=" in page.body
    assert server.ask("GET", "/assets/versions/versions.html", key=None).status == 404
