"""Runs of tiny models as processes of their own, and what may be said of how one ended.

This process imports everything once and forks for each command: starting Python takes longer than training. The fork is
the process that trains, so that kill -9, SIGSTOP and limits strike it and nothing else.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import importlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from penstock.flags import to_dict
from tests.conftest import cli, rank_environments, stage_config
from tests.zygote import IMPORTED

STAGES = ("sft", "reward", "dpo", "kto", "distill", "ppo", "grpo")
PATIENCE = 600.0
"""Seconds after which a process that should have ended hangs."""
RESOURCES, DATA, USER = 3, 4, 2
UNHARMED = ("survived", "resumed", "refused")
"""Verdicts on a trial that kept every promise: it ended as an undisturbed run; it was resumed to the same bytes; it was
refused in one paragraph and, where it had begun, went on to the same bytes once the cause was gone. All others are
faults: lost, silent, traceback, hung, memory."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended. A negative code is a signal's."""

    code: int
    text: str
    """Standard output and error."""
    resident_bytes: int = 0
    """The most it had."""

    @property
    def line(self) -> str:
        """What it said last."""
        return (self.text.strip().splitlines() or [""])[-1]

    @property
    def fault(self) -> str | None:
        """ "hung", "traceback" or "killed", or None: it ended well, or in one paragraph and with its exit code."""
        if self.code == HUNG:
            return "hung"
        if self.code < 0:
            return "killed"
        last = LAST_LINES.get(self.code)
        clean = self.code == 0 or (last is not None and re.match(last, self.line))
        return (
            None if clean and "Traceback (most" not in self.text and "internal error" not in self.text else "traceback"
        )


HUNG = -1000
PARAGRAPH = r"penstock\b.*: "
RECORDS = r"/\S+:\d+: \S|\.\.\. and \d+ more|Mend \d+ bad|No good line is left"
LAST_LINES = {USER: PARAGRAPH, RESOURCES: PARAGRAPH, DATA: f"{PARAGRAPH}|{RECORDS}"}
"""What the last line of a refusal begins with, by exit code; of bad records each has a line, FILE:LINE: FIELD ...."""


class Process:
    """`penstock` with these arguments, in a fork."""

    def __init__(
        self, arguments: Sequence[Any], log: Path, environment: Mapping[str, Any] | None = None,
        prepare: Callable[[], Any] = lambda: None,
    ) -> None:  # fmt: skip
        self.log = log
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become([*map(str, arguments)], log, environment or {}, prepare)
        self._status: tuple[int, int] | None = None

    def poll(self) -> int | None:
        """Its wait status, or None while it runs."""
        if self._status is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self._status = status, usage.ru_maxrss * 1024
        return self._status and self._status[0]

    def signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """How it ended; a process that has not in so many seconds is killed."""
        end, hung, pause = time.monotonic() + seconds, False, 0.001
        while self.poll() is None:
            if not hung and time.monotonic() > end:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        assert self._status is not None
        status, resident = self._status
        code = HUNG if hung else os.waitstatus_to_exitcode(status)
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return Ended(code, text, resident)


def worst(processes: Sequence[Process], seconds: float = PATIENCE) -> Ended:
    """How the first that did not end well ended, or else the first."""
    ended = [process.wait(seconds) for process in processes]
    return next((each for each in ended if each.code), ended[0])


def _become(arguments: list[str], log: Path, environment: Mapping[str, Any], prepare: Callable[[], Any]) -> None:
    """Runs the command in this fork and ends it."""
    code: Any = 5
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ.update({name: str(value) for name, value in environment.items()})
        prepare()
        code = cli(*arguments)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        print(f"Traceback (most recent call last) of {error!r}", file=sys.stderr)
    finally:
        os._exit(code if isinstance(code, int) else 0)


def limit_memory(more: int) -> None:
    """This process may take so many bytes of address space more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def import_all() -> None:
    """Once, before the first fork, which needs a process without threads."""
    for name in IMPORTED:
        importlib.import_module(name)
    assert threading.active_count() == 1


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run of one algorithm under one strategy that is made again and again, each time disturbed."""

    work: Path
    """All that the run reads and writes lies below; its logs do not."""
    begin: list[Any]
    """The command line that makes `run`."""
    expected: dict[str, str]
    """The outcome of a run that nothing happens to."""
    seconds: float
    """That one took."""
    ranks: int = 1

    @property
    def run(self) -> Path:
        return self.work / "run"

    def start(self, environment: Mapping[str, Any] | None = None, **more: Any) -> list[Process]:
        """The run from its beginning, a process for each rank."""
        shutil.rmtree(self.run, ignore_errors=True)
        return self.launch(self.begin, environment, **more)

    def launch(
        self, arguments: Sequence[Any], environment: Mapping[str, Any] | None = None, **more: Any
    ) -> list[Process]:
        """A command of this run, a process for each rank."""
        ranks = rank_environments(self.ranks) if self.ranks > 1 else [{}]
        logs = [self.work.with_name(f"log-{rank}-{time.monotonic_ns()}") for rank in range(self.ranks)]
        given = environment or {}
        return [Process(arguments, log, {**own, **given}, **more) for log, own in zip(logs, ranks, strict=True)]

    def go_on(self) -> str | None:
        """Resumes the run, or begins it again where it had not begun. None when it ends as the undisturbed one, else
        what is wrong."""
        begun = (self.run / "config.toml").exists()
        ended = worst(self.launch(["resume", self.run] if begun else self.begin))
        if ended.code:
            return f"{ended.code}: {ended.text[-1500:]}"
        return self.difference()

    def difference(self, damaged: str = "") -> str | None:
        """None when the run has ended as the undisturbed one, but for a file that was damaged from outside."""
        if not (self.run / "checkpoints" / "latest").exists():
            return "no checkpoint"
        wrong = sorted({name for name, _ in {*outcome(self.run).items()} ^ {*self.expected.items()}} - {damaged})
        return f"other bytes in {', '.join(wrong)}" if wrong else None

    def judged(self, ended: Ended, codes: Sequence[int] = (RESOURCES,)) -> dict[str, Any]:
        """Verdict and text on the disturbed run, which is resumed where it stopped. `codes`: those of a refusal."""
        if ended.code == 0 and ended.fault is None:
            wrong = self.difference()
            return {"verdict": "silent", "text": f"{wrong}: {ended.text[-1500:]}"} if wrong else {"verdict": "survived"}
        problem = self.go_on()
        if problem is not None:
            return {"verdict": "lost", "text": f"{ended.line[:1000]} THEN {problem}"}
        if ended.fault == "killed":
            return {"verdict": "resumed"}
        if ended.fault is None and ended.code not in codes:
            return {"verdict": "exit code", "text": f"{ended.code}: {ended.line}"}
        return {"verdict": ended.fault or "refused", "text": ended.text[-1500:] if ended.fault else ended.line}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory. Not tempfile's own, which a fork would remove as it ends."""
    home = Path(tempfile.mkdtemp(prefix="reliability-"))
    try:
        yield home
    finally:
        shutil.rmtree(home)


@contextlib.contextmanager
def subject(
    stage: str, strategy: str = "ddp", steps: int = 4, checkpoint_every: int = 2, keep: int = 1, ranks: int = 1
) -> Iterator[Subject]:
    """A subject in a directory that goes when it does."""
    with scratch() as home:
        work = home / "work"
        work.mkdir()
        config = stage_config(work, stage, "run", steps=steps, checkpoint_every=checkpoint_every)
        disk = str(work / "disk") if strategy.startswith("gemini_nvme") else None
        run = dataclasses.replace(config.run, strategy=strategy, disk=disk, keep=keep)
        path = work.with_name("flags.toml")
        path.write_text(tomli_w.dumps(to_dict(dataclasses.replace(config, run=run))))
        new = Subject(work, [stage, "--config", path], {}, 0.0, ranks)
        started = time.monotonic()
        ended = worst(new.start())
        if ended.code:
            raise RuntimeError(
                f"{stage} {strategy}: the undisturbed run failed with {ended.code}: {ended.text[-2000:]}"
            )
        yield dataclasses.replace(new, expected=outcome(new.run), seconds=time.monotonic() - started)


def outcome(run: str | Path) -> dict[str, str]:
    """What must be equal: sha256 of metrics, samples, and every weight file of the last checkpoint."""
    run = Path(run)
    files = [run / "metrics.jsonl", run / "samples.jsonl", *sorted(last_checkpoint(run).rglob("*.safetensors"))]
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.exists() and file.name != "state.safetensors"  # random state of threads that no sample depends on
    }


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint's directory."""
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
