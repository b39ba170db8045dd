"""The service: models, scheduler, store, keys and metrics, as one object that all routes share. Knows no routes.

[Note: a process around the engines] The engines are in a process of their own; routes hand in a `Generation` and await
its pieces. In one process (two threads) 32 streams of a small model had 0.66 of the engine's rate, in two 0.86: the
thread that steps gives up the interpreter's lock at each operation, and waited for it behind the event loop's work.
"""

import asyncio
import contextlib
import enum
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request

from penstock.serve.answers import Answers
from penstock.serve.auth import Keys
from penstock.serve.config import ServeConfig
from penstock.serve.errors import ApiError
from penstock.serve.metrics import Metrics
from penstock.serve.models.catalogue import Catalogue, ServedModel, ServedReward
from penstock.serve.openai_requests import EncodedRequest
from penstock.serve.scheduler import BusyError, Generation, Scheduler
from penstock.serve.store import Store
from penstock.serve.versions.rounds import Rounds

Result = TypeVar("Result")
Kind = TypeVar("Kind", ServedModel, ServedReward)
DRAIN_SECONDS = 30.0
"""From SIGTERM until answers that still run are cut off."""
LARGE_BYTES = 4096
"""Longer prompts are tokenized in a thread, so that no stream waits for them."""


class Life(enum.Enum):
    """Loading: no model yet. Serving. Draining: running answers end, new requests are refused."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Service:
    """What the routes share."""

    def __init__(self, config: ServeConfig, store: Store) -> None:
        self.config, self.store = config, store
        self.catalogue, self.metrics = Catalogue(config), Metrics()
        self.keys = Keys(store, config.per_key)
        self.answers = Answers(store, self.cancel, self.metrics.generated)
        self.rounds = Rounds(config)
        self.scheduler: Scheduler | None = None
        self.draining = False
        self.new_items = asyncio.Event()
        """Set when the labelling room has items that wait for answers or scores."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self.background: set[Generation] = set()
        """What is generated for nobody who waits; who began it takes it out."""
        self.scoring = 0
        """Requests for scores that are in work."""
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")
        """One thread: several must not use a tokenizer at once."""

    @property
    def life(self) -> Life:
        if self.draining:
            return Life.DRAINING
        return Life.SERVING if self.catalogue.ready.is_set() else Life.LOADING

    def start(self, on_failure: Callable[[], None]) -> None:
        """Starts the scheduler in the running loop, and loading. Calls `on_failure` if a model cannot be loaded."""
        self._loop = asyncio.get_running_loop()
        self.scheduler = Scheduler(
            queue_length=self.config.queue, threads=self.config.threads, on_loss=self.catalogue.reload
        )
        self.metrics.watch(self.scheduler, self.catalogue)
        self.catalogue.start(self.scheduler, on_failure)

    async def drain(self) -> None:
        """Waits up to DRAIN_SECONDS until all running answers and scores end; the remaining ones get an error."""
        self.draining = True
        assert self.scheduler is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self.scheduler.outstanding or self.scoring:
                    await asyncio.sleep(0.02)
        self.stop()
        await self.answers.close()
        await asyncio.sleep(0.1)  # the last pieces are on their way to the clients

    def stop(self) -> None:
        """Ends all running answers with an error that says why."""
        self.catalogue.stop()
        if self.scheduler is not None:
            self.scheduler.close(ApiError(503, "the server is shutting down.", code="shutting_down"))
            self.scheduler = None
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    def find(self, name: str) -> ServedModel:
        """A model by name. Raises ApiError 503 while loading or draining, 404 with the known names, 400 for one that
        does something else."""
        return self._find(name, ServedModel, "/v1/score")

    def _find(self, name: str, kind: type[Kind], other_route: str) -> Kind:
        if self.life is not Life.SERVING:
            raise ApiError(503, f"the server is {self.life.value}; try again in a moment.", code=self.life.value)
        if name not in self.catalogue.models:
            raise self.unknown(name)
        model = self.catalogue.models[name]
        if not isinstance(model, kind):
            raise ApiError(400, f"{name} is for {other_route}.", param="model", code="model_not_supported")
        return model

    def find_reward(self, name: str) -> ServedReward:
        """A reward model by name. Raises ApiError as `find` does."""
        return self._find(name, ServedReward, "/v1/chat/completions and /v1/completions")

    def unknown(self, name: str) -> ApiError:
        """The answer to a name that no model has."""
        known = ", ".join(card["id"] for card in self.catalogue.cards())
        text = f"there is no model {ascii(name)[:80]} here; there are: {known}."
        return ApiError(404, text, param="model", code="model_not_found")

    def tell_items(self) -> None:
        """Sets `new_items`, from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.new_items.set)

    async def encode(self, size: int, encode: Callable[..., Result], *arguments: Any) -> Result:
        """Calls a function that tokenizes `size` bytes: at once if they are few, in the thread otherwise."""
        if size <= LARGE_BYTES:
            return encode(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, encode, *arguments)

    def begin(self, model: ServedModel, request: EncodedRequest, *, background: bool = False) -> Generation:
        """Hands a request to the scheduler. Raises ApiError 429 when there is no room, 400 when there never is.

        What is in the background is cancelled by the next request that is not.
        """
        generation = Generation(
            model, request.prompts, request.sampling, request.stops, request.wants_tokens, request.echo,
            request.answers, background,
        )  # fmt: skip
        room = model.rows + self.config.queue
        if generation.count > room:
            raise ApiError(400, f"{generation.count} answers are more than the {room} there is room for.", param="n")
        if self.scheduler is None:
            raise ApiError(503, "the server is draining; try again in a moment.", code="draining")
        for waiting in () if background else list(self.background):
            self.cancel(waiting)
        if background:
            self.background.add(generation)
        try:
            self.scheduler.submit(generation)
        except BusyError as error:
            raise ApiError(429, str(error), code="queue_full") from error
        return generation

    def cancel(self, generation: Generation) -> None:
        """Frees the rows of a generation that no client waits for."""
        if self.scheduler is not None:
            self.scheduler.cancel(generation)


def request_bytes(request: Request) -> int:
    """Bytes of the body; counts as large when the client does not say."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdigit() else LARGE_BYTES + 1


def service_of(request: Request) -> Service:
    """The service behind a request."""
    return request.app.state.service
