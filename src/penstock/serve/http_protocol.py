"""A connection's first bytes: how long and how large the head of a request may be, and what broken HTTP is told.

uvicorn's own protocol limits neither time nor size of headers; everything else is uvicorn's.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from penstock.serve.errors import ApiError

HEAD_SECONDS = 10.0
"""From a connection's (or a request's) first byte to the end of its headers."""
MOST_HEAD_BYTES = 32 * 1024


class LimitedHttpProtocol(HttpToolsProtocol):
    """See the module."""

    _clock: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection that never sends a whole head is closed."""
        super().connection_made(transport)
        self._clock = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes. While they are a head's they are counted: the parser keeps a header until it is whole."""
        super().data_received(data)
        if self._clock is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """The head of a request begins."""
        super().on_message_begin()
        self._stop_clock()
        self._clock = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def on_headers_complete(self) -> None:
        """The head is here in time."""
        self._stop_clock()
        self._head_bytes = 0
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Broken HTTP is told so in the shape of all our errors."""
        self._answer(ApiError(400, "this is no HTTP request, or its head is larger than 32 KiB."))

    def _give_up(self) -> None:
        self._stop_clock()
        if self._head_bytes:
            self._answer(ApiError(408, f"the head of the request did not arrive within {HEAD_SECONDS:.0f} seconds."))
        else:
            self.transport.close()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _answer(self, error: ApiError) -> None:
        self._stop_clock()
        body = error.encoded
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()
