"""One thread that owns the engines: requests join the running batch, and leave it the moment nobody waits for them.

The web side hands in a `Generation` and awaits its pieces; all that crosses between the threads is a queue of orders
in one direction and each generation's inbox in the other. Several models, and an old and a new version of one, are
several engines that take their steps in turn.
"""

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from penstock.rollout.engine import Answer, Engine
from penstock.rollout.sampling import Sampling
from penstock.serve.catalogue import ServedModel
from penstock.serve.detokenize import TextStream
from penstock.serve.errors import ApiError


class BusyError(Exception):
    """All rows and all places in the queue are taken."""


@dataclass(frozen=True)
class Token:
    """One sampled token. Example: Token(17, -0.5, 3, ((17, -0.5),))."""

    id: int
    logprob: float
    start: int
    """Where its text begins in the answer, in characters."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place, if they were asked for."""


@dataclass(frozen=True)
class Piece:
    """What one answer has gained. Example: Piece(0, "Hel", (), None)."""

    index: int
    """Which of the request's answers."""
    text: str
    tokens: tuple[Token, ...] = ()
    """Those behind the text, where log-probabilities were asked for."""
    finish_reason: str | None = None
    """`stop`, `length` or `error`, with the answer's last piece."""
    error: ApiError | None = None
    """Why an answer failed."""


@dataclass(eq=False)
class Generation:
    """The answers to one request, on their way. Belongs to the event loop that made it."""

    served: ServedModel
    prompts: list[list[int]]
    sampling: Sampling
    """Without stop strings: they are `stops`, which are found in the text as it is shown."""
    stops: tuple[str, ...] = ()
    wants_tokens: bool = False
    cancelled: bool = False
    tokens_made: int = 0
    first_token_at: float | None = None
    """time.monotonic() of the first token of all."""
    started_at: float = field(default_factory=time.monotonic)
    inbox: deque[Piece] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def count(self) -> int:
        """Answers."""
        return len(self.prompts) * self.sampling.n

    async def pieces(self) -> list[Piece]:
        """All that is new, at least one piece; an empty list once it was cancelled."""
        while not self.inbox and not self.cancelled:
            self.wake.clear()
            await self.wake.wait()
        new = []
        while self.inbox and not self.cancelled:
            new.append(self.inbox.popleft())
        return new


@dataclass(eq=False)
class _Line:
    """One answer of a generation."""

    generation: Generation
    index: int
    answer: Answer
    limit: int
    """Tokens it may have."""
    text: TextStream
    told: int = 0
    tokens: list[Token] = field(default_factory=list)
    """Tokens whose text waits."""


class Scheduler:
    """See the module. `submit` and `cancel` may be called from any thread; pieces arrive in the loop given here."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, queue_length: int) -> None:
        self.queue_length = queue_length
        """Answers that may wait for a row, per model."""
        self.tokens_made = 0
        self.steps = 0
        self._loop = loop
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lines: dict[Engine, dict[int, _Line]] = {}
        """Answers that wait or run, by engine and by the identity of the engine's answer."""
        self._served: dict[Engine, ServedModel] = {}
        self._outstanding: dict[str, int] = {}
        """Answers accepted and not ended, by model."""
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Queues a request. Raises BusyError when its answers find no room."""
        served = generation.served
        with self._lock:
            there = self._outstanding.get(served.id, 0)
            if there + generation.count > served.rows + self.queue_length:
                raise BusyError(
                    f"{served.id} has {there} answers running or waiting, and room for "
                    f"{served.rows + self.queue_length} with {served.rows} at once; try again in a moment."
                )
            self._outstanding[served.id] = there + generation.count
        self._orders.put(lambda: self._begin(generation))

    def cancel(self, generation: Generation) -> None:
        """Nobody waits for it any more: its rows are free before the next step."""
        generation.cancelled = True
        generation.wake.set()
        self._orders.put(lambda: self._drop(generation))

    @property
    def outstanding(self) -> int:
        """Answers that were accepted and have not ended."""
        with self._lock:
            return sum(self._outstanding.values())

    @property
    def rows_used(self) -> int:
        """Rows of all engines that hold an answer."""
        return sum(engine.rows - engine.free for engine in list(self._lines))

    def close(self, why: ApiError) -> None:
        """Ends every generation with an error that says why, and the thread. Waits for the step that runs."""

        def stop() -> None:
            self._closing = True
            for engine in list(self._lines):
                self._fail(engine, why)

        self._orders.put(stop)
        self._thread.join()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            self._take_orders(wait=not self._lines)
            for engine in list(self._lines):
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
        if generation.cancelled:
            self._release(generation.served, generation.count)
            return
        served, sampling = generation.served, generation.sampling
        engine = served.engine
        lines = self._lines.setdefault(engine, {})
        self._served[engine] = served
        refused = []
        for i, prompt in enumerate(generation.prompts):
            for j, answer in enumerate(engine.submit(prompt, sampling)):
                limit = min(sampling.max_new_tokens, engine.length - len(prompt))
                line = _Line(generation, i * sampling.n + j, answer, limit, TextStream(served.decode, generation.stops))
                if answer.error:
                    refused.append((generation, _failed(line, ApiError(400, answer.error))))
                else:
                    lines[id(answer)] = line
        self._release(served, len(refused))
        self._tell(refused)
        self._forget_if_idle(engine)

    def _drop(self, generation: Generation) -> None:
        for engine, lines in list(self._lines.items()):
            mine = [line for line in lines.values() if line.generation is generation]
            for line in mine:
                engine.cancel(line.answer)
                self._end(engine, line)
            self._forget_if_idle(engine)

    def _step(self, engine: Engine) -> None:
        lines = self._lines[engine]
        try:
            answers = engine.step()
        except Exception as error:  # whatever a model or a device can do wrong; the server goes on
            traceback.print_exc(file=sys.stderr)
            served = self._served[engine]
            why = f"the model failed ({type(error).__name__}); the server's log says more."
            self._fail(engine, ApiError(500, why, code="model_failed"))
            served.renew()
            return
        self.steps += 1
        self.tokens_made += len(answers)
        now, news = time.monotonic(), []
        for answer in answers:
            line = lines[id(answer)]
            generation = line.generation
            if generation.first_token_at is None:
                generation.first_token_at = now
            piece = self._advance(engine, line)
            if piece is not None:
                news.append((generation, piece))
        self._tell(news)
        self._forget_if_idle(engine)

    def _advance(self, engine: Engine, line: _Line) -> Piece | None:
        """What a step brought for one answer; None while it must wait."""
        answer, generation = line.answer, line.generation
        if answer.error:
            self._end(engine, line)
            return _failed(line, ApiError(500, answer.error))
        text, place = "", line.told
        for token in answer.response_ids[line.told :]:
            if token not in engine.eos_ids:
                if generation.wants_tokens:
                    top = tuple(answer.top_logprobs[place]) if answer.top_logprobs else ()
                    line.tokens.append(Token(token, answer.logprobs[place], line.text.position, top))
                text += line.text.push(token)
            place += 1
        generation.tokens_made += place - line.told
        line.told = place
        reason = None
        if line.text.ended:
            engine.cancel(answer)
            reason = "stop"
        elif answer.finish_reason != "length":
            reason = answer.finish_reason
        elif place >= line.limit:
            reason = "length"
        if reason is not None:
            text += line.text.finish()
            reason = "stop" if line.text.ended else reason
            self._end(engine, line)
        elif not text:
            return None
        tokens, line.tokens = line.tokens, []
        if line.text.ended:  # what belongs to the stop string alone is not shown
            tokens = [token for token in tokens if token.start < line.text.length]
        return Piece(line.index, text, tuple(tokens), reason)

    def _fail(self, engine: Engine, why: ApiError) -> None:
        """An error for every answer of an engine."""
        news = []
        for line in list(self._lines[engine].values()):
            engine.cancel(line.answer)
            self._end(engine, line)
            news.append((line.generation, _failed(line, why)))
        self._tell(news)
        self._forget_if_idle(engine)

    def _end(self, engine: Engine, line: _Line) -> None:
        del self._lines[engine][id(line.answer)]
        self._release(self._served[engine], 1)

    def _release(self, served: ServedModel, count: int) -> None:
        with self._lock:
            self._outstanding[served.id] -= count

    def _forget_if_idle(self, engine: Engine) -> None:
        """An engine without answers is let go: if its weights were replaced, nothing else holds them."""
        if not self._lines.get(engine, True):
            del self._lines[engine], self._served[engine]

    def _tell(self, news: Sequence[tuple[Generation, Piece]]) -> None:
        """Puts the pieces where they are awaited, and wakes all that wait with one call into the loop."""
        for generation, piece in news:
            generation.inbox.append(piece)
        if news and not self._loop.is_closed():  # a loop that has ended has nobody waiting
            self._loop.call_soon_threadsafe(_wake, {generation for generation, _ in news})


def _failed(line: _Line, why: ApiError) -> Piece:
    return Piece(line.index, "", finish_reason="error", error=why)


def _wake(generations: Iterable[Generation]) -> None:
    for generation in generations:
        generation.wake.set()
