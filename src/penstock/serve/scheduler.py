"""Requests to the models' process, and the text of what comes back: answers join the running batch, and leave it when
they end or are cancelled.

A route hands in a `Generation` and awaits its pieces. The engines are in a process of their own (`worker.py`); here is
its end of the connection, and what needs no model: room, text, stop strings. All in the event loop; only `call` and
`drop` are for other threads too.

[Note: pieces for the eye] What a request's task does for a piece costs as much Python as a small model's token. So
pieces that come within PIECES_SECONDS of the last ones are handed out together, 50 times a second; the first of a
request and the last of an answer never wait.
"""

import asyncio
import contextlib
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from penstock.errors import ResourceError
from penstock.rollout.prompt_logprobs import Scored
from penstock.rollout.sampling import Sampling
from penstock.serve.detokenize import TextStream
from penstock.serve.errors import ApiError
from penstock.serve.models.catalogue import ServedModel
from penstock.serve.models.worker import NUMBERS, Failure, ModelGoneError, Update, failed

WORKER = "from penstock.serve.models.worker import main; main({descriptor}, {threads})"
"""What the models' process runs, with the imports of this one."""
BEFORE = "import signal, sys; [signal.signal(number, signal.SIG_IGN) for number in (2, 15)]; sys.path[:] = {path!r}; "
"""SIGINT and SIGTERM are the server's to follow: they come to both from a terminal, or from systemd."""
LOST_SECONDS = 1.0
"""For a worker that has closed its connection to end."""
LOST = "model_lost"
"""The code of errors of a worker that has ended by itself."""
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
    held: list[Update] | None = None
    """What waits until the text of the prompts has been sent; None: nothing does."""
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
    number: int
    """The worker's."""
    text: TextStream
    ends: frozenset[int]
    """Tokens that end it, and are no part of its text."""
    start: int = 0
    """Characters of the prompt before it."""
    made: int = 0
    """Its tokens so far."""
    tokens: list[Token] = field(default_factory=list)
    """Tokens whose text waits."""


def start_worker(threads: int | None) -> tuple[Connection, subprocess.Popen[bytes]]:
    """The models' process, and our end of the connection to it. What it prints goes to stderr."""
    ours, theirs = multiprocessing.Pipe()
    command = BEFORE.format(path=sys.path) + WORKER.format(descriptor=theirs.fileno(), threads=threads)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", command], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2,
            start_new_session=True,
        )  # fmt: skip
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return ours, process


OnLoss = Callable[[ResourceError | None], None]


class Scheduler:
    """Belongs to the event loop that makes it."""

    def __init__(self, *, queue_length: int, threads: int | None = None, on_loss: OnLoss = lambda _: None) -> None:
        """Starts the worker. `on_loss` is called when one has ended by itself, and another, without models, begun; or
        with the reason why there is none."""
        self.queue_length = queue_length
        """Answers that may wait for a row, per model."""
        self.tokens_made = 0
        self.steps = 0
        self.rows_used = 0
        """Rows of all engines that hold an answer."""
        self._threads, self._on_loss = threads, on_loss
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[int, _Job] = {}
        """Answers that wait or run, by number."""
        self._next = 0
        """The next answer's number."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._outstanding: dict[str, int] = {}
        """Accepted answers that have not ended, by model."""
        self._calls: dict[int, Future[Any]] = {}
        self._sending = threading.Lock()
        self._connection, self._process = self._start()

    def _start(self) -> tuple[Connection, subprocess.Popen[bytes]]:
        connection, process = start_worker(self._threads)
        self._loop.add_reader(connection.fileno(), self._read)
        return connection, process

    def submit(self, generation: Generation) -> None:
        """Sends a request to its model. Raises BusyError when there is no room for its answers."""
        model, sampling = generation.model, generation.sampling
        room = model.rows + self.queue_length
        outstanding = self._outstanding.setdefault(model.owner.id, 0)
        if outstanding + generation.count > room:
            raise BusyError(
                f"{model.id} has {outstanding} answers running or waiting, and room for {room} with {model.rows} "
                "at once; try again in a moment."
            )
        self._outstanding[model.owner.id] += 0 if generation.background else generation.count
        ends = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else frozenset(model.encoder.eos_ids))
        first, self._next = self._next, self._next + generation.count
        for index in range(generation.count):
            text = TextStream(model.decode, generation.stops)
            self._jobs[first + index] = _Job(generation, index, first + index, text, ends)
        scored = generation.echo and generation.wants_tokens
        generation.held = [] if generation.echo else None
        if generation.echo and not scored:
            self._on_prompts(first, [[(None, ())] * len(prompt) for prompt in generation.prompts])
        if scored or generation.answers:
            order = generation.prompts, sampling, model.adapter, scored, generation.answers
            self._send("begin", model.owner.number, first, *order)

    def cancel(self, generation: Generation) -> None:
        """Ends a request early; its rows are free before the next step."""
        generation.cancelled = True
        generation.wake.set()
        self._drop_jobs([job for job in self._jobs.values() if job.generation is generation])

    def call(self, name: str, *arguments: Any) -> Future[Any]:
        """What a method of the worker returns. From any thread. Raises what it raises there, ResourceError where the
        worker ends before its answer."""
        future, number = Future[Any](), next(NUMBERS)
        with self._sending:
            if self._connection.closed:
                future.set_exception(ResourceError("the models' process has ended."))
                return future
            self._calls[number] = future
            self._write("call", number, name, *arguments)
        return future

    async def score(self, number: int, rows: Sequence[Sequence[int]]) -> list[float]:
        """What a reward model says of rows. Raises ApiError."""
        try:
            return await asyncio.wrap_future(self.call("score", number, rows))
        except ModelGoneError as error:
            raise ApiError(503, str(error), code="loading") from error
        except ResourceError as error:
            why = error.__cause__
            raise why if isinstance(why, ApiError) else ApiError(500, str(error), code=LOST) from error

    def drop(self, number: int) -> None:
        """A model that nobody will ask again. From any thread, and from a finalizer, which may run within a `_send`."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._send, "drop", number)

    @property
    def outstanding(self) -> int:
        """Accepted answers that have not ended, but for those in the background."""
        return sum(self._outstanding.values())

    def close(self, error: ApiError) -> None:
        """Ends every generation with this error, and then the worker."""
        if self._connection.closed:
            return
        self._loop.remove_reader(self._connection.fileno())
        with self._sending:
            self._connection.close()
        self._fail(error, self._take_calls())
        self._process.kill()
        self._process.wait()

    # --- what the worker sends ----------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while self._connection.poll():
                kind, *content = self._connection.recv()
                getattr(self, f"_on_{kind}")(*content)
        except (EOFError, OSError):
            self._lose()

    def _on_result(self, number: int, result: Any, error: Exception | None) -> None:
        future = self._calls.pop(number, Future[Any]())
        if future.set_running_or_notify_cancel():
            future.set_exception(error) if error else future.set_result(result)

    def _on_prompts(self, first: int, scored: Sequence[Sequence[Scored]]) -> None:
        """The prompts of the answers from number `first` on, with their log-probabilities."""
        if first in self._jobs:  # not cancelled
            task = self._loop.create_task(self._echo(self._jobs[first].generation, first, scored))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _echo(self, generation: Generation, first: int, scored: Sequence[Sequence[Scored]]) -> None:
        """Prompts' text, before that of their answers. Long ones are read in a thread, so that no stream waits."""
        try:
            pieces = await asyncio.to_thread(_echoed, generation, scored)
        except Exception as error:  # as in a step
            failure, jobs = failed(error), [job for job in self._jobs.values() if job.generation is generation]
            self._drop_jobs(jobs)
            generation.inbox.extend(_failed(job, failure) for job in jobs)
            generation.tell()
            return
        for piece in pieces:
            job = self._jobs.get(first + piece.index)
            if job is not None:
                generation.inbox.append(piece)
                job.start = len(piece.text)
                if piece.finish_reason is not None:
                    self._end(job)
        generation.tell()
        held, generation.held = generation.held, None
        self._show(held or ())

    def _on_updates(self, updates: Sequence[Update], rows_used: int) -> None:
        self.rows_used = rows_used
        self.steps += any(update.tokens for update in updates)
        self.tokens_made += sum(len(update.tokens) for update in updates)
        self._show(updates)

    def _show(self, updates: Sequence[Update]) -> None:
        now, generations = time.monotonic(), dict[Generation, None]()
        for update in updates:
            job = self._jobs.get(update.number)
            if job is None:  # ended here, by a stop string or its reader
                continue
            generation = job.generation
            if generation.held is not None and not update.failure:
                generation.held.append(update)
                continue
            if generation.first_token_at is None and update.tokens:
                generation.first_token_at = now
            piece = self._advance(job, update)
            if piece is not None:
                generation.inbox.append(piece)
                generations[generation] = None
        for generation in generations:
            generation.tell()

    def _advance(self, job: _Job, update: Update) -> Piece | None:
        """One answer's new piece; None while its text waits for the next token."""
        if update.failure:
            self._end(job)
            return _failed(job, update.failure)
        text = self._read_tokens(job, update)
        reason = "stop" if job.text.ended else update.finish_reason
        if reason is not None:
            if update.finish_reason is None:
                self._drop_jobs([job])
            else:
                self._end(job)
            text += job.text.finish()
            reason = "stop" if job.text.ended else reason
        elif not text:
            return None
        tokens, job.tokens = job.tokens, []
        if job.text.ended:  # tokens of the stop string alone are not shown
            tokens = [token for token in tokens if token.start < job.start + job.text.length]
        return Piece(job.index, text, tuple(tokens), reason)

    def _read_tokens(self, job: _Job, update: Update) -> str:
        """Moves an answer's new tokens into its job. Returns the text to show."""
        generation, text = job.generation, ""
        for i, token in enumerate(update.tokens):
            ends = token in job.ends
            if generation.wants_tokens and (generation.echo or not ends):  # behind an echo every token is counted on
                top = tuple(update.top[i]) if update.top else ()
                job.tokens.append(Token(token, update.logprobs[i], job.start + job.text.position, top))
            job.made += 1
            text += "" if ends else job.text.push(token, may_stop=job.made >= generation.sampling.min_new_tokens)
        generation.tokens_made += len(update.tokens)
        return text

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _drop_jobs(self, jobs: Iterable[_Job]) -> None:
        """Ends answers that the worker would go on with."""
        numbers: dict[int, list[int]] = {}
        for job in jobs:
            self._end(job)
            numbers.setdefault(job.generation.model.owner.number, []).append(job.number)
        for model, answers in numbers.items():
            self._send("cancel", model, answers)

    def _end(self, job: _Job) -> None:
        del self._jobs[job.number]
        self._outstanding[job.generation.model.owner.id] -= 0 if job.generation.background else 1

    def _fail(self, error: ApiError, calls: Sequence[Future[Any]]) -> None:
        """Ends all that runs with an error, and calls that nobody will answer."""
        for job in list(self._jobs.values()):
            self._end(job)
            job.generation.inbox.append(Piece(job.index, "", finish_reason="error", error=error))
            job.generation.tell()
        for future in calls:
            if future.set_running_or_notify_cancel():
                lost = ResourceError(error.message)
                lost.__cause__ = error
                future.set_exception(lost)

    def _take_calls(self) -> list[Future[Any]]:
        with self._sending:
            calls, self._calls = self._calls, {}
        return list(calls.values())

    def _lose(self) -> None:
        """The worker has ended by itself."""
        self._loop.remove_reader(self._connection.fileno())
        with self._sending:
            self._connection.close()
        calls, code = self._take_calls(), None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(LOST_SECONDS)
        self._process.kill()
        how = "does not answer any more" if code is None else f"ended with exit code {code}"
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else how
        advice = "; the system may have had no memory left for it" if code == -signal.SIGKILL else ""
        text = f"the models' process {how}{advice}."
        print(f"penstock serve: {text}", file=sys.stderr, flush=True)
        self.rows_used = 0
        self._fail(ApiError(500, text, code=LOST), calls)
        try:
            with self._sending:
                self._connection, self._process = self._start()
        except OSError as error:
            self._on_loss(ResourceError(f"{text[:-1]}, and another cannot be started ({error.strerror})."))
        else:
            self._on_loss(None)

    def _send(self, *order: Any) -> None:
        with self._sending:
            self._write(*order)

    def _write(self, *order: Any) -> None:
        with contextlib.suppress(OSError):  # the worker has ended: `_read` sees it
            self._connection.send(order)


def _echoed(generation: Generation, scored: Sequence[Sequence[Scored]]) -> list[Piece]:
    """A piece per answer with its prompt's text and tokens; the last one where no answer is wanted."""
    pieces: list[Piece] = []
    for prompt, scores in zip(generation.prompts, scored, strict=True):
        stream, shown, tokens = TextStream(generation.model.decode), list[str](), list[Token]()
        for token, (logprob, likeliest) in zip(prompt, scores, strict=True):
            tokens.append(Token(token, logprob, stream.position, likeliest))
            shown.append(stream.push(token))
        text, read = "".join([*shown, stream.finish()]), tuple(tokens) if generation.wants_tokens else ()
        reason = None if generation.answers else "length"
        pieces += [Piece(len(pieces) + j, text, read, reason) for j in range(generation.sampling.n)]
    return pieces


def _failed(job: _Job, failure: Failure) -> Piece:
    error = ApiError(failure.status, failure.message, code=failure.code)
    return Piece(job.index, "", finish_reason="error", error=error)
