"""One training command at work: its run directory, its numbers, its checkpoints, and how it stops.

An algorithm's loop asks `steps()` for step numbers, gives each step's metrics to `log()` and its state to
`checkpoint()`. Only the first rank writes. SIGTERM and Ctrl-C are noted and take effect at the next safe point,
after a checkpoint, so that `penstock resume` goes on from there.
"""

import dataclasses
import hashlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from penstock import config as flags
from penstock.errors import PenstockError, ResourceError, UserError
from penstock.memory.shard import World
from penstock.memory.strategy import StepStats
from penstock.run import checkpoint
from penstock.run.directory import RunDirectory
from penstock.run.metrics import Metrics, peak_rss_bytes
from penstock.run.progress import Progress

STREAMS = ("metrics.jsonl", "perf.jsonl", "samples.jsonl")
SKIPS_IN_A_ROW = 3
"""Non-finite updates before a run stops itself (PPO.md 20)."""


class Saved(Protocol):
    """A model that can write itself as a Hugging Face directory."""

    def save_pretrained(self, directory: Path) -> None:
        """Writes config and weights."""


class Interrupted(PenstockError):
    """SIGTERM or Ctrl-C, after the checkpoint was written."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Session:
    """See the module. `state` is what the checkpoint held when this is a resumed run, else None."""

    def __init__(self, command: str, config: Any, world: World, *, resume: bool = False) -> None:
        self.command, self.config, self.world = command, config, world
        self.state: dict[str, Any] | None = None
        self.path = Path(config.run.out)
        self.tokenizer_source: str | None = None
        """Directory whose tokenizer files go beside saved models."""
        self._resume = resume
        self._signal = 0
        self._skips = 0
        self._sampler: dict[str, int] = {}
        self._since = time.perf_counter()
        self._progress: Progress | None = None
        self._handlers: dict[int, Any] = {}

    # --- life -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Session":
        if self.world.first:
            if self._resume:
                self.directory = RunDirectory.open(self.path)
            else:
                self.directory = RunDirectory.create(self.path, flags.to_dict(self.config), self.command)
        self.world.broadcast(None)  # nobody reads the directory before it is made
        if self._resume:
            self._restore()
        if self.world.first:
            offsets = self.state["offsets"] if self.state else {}
            self.metrics, self.perf, self.samples = (
                Metrics(self.path / name, offset=offsets.get(name, 0)) for name in STREAMS
            )
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._handlers[signum] = signal.signal(signum, self._note_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        if self._progress:
            self._progress.close()
        if self.world.first:
            self.directory.close()
        if kind is None:
            self.world.leave()

    def _note_signal(self, signum: int, frame: object) -> None:
        if self._signal:  # the second Ctrl-C means now
            raise KeyboardInterrupt
        self._signal = signum

    def _restore(self) -> None:
        """Reads the newest checkpoint that verifies; a run killed before its first one starts over."""
        newest = checkpoint.newest(self.path / "checkpoints", warn=self.say)
        if newest is None:
            self.say("no checkpoint yet: starting at step 0")
            return
        self.state = checkpoint.read_state(newest / "state")
        ranks = self.state["rng"]
        if len(ranks) != self.world.size:
            self.say(f"the checkpoint was written by {len(ranks)} ranks and this run has {self.world.size}: same data "
                     "and samples, but random numbers drawn by a --reward-fn will differ")  # fmt: skip
        checkpoint.set_rng_state(ranks[self.world.rank % len(ranks)])
        self._sampler = self.state["sampler"]
        self.say(f"resumed from {newest.name}")

    # --- the loop ---------------------------------------------------------------------------------------------------

    def steps(self, start: int, total: int) -> Iterator[int]:
        """Step numbers start + 1 .. total, with a progress line."""
        if self.world.first:
            self._progress = Progress(total, self.command, json=self.config.run.json, log=self.path / "log.txt")
        self._since = time.perf_counter()
        yield from range(start + 1, total + 1)

    def log(self, step: int, metrics: Mapping[str, float], *, tokens: int, timing: Mapping[str, float]) -> None:
        """One step's numbers: what follows from data and seed to metrics.jsonl, times and memory to perf.jsonl."""
        now = time.perf_counter()
        perf = {"perf/tokens_per_second": tokens / (now - self._since), "timing/step_seconds": now - self._since}
        perf |= {"perf/host_peak_bytes": float(peak_rss_bytes()), **timing}
        if self.world.device.type == "cuda":
            perf["perf/device_peak_bytes"] = float(torch.cuda.max_memory_allocated(self.world.device))
        self._since = now
        if self.world.first:
            self.metrics.log(step, metrics)
            self.perf.log(step, perf)
            assert self._progress is not None
            self._progress.update(step, {**metrics, **perf})

    def sample(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sampled answers for the report, one object each: step, prompt, response."""
        if self.world.first:
            for row in rows:
                self.samples.write(row)

    def check(self, stats: StepStats) -> None:
        """Counts updates that were not finite; three in a row end the run, and nothing of them is saved."""
        self._skips = 0 if stats.applied else self._skips + 1
        if not stats.applied:
            self.say(f"an update was skipped: loss {stats.sums['loss']}, gradient norm {stats.grad_norm}")
        if self._skips == SKIPS_IN_A_ROW:
            raise ResourceError(
                f"{self.path}: {SKIPS_IN_A_ROW} updates in a row were not finite, so the run stopped; its last checkpoint "
                "is from before. Try a lower --lr, or --dtype fp32."
            )

    def say(self, text: str) -> None:
        """A line for the user, on the console and in log.txt."""
        if self.world.first:
            self.directory.say(text)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint(
        self, step: int, models: Mapping[str, Saved], state: Callable[[], dict[str, Any]], *, best: bool = False
    ) -> None:
        """Saves at the end of a step when one is due, when it is the best yet, at the last step, or when told to stop."""
        stopping = self._stopping()
        assert_total = self._total
        if best or stopping or step == assert_total or step % self.config.run.checkpoint_every == 0:
            self._save(step, models, state(), best)
        if stopping and step < assert_total:
            self._stop(stopping)

    def pause(self, step: int, models: Mapping[str, Saved], state: Callable[[], dict[str, Any]]) -> None:
        """A safe point inside a step: saves and stops if a signal has arrived, else returns at once."""
        stopping = self._stopping()
        if stopping:
            self._save(step, models, state(), False)
            self._stop(stopping)

    def finish(self) -> Path:
        """Writes the report and returns the run directory."""
        if self.world.first:
            from penstock.run.report import run_report

            run_report(self.path, self.command)
        return self.path

    def sampler_state(self) -> int:
        """Episodes sampled so far: the position of the sampler's random streams."""
        return self._sampler.get("episode", 0)

    def keep_sampler_state(self, episode: int) -> None:
        """Notes the position of the sampler's random streams for the next checkpoint."""
        self._sampler = {"episode": episode}

    def _stopping(self) -> int:
        """The signal that any rank received, or 0: ranks stop at the same step."""
        return max(self.world.gather(self._signal))

    def _stop(self, signum: int) -> None:
        raise Interrupted(
            f"stopped by {signal.Signals(signum).name} after a checkpoint; go on with: penstock resume {self.path}", signum
        )

    def _save(self, step: int, models: Mapping[str, Saved], state: dict[str, Any], best: bool) -> None:
        ranks = self.world.gather(checkpoint.rng_state())
        if self.world.first:
            offsets = {name: stream.sync() for name, stream in zip(STREAMS, self._streams, strict=True)}
            state |= {"rng": ranks, "sampler": self._sampler, "offsets": offsets}

            def write(directory: Path) -> None:
                for name, model in models.items():
                    model.save_pretrained(directory / name)
                    if self.tokenizer is not None:
                        self.tokenizer.save_pretrained(directory / name)
                checkpoint.write_state(directory / "state", state)

            self.directory.save(step, write, world_size=self.world.size, best=best, keep=self.config.run.keep)
        self.world.broadcast(None)
