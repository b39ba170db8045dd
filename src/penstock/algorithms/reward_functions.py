"""Reward functions: what one is given by its signature, what it gives back, and the processes it may run in. No torch.

A function gets lists over the samples: prompts and responses, what else of GIVEN it has parameters for, and any other
field of the records by its name (TRL's convention). It gives a number per sample, or None where it does not apply.
What becomes of the numbers is known elsewhere.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import math
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from penstock.algorithms.verifiers import NEEDS, VERIFIERS
from penstock.errors import UserError

Scores = list[float | None]
GIVEN = (
    "prompts", "responses", "completions", "messages", "prompt_ids", "response_ids", "completion_ids", "finish_reason",
    "step",
)  # fmt: skip
"""What is no field of a record. completions and completion_ids are TRL's names for the responses; where a function has
a parameter `completions`, conversations reach it as TRL's do: a prompt as turns, a completion as a list of one turn."""
SEARCH_SECONDS = 5
"""When a function fails, so long its samples are given to it alone, to name the one."""


@dataclass(frozen=True)
class Sample:
    """One answer, as functions see it."""

    where: str
    """file:line of its record."""
    prompt: str
    response: str
    """Without its EOS."""
    messages: Sequence[Mapping[str, Any]] | None
    """The conversation that it answers, where the record is one."""
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    finish_reason: str
    fields: Mapping[str, Any]
    """All fields of the record."""


class Failure(Exception):
    """A function that gave no usable scores: which sample shows it (None: it is not known), and what happened."""

    def __init__(self, index: int | None, problem: str) -> None:
        super().__init__(index, problem)
        self.index, self.problem = index, problem


@dataclass
class RewardFunction:
    """A function and what it wants. Example: RewardFunction.load("rewards.py:score")."""

    address: str
    """As it was given: file.py:name, or a verifier and perhaps its parameter, regex:yes|no."""
    function: Callable[..., Any]

    @staticmethod
    def load(address: str) -> "RewardFunction":
        """Raises UserError when there is no such file, function, or parameter."""
        word, colon, parameter = address.partition(":")
        if word not in VERIFIERS:
            return RewardFunction(address, load_file(address))
        function = VERIFIERS[word]
        if word in NEEDS and importlib.util.find_spec(NEEDS[word]) is None:
            raise UserError(f"--reward-fn {address}: needs {NEEDS[word]}; pip install 'penstock[verify]' brings it.")
        if not colon:
            return RewardFunction(address, function)
        name = next(name for name in inspect.signature(function).parameters if name not in GIVEN)
        if name == "answer":
            raise UserError(f"--reward-fn {address}: takes no parameter; it reads the records' field answer.")
        bound = partial(function, **{name: parameter})
        try:
            bound(prompts=[""], responses=[""], response_ids=[[]])
        except Exception as error:
            raise UserError(f"--reward-fn {address}: {name} {parameter!r} is refused: {error}.") from error
        return RewardFunction(address, bound)

    @property
    def name(self) -> str:
        """The function's own, for its metrics."""
        word = self.address.partition(":")[0]
        return word if word in VERIFIERS else self.address.rpartition(":")[2]

    @property
    def bound(self) -> Sequence[str]:
        """The parameter that the address gives."""
        return [*self.function.keywords] if isinstance(self.function, partial) else []

    @cached_property
    def parameters(self) -> list[inspect.Parameter]:
        """All others."""
        return [p for p in inspect.signature(self.function).parameters.values() if p.name not in self.bound]

    @cached_property
    def by_name(self) -> bool:
        """Whether it gets the responses by a name; else prompts and responses are its first two arguments."""
        positional = [p for p in self.parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names = {p.name for p in self.parameters}
        takes_two = len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in self.parameters)
        return bool({"responses", "completions"} & names) or not takes_two

    @cached_property
    def named(self) -> dict[str, bool]:
        """The parameters that it gets by name, and whether each is required."""
        named = [p for p in self.parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return {p.name: p.default is p.empty for p in (named if self.by_name else named[2:])}

    @cached_property
    def rest(self) -> str:
        """The name of the parameter that takes all other keywords; empty without one."""
        return next((p.name for p in self.parameters if p.kind is p.VAR_KEYWORD), "")

    @property
    def fields(self) -> dict[str, bool]:
        """The fields of records that it names, and whether it requires each."""
        return {name: need for name, need in self.named.items() if name not in GIVEN}

    def reads(self, name: str) -> bool:
        """Whether it may read this field. What **_ takes is not read."""
        return name in self.fields or self.rest.strip("_") != ""

    def scores(self, samples: Sequence[Sample], step: int, runner: asyncio.Runner) -> Scores:
        """A number or None per sample. Raises Failure when it raises, gives too few, or one that is not finite."""
        try:
            scores = self._call(samples, step, runner)
        except Exception as error:
            raise Failure(self._culprit(samples, step, runner), _described(error)) from error
        if len(scores) != len(samples):
            raise Failure(None, f"gave {len(scores)} scores for {len(samples)} responses")
        for i, score in enumerate(scores):
            if score is not None and not math.isfinite(score):
                raise Failure(i, f"gave {score}; scores must be finite")
        return scores

    def _call(self, samples: Sequence[Sample], step: int, runner: asyncio.Runner) -> Scores:
        columns = columns_of(samples, step, in_turns="completions" in self.named)
        texts = [] if self.by_name else [columns.pop("prompts"), columns.pop("responses")]
        refused = {*self.bound, *[p.name for p in self.parameters if p.name not in self.named]}
        wanted = columns.keys() - refused if self.rest else self.named.keys()
        result = self.function(*texts, **{name: column for name, column in columns.items() if name in wanted})
        if inspect.iscoroutine(result):
            result = runner.run(result)
        if not isinstance(result, Iterable):
            raise TypeError(f"gave a {type(result).__name__} and no list of scores")
        return [None if score is None else float(score) for score in result]

    def _culprit(self, samples: Sequence[Sample], step: int, runner: asyncio.Runner) -> int | None:
        """The first sample that it fails on alone, if a few seconds show it."""
        end = time.monotonic() + SEARCH_SECONDS
        for i, sample in enumerate(samples):
            try:
                self._call([sample], step, runner)
            except Exception:
                return i
            if time.monotonic() > end:
                break
        return None


def load_file(address: str) -> Callable[..., Any]:
    """The function at `file.py:name`. Raises UserError when there is no such file or function."""
    path, _, name = address.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(
            f"--reward-fn {address}: no such file; give file.py:name, a path and a function in it, or one of "
            f"{', '.join(VERIFIERS)}."
        )
    spec = importlib.util.spec_from_file_location(f"penstock_reward_fn_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--reward-fn {path}: is no Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look it up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward-fn {path}: the file cannot be run: {type(error).__name__}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"--reward-fn {path}: has no function {name!r}; it has {', '.join(names) or 'none'}.")
    return function


def columns_of(samples: Sequence[Sample], step: int, *, in_turns: bool) -> dict[str, Any]:
    """The samples as lists by name, and the step; a name of ours wins over a field's. in_turns: prompts of
    conversations are their turns, as they are for TRL's functions."""
    columns: dict[str, Any] = {
        "prompts": [(in_turns and sample.messages) or sample.prompt for sample in samples],
        "responses": [sample.response for sample in samples],
        "completions": [
            [{"role": "assistant", "content": sample.response}] if sample.messages else sample.response
            for sample in samples
        ],
        "completion_ids": [sample.response_ids for sample in samples],
        "step": step,
    }
    for name in ("messages", "prompt_ids", "response_ids", "finish_reason"):
        columns[name] = [getattr(sample, name) for sample in samples]
    for name in dict.fromkeys(name for sample in samples for name in sample.fields):
        columns.setdefault(name, [sample.fields.get(name) for sample in samples])
    return columns


def _described(error: Exception) -> str:
    line = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {error} ({line.filename}:{line.lineno})"


# --- processes ------------------------------------------------------------------------------------------------------


class Workers:
    """Processes that each hold all functions. A batch is dealt out to them, and its scores come back in its order.

    A function in one may hang or die, and its caller learns it. They end with the process that started them.
    """

    def __init__(self, addresses: Sequence[str], count: int, timeout: float | None = None) -> None:
        """timeout: seconds that a function may take for its part of a batch."""
        self.timeout, self.loading = timeout, True
        self.connections: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        paths = os.pathsep.join(filter(None, sys.path))  # functions import what they could import in this process
        for _ in range(count):
            ours, theirs = Pipe()
            code = f"from {__name__} import serve; serve({theirs.fileno()}, {[*addresses]!r})"
            # A session of its own: Ctrl-C lets the run write a checkpoint, and it may need scores before that.
            process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def scores(self, function: int, samples: Sequence[Sample], step: int) -> Scores:
        """The scores of the function of this number. Raises Failure; then the processes have ended."""
        count = len(self.connections)
        scores: Scores = [None] * len(samples)
        try:
            for i in range(count if self.loading else 0):
                self._receive(i)  # imports are not part of the time
            self.loading = False
            waiting: dict[Any, int] = dict(zip(self.connections, range(min(count, len(samples))), strict=False))
            for connection, i in waiting.items():
                with contextlib.suppress(OSError):  # a dead process shows when it is listened to
                    connection.send((function, samples[i::count], step))
            end = math.inf if self.timeout is None else time.monotonic() + self.timeout
            while waiting:
                ready = wait([*waiting], None if end == math.inf else max(end - time.monotonic(), 0.0))
                if not ready:
                    raise Failure(None, f"gave no scores within {self.timeout:g} seconds (--reward-timeout)")
                for connection in ready:
                    i = waiting.pop(connection)
                    scores[i::count] = self._receive(i)
        except BaseException:
            self.close()
            raise
        return scores

    def _receive(self, i: int) -> Any:
        """What process i sends. Raises Failure where that is one, and where the process has died."""
        try:
            reply = self.connections[i].recv()
        except (EOFError, OSError) as error:
            raise Failure(None, f"its process died (exit code {self.processes[i].wait()})") from error
        if isinstance(reply, Failure):
            index = None if reply.index is None else i + reply.index * len(self.connections)
            raise Failure(index, reply.problem)
        return reply

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.close()
            process.kill()
            process.wait()


def serve(descriptor: int, addresses: Sequence[str]) -> None:
    """The process: scores what comes through the connection until that is closed."""
    connection, runner = Connection(descriptor), asyncio.Runner()
    functions = [RewardFunction.load(address) for address in addresses]
    connection.send("loaded")
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            function, samples, step = connection.recv()
            random.seed(f"{step} {samples[0]}")  # what a function draws depends on what it is given alone
            try:
                reply: Any = functions[function].scores(samples, step, runner)
            except Failure as failure:
                reply = failure
            connection.send(reply)
