"""The process that owns the models: it loads them, gives every running answer a token per step, and scores.

The server's end of the connection is `scheduler.py`. Orders are names of a Worker's methods with their arguments; back
come the updates of each step and the results of calls. So requests, texts and the database take no time of the
interpreter that steps the engines, and the server outlives what a model does to its process.

[Note: orders between steps] A thread receives orders at once, so that the server never waits for room in the
connection; they are carried out between two steps. So a cancelled answer's row is free before the next step. Models are
read from disk in threads of their own, while answers go on. Several models, and an old and a new version of one, are
engines that step in turn.
"""

import itertools
import os
import pickle
import queue
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from penstock.errors import PenstockError, ResourceError, one_line_warning
from penstock.models.adapter_files import AdapterFile, read_spec
from penstock.models.decoder import Decoder
from penstock.models.roles import RewardModel
from penstock.models.surgery import add_adapters_by_row
from penstock.rollout import engine as engines
from penstock.rollout.engine import Answer, Engine
from penstock.rollout.prompt_logprobs import prompt_logprobs
from penstock.rollout.sampling import Sampling
from penstock.serve.models import reward_models

NUMBERS = itertools.count()
"""The server's, of models and calls: none is given twice."""

GONE = "the model has just been loaded anew; try again in a moment."


class ModelGoneError(ResourceError):
    """A model of a worker that has ended."""


class Failure(NamedTuple):
    """Why an answer failed. Example: Failure(500, "the model failed", "model_failed")."""

    status: int
    message: str
    code: str | None = None


class Update(NamedTuple):
    """What has been added to an answer. Example: Update(7, [17], [-0.5])."""

    number: int
    """Of the answer."""
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    top: Sequence[Sequence[tuple[int, float]]] = ()
    """The likeliest tokens at the place of each, if the request wants them."""
    finish_reason: str | None = None
    """`stop` or `length` with an answer's last tokens."""
    failure: Failure | None = None
    """Ends the answer too."""


class Loaded(NamedTuple):
    """What the server must know of a model."""

    scores: bool
    """Whether it is a reward model."""
    vocab_size: int
    max_length: int
    eos_ids: tuple[int, ...]
    foreign: bool
    """Whether its layers are transformers' own, which read rows without padding."""
    std: float
    """Of a reward model: what its scores were divided by."""


@dataclass(eq=False)
class _Running:
    """An answer that waits or runs."""

    number: int
    answer: Answer
    limit: int
    """Tokens at most."""
    sent: int = 0
    """Tokens that the server has."""


@dataclass(eq=False)
class Model:
    """A model in this process."""

    decoder: Decoder
    reward: RewardModel | None = None
    engine: Engine | None = None
    """Of a model that speaks."""
    running: dict[int, _Running] = field(default_factory=dict)
    """By the identity of the engine's answer."""
    dropped: bool = False
    """Nobody will ask it again; it goes with its last answer."""


class Worker:
    """See the module. Methods without an underscore are orders; the server numbers models, answers and calls."""

    def __init__(self, connection: Connection, ended: Callable[[], None] = lambda: None) -> None:
        """`ended` is called, in any thread, once the server has gone."""
        self._connection, self._ended = connection, ended
        self._sending = threading.Lock()
        self.pending: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        """Orders to carry out; None is the last."""
        self.models: dict[int, Model] = {}
        self._rows_told = 0

    def run(self) -> None:
        """Works until the connection is closed."""
        threading.Thread(target=self._receive, name="orders", daemon=True).start()
        while self._take_orders(wait=not any(model.running for model in list(self.models.values()))):
            for number in list(self.models):
                self._visit(number)
            if self._rows != self._rows_told:
                self._send_updates([])

    # --- orders -------------------------------------------------------------------------------------------------------

    def call(self, call: int, name: str, *arguments: Any) -> None:
        """Sends back what `name` of these arguments returns or raises; loading waits for nobody, nor anybody for it."""
        if name == "load":
            threading.Thread(target=self._answer_call, args=(call, name, *arguments), daemon=True).start()
        else:
            self._answer_call(call, name, *arguments)

    def load(self, number: int, path: str, dtype: str, device: str | None, rows: int, length: int) -> Loaded:
        """Loads the model at `path`. Raises PenstockError."""
        if reward_models.is_reward_model(path):
            scorer = reward_models.load(path, dtype, device)
            model = Model(scorer.decoder, scorer)
        else:
            decoder = engines.load(path, dtype, device)[1].decoder
            model = Model(decoder, engine=Engine(decoder, rows=rows, length=min(length, decoder.config.max_length)))
        self.models[number] = model
        config, std = model.decoder.config, model.reward.std if model.reward else 1.0
        scores = model.reward is not None
        return Loaded(
            scores, config.vocab_size, config.max_length, tuple(config.eos_ids), config.foreign is not None, float(std)
        )

    def add_adapters(self, number: int, path: str, directories: Sequence[str]) -> None:
        """Adapters of the model that was loaded from `path`; answers ask for them by their place in the list."""
        adapters = [(read_spec(directory)[0], AdapterFile(directory.resolve())) for directory in map(Path, directories)]
        add_adapters_by_row(self._model(number).decoder, adapters, base=path)

    def score(self, number: int, rows: Sequence[Sequence[int]]) -> list[float]:
        """What a reward model says at the end of each row."""
        reward = self._model(number).reward
        assert reward is not None
        return reward_models.score(reward, rows)

    def _model(self, number: int) -> Model:
        if number not in self.models:
            raise ModelGoneError(GONE)
        return self.models[number]

    def drop(self, number: int) -> None:
        """A model that nobody will ask again."""
        if number in self.models:
            self.models[number].dropped = True

    def begin(
        self, number: int, first: int, prompts: Sequence[Sequence[int]], sampling: Sampling, adapter: int | None,
        scored: bool, answered: bool,
    ) -> None:  # fmt: skip
        """Begins the answers `first` ... to prompts, `sampling.n` to each. `scored`: prompts' log-probabilities come
        first. `answered`: False where they are all that is asked for."""
        model = self.models.get(number)
        if model is None or model.engine is None:
            gone = Failure(503, GONE, "loading")
            self._send_updates([Update(first + i, failure=gone) for i in range(len(prompts) * sampling.n)])
            return
        if scored:
            try:
                scores = prompt_logprobs(model.decoder, prompts, sampling.top_logprobs, adapter)
            except Exception as error:  # as in a step
                failure = failed(error)
                self._send_updates([Update(first + i, failure=failure) for i in range(len(prompts) * sampling.n)])
                return
            self._send("prompts", first, scores)
        refused = []
        for i, prompt in enumerate(prompts if answered else ()):
            for j, answer in enumerate(model.engine.submit(prompt, sampling, adapter=adapter)):
                limit = min(sampling.max_new_tokens, model.engine.length - len(prompt))
                running = _Running(first + i * sampling.n + j, answer, limit)
                if answer.error:
                    refused.append(Update(running.number, failure=Failure(400, answer.error)))
                else:
                    model.running[id(answer)] = running
        if refused:
            self._send_updates(refused)

    def cancel(self, number: int, answers: Sequence[int]) -> None:
        """Ends answers of a model; those that have ended are passed over."""
        model, ended = self.models.get(number), set(answers)
        for running in list(model.running.values()) if model else ():
            if model and model.engine and running.number in ended:
                model.engine.cancel(running.answer)
                del model.running[id(running.answer)]

    # --- steps --------------------------------------------------------------------------------------------------------

    def _visit(self, number: int) -> None:
        """A step, where an answer runs; the end of a model that nobody needs."""
        model = self.models[number]
        if model.running:
            self._step(model)
        elif model.dropped:
            del self.models[number]

    def _step(self, model: Model) -> None:
        assert model.engine is not None
        try:
            answers = model.engine.step()
        except Exception as error:  # a model or a device may fail in any way; the server goes on
            failure, old = failed(error), model.engine
            model.engine = Engine(model.decoder, rows=old.rows, length=old.length)
            updates = [Update(running.number, failure=failure) for running in model.running.values()]
            model.running.clear()
        else:
            updates = [self._advance(model, answer) for answer in answers]
        if updates:
            self._send_updates(updates)

    def _advance(self, model: Model, answer: Answer) -> Update:
        running = model.running[id(answer)]
        first, running.sent = running.sent, len(answer.response_ids)
        failure = Failure(500, answer.error) if answer.error else None
        reason = answer.finish_reason if answer.finish_reason != "length" or running.sent >= running.limit else None
        if failure or reason:
            del model.running[id(answer)]
        tokens, logprobs = answer.response_ids[first:], answer.logprobs[first:]
        return Update(running.number, tokens, logprobs, answer.top_logprobs[first:], reason, failure)

    @property
    def _rows(self) -> int:
        """That hold an answer."""
        return sum(model.engine.rows - model.engine.free for model in list(self.models.values()) if model.engine)

    # --- the connection -----------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            while True:
                self.pending.put(self._connection.recv())
        except (EOFError, OSError):
            self.pending.put(None)
            self._ended()

    def _take_orders(self, wait: bool) -> bool:
        """Carries out what has been ordered; False once the server has gone."""
        while wait or not self.pending.empty():
            order = self.pending.get()
            if order is None:
                return False
            name, *arguments = order
            getattr(self, name)(*arguments)
            wait = False
        return True

    def _answer_call(self, call: int, name: str, *arguments: Any) -> None:
        try:
            self._send("result", call, getattr(self, name)(*arguments), None)
        except Exception as error:  # its caller's to answer
            self._send("result", call, None, _portable(error))

    def _send_updates(self, updates: Sequence[Update]) -> None:
        self._rows_told = self._rows
        self._send("updates", updates, self._rows_told)

    def _send(self, *message: Any) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:  # the server has gone, which `_receive` sees too
            pass


def failed(error: Exception) -> Failure:
    """What a client hears of a model that failed. The log gets the traceback."""
    traceback.print_exception(error, file=sys.stderr)
    return Failure(500, f"the model failed ({type(error).__name__}); the server's log says more.", "model_failed")


def _portable(error: Exception) -> Exception:
    """An error as it can be sent: those that are our own fault tell where they were raised."""
    where = "" if isinstance(error, PenstockError) else "".join(traceback.format_exception(error))
    error.__traceback__ = None  # it would keep what a failed load had read
    try:
        sent: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # an exception with arguments of its own kind
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    if where:
        sent.add_note(where)
    return sent


def main(descriptor: int, threads: int | None) -> None:
    """The process. It ends with the server, even in the middle of a step."""
    warnings.formatwarning = one_line_warning
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        Worker(Connection(descriptor), ended=lambda: os._exit(0)).run()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a thread that loads would keep the process
