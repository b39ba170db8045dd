"""In front of the routes: methods and paths in other forms, prefixes of proxies, cookies, keys, a locked database."""

import contextlib
import http.client
import http.cookiejar
import json
import subprocess
import sys
import threading
import unicodedata
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import openai
import pytest

from penstock.serve import server, store
from penstock.serve.models import catalogue
from tests.conftest import PATIENCE
from tests.serve.conftest import KEY, RunningServer, eventually, running, save_chatty

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "seed": 1}


# --- other forms of a request -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["/", "/health", "/assets/app.js", "/v1/models", "/v1/models/tiny", "/api/export",
                                  "/openapi.json", "/nowhere", "/v1/chat/completions"])  # fmt: skip
def test_head_is_get_without_the_body(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    answers = []
    for method in ("HEAD", "GET", "HEAD"):  # on one connection: a body after the first would be read as the second
        connection.request(method, path, headers={"authorization": f"Bearer {KEY}", "x-request-id": "same"})
        answer = connection.getresponse()
        headers = {name: value for name, value in answer.getheaders() if name not in ("date", "transfer-encoding")}
        answers.append((answer.status, headers, answer.read()))
    assert answers[0][2] == answers[2][2] == b""
    assert answers[0][:2] == answers[1][:2] == answers[2][:2]
    assert answers[1][2] or path == "/api/export"


def test_a_slash_at_the_end_changes_nothing(server):
    for path in ("/v1/models", "/v1/models/tiny", "/health", "/api/conversations", "/assets/app.js"):
        plain, slashed = server.ask("GET", path), server.ask("GET", path + "/")
        assert (plain.status, plain.body) == (slashed.status, slashed.body) == (200, plain.body)
    assert server.post(ASK, "/v1/chat/completions/").json["choices"] == server.post(ASK).json["choices"]
    assert server.ask("GET", "/v1/models/", key=None).status == 401


# --- proxies ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def proxied(port, prefix, strips=True):
    """A reverse proxy that serves the server at `port` below a prefix, and nothing else. Yields its own address."""

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def forward(self):
            if not self.path.startswith(prefix):
                return self.send_error(418)  # outside of the prefix lives another service
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            headers = {**dict(self.headers), "x-forwarded-proto": "https", "connection": "close"}
            upstream.request(self.command, self.path.removeprefix(prefix) if strips else self.path, body, headers)
            answer = upstream.getresponse()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() != "transfer-encoding":
                    self.send_header(name, value)
            self.end_headers()
            while part := answer.read1(65536):
                self.wfile.write(part)

        do_GET = do_POST = do_PATCH = do_DELETE = do_HEAD = forward  # noqa: N815

        def log_message(self, *arguments):
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()


@pytest.mark.parametrize("strips", [True, False])
def test_below_a_prefix_all_addresses_and_cookies_are_below_it(tmp_path, strips):
    with (
        running(tmp_path / "data", save_chatty(tmp_path / "tiny"), root_path="/lab/chat") as server,
        proxied(server.port, "/lab/chat", strips) as address,
    ):
        outside = RunningServer(server.service, address)
        assert outside.ask("GET", "/lab/chat/v1/models").json["data"][0]["id"] == "tiny"
        assert outside.post(ASK, "/lab/chat/v1/chat/completions").status == 200
        if not strips:  # at the prefix itself relative addresses would miss it
            answer = httpx2.get(f"{address}/lab/chat", follow_redirects=False)
            assert (answer.status_code, answer.headers["location"]) == (308, "/lab/chat/")
        page = outside.ask("GET", "/lab/chat/", key=None).body.decode()
        for line in page.splitlines():
            assert 'href="/' not in line
            assert 'src="/' not in line
        login = outside.ask("POST", "/lab/chat/api/session", {"key": KEY}, key=None)
        assert {"Path=/lab/chat", "Secure", "HttpOnly"} <= set(login.headers["set-cookie"].split("; "))
        cookie = {"cookie": login.headers["set-cookie"].split(";")[0]}
        assert outside.ask("GET", "/lab/chat/api/session", key=None, headers=cookie).json == login.json
        document = outside.ask("GET", "/lab/chat/openapi.json").json
        assert document["servers"] == [{"url": "/lab/chat"}]
        leave = outside.ask("DELETE", "/lab/chat/api/session", key=None,
                            headers={**cookie, "x-csrf-token": login.json["csrf"]})  # fmt: skip
        assert "Path=/lab/chat" in leave.headers["set-cookie"]


@pytest.mark.parametrize("prefix", ["lab", "/", "/lab/", "/a b", "/api", "/v1/chat", "//x"])
def test_a_root_path_that_is_none_is_refused(prefix):
    assert not server.ROOT_PATH.fullmatch(prefix)
    assert server.ROOT_PATH.fullmatch("/apis/v1")


def test_two_servers_on_one_host_keep_their_sessions_apart(tmp_path):
    model = save_chatty(tmp_path / "tiny")
    with running(tmp_path / "a", model) as first, running(tmp_path / "b", model) as second:
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        tokens = []
        for one in (first, second):
            head = {"content-type": "application/json"}
            login = urllib.request.Request(f"{one.address}/api/session", json.dumps({"key": KEY}).encode(), head)
            tokens.append(json.loads(browser.open(login).read()))
        assert [json.loads(browser.open(f"{s.address}/api/session").read()) for s in (first, second)] == tokens


# --- other origins ----------------------------------------------------------------------------------------------------
def test_another_origin_may_send_all_that_openais_client_sends(tmp_path):
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny"), cors=("https://friend.example",)) as server:
        sent = []
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, organization="o", project="p") as client:
            request = client._client.build_request
            client._client.build_request = lambda *a, **k: sent.append(request(*a, **k)) or sent[-1]
            client.chat.completions.create(**ASK, extra_headers={"idempotency-key": "1"})
        names = {name.lower() for name in sent[0].headers} - {"host", "connection", "content-length"}
        assert {"x-stainless-lang", "x-stainless-retry-count", "openai-organization"} <= names
        headers = {"origin": "https://friend.example", "access-control-request-method": "POST",
                   "access-control-request-headers": ",".join(sorted(names))}  # fmt: skip
        reply = server.ask("OPTIONS", "/v1/chat/completions", key=None, headers=headers)
        assert reply.status == 200
        allowed = {name.strip().lower() for name in reply.headers["access-control-allow-headers"].split(",")}
        assert names <= allowed
        for path, status in (("/v1/models", 200), ("/v1/models/none", 404)):
            reply = server.ask("GET", path, headers={"origin": "https://friend.example"})
            assert reply.status == status
            exposed = {name.strip() for name in reply.headers["access-control-expose-headers"].split(",")}
            assert {"x-request-id", "retry-after"} <= exposed


# --- keys -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["Schlüssel für die Küche", "ключ от кухни 12345"])
def test_a_key_may_have_letters_beyond_ascii(tmp_path, key):
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny"), key=key) as server:
        spellings = [key.encode(), unicodedata.normalize("NFD", key).encode()]
        with contextlib.suppress(UnicodeEncodeError):
            spellings.append(key.encode("latin-1"))
        for spelled in spellings:
            head = {"authorization": b"Bearer " + spelled}
            assert httpx2.get(f"{server.address}/v1/models", headers=head).status_code == 200
            head = {"authorization": b"Bearer " + spelled[:-1]}
            assert httpx2.get(f"{server.address}/v1/models", headers=head).status_code == 401
        assert server.ask("POST", "/api/session", {"key": f" {key}\n"}, key=None).status == 200


# --- while models load, and while others write ------------------------------------------------------------------------
def test_models_are_listed_while_they_load_and_completions_are_told_when_to_come_back(tmp_path, monkeypatch):
    load, go_on = catalogue.Catalogue._load, threading.Event()
    monkeypatch.setattr(catalogue.Catalogue, "_load", lambda *arguments: go_on.wait(PATIENCE) and load(*arguments))
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny"), wait=False) as slow:
        cards = slow.ask("GET", "/v1/models").json["data"]
        assert [(card["id"], card["object"]) for card in cards] == [("tiny", "model")]
        assert slow.ask("GET", "/v1/models/tiny").json == cards[0]
        assert slow.ask("GET", "/v1/models/none").status == 404
        reply = slow.post(ASK)
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "loading", "1")
        go_on.set()
        assert eventually(lambda: slow.post(ASK).status == 200)
        assert [card["id"] for card in slow.ask("GET", "/v1/models").json["data"]] == ["tiny"]


HOLDS_THE_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
"""


@contextlib.contextmanager
def locked(directory):
    """Inside, another program holds the write lock of the server's database."""
    command = [sys.executable, "-c", HOLDS_THE_LOCK, str(directory / "penstock.db")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        yield
        other.communicate("\n", PATIENCE)


def test_a_database_that_another_program_locks_stops_nothing_but_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BUSY_SECONDS", float(PATIENCE))
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny")) as server:
        kept = server.ask("POST", "/api/conversations", {"title": "kept"}).json["id"]
        login = server.ask("POST", "/api/session", {"key": KEY}, key=None)
        cookie = {"cookie": login.headers["set-cookie"].split(";")[0]}
        server.service.keys._sessions.clear()  # as after a restart: the session is looked up
        statuses = []

        def write():
            statuses.append(server.ask("POST", "/api/conversations", {"title": "late"}).status)

        with locked(tmp_path / "data"):
            writes = [threading.Thread(target=write) for _ in range(60)]
            for thread in writes[:20]:
                thread.start()
            assert eventually(lambda: server.service.keys._busy.total() == 20)
            for path in ("/api/session", f"/api/conversations/{kept}", "/api/conversations", "/api/export"):
                assert server.ask("GET", path, key=None, headers=cookie).status == 200
            for thread in writes[20:]:  # more than there are threads for them
                thread.start()
            assert eventually(lambda: server.service.keys._busy.total() == 60)
            for path in ("/health", "/", "/assets/app.js", "/v1/models", "/metrics"):
                assert server.ask("GET", path).status == 200
            assert server.post(ASK).status == 200
            assert not statuses
        for thread in writes:
            thread.join(PATIENCE)
        assert statuses == [201] * 60


def test_a_write_that_waits_too_long_is_told_to_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.1)
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny")) as server:
        with locked(tmp_path / "data"):
            reply = server.ask("POST", "/api/conversations", {"title": "late"})
            assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "database_busy", "1")
            assert "locked" in reply.error["message"]
        assert server.ask("POST", "/api/conversations", {"title": "late"}).status == 201


def test_an_export_of_everything_is_sent_as_it_is_read(tmp_path, monkeypatch):
    """The second conversation is not read before the client has the first, and a write does not wait for the export."""
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny")) as server:
        for _ in range(3):
            conversation = server.ask("POST", "/api/conversations", {}).json["id"]
            message = {"parent_id": None, "role": "user", "content": "x" * 400_000}
            server.ask("POST", f"/api/conversations/{conversation}/messages", message)
        read, go_on, tree = [], threading.Event(), store._tree

        def slow_tree(connection, conversation):
            read.append(conversation["id"])
            assert len(read) == 1 or go_on.wait(PATIENCE)
            return tree(connection, conversation)

        monkeypatch.setattr(store, "_tree", slow_tree)
        with httpx2.stream("GET", f"{server.address}/api/export", headers={"authorization": f"Bearer {KEY}"}) as answer:
            lines = answer.iter_lines()
            assert "messages" in json.loads(next(lines))
            assert server.ask("GET", "/health", key=None).status == 200
            assert server.ask("POST", "/api/conversations", {}).status == 201
            go_on.set()
            assert len(list(lines)) == 2
