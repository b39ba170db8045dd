"""OpenAI's routes under /v1. They are thin: `openai_requests` reads a request, the scheduler runs it, and
`openai_responses` writes the answer, which ends when its client leaves.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import HTTPBearer
from starlette.responses import JSONResponse

from penstock.serve import openai_requests, openai_responses
from penstock.serve.errors import documented
from penstock.serve.openai_requests import ChatRequest, CompletionRequest
from penstock.serve.scheduler import Generation
from penstock.serve.service import Service, request_bytes, service_of

v1 = APIRouter(prefix="/v1", tags=["openai"], dependencies=[Depends(HTTPBearer(auto_error=False))])
COMPLETION_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    **documented(400, 401, 403, 404, 408, 413, 429, 500, 503),
}


@v1.post("/chat/completions", response_model=openai_responses.ChatCompletion, responses=COMPLETION_RESPONSES)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation; as server-sent events with `stream`."""
    service = service_of(request)
    model = service.find(body.model)
    encoded = await service.encode(request_bytes(request), openai_requests.encode_chat, body, model)
    return await _answer(request, service, service.begin(model, encoded), body)


@v1.post("/completions", response_model=openai_responses.TextCompletion, responses=COMPLETION_RESPONSES)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Goes on with a text or with token ids, without a chat template."""
    service = service_of(request)
    model = service.find(body.model)
    encoded = await service.encode(request_bytes(request), openai_requests.encode_text, body, model)
    return await _answer(request, service, service.begin(model, encoded), body)


@v1.get("/models", response_model=openai_responses.ModelList, responses=documented(401, 403, 429, 503))
async def list_models(request: Request) -> JSONResponse:
    """The models that are served, those that still load among them."""
    return JSONResponse({"object": "list", "data": service_of(request).catalogue.cards()})


@v1.get(
    "/models/{model:path}", response_model=openai_responses.ModelCard, responses=documented(401, 403, 404, 429, 503)
)
async def one_model(model: str, request: Request) -> JSONResponse:
    """One of them."""
    service = service_of(request)
    card = next((card for card in service.catalogue.cards() if card["id"] == model), None)
    if card is None:
        raise service.unknown(model)
    return JSONResponse(card)


async def _answer(
    request: Request, service: Service, generation: Generation, body: ChatRequest | CompletionRequest
) -> Response:
    """The answer to a request that runs, whole or as events."""
    chat = isinstance(body, ChatRequest)
    if body.stream:
        return EventStream(service, generation, openai_responses.events(generation, chat, body.with_usage))
    watch = asyncio.create_task(cancel_on_disconnect(request.receive, service, generation))
    try:
        return JSONResponse(await openai_responses.whole(generation, chat))
    finally:
        watch.cancel()
        service.cancel(generation)
        service.metrics.generated(generation)


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
