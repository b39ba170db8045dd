"""A training command while it runs: its run directory, its metrics, its checkpoints, and how it stops.

An algorithm's loop asks `steps()` for step numbers, gives each step's metrics to `log()` and its state to
`checkpoint()`. Only the first rank writes. SIGTERM and Ctrl-C take effect at the next safe point, after a checkpoint
from which `penstock resume` continues: at the end of a step, where it says `pause()`, and between the tokens that it
samples under `may_give_up()`.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from penstock import flags, sources
from penstock.distributed.world import World, lost_ranks
from penstock.errors import PenstockError, ResourceError, UserError
from penstock.hub import pinned
from penstock.memory.strategy import StepStats
from penstock.memory.stream import Stream
from penstock.run import checkpoint
from penstock.run.directory import RunDirectory
from penstock.run.loggers import Loggers, require
from penstock.run.metrics import Lines, peak_rss_bytes
from penstock.run.optimizer_files import read_optimizer, stager, write_optimizer
from penstock.run.progress import Progress

STREAMS = ("metrics", "perf", "samples", "health")
MODEL_FLAG = {"ppo": "actor"}
"""Where the flag that names the model to start from is not --model."""
SKIPS_IN_A_ROW = 3
"""Non-finite updates before a run stops itself (PPO.md 20)."""
QUIET = 3
"""Steps without a warning before it counts as over: what comes and goes is said once."""


class _GivenUpError(Exception):
    """A signal has come while answers were sampled."""


class StoppedError(PenstockError):
    """SIGTERM or Ctrl-C, after the checkpoint was written."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Session:
    """See the module. `state` is the checkpoint's state in a resumed run, else None."""

    def __init__(self, command: str, config: Any, world: World, *, resume: bool = False) -> None:
        # What templates take for today is part of the run: a resume after midnight reads the same ids.
        date = config.data.date or datetime.date.today().isoformat()
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))
        self.command, self.world = command, world
        self.path = Path(config.run.out)
        self.directory: RunDirectory | None = None
        """Open on the first rank inside `with`: nothing is written before the data is read."""
        self.state: dict[str, Any] | None = None
        self.episode = 0
        """Answers sampled so far: the position of the sampler's random streams, kept in every checkpoint."""
        self.finishing: Callable[[Path], None] = lambda directory: None
        """Called with each saved model's directory, to add the tokenizer's files."""
        self._resume = resume
        self._newest: Path | None = None
        self._notes: list[str] = []
        self.total = 0
        """Steps of the whole run."""
        self._signal, self._may_give_up, self._ended_early = 0, False, False
        self._skips: dict[str, int] = {}
        self._warned: list[str] = []
        self._warnings: dict[str, int] = {}
        """The warnings that have begun and not ended, by name, and the last step of each."""
        self._data: dict[str, str] = {}
        self._since = time.perf_counter()
        self._progress: Progress | None = None
        self._handlers: dict[int, Any] = {}
        self._saving: Future | None = None
        """The checkpoint that a thread writes. See [Note: saved beside training] in optimizer_files.py."""
        self._stager: Any = None
        """Has the host memory that it is written from."""
        if config.run.resume_if_present and len(set(world.gather(resume))) > 1:
            raise UserError(f"--out {self.path}: some ranks see a run in it and some do not; it must be one directory.")
        if world.first:  # before a large model is loaded
            require(config.run.log)
            if not resume:
                RunDirectory.refuse_used(self.path)
        self.config = _with_commits(config, world)
        self._flags = flags.with_absolute_paths(flags.to_dict(self.config))

    # --- life -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Session":
        if self.world.first:
            if self._resume:
                self.directory = RunDirectory.open(self.path)
            else:
                kept = self.path.absolute() / sources.KEPT  # a resume has another standard input, or none
                piped = {text: f"{kept}{text[1:]}" for text in self._sources() if sources.weighed(text)[0] == "-"}
                self._flags = flags.with_sources(self._flags, lambda text: piped.get(text, text))
                self.directory = RunDirectory.create(self.path, self._flags, self.command)
                if piped:
                    shutil.copyfile(sources.standard_input(), kept)
            for note in self._notes:
                self.directory.note(note)
        self.world.broadcast(None)  # no rank reads the directory before it is made
        self._data = {text: sources.digest(text) for text in self._sources()}
        checkpoint.seed_everything(self.config.run.seed + self.world.rank)
        if self._resume:
            self._restore()
        if self.world.first:
            offsets = self.state["offsets"] if self.state else {}
            digests = self.state.get("digests", {}) if self.state else {}
            self._lines = {
                name: Lines(self.path / f"{name}.jsonl", offsets.get(name, 0), digests.get(name)) for name in STREAMS
            }
            for text in self._warned if self.state is None else ():
                self._lines["health"].write({"step": 0, "text": text})
            settings = {"command": self.command, **self._flags, "out": str(self.path.absolute())}
            self._loggers = Loggers(self.config.run.log, self.path, settings, partial(self.say, loud=True))
        # Python lets the main thread alone handle signals; a run in another one ends with its process, as by kill -9.
        main = threading.current_thread() is threading.main_thread()
        for signum in (signal.SIGTERM, signal.SIGINT) if main else ():
            self._handlers[signum] = signal.signal(signum, self._note_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = lost_ranks(error)  # FSDP2's collectives name nobody, in a phase or between two
        if self._saving is not None and not isinstance(error, KeyboardInterrupt):
            wait([self._saving])  # after an error too: the heartbeat still watches the ranks that it needs
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        if self._progress is not None:
            self._progress.close()
        if self.directory is not None:
            if isinstance(lost or error, PenstockError):
                self.directory.note(f"stopped: {lost or error}")
            self._loggers.close(error is None)
            for lines in self._lines.values():
                lines.close()
            self.directory.close()
        self.world.leave(error is None)
        if lost is not None:
            raise lost from error

    def _sources(self) -> list[str]:
        return [text for name in flags.SOURCES for text in self._flags.get(name, ())]

    def _note_signal(self, signum: int, frame: object) -> None:
        # The second Ctrl-C stops at once. A second SIGTERM does not: Slurm sends it to all processes of a job, and
        # torchrun, which gets it too, sends it to its ranks again.
        if self._signal and signum == signal.SIGINT:
            raise KeyboardInterrupt
        first, run = not self._signal, self.config.run
        self._signal = signum
        if not first or not self.world.first or run.json or run.quiet:
            return
        again = "; again: at once, without" if signum == signal.SIGINT else ""
        text = f"{signal.Signals(signum).name}: stops with a checkpoint, soon{again}"
        if self._progress is None or not self._progress.announce(text):
            with contextlib.suppress(OSError):  # not print: it may be interrupted in the middle of another line
                os.write(2, f"\n{text}\n".encode())

    def _restore(self) -> None:
        """Reads the newest checkpoint that verifies; a run killed before its first one starts over."""
        newest = checkpoint.newest(self.path / "checkpoints", partial(self.say, loud=True))
        if newest is None:
            self.say("no checkpoint yet: starting at step 0")
            return
        self._newest = newest
        self.state = checkpoint.read_state(newest / "state")
        ranks = self.state["rng"]
        if len(ranks) != self.world.size:
            self.say(
                f"the checkpoint was written by {len(ranks)} ranks and this run has {self.world.size}: data and "
                "samples stay the same, random numbers that a --reward-fn draws do not"
            )
        checkpoint.set_rng_state(ranks[self.world.rank % len(ranks)])
        self.episode, self._skips = self.state["episode"], self.state["skips"]
        self._warnings = self.state.get("warnings", {})
        for path, digest in self.state["data"].items():
            if self._data.get(path, digest) != digest:
                flag = MODEL_FLAG.get(self.command, "model")
                raise UserError(
                    f"{path}: has changed since {newest.name} was written, and a resumed run must see the same rows. "
                    f"Put it back, or start a new run from this one's model: --{flag} {self.path}"
                )
        self.say(f"resumed from {newest.name}")

    # --- the loop ---------------------------------------------------------------------------------------------------

    def steps(self, start: int, total: int) -> Iterator[int]:
        """Step numbers start + 1 .. total, with a progress line. Raises UserError when the run has made more."""
        self.total = total
        if self._resume:
            self._extend(start, total)
        if self.directory is not None:
            run = self.config.run
            note = self.directory.note
            self._progress = Progress(start, total, self.command, note, json=run.json, quiet=run.quiet)
        self._since = time.perf_counter()
        for step in range(start + 1, total + 1):
            if step <= self.total:
                yield step

    def _extend(self, start: int, total: int) -> None:
        """A resumed run may be longer than it was: config.toml then says so."""
        if start > total:
            raise UserError(f"{self.path}: has made {start} steps, more than {total}; give more --steps or --epochs.")
        if start == total:
            self.say(f"all {total} steps are made; to go on: penstock resume {self.path} --steps N, more than {total}")
        saved = RunDirectory.peek(self.path)
        length: dict[str, Any] = {name: self._flags[name] for name in ("steps", "epochs") if name in self._flags}
        if self.directory and any(saved.get(name) != length.get(name) for name in ("steps", "epochs")):
            self.directory.amend({"steps": None, **length})
            self.say(f"the run is {total} steps long now; the learning rate follows that length")

    def end_early(self, step: int, reason: str) -> None:
        """The step, which is running, is the last."""
        self.total, self._ended_early = step, True
        self.say(f"step {step}: the run ends here: {reason}")

    def log(self, step: int, metrics: Mapping[str, float], *, tokens: int, perf: Mapping[str, float]) -> None:
        """One step's numbers: those that data and seed determine to metrics.jsonl, times and memory to perf.jsonl."""
        if not self.world.first:
            return
        now = time.perf_counter()
        seconds = now - self._since
        taken = {"perf/tokens_per_second": tokens / seconds, "timing/step_seconds": seconds, **perf}
        taken["perf/host_peak_bytes"] = float(peak_rss_bytes())
        if self.world.device.type == "cuda":
            taken["perf/device_peak_bytes"] = float(torch.cuda.max_memory_allocated(self.world.device))
        assert self._progress is not None
        taken["timing/left_seconds"] = self._progress.seconds_per_step(step) * (self.total - step)
        self._since = now
        self._lines["metrics"].write({"step": step, **metrics})
        self._lines["perf"].write({"step": step, **taken})
        self._loggers.log(step, {**metrics, **taken})
        self._progress.update(step, {**metrics, **taken})

    def sample(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sampled answers for the report, one object each: prompt, response, and a score where there is one."""
        if self.world.first:
            for row in rows:
                self._lines["samples"].write({"step": step, **row})
            self._loggers.sample(step, rows)

    def check(self, stats: StepStats, name: str = "model") -> None:
        """Counts a model's updates that were not finite; three in a row end the run, never saved (PPO.md 20)."""
        self._skips[name] = 0 if stats.applied else self._skips.get(name, 0) + 1
        if not stats.applied:
            numbers = f"loss {stats.sums['loss']}, gradient norm {stats.grad_norm}"
            self.say(f"{name}: an update was skipped: {numbers}", loud=True)
        if self._skips[name] == SKIPS_IN_A_ROW:
            raise ResourceError(
                f"{self.path}: {SKIPS_IN_A_ROW} updates in a row were not finite, so the run stopped; its last "
                "checkpoint is from before them. Try a lower --lr, or --dtype fp32."
            )

    def warn(self, text: str) -> None:
        """A warning that has no end: said, and in the report's band."""
        self.say(f"WARNING: {text}", loud=True)
        self._warned.append(text)
        if self.directory is not None:
            self._lines["health"].write({"step": 0, "text": text})

    def health(self, step: int, warnings: Sequence[str]) -> None:
        """Says which warnings ("name: text") begin and which have ended; the report shows them with their steps."""
        for text in warnings:
            name = text.partition(":")[0]
            if name not in self._warnings:
                self._report_health(step, f"WARNING: {text}", {"text": text})
            self._warnings[name] = step
        for name, last in [*self._warnings.items()]:
            if step - last >= QUIET:
                del self._warnings[name]
                self._report_health(step, f"no longer: {name} (since step {last + 1})", {"ended": name, "last": last})

    def _report_health(self, step: int, line: str, row: Mapping[str, Any]) -> None:
        if self.world.first:
            self.say(f"step {step}: {line}", loud=True)
            self._lines["health"].write({"step": step, **row})

    def say(self, text: str, loud: bool = False) -> None:
        """A line for the user, on stderr at once, unless --quiet asks for `loud` ones alone, and in log.txt, as soon as
        the run directory is open."""
        if not self.world.first:
            return
        if loud or not self.config.run.quiet:
            print(text, file=sys.stderr, flush=True)
        if self.directory is None:
            self._notes.append(text)
        else:
            self.directory.note(text)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def restore(self, models: Mapping[str, Stream]) -> None:
        """Loads weights and optimizer states of the checkpoint that this run resumes from."""
        if self._newest is None or self.state is None:
            return
        for name, stream in models.items():
            read_optimizer(self._newest / f"{name}.optimizer", self.state["updates"][name], stream)

    def checkpoint(
        self, step: int, models: Mapping[str, Stream], state: Callable[[], dict[str, Any]], *, best: bool = False
    ) -> None:
        """At the end of a step: saves when it is due, the last, or when a signal has arrived; else of the best the
        weights alone."""
        stopping = self._stopping()
        if self._saving is not None and self._saving.done():
            self._end_saving()  # its error is the run's, at once
        ends = bool(stopping) or step == self.total
        if ends or step % self.config.run.checkpoint_every == 0:
            self._save(step, models, state(), best, ends)
        elif best:
            self._save(step, models, None, best)
        if stopping and step < self.total:
            self._stop(stopping)

    def pause(self, step: int, models: Mapping[str, Stream], state: Callable[[], dict[str, Any]]) -> None:
        """A safe point inside a step, of which `step` are complete: saves and stops if a signal has arrived."""
        if stopping := self._stopping():
            self._save(step, models, state(), best=False)
            self._stop(stopping)

    @contextlib.contextmanager
    def may_give_up(
        self, step: int, models: Mapping[str, Stream], state: Callable[[], dict[str, Any]]
    ) -> Iterator[None]:
        """A part of a step that only samples answers and reads them: a signal ends it between two tokens
        (`give_up`), and the checkpoint is of the moment before it. Several ranks would stop at different tokens: they
        go on to their next safe point."""
        before, episode = state(), self.episode
        self._may_give_up = self.world.size == 1
        try:
            yield
        except _GivenUpError:
            self.episode = episode
            self._save(step, models, before, best=False)
            self._stop(self._signal)
        finally:
            self._may_give_up = False

    def give_up(self) -> None:
        """Between two tokens."""
        if self._signal and self._may_give_up:
            raise _GivenUpError

    def finish(self) -> Path:
        """Writes the report and returns the run directory."""
        if self.world.first:
            assert self.directory is not None
            if self._ended_early:  # now, not before its last checkpoint: until then a resume needs the old schedule
                self.directory.amend({"steps": self.total})
            from penstock.run.report import run_report

            self.say(f"wrote {run_report(self.path, self.command)}")
        return self.path

    def _stopping(self) -> int:
        """The signal that any rank has received, or 0: all ranks stop at the same point."""
        return max(self.world.gather(self._signal))

    def _stop(self, signum: int) -> None:
        name = signal.Signals(signum).name
        raise StoppedError(f"{name}: stopped after a checkpoint; go on with: penstock resume {self.path}", signum)

    def _save(
        self, step: int, models: Mapping[str, Stream], state: dict[str, Any] | None, best: bool, waits: bool = True
    ) -> None:
        """A checkpoint; without a state, the weights alone. Not `waits`: training goes on while a thread writes what it
        can of it."""
        self._end_saving()
        rng = self.world.gather(checkpoint.rng_state())
        if self.world.first:
            synced = {name: lines.sync() for name, lines in self._lines.items()}
            offsets, digests = ({name: pair[i] for name, pair in synced.items()} for i in range(2))
            updates = {name: stream.sink.steps for name, stream in models.items() if stream.sink}
            own: dict[str, Any] = {"updates": updates, "rng": rng, "data": self._data, "offsets": offsets}
            own |= {"digests": digests, "episode": self.episode, "skips": self._skips, "warnings": self._warnings}
            state = None if state is None else state | own
        later = not waits and all(stream.sink is None or stream.sink.staged for stream in models.values())
        if later and self._stager is None:
            self._stager = stager(self.world.device)
        write = partial(self._write, models, state, self._stager if later else None)
        end: Callable[[], Any]
        if self.world.first:
            digest = hashlib.sha256(json.dumps(self._flags, sort_keys=True).encode()).hexdigest()
            meta = {"command": self.command, "config_sha256": digest, "world_size": self.world.size}
            kept = {"keep": self.config.run.keep, "best": best, "whole": state is not None}
            end = checkpoint.begin(self.path / "checkpoints", step, write, meta, **kept)
        else:
            end = write(None)
        if later:
            self._saving = in_thread(end)
        else:
            end()
        self.world.broadcast(None)  # no rank goes on before the checkpoint is whole, or copied

    def _write(
        self, models: Mapping[str, Stream], state: dict[str, Any] | None, staging: Any, directory: Path | None
    ) -> Callable[[], None]:
        """Fills the directory and returns what fills the rest. All ranks call it, to gather what they share; directory:
        None on those but the first."""
        rest = []
        for name, stream in models.items():
            stream.model.save_pretrained(directory and directory / name)
            if directory is not None:
                self.finishing(directory / name)
            if state is not None:
                rest.append(write_optimizer(directory and directory / f"{name}.optimizer", stream, staging))
        if directory is not None and state is not None:
            checkpoint.write_state(directory / "state", state)

        def end() -> None:
            for write in rest:
                write()

        return end

    def _end_saving(self) -> None:
        """Waits for the checkpoint that a thread writes. Raises what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()


def in_thread(work: Callable[[], Any]) -> Future:
    """work() in a thread that does not keep a failing process alive."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _with_commits(config: Any, world: World) -> Any:
    """The config with the commit of each dataset on the hub: a resumed run reads the rows that it began with."""
    flat = flags.to_dict(config)
    texts = [text for name in flags.SOURCES for text in flat.get(name, ())]
    if world.size > 1 and sources.STDIN in (sources.weighed(text)[0] for text in texts):
        raise UserError(f"--data -: {world.size} ranks cannot share one standard input; write it to a file first.")
    pins = world.broadcast({text: pinned(text) for text in texts} if world.first else None)
    if all(text == pin for text, pin in pins.items()):
        return config
    return flags.from_dict(type(config), flags.with_sources(flat, pins.__getitem__))
