"""Two kinds of people: a labeller's token, and a session that it opened, open the labelling room and nothing else."""

import re

import pytest

from tests.serve.conftest import KEY, running, save_chatty

OPEN = {("GET", "/api/label/me"), ("POST", "/api/label/next"), ("POST", "/api/label/undo"),
        ("POST", "/api/label/items/{item_id}"), ("POST", "/api/session"), ("GET", "/api/session"),
        ("DELETE", "/api/session"), ("GET", "/health")}  # fmt: skip
"""All that a labeller may ask; /health needs no key at all."""


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    directory = tmp_path_factory.mktemp("room")
    with running(directory / "data", save_chatty(directory / "tiny")) as server:
        yield server


def hire(server, name):
    reply = server.ask("POST", "/api/labelling/labellers", {"name": name})
    assert reply.status == 201
    return reply.json


def log_in(server, key):
    """Headers of a session, with and without its CSRF token, and what was answered."""
    reply = server.ask("POST", "/api/session", {"key": key}, key=None)
    cookie = {"cookie": reply.headers["set-cookie"].split(";")[0]}
    return {**cookie, "x-csrf-token": reply.json["csrf"]}, cookie, reply.json


def routes(server):
    """(method, path) of all that the server documents, with ids that could be there."""
    document = server.ask("GET", "/openapi.json").json
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


def test_a_labellers_token_is_refused_on_every_other_route(room):
    token = hire(room, "leaky")["token"]
    session, _, _ = log_in(room, token)
    conversation = room.ask("POST", "/api/conversations", {"title": "secret"}).json["id"]
    item_id = "item_" + "0" * 24
    asked = routes(room)
    assert set(asked) >= OPEN
    assert len(asked) > 35
    for method, template in asked:
        path = template.replace("{conversation_id}", conversation).replace("{item_id}", item_id)
        path = re.sub(r"\{[^}]*\}", "x", path)
        body = {} if method in ("POST", "PATCH", "PUT") else None
        for reply in (room.ask(method, path, body, key=token), room.ask(method, path, body, key=None, headers=session)):
            if (method, template) in OPEN:
                assert reply.status != 403, (method, path)
            else:
                assert (reply.status, reply.error["code"]) == (403, "owner_only"), (method, path)
            assert b"secret" not in reply.body
        if (method, path) == ("DELETE", "/api/session"):
            session, _, _ = log_in(room, token)


@pytest.mark.parametrize("path", [
    "/api/label", "/api/label/", "/api/label/../conversations", "/api/label/%2e%2e/conversations", "/api//label/me",
    "/api/label/..%2fconversations", "/API/LABEL/me", "/api/labelling/", "/api/labelling/export?what=argilla",
    "/api/session/../conversations", "/v1/models/", "/nowhere", "/api/label/me/../../export", "/metrics",
    "/openapi.json?x=/api/label/me", "/api/label/me%0a", "/api/label/me%00", "/api/label/x.y",
])  # fmt: skip
def test_no_spelling_of_a_path_opens_more(room, path):
    token = hire(room, "speller")["token"]
    for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT"):
        reply = room.ask(method, path, {} if method in ("POST", "PUT") else None, key=token)
        assert reply.status in (403, 404, 405), (method, path, reply.status)
        assert reply.status == 403 or "/api/label" in path


def test_the_pages_files_need_no_token_and_a_slash_leads_to_the_page(room):
    for path in ("/", "/label", "/assets/app.js", "/assets/labelling/label.js"):
        assert room.ask("GET", path, key=None).status == 200
    assert b"assets/labelling/label.js?v=" in room.ask("GET", "/label/", key=None).body
    assert room.ask("GET", "/assets/labelling/label.html", key=None).status == 404


def test_a_session_of_a_labeller_needs_its_csrf_token_and_says_that_it_is_no_owners(room):
    token = hire(room, "cy")["token"]
    both, cookie, told = log_in(room, token)
    assert told["owner"] is False
    assert log_in(room, KEY)[2]["owner"] is True
    assert room.ask("POST", "/api/label/next", key=None, headers=cookie).status == 403
    assert room.ask("POST", "/api/label/next", key=None, headers=both).status == 200
    assert room.ask("GET", "/api/session", key=None, headers=cookie).json == told


def test_a_token_that_ended_and_its_sessions_open_nothing(room):
    hired = hire(room, "di")
    session, _, _ = log_in(room, hired["token"])
    assert room.ask("GET", "/api/label/me", key=None, headers=session).json["name"] == "di"
    assert room.ask("DELETE", f"/api/labelling/labellers/{hired['id']}").status == 204
    assert room.ask("GET", "/api/label/me", key=hired["token"]).status == 401
    assert room.ask("GET", "/api/label/me", key=None, headers=session).status == 401
    assert room.ask("DELETE", "/api/labelling/labellers/lab_x").status == 404


def test_a_new_token_for_a_name_ends_the_earlier_one_and_its_sessions(room):
    first = hire(room, "eve")
    session, _, _ = log_in(room, first["token"])
    second = hire(room, "eve")
    assert second["id"] == first["id"]
    assert room.ask("GET", "/api/label/me", key=first["token"]).status == 401
    assert room.ask("GET", "/api/label/me", key=None, headers=session).status == 401
    assert room.ask("GET", "/api/label/me", key=second["token"]).json["name"] == "eve"


def test_tokens_and_sessions_outlive_the_server(tmp_path):
    model = save_chatty(tmp_path / "tiny")
    with running(tmp_path / "data", model) as server:
        token = hire(server, "fay")["token"]
        session, _, _ = log_in(server, token)
    with running(tmp_path / "data", model) as server:
        assert server.ask("GET", "/api/label/me", key=token).json["name"] == "fay"
        name = f"penstock_session_{server.port}"
        session["cookie"] = name + "=" + session["cookie"].split("=", 1)[1]
        assert server.ask("GET", "/api/label/me", key=None, headers=session).json["name"] == "fay"
        assert server.ask("GET", "/api/conversations", key=None, headers=session).error["code"] == "owner_only"


@pytest.mark.parametrize("name", ["owner", "server", "", " ada", "ada ", "two\nlines", "x" * 61, "\0"])
def test_a_labellers_name_is_one_line_and_no_actors(room, name):
    assert room.ask("POST", "/api/labelling/labellers", {"name": name}).status == 400


def test_the_owner_labels_too_under_its_own_name(room):
    assert room.ask("GET", "/api/label/me").json["name"] == "owner"
    assert room.ask("GET", "/api/label/me").json["owner"] is True
    assert room.ask("POST", "/api/label/next").json["item"] is None
