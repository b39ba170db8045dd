"""One thread that owns the engines: requests join the running batch, and leave it when they end or are cancelled.

The event loop hands in a `Generation` and awaits its pieces. Between the threads pass a queue of orders in one
direction and each generation's inbox in the other. Several models, and an old and a new version of one, are engines
that step in turn; an engine is freed after its last answer.

[Note: orders between steps] Orders are taken between two steps, so a cancelled request frees its row before the next
step. Pieces go the other way with one wake-up of the event loop per step, not per answer.

[Note: pieces for the eye] What a request's task does for a piece costs as much Python as a small model's token, under
the same lock. So pieces that come within PIECES_SECONDS of the last ones are handed out together, 50 times a second;
the first of a request and the last of an answer never wait.
"""

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from penstock.rollout.engine import Answer, Engine
from penstock.rollout.prompt_logprobs import Scored, prompt_logprobs
from penstock.rollout.sampling import Sampling
from penstock.serve.catalogue import ServedModel
from penstock.serve.detokenize import TextStream
from penstock.serve.errors import ApiError

Result = TypeVar("Result")


PIECES_SECONDS = 0.02
"""See [Note: pieces for the eye]."""


class BusyError(Exception):
    """All rows and the whole queue are taken."""


@dataclass(frozen=True)
class Token:
    """One sampled token, or one of a prompt. Example: Token(17, -0.5, 3, ((17, -0.5),))."""

    id: int
    logprob: float | None
    """None: a prompt's first."""
    start: int
    """Where its text begins in the answer, in characters."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its position and their log-probabilities, if the request wants them."""


@dataclass(frozen=True)
class Piece:
    """New text of one answer. Example: Piece(0, "Hel", (), None)."""

    index: int
    """Of the answer in its request."""
    text: str
    tokens: tuple[Token, ...] = ()
    """The tokens of the text, if the request wants log-probabilities."""
    finish_reason: str | None = None
    """`stop`, `length` or `error` in the answer's last piece."""
    error: ApiError | None = None
    """Why an answer failed."""


@dataclass(eq=False)
class Generation:
    """The answers to one request while they are generated. Belongs to the event loop that makes it."""

    model: ServedModel
    prompts: list[list[int]]
    sampling: Sampling
    """Without stop strings, which are in `stops`. See [Note: stop strings are found in the text]."""
    stops: tuple[str, ...] = ()
    wants_tokens: bool = False
    echo: bool = False
    """Whether prompts come before their answers."""
    answers: bool = True
    """False: prompts are all that comes."""
    background: bool = False
    """Nobody waits for it: it takes no place in the queue."""
    cancelled: bool = False
    tokens_made: int = 0
    first_token_at: float | None = None
    """time.monotonic() of its first token."""
    started_at: float = field(default_factory=time.monotonic)
    inbox: deque[Piece] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    due: float = 0.0
    """The loop's time before which pieces wait for more; see [Note: pieces for the eye]."""
    timed: bool = False
    """Whether a timer will wake it then."""

    @property
    def count(self) -> int:
        return len(self.prompts) * self.sampling.n

    async def pieces(self) -> list[Piece]:
        """Waits for new pieces and returns them all; an empty list after `cancel`."""
        while not self.cancelled:
            await self.wake.wait()
            self.wake.clear()
            if self.inbox:
                break
        pieces = []
        while self.inbox and not self.cancelled:
            pieces.append(self.inbox.popleft())
        self.due = asyncio.get_running_loop().time() + PIECES_SECONDS
        return pieces

    def tell(self) -> None:
        """New pieces are in the inbox."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self.due or (self.inbox and self.inbox[-1].finish_reason):
            self.wake.set()
        elif not self.timed:
            self.timed = True
            loop.call_at(self.due, self._ring)

    def _ring(self) -> None:
        self.timed = False
        self.wake.set()


@dataclass(eq=False)
class _Job:
    """One answer of a generation."""

    generation: Generation
    index: int
    answer: Answer
    limit: int
    """Tokens at most."""
    text: TextStream
    ends: frozenset[int]
    """Tokens that end it, and are no part of its text."""
    start: int = 0
    """Characters of the prompt before it."""
    processed: int = 0
    """Tokens of the answer that went into the text."""
    tokens: list[Token] = field(default_factory=list)
    """Tokens whose text waits."""


class Scheduler:
    """`submit` and `cancel` may be called from any thread; pieces arrive in `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, queue_length: int) -> None:
        self.queue_length = queue_length
        """Answers that may wait for a row, per model."""
        self.tokens_made = 0
        self.steps = 0
        self._loop = loop
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[Engine, dict[int, _Job]] = {}
        """Answers that wait or run, by engine and by the identity of the engine's answer."""
        self._models: dict[Engine, ServedModel] = {}
        self._outstanding: dict[str, int] = {}
        """Accepted answers that have not ended, by model."""
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Queues a request. Raises BusyError when there is no room for its answers."""
        model = generation.model
        room = model.rows + self.queue_length
        with self._lock:
            outstanding = self._outstanding.setdefault(model.owner.id, 0)
            if outstanding + generation.count > room:
                raise BusyError(
                    f"{model.id} has {outstanding} answers running or waiting, and room for {room} with {model.rows} "
                    "at once; try again in a moment."
                )
            self._outstanding[model.owner.id] += 0 if generation.background else generation.count
        self._orders.put(lambda: self._begin(generation))

    def cancel(self, generation: Generation) -> None:
        """Ends a request early; its rows are free before the next step."""
        generation.cancelled = True
        generation.wake.set()
        self._orders.put(lambda: self._drop(generation))

    def run(self, function: Callable[[], Result]) -> Future[Result]:
        """Calls a function on the engines' thread, between two steps."""
        result: Future[Result] = Future()

        def call() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(function())
            except Exception as error:  # its caller's to answer
                result.set_exception(error)

        self._orders.put(call)
        return result

    @property
    def outstanding(self) -> int:
        """Accepted answers that have not ended, but for those in the background."""
        with self._lock:
            return sum(self._outstanding.values())

    @property
    def rows_used(self) -> int:
        """Rows of all engines that hold an answer."""
        return sum(engine.rows - engine.free for engine in list(self._jobs))

    def close(self, error: ApiError) -> None:
        """Ends every generation with this error, and then the thread. Waits for the step that runs."""

        def stop() -> None:
            self._closing = True
            for engine in list(self._jobs):
                self._fail(engine, error)

        self._orders.put(stop)
        self._thread.join()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            self._take_orders(wait=not self._jobs)
            for engine in list(self._jobs):
                self._step(engine)

    def _take_orders(self, wait: bool) -> None:
        if wait:
            self._orders.get()()
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return
            order()

    def _begin(self, generation: Generation) -> None:
        model, sampling = generation.model, generation.sampling
        if generation.cancelled:
            self._release(generation, generation.count)
            return
        engine = model.engine
        starts = [0] * len(generation.prompts)
        if generation.echo:
            try:
                pieces = _echoed(generation, engine)
            except Exception as error:  # as in a step
                pieces = [self._broken(model, error)]
            self._deliver([(generation, piece) for piece in pieces])
            if pieces[0].error or not generation.answers:
                self._release(generation, generation.count)
                return
            starts = [len(piece.text) for piece in pieces[:: sampling.n]]
        jobs = self._jobs.setdefault(engine, {})
        self._models[engine] = model
        refused = []
        for i, prompt in enumerate(generation.prompts):
            for j, answer in enumerate(engine.submit(prompt, sampling, adapter=model.adapter)):
                limit = min(sampling.max_new_tokens, engine.length - len(prompt))
                text = TextStream(model.decode, generation.stops)
                job = _Job(generation, i * sampling.n + j, answer, limit, text, engine.ends_of(sampling), starts[i])
                if answer.error:
                    refused.append((generation, _failed(job, ApiError(400, answer.error))))
                else:
                    jobs[id(answer)] = job
        self._release(generation, len(refused))
        self._deliver(refused)
        self._forget_if_idle(engine)

    def _drop(self, generation: Generation) -> None:
        for engine, jobs in list(self._jobs.items()):
            for job in [job for job in jobs.values() if job.generation is generation]:
                engine.cancel(job.answer)
                self._end(engine, job)
            self._forget_if_idle(engine)

    def _step(self, engine: Engine) -> None:
        jobs = self._jobs[engine]
        try:
            answers = engine.step()
        except Exception as error:  # a model or a device may fail in any way; the server goes on
            failure = self._broken(self._models[engine], error).error
            assert failure is not None
            self._fail(engine, failure)
            return
        self.steps += 1
        self.tokens_made += len(answers)
        now, pieces = time.monotonic(), []
        for answer in answers:
            job = jobs[id(answer)]
            generation = job.generation
            if generation.first_token_at is None:
                generation.first_token_at = now
            piece = self._advance(engine, job)
            if piece is not None:
                pieces.append((generation, piece))
        self._deliver(pieces)
        self._forget_if_idle(engine)

    def _broken(self, model: ServedModel, error: Exception) -> Piece:
        """What is left of a model that failed: its error, and a new engine for the next request."""
        traceback.print_exc(file=sys.stderr)
        model.renew()
        text = f"the model failed ({type(error).__name__}); the server's log says more."
        return Piece(0, "", finish_reason="error", error=ApiError(500, text, code="model_failed"))

    def _advance(self, engine: Engine, job: _Job) -> Piece | None:
        """One answer's new piece after a step; None while its text waits for the next token."""
        answer = job.answer
        if answer.error:
            self._end(engine, job)
            return _failed(job, ApiError(500, answer.error))
        text = self._read_tokens(engine, job)
        reason = None
        if job.text.ended:
            engine.cancel(answer)
            reason = "stop"
        elif answer.finish_reason != "length":
            reason = answer.finish_reason
        elif job.processed >= job.limit:
            reason = "length"
        if reason is not None:
            text += job.text.finish()
            reason = "stop" if job.text.ended else reason
            self._end(engine, job)
        elif not text:
            return None
        tokens, job.tokens = job.tokens, []
        if job.text.ended:  # tokens of the stop string alone are not shown
            tokens = [token for token in tokens if token.start < job.start + job.text.length]
        return Piece(job.index, text, tuple(tokens), reason)

    def _read_tokens(self, engine: Engine, job: _Job) -> str:
        """Moves the answer's new tokens into the job. Returns the text to show."""
        answer, generation = job.answer, job.generation
        text, first = "", job.processed
        for i, token in enumerate(answer.response_ids[first:], first):
            ends = token in job.ends
            if generation.wants_tokens and (generation.echo or not ends):  # behind an echo every token is counted on
                top = tuple(answer.top_logprobs[i]) if answer.top_logprobs else ()
                start = job.start + job.text.position
                job.tokens.append(Token(token, answer.logprobs[i], start, top))
            text += "" if ends else job.text.push(token, may_stop=i + 1 >= generation.sampling.min_new_tokens)
            job.processed = i + 1
        generation.tokens_made += job.processed - first
        return text

    def _fail(self, engine: Engine, error: ApiError) -> None:
        """Ends every answer of an engine with an error."""
        pieces = []
        for job in list(self._jobs[engine].values()):
            engine.cancel(job.answer)
            self._end(engine, job)
            pieces.append((job.generation, _failed(job, error)))
        self._deliver(pieces)
        self._forget_if_idle(engine)

    def _end(self, engine: Engine, job: _Job) -> None:
        del self._jobs[engine][id(job.answer)]
        self._release(job.generation, 1)

    def _release(self, generation: Generation, count: int) -> None:
        with self._lock:
            self._outstanding[generation.model.owner.id] -= 0 if generation.background else count

    def _forget_if_idle(self, engine: Engine) -> None:
        """Drops an engine without answers, and with it weights that a newer version has replaced."""
        if not self._jobs.get(engine, True):
            del self._jobs[engine], self._models[engine]

    def _deliver(self, pieces: Sequence[tuple[Generation, Piece]]) -> None:
        """Puts pieces into their inboxes, and wakes all generations with one call into the loop."""
        for generation, piece in pieces:
            generation.inbox.append(piece)
        if pieces and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_wake, {generation for generation, _ in pieces})


def _echoed(generation: Generation, engine: Engine) -> list[Piece]:
    """A piece per answer with its prompt's text and tokens; the last one where no answer is wanted."""
    top, pieces = generation.sampling.top_logprobs, list[Piece]()
    scored: Sequence[Sequence[Scored]] = [[(None, ())] * len(prompt) for prompt in generation.prompts]
    if generation.wants_tokens:
        scored = prompt_logprobs(engine.decoder, generation.prompts, top, generation.model.adapter)
    for prompt, scores in zip(generation.prompts, scored, strict=True):
        stream, shown, tokens = TextStream(generation.model.decode), list[str](), list[Token]()
        for token, (logprob, likeliest) in zip(prompt, scores, strict=True):
            tokens.append(Token(token, logprob, stream.position, likeliest))
            shown.append(stream.push(token))
        text, read = "".join([*shown, stream.finish()]), tuple(tokens) if generation.wants_tokens else ()
        reason = None if generation.answers else "length"
        pieces += [Piece(len(pieces) + j, text, read, reason) for j in range(generation.sampling.n)]
    return pieces


def _failed(job: _Job, error: ApiError) -> Piece:
    return Piece(job.index, "", finish_reason="error", error=error)


def _wake(generations: Iterable[Generation]) -> None:
    for generation in generations:
        generation.tell()
