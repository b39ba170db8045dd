"""What every request passes before a route sees it: who it is, how much it may send, and what its answer carries.

Plain ASGI, outside the framework, so that a body of 100 MB is refused from its first bytes and no route can forget a
check. Errors that it raises, and those that no route caught, leave in OpenAI's shape.
"""

import asyncio
import re
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any

from penstock.serve.auth import COOKIE, Keys, csrf_of, hashed
from penstock.serve.errors import ApiError
from penstock.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

MOST_BODY_BYTES = 2**20
BODY_SECONDS = 30.0
"""For the whole body: one that drips in slower is given up."""
SEND_SECONDS = 60.0
"""For a client to take what it was sent: one that stops reading is given up."""
LINGER_BYTES, LINGER_SECONDS = 256 * 2**20, 5.0
"""A refused body is read on so far, into nothing: a connection that is cut at once loses the answer too."""
OPEN = re.compile(r"/|/health|/favicon\.ico|/assets/.*")
"""What needs no key: the page's own files, which hold no secret, and whether the server is well."""
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
HEADERS = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
     b"object-src 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)  # fmt: skip


@dataclass(eq=False)
class _Exchange:
    """One request on its way through."""

    scope: Message
    receive: Receive
    send: Send
    id: bytes
    status: int = 0
    """Of the answer, once it has begun."""
    who: str | None = None
    """The key's or session's hash, while it counts as busy."""
    task: asyncio.Task[Any] | None = None
    sending_since: float | None = None
    """The loop's time when the client was last handed something that it has not taken yet."""


class AccessMiddleware:
    """See the module."""

    def __init__(self, inner: Application, keys: Callable[[], Keys], metrics: Metrics) -> None:
        self._inner, self._keys, self._metrics = inner, keys, metrics
        self._open: set[_Exchange] = set()
        self._watching = False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: there are none here
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if REQUEST_ID.fullmatch(given) else b"req_" + secrets.token_hex(12).encode()
        exchange = _Exchange(scope, receive, send, name)
        started = time.monotonic()
        exchange.task = asyncio.current_task()
        self._open.add(exchange)
        if not self._watching:
            self._watching = True
            self._give_up_on_the_slow()
        try:
            self._identify(exchange, headers)
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > MOST_BODY_BYTES:
                raise _too_large()
            body = await _body(exchange)
            if body is not None:
                await self._inner(scope, _replay(exchange, body), _dressed(exchange))
        except ApiError as error:
            await _refuse(exchange, error)
        except Exception as error:  # our own mistake: said in the log, answered without its details
            print(f"request {name.decode()}: {scope['method']} {scope['path']!a}", file=sys.stderr)
            traceback.print_exc(file=sys.stderr)
            if not exchange.status:
                text = f"internal error ({type(error).__name__}); please report it with the id {name.decode()}."
                await _refuse(exchange, ApiError(500, text))
        finally:
            self._open.discard(exchange)
            if exchange.who is not None:
                self._keys().leave(exchange.who)
            self._metrics.answered(scope, exchange.status, time.monotonic() - started)

    def _give_up_on_the_slow(self) -> None:
        """Every few seconds: ends the exchanges whose clients stopped reading. A timer for each send costs more."""
        loop = asyncio.get_running_loop()
        for exchange in self._open:
            since = exchange.sending_since
            if since is not None and loop.time() - since > SEND_SECONDS and exchange.task is not None:
                exchange.task.cancel()
        loop.call_later(SEND_SECONDS / 12, self._give_up_on_the_slow)

    def _identify(self, exchange: _Exchange, headers: dict[bytes, bytes]) -> None:
        """Finds the key or the session behind a request. Raises ApiError 401, 403 or 429."""
        method, path = exchange.scope["method"], exchange.scope["path"]
        if OPEN.fullmatch(path) or (path == "/api/session" and method == "POST"):
            return
        keys = self._keys()
        who = None
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        session = _session_of(headers)
        if scheme.lower() == "bearer":
            if not keys.holds(key.strip()):
                raise ApiError(401, "this key is not the server's; penstock serve printed it when it first started.")
            who = hashed(key.strip())
        elif session is not None and keys.knows(session):
            who = hashed(session)
            token = headers.get(b"x-csrf-token", b"").decode("latin-1")
            if method not in ("GET", "HEAD") and not secrets.compare_digest(token.encode(), csrf_of(session).encode()):
                raise ApiError(403, "the X-CSRF-Token header is missing or not this session's; reload the page.")
            exchange.scope["penstock.session"] = session
        if who is None:
            raise ApiError(
                401, "a key is needed: Authorization: Bearer KEY. penstock serve printed it when it first started.",
                code="missing_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        if not keys.enter(who):
            raise ApiError(429, "this key has too many requests in work already; wait for one to end.")
        exchange.who = who


def _session_of(headers: dict[bytes, bytes]) -> str | None:
    try:
        cookie = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(COOKIE)
    except CookieError:
        return None
    return None if cookie is None else cookie.value


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MOST_BODY_BYTES} bytes (1 MiB); send less.")


async def _body(exchange: _Exchange) -> bytes | None:
    """The whole body, or None when the client left. Raises ApiError 413 or 408 before it grows too large or too old."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await exchange.receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > MOST_BODY_BYTES:
                    raise _too_large()
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds.") from None


def _replay(exchange: _Exchange, body: bytes) -> Receive:
    """The request's `receive` for the routes: the body in one piece, then what comes, the client's leaving."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return rest.pop() if rest else await exchange.receive()

    return receive


def _dressed(exchange: _Exchange) -> Send:
    """The request's `send`, which adds headers and gives up on a client that reads no more."""

    loop = asyncio.get_running_loop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
            there = {name for name, _ in message["headers"]}
            message["headers"] = [
                *message["headers"],
                *(pair for pair in HEADERS if pair[0] not in there),
                (b"x-request-id", exchange.id),
            ]
            if b"cache-control" not in there:
                message["headers"].append((b"cache-control", b"no-store"))
        exchange.sending_since = loop.time()
        await exchange.send(message)
        exchange.sending_since = None

    return send


async def _refuse(exchange: _Exchange, error: ApiError) -> None:
    """Answers with an error; then reads on what the client still sends, within limits, so that it gets to read it."""
    if exchange.status:
        return
    body, send = error.encoded, _dressed(exchange)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    early = error.status in (408, 413)
    if early:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    if exchange.scope["method"] == "HEAD":
        body = b""
    await send({"type": "http.response.body", "body": body, "more_body": early})
    if not early:
        return
    got = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while got < LINGER_BYTES:
                message = await exchange.receive()
                got += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})
