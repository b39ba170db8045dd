"""The web application: OpenAI's routes under /v1, health and metrics, and the pieces put together.

Routes are thin: protocol.py reads the request, the scheduler runs it, answers.py writes what comes. The page's own
routes are in history.py, its files in assets.py.
"""

import asyncio
import contextlib
import enum
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from penstock.serve import openai_requests, openai_responses, page_api, static_files
from penstock.serve.auth import Keys
from penstock.serve.catalogue import Catalogue, ServedModel
from penstock.serve.config import ServeConfig
from penstock.serve.errors import ApiError, documented
from penstock.serve.metrics import CONTENT_TYPE, Metrics
from penstock.serve.middleware import AccessMiddleware, Application
from penstock.serve.scheduler import BusyError, Generation, Scheduler
from penstock.serve.store import Store

Result = TypeVar("Result")
Request_ = TypeVar("Request_", openai_requests.ChatRequest, openai_requests.CompletionRequest)
DRAIN_SECONDS = 30.0
"""From SIGTERM until answers that still run are cut off."""
LARGE_BYTES = 4096
"""Prompts above it are tokenized in a thread, so that nobody's stream waits for them."""


class Life(enum.Enum):
    """Loading: no model yet. Serving. Draining: answers end, nothing new begins."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Service:
    """What the routes share: models, scheduler, store, keys, metrics."""

    def __init__(self, config: ServeConfig, store: Store) -> None:
        self.config, self.store = config, store
        self.catalogue, self.metrics = Catalogue(config), Metrics()
        self.keys = Keys(store, config.per_key)
        self.scheduler: Scheduler | None = None
        self.draining = False
        self._encoding = ThreadPoolExecutor(1, "encoding")
        """One: tokenizers are not for several threads at once."""

    @property
    def life(self) -> Life:
        """Where the server stands."""
        if self.draining:
            return Life.DRAINING
        return Life.SERVING if self.catalogue.ready.is_set() else Life.LOADING

    def start(self, failed: Callable[[], None]) -> None:
        """Starts the scheduler in the running loop, and loading. `failed` is called if a model cannot be loaded."""
        self.scheduler = Scheduler(asyncio.get_running_loop(), queue_length=self.config.queue)
        self.scheduler.start()
        self.metrics.watch(self.scheduler, self.catalogue)
        self.catalogue.start(failed)

    async def drain(self) -> None:
        """Lets what runs come to its end, for DRAIN_SECONDS at most; what is left gets an error."""
        self.draining = True
        assert self.scheduler is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self.scheduler.outstanding:
                    await asyncio.sleep(0.02)
        self.stop()
        await asyncio.sleep(0.1)  # the last pieces are on their way to the clients

    def stop(self) -> None:
        """Ends everything that runs with an error that says why."""
        self.catalogue.stop()
        if self.scheduler is not None:
            self.scheduler.close(ApiError(503, "the server is shutting down.", code="shutting_down"))
            self.scheduler = None
        self._encoding.shutdown(wait=False, cancel_futures=True)

    def find(self, model: str) -> ServedModel:
        """A model by name. Raises ApiError 503 while loading or draining, 404 with the known names."""
        if self.life is not Life.SERVING:
            raise ApiError(503, f"the server is {self.life.value}; try again in a moment.", code=self.life.value)
        if model not in self.catalogue.models:
            known = ", ".join(self.catalogue.models)
            text = f"there is no model {ascii(model)[:80]} here; there are: {known}."
            raise ApiError(404, text, param="model", code="model_not_found")
        return self.catalogue.models[model]

    async def encode(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """Tokenizes: here if it is short, in the thread for it otherwise."""
        if size <= LARGE_BYTES:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._encoding, work, *arguments)

    def begin(self, served: ServedModel, asked: openai_requests.Asked) -> Generation:
        """Hands a request to the scheduler. Raises ApiError 429 when there is no room, 400 when there never is."""
        generation = Generation(served, asked.prompts, asked.sampling, asked.stops, asked.wants_tokens)
        room = served.rows + self.config.queue
        if generation.count > room:
            raise ApiError(400, f"{generation.count} answers are more than the {room} there is room for.", param="n")
        if self.scheduler is None:
            raise ApiError(503, "the server is draining; try again in a moment.", code="draining")
        try:
            self.scheduler.submit(generation)
        except BusyError as error:
            raise ApiError(429, str(error), code="queue_full") from error
        return generation

    def cancel(self, generation: Generation) -> None:
        """Nobody waits for it any more."""
        if self.scheduler is not None:
            self.scheduler.cancel(generation)


class EventStream(Response):
    """Server-sent events from a generation, which is cancelled as soon as the client has gone."""

    def __init__(self, service: Service, generation: Generation, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._service, self._generation, self._lines = service, generation, lines

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends lines until there are no more, or nobody to read them."""
        leaving = asyncio.create_task(_gone(receive, self._service, self._generation))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self._lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            leaving.cancel()
            self._service.cancel(self._generation)
            await self._lines.aclose()
            self._service.metrics.generated(self._generation)


async def _gone(receive: Callable[[], Awaitable[Any]], service: Service, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    service.cancel(generation)


# --- /v1 --------------------------------------------------------------------------------------------------------------


def service_of(request: Request) -> Service:
    """The service behind a request."""
    return request.app.state.service


async def _answer(
    request: Request, service: Service, served: ServedModel, asked: openai_requests.Asked, body: Any
) -> Response:
    """Runs what was asked for and answers it, whole or in pieces."""
    generation = service.begin(served, asked)
    chat = isinstance(body, openai_requests.ChatRequest)
    if body.stream:
        return EventStream(service, generation, openai_responses.events(generation, chat, body.with_usage))
    leaving = asyncio.create_task(_gone(request.receive, service, generation))
    try:
        return JSONResponse(await openai_responses.whole(generation, chat))
    finally:
        leaving.cancel()
        service.cancel(generation)
        service.metrics.generated(generation)


v1 = APIRouter(prefix="/v1", tags=["openai"], dependencies=[Depends(HTTPBearer(auto_error=False))])
IN_PIECES: dict[str, Any] = {"text/event-stream": {}}


def _size(request: Request) -> int:
    length = request.headers.get("content-length", "")
    return int(length) if length.isdigit() else LARGE_BYTES + 1


@v1.post(
    "/chat/completions", response_model=openai_responses.ChatCompletion,
    responses={200: {"content": IN_PIECES}, **documented(400, 401, 403, 404, 408, 413, 429, 500, 503)},
)  # fmt: skip
async def chat_completions(body: openai_requests.ChatRequest, request: Request) -> Response:
    """Answers a conversation; as server-sent events with `stream`."""
    service = service_of(request)
    served = service.find(body.model)
    asked = await service.encode(_size(request), openai_requests.asked_chat, body, served)
    return await _answer(request, service, served, asked, body)


@v1.post(
    "/completions", response_model=openai_responses.TextCompletion,
    responses={200: {"content": IN_PIECES}, **documented(400, 401, 403, 404, 408, 413, 429, 500, 503)},
)  # fmt: skip
async def completions(body: openai_requests.CompletionRequest, request: Request) -> Response:
    """Goes on with a text or with token ids, without a chat template."""
    service = service_of(request)
    served = service.find(body.model)
    asked = await service.encode(_size(request), openai_requests.asked_text, body, served)
    return await _answer(request, service, served, asked, body)


def _card(served: ServedModel) -> dict[str, Any]:
    return {"id": served.id, "object": "model", "created": served.created, "owned_by": "penstock"}


@v1.get("/models", response_model=openai_responses.ModelList, responses=documented(401, 403, 429, 503))
async def list_models(request: Request) -> JSONResponse:
    """The models that are served."""
    cards = [_card(served) for served in list(service_of(request).catalogue.models.values())]
    return JSONResponse({"object": "list", "data": cards})


@v1.get(
    "/models/{model:path}", response_model=openai_responses.ModelCard, responses=documented(401, 403, 404, 429, 503)
)
async def one_model(model: str, request: Request) -> JSONResponse:
    """One of them."""
    return JSONResponse(_card(service_of(request).find(model)))


# --- health, metrics, errors ------------------------------------------------------------------------------------------

own = APIRouter(tags=["server"])


@own.get("/health", responses={200: {"description": "serving"}, **documented(503)})
async def health(request: Request) -> JSONResponse:
    """Whether requests are answered: 503 while models load and while the server drains. Needs no key."""
    life = service_of(request).life
    if life is not Life.SERVING:
        raise ApiError(503, f"the server is {life.value}.", code=life.value)
    return JSONResponse({"status": "serving"})


@own.get(
    "/metrics", dependencies=[Depends(HTTPBearer(auto_error=False))], response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented(401, 403, 429)},
)  # fmt: skip
async def metrics(request: Request) -> Response:
    """Counters, as Prometheus reads them."""
    return Response(service_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE})


async def _api_error(request: Request, error: Any) -> Response:
    return Response(error.encoded, error.status, headers=error.headers, media_type="application/json")


async def _http_error(request: Request, error: Any) -> Response:
    said = {404: "there is nothing at this address.", 405: "this address does not take this method."}
    text = said.get(error.status_code, str(error.detail))
    return await _api_error(request, ApiError(error.status_code, text, headers=error.headers))


async def _validation_error(request: Request, error: Any) -> Response:
    # Where a key may be of several types, a wrong value in one of them says more than a wrong type for the others.
    every = error.errors()
    first = next((one for one in every if not one["type"].endswith("_type")), every[0])
    where = [part for part in first["loc"] if part not in ("body", "query", "path")]
    param = openai_requests.param_of(where, error.body) if first["loc"][0] == "body" else str(where[-1])
    if first["type"].startswith("union_tag"):
        param = first["ctx"]["discriminator"].strip("'")
    kind = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    text = f"{param or 'the body'}: {first['msg'].removeprefix('Value error, ')}."
    return await _api_error(request, ApiError(400, text, param=param, code=kind))


async def _own_mistake(request: Request, error: Any) -> Response:
    text = f"internal error ({type(error).__name__}); please report it with this answer's x-request-id."
    return await _api_error(request, ApiError(500, text))  # the gate logs it


def build(service: Service) -> Application:
    """The application: routes, error shapes, and the gate in front."""
    app = FastAPI(
        title="penstock", docs_url=None, redoc_url=None, openapi_url="/openapi.json",
        exception_handlers={
            ApiError: _api_error, HTTPException: _http_error, RequestValidationError: _validation_error,
            Exception: _own_mistake,
        },
    )  # fmt: skip
    app.state.service = service
    for router in (v1, own, page_api.api, static_files.pages):
        app.include_router(router)
    app.openapi = lambda: _document(app, service)  # type: ignore[method-assign]
    inner: Application = AccessMiddleware(app, lambda: service.keys, service.metrics)
    if service.config.cors:
        origins = list(service.config.cors)
        allowed = ["authorization", "content-type", "x-request-id"]
        inner = CORSMiddleware(
            inner, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=allowed,
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    return inner


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document: 400 in our shape where the framework would say 422, and the models that there are."""
    document = get_openapi(title=app.title, version="1", routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    known = list(service.catalogue.models)
    if known:
        for schema in document["components"]["schemas"].values():
            if schema["title"] in ("ChatRequest", "CompletionRequest", "NewReply"):
                schema["properties"]["model"]["enum"] = known
    return document
