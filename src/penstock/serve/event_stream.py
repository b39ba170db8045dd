"""Answers that end with the client: server-sent events from a generation, and the watch on the connection."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi import Response

from penstock.serve.scheduler import Generation
from penstock.serve.service import Service


class EventStream(Response):
    """Sends a generation as server-sent events, and cancels it as soon as the client disconnects."""

    def __init__(self, service: Service, generation: Generation, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._service, self._generation, self._events = service, generation, events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends all events, or those until the client disconnects."""
        watch = asyncio.create_task(cancel_on_disconnect(receive, self._service, self._generation))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            watch.cancel()
            self._service.cancel(self._generation)
            await self._events.aclose()
            self._service.metrics.generated(self._generation)


async def cancel_on_disconnect(receive: Callable[[], Awaitable[Any]], service: Service, generation: Generation) -> None:
    """Waits until the client disconnects, then cancels the generation."""
    while (await receive())["type"] != "http.disconnect":
        pass
    service.cancel(generation)
