"""The head of a request: how long it may take, how large it may be, and the answer to broken HTTP.

uvicorn limits neither the time nor the size of headers; everything else is uvicorn's.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from penstock.serve.errors import ApiError

HEAD_SECONDS = 10.0
"""From a connection's (or a request's) first byte to the end of its headers."""
MAX_HEAD_BYTES = 32 * 1024


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits for the head."""

    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time limit."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts the bytes of a head: the parser keeps a header until it is complete."""
        super().data_received(data)
        if self._timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """Starts the time limit of a request's head."""
        super().on_message_begin()
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._head_bytes = 0
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers broken HTTP with an error in our shape."""
        self._answer(ApiError(400, "this is no HTTP request, or its head is larger than 32 KiB."))

    def _give_up(self) -> None:
        self._stop_timer()
        if self._head_bytes:
            self._answer(ApiError(408, f"the head of the request did not arrive within {HEAD_SECONDS:.0f} seconds."))
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _answer(self, error: ApiError) -> None:
        self._stop_timer()
        body = error.encoded
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()
