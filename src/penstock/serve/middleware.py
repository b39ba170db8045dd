"""Access to the server: keys, CSRF tokens, sizes, times and headers, checked before any route sees a request.

[Note: access is checked outside the framework] This is plain ASGI, around FastAPI, so that no route can forget a check
and a large body costs nothing; `http_protocol.py` limits the head of a request before that. The whole body is read
here, 1 MiB at most (4 of an import): routes get it in one piece, and the next message they receive is the client's
disconnect.
"""

import asyncio
import contextlib
import re
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any

from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from penstock.serve.auth import Keys, cookie_of, csrf_of, hashed, spellings
from penstock.serve.errors import ApiError, busy_database
from penstock.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 2**20
LARGER_BODIES = {"/api/import": 4 * 2**20}
"""A whole conversation comes in one body; parsing it holds the others up for some hundredths of a second."""
BODY_SECONDS = 30.0
"""For the whole body; a slower one is answered 408."""
SEND_SECONDS = 60.0
"""For a client to read what was sent; the request of a slower one is cancelled."""
LINGER_BYTES, LINGER_SECONDS = 256 * 2**20, 5.0
"""So much of a refused body is read and dropped: a connection that is closed at once loses the answer too."""
PUBLIC = re.compile(r"/|/label|/versions|/health|/favicon\.ico|/assets/.*")
"""Paths that need no key: the pages' files, which hold no secret, and the server's health."""
LABELLERS = re.compile(r"/api/label/[a-z0-9_/]+|/api/session")
"""All that a labeller's token opens; everything else is the owner's."""
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
    """A request and its answer."""

    scope: Message
    receive: Receive
    send: Send
    id: bytes
    bodiless: bool
    """HEAD: the answer is its headers alone."""
    status: int = 0
    """Of the answer; 0 before it begins."""
    sha256: str | None = None
    """Of the key or session, while the request counts as in work."""
    task: asyncio.Task[Any] | None = None
    sending_since: float | None = None
    """The loop's time when the send began that the client has not read yet."""

    @property
    def max_bytes(self) -> int:
        """Of the body."""
        return LARGER_BODIES.get(self.scope["path"], MAX_BODY_BYTES)


class AccessMiddleware:
    """Identifies each request, reads its body, passes it on, and counts it. Errors leave in OpenAI's shape."""

    def __init__(self, inner: Application, keys: Callable[[], Keys], metrics: Metrics, root_path: str = "") -> None:
        self._inner, self._keys, self._metrics, self._root_path = inner, keys, metrics, root_path
        self._exchanges: set[_Exchange] = set()
        self._watching = False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: no route has one
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = b"req_" + secrets.token_hex(12).encode()
        method, scope = scope["method"], _routed(scope, self._root_path)
        exchange = _Exchange(scope, receive, send, request_id, method == "HEAD", task=asyncio.current_task())
        started = time.monotonic()
        self._exchanges.add(exchange)
        if not self._watching:
            self._watching = True
            self._cancel_slow_clients()
        try:
            if scope["path"] == "":
                await _redirect(exchange, f"{self._root_path}/")
                return
            await self._identify(exchange, headers)
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > exchange.max_bytes:
                raise _too_large(exchange)
            body = await _body(exchange)
            if body is not None:
                await self._inner(scope, _replay(exchange, body), _with_headers(exchange))
        except ApiError as error:
            await _refuse(exchange, error)
        except (OperationalError, PoolTimeout) as error:  # of the look-up of a session
            await _refuse(exchange, busy_database(error))
        except Exception as error:  # a bug: details go to the log, not to the client
            name = request_id.decode()
            print(f"request {name}: {scope['method']} {scope['path']!a}", file=sys.stderr)
            traceback.print_exc(file=sys.stderr)
            if not exchange.status:
                text = f"internal error ({type(error).__name__}); please report it with the id {name}."
                await _refuse(exchange, ApiError(500, text))
        finally:
            self._exchanges.discard(exchange)
            if exchange.sha256 is not None:
                self._keys().leave(exchange.sha256)
            self._metrics.answered({**scope, "method": method}, exchange.status, time.monotonic() - started)

    def _cancel_slow_clients(self) -> None:
        """Cancels, every few seconds, the requests whose clients stopped reading. A timer for each send costs more."""
        loop = asyncio.get_running_loop()
        for exchange in self._exchanges:
            since = exchange.sending_since
            if since is not None and loop.time() - since > SEND_SECONDS and exchange.task is not None:
                exchange.task.cancel()
        loop.call_later(SEND_SECONDS / 12, self._cancel_slow_clients)

    async def _identify(self, exchange: _Exchange, headers: dict[bytes, bytes]) -> None:
        """Finds the key or the session of a request. Raises ApiError 401, 403 or 429."""
        method, path = exchange.scope["method"], exchange.scope["path"]
        if PUBLIC.fullmatch(path) or (path == "/api/session" and method == "POST"):
            return
        keys, sha256, caller = self._keys(), None, None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        session = _session_of(headers, cookie_of(exchange.scope))
        if scheme.lower() == b"bearer":
            for text in spellings(key):
                if caller := keys.whose(text):
                    sha256 = hashed(text)
                    break
            else:
                raise ApiError(401, "this key is not the server's; penstock serve printed it when it first started.")
        elif session and (caller := keys.remembers(session) or await asyncio.to_thread(keys.knows, session)):
            sha256 = hashed(session)
            token = headers.get(b"x-csrf-token", b"").decode("latin-1")
            if method != "GET" and not secrets.compare_digest(token.encode(), csrf_of(session).encode()):
                raise ApiError(403, "the X-CSRF-Token header is missing or not this session's; reload the page.")
            exchange.scope["penstock.session"] = session
        if sha256 is None or caller is None:
            raise ApiError(
                401, "a key is needed: Authorization: Bearer KEY. penstock serve printed it when it first started.",
                code="missing_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        if caller.labeller_id is not None and not LABELLERS.fullmatch(path):
            raise ApiError(403, "a labeller's token opens the labelling room alone.", code="owner_only")
        exchange.scope["penstock.caller"] = caller
        if not keys.enter(sha256):
            raise ApiError(429, "this key has too many requests in work already; wait for one to end.")
        exchange.sha256 = sha256


def _routed(scope: Message, root_path: str) -> Message:
    """The request as routes see it, whichever way it came: HEAD as GET, and a path without the prefix of a proxy and
    without slashes at its end; empty: the prefix alone, below which the page's relative addresses do not work."""
    path = scope["path"]
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        path = path.removeprefix(root_path)
    path = path and (path.rstrip("/") or "/")
    return {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}


def _session_of(headers: dict[bytes, bytes], name: str) -> str | None:
    try:
        cookie = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(name)
    except CookieError:
        return None
    return None if cookie is None else cookie.value


def _too_large(exchange: _Exchange) -> ApiError:
    most = exchange.max_bytes
    return ApiError(413, f"the body is larger than {most} bytes ({most // 2**20} MiB); send less.")


async def _body(exchange: _Exchange) -> bytes | None:
    """The whole body, or None when the client disconnects. Raises ApiError 413 or 408 at the limits."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await exchange.receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > exchange.max_bytes:
                    raise _too_large(exchange)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds.") from None


def _replay(exchange: _Exchange, body: bytes) -> Receive:
    """The request's `receive` for the routes: the body in one piece, then the client's disconnect."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await exchange.receive()

    return receive


def _with_headers(exchange: _Exchange) -> Send:
    """The request's `send`, which adds HEADERS and records when it waits for the client."""
    loop = asyncio.get_running_loop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
            present = {name for name, _ in message["headers"]}
            added = [(name, value) for name, value in HEADERS if name not in present]
            message["headers"] = [*message["headers"], *added, (b"x-request-id", exchange.id)]
            if b"cache-control" not in present:
                message["headers"].append((b"cache-control", b"no-store"))
        elif exchange.bodiless:
            message = {**message, "body": b""}
        exchange.sending_since = loop.time()
        await exchange.send(message)
        exchange.sending_since = None

    return send


async def _redirect(exchange: _Exchange, address: str) -> None:
    send, headers = _with_headers(exchange), [(b"location", address.encode()), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 308, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(exchange: _Exchange, error: ApiError) -> None:
    """Answers with an error. Reads and drops an unread body, within limits, so that the client can read the answer."""
    if exchange.status:
        return
    body, send = error.encoded, _with_headers(exchange)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    early = error.status in (408, 413)
    if early:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": early})
    if not early:
        return
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while dropped < LINGER_BYTES:
                message = await exchange.receive()
                dropped += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    await send({"type": "http.response.body", "body": b""})
