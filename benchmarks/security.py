"""The chat service before somebody who means it harm: strangers, labellers, texts that would run, and bombs.

`python -m benchmarks serve security` runs these against the real command, and 25,000 requests made from its OpenAPI
document.
"""

import gzip
import http.client
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CANARY = "the owner's secret"
"""A text of the owner's: nobody else may ever read it."""
PUBLIC = {("POST", "/api/session"), ("GET", "/health")}
LABELLERS = {
    *PUBLIC, ("GET", "/api/session"), ("DELETE", "/api/session"), ("GET", "/api/label/me"), ("POST", "/api/label/next"),
    ("POST", "/api/label/undo"), ("POST", "/api/label/items/{item_id}"),
}  # fmt: skip
"""The routes that a labeller's token may open."""


@dataclass
class Reply:
    """An answer: status 0 where the server closed the connection instead."""

    status: int
    headers: dict[str, str]
    body: bytes


Ask = Callable[..., Reply]


def asker(address: str) -> Ask:
    """ask(method, path, body=None, headers={}): a body that is no bytes goes as JSON."""
    port = urlsplit(address).port

    def ask(method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **headers}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
            return Reply(0, {}, b"")
        finally:
            connection.close()

    return ask


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def strangers(ask: Ask, key: str) -> dict[str, Any]:
    """Every documented route without a key, with wrong ones and with a labeller's: nothing but what is public opens."""
    owner = bearer(key)
    conversation = json.loads(ask("POST", "/api/conversations", {"title": CANARY}, owner).body)["id"]
    message = {"parent_id": None, "role": "user", "content": CANARY}
    message_id = json.loads(ask("POST", f"/api/conversations/{conversation}/messages", message, owner).body)["id"]
    token = json.loads(ask("POST", "/api/labelling/labellers", {"name": "stranger"}, owner).body)["token"]
    login = ask("POST", "/api/session", {"key": token})
    session = {"cookie": login.headers["set-cookie"].split(";")[0], "x-csrf-token": json.loads(login.body)["csrf"]}
    nobody = [{}, bearer("not the key of it"), {"cookie": "penstock_session=x"}, {"authorization": f"Basic {key}"}]
    document = json.loads(ask("GET", "/openapi.json", None, owner).body)
    routes = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    asked, opened, leaked = 0, [], []
    for method, template in sorted(routes, key=lambda route: route == ("DELETE", "/api/session")):
        path = template.replace("{conversation_id}", conversation).replace("{message_id}", message_id)
        path = re.sub(r"\{[^}]*\}", "x", path)
        body = {} if method in ("POST", "PATCH", "PUT") else None
        for headers, open_to in [
            *((headers, PUBLIC) for headers in nobody),
            (bearer(token), LABELLERS),
            (session, LABELLERS),
        ]:
            reply, asked = ask(method, path, body, headers), asked + 1
            if (method, template) not in open_to and reply.status not in (401, 403):
                opened.append(f"{method} {path} {reply.status}")
            if CANARY.encode() in reply.body:
                leaked.append(f"{method} {path}")
    return {"routes": len(routes), "requests": asked, "opened": opened, "leaks": leaked}


def payloads(ask: Ask, key: str, texts: list[str]) -> dict[str, Any]:
    """Each text through every field that is shown again. No answer with one in it may be taken for a page."""
    owner, wrong, refused = bearer(key), [], 0
    fields: list[tuple[str, str, Callable[[str], Any]]] = [
        ("PATCH", "/api/conversations/{conversation}", lambda text: {"title": text[:200]}),
        ("PATCH", "/api/conversations/{conversation}", lambda text: {"system": text}),
        ("POST", "/api/conversations/{conversation}/messages",
         lambda text: {"parent_id": None, "role": "user", "content": text}),
        ("POST", "/api/labelling/labellers", lambda text: {"name": text[:60].strip() or "x"}),
        ("PATCH", "/api/labelling", lambda text: {"guidelines": text}),
        ("POST", "/api/labelling/items", lambda text: {"items": [{"prompt": text, "responses": [text, f"{text}."]}]}),
        ("POST", "/v1/chat/completions", lambda text: {"model": text, "messages": [{"role": "user", "content": text}]}),
    ]  # fmt: skip
    conversation = json.loads(ask("POST", "/api/conversations", {}, owner).body)["id"]
    for text in texts:
        for method, path, body in fields:
            reply = ask(method, path.format(conversation=conversation), body(text), owner)
            refused += reply.status >= 400
            wrong += _as_page(f"{method} {path}", reply)
    shown = [
        f"/api/conversations/{conversation}", "/api/conversations", f"/api/conversations/{conversation}/export",
        "/api/export", "/api/labelling", "/api/labelling/export", "/api/labelling/export?what=argilla",
        "/api/labelling/audit", "/api/votes", "/v1/models/%3Cscript%3Ealert(1)%3C%2Fscript%3E", "/%3Cscript%3E",
    ]  # fmt: skip
    for path in shown:
        wrong += _as_page(path, ask("GET", path, None, owner))
    return {"texts": len(texts), "fields": len(fields), "refused": refused, "taken_for_a_page": wrong}


def _as_page(name: str, reply: Reply) -> list[str]:
    """The route's name, if a browser could take its answer for a page or a script."""
    kind, sniffed = reply.headers.get("content-type", ""), reply.headers.get("x-content-type-options") != "nosniff"
    policy = reply.headers.get("content-security-policy", "")
    return [name] if "html" in kind or "script" in kind or sniffed or "default-src 'self'" not in policy else []


MIB = 2**20


def bombs(ask: Ask, key: str, model: str, resident_gb: Callable[[], float]) -> dict[str, Any]:
    """Bodies and heads that are more than they look. Each is refused, with none of it in memory."""
    kind = {**bearer(key), "content-type": "application/json"}
    zipped = gzip.compress(bytes(512 * MIB))
    chat = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    requests: dict[str, tuple[str, bytes, dict[str, str]]] = {
        "two MiB of JSON": ("/v1/chat/completions", json.dumps({**chat, "x": "y" * 2 * MIB}).encode(), {}),
        "a length of a TiB": ("/v1/chat/completions", b"{}", {"content-length": str(2**40)}),
        "512 MiB in gzip": ("/v1/chat/completions", zipped, {"content-encoding": "gzip"}),
        "a million brackets": ("/v1/chat/completions", b"[" * 1_000_000, {}),
        "a million keys": ("/v1/chat/completions", b'{"a":{"b":' * 100_000, {}),
        "a number of 900,000 digits": ("/v1/chat/completions", b'{"seed":' + b"9" * 900_000 + b"}", {}),
        "an infinite number": ("/v1/chat/completions", b'{"temperature":1e999999}', {}),
        "a head of a MiB": ("/v1/chat/completions", b"{}", {"x-long": "y" * MIB}),
        "10,000 heads": ("/v1/chat/completions", b"{}", {f"x-{i}": "y" for i in range(10_000)}),
        "a zip in place of an import": ("/api/labelling/items", b"PK\x03\x04" + bytes(1000), {}),
        "a thousand empty items": ("/api/labelling/items", json.dumps({"items": [{}] * 1001}).encode(), {}),
    }  # fmt: skip
    before, answers, let_in = resident_gb(), {}, []
    for name, (path, body, headers) in requests.items():
        reply = ask("POST", path, body, {**kind, **headers})
        answers[name] = reply.status
        if reply.status not in (0, 400, 408, 413, 415, 431):
            let_in.append(name)
    still = ask("POST", "/v1/chat/completions", {**chat, "max_tokens": 2}, bearer(key)).status
    return {
        "answers": answers, "let_in": let_in, "answered_afterwards": still == 200,
        "grown_gb": max(0.0, resident_gb() - before),
    }  # fmt: skip
