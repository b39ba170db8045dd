"""Loggers: a run's numbers and samples in TensorBoard, W&B, MLflow and trackio, under the names of metrics.jsonl.

The files of the run are the record and a logger follows it. A resumed run goes on in the logger's same run, whose name
is kept in loggers.json. Keys, servers and offline modes are the libraries' own environment variables.
"""

import collections
import contextlib
import importlib.util
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from penstock.errors import UserError
from penstock.run.checkpoint import rng_state, set_rng_state, write_whole
from penstock.run.metrics import read_record

PROJECT = "penstock"
"""The project, or experiment, where the library's own variable names none."""
Row = Mapping[str, Any]
Table = tuple[list[str], list[list[Any]]]
"""Columns, and the cells of each row."""


class Logger(NamedTuple):
    """A library's run that is open for this one."""

    names: dict[str, str]
    """What a resume opens it by."""
    steps: Container[int]
    """Steps that it has. See [Note: steps that a logger has]."""
    log: Callable[[dict[str, float], int], Any]
    """Numbers of a step."""
    sample: Callable[[str, Table, int], Any]
    """Samples of a step, and of which kind they are: samples/greedy, samples/rollout."""
    close: Callable[[bool], Any]
    """Ends the run there: well or not."""


# [Note: steps that a logger has]
# A kill leaves a logger ahead of the checkpoint (steps that will be made again) or behind it (rows in its buffer, or
# lost in an outage). So a resume asks which steps are there, sends what is missing of the run's record, and never sends
# a step twice. Only TensorBoard can take steps back; elsewhere the first copy of a repeated step stays, which on a CPU
# has the same metrics to the last digit. Samples follow the numbers of their step, so a step with samples has them.


class Loggers:
    """The loggers of a run. A failure is said once for each, and counted at the end; the run goes on."""

    def __init__(self, names: Sequence[str], path: Path, config: Row, say: Callable[[str], None]) -> None:
        self._say, self._failures, self._last = say, collections.Counter[str](), 0
        self._open: dict[str, Logger] = {}
        self._waiting: list[tuple[int, Sequence[Row]]] = []
        """Samples of steps whose numbers are not there yet."""
        if not names:
            return
        file, record = path / "loggers.json", _record(path)
        known: dict[str, dict[str, str]] = self._attempt(file.name, _names_in, file) or {}
        for name in dict.fromkeys(names):
            logger = self._attempt(name, OPEN[name], path, config, known.get(name, {}), max(record, default=0))
            if logger is not None:
                self._open[name], known[name] = logger, logger.names
        self._attempt(file.name, write_whole, file, json.dumps(known, indent=1))
        self._waiting = [(row["step"], [row]) for row in read_record(path / "samples.jsonl")]
        for step, row in record.items():
            self.log(step, row)

    def log(self, step: int, row: Row) -> None:
        """The numbers of a step; what is null in metrics.jsonl is NaN."""
        self._send_samples(step - 1)
        finite = {name: float(value) for name, value in row.items() if value is not None and math.isfinite(value)}
        numbers = {name: finite.get(name, math.nan) for name in row if name != "step"}
        for name, logger in self._open.items():
            if step not in logger.steps:
                self._attempt(name, logger.log, numbers, step)
        self._last = step
        self._send_samples(step)

    def sample(self, step: int, rows: Sequence[Row]) -> None:
        self._waiting.append((step, rows))
        self._send_samples(self._last)

    def close(self, ended_well: bool) -> None:
        for name, logger in self._open.items():
            self._attempt(name, logger.close, ended_well)
        for name, count in self._failures.items():
            outcome = "has nothing of this run" if name in OPEN and name not in self._open else f"failed {count} times"
            self._say(f"WARNING: {_shown(name)}: {outcome}")

    def _send_samples(self, last: int) -> None:
        """Those of steps up to `last`, a table for each step and kind."""
        ready: dict[tuple[int, str], list[Row]] = {}
        for step, rows in self._waiting:
            for row in rows if step <= last else ():
                ready.setdefault((step, f"samples/{row.get('kind', 'answers')}"), []).append(row)
        self._waiting = [(step, rows) for step, rows in self._waiting if step > last]
        for (step, kind), rows in ready.items():
            columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "kind")))
            cells = [[row.get(column) for column in columns] for row in rows]
            for name, logger in self._open.items():
                if step not in logger.steps:
                    self._attempt(name, logger.sample, kind, (columns, cells), step)

    def _attempt(self, name: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """What the action returns, or None where a network, a disk or a key refuses."""
        generators = rng_state()  # trackio draws a name from Python's, and a --reward-fn may draw from any
        try:
            return action(*arguments)
        except Exception as error:
            self._failures[name] += 1
            if self._failures[name] == 1:
                reason = (str(error).strip().splitlines() or [""])[0]
                self._say(f"WARNING: {_shown(name)}: {type(error).__name__}: {reason}; the run goes on")
        finally:
            set_rng_state(generators)


def require(names: Sequence[str]) -> None:
    """Raises UserError for a logger whose library is not installed."""
    for name in names:
        library = importlib.util.find_spec(name)
        if library is None or library.origin is None:  # a directory ./wandb of earlier runs is no library
            raise UserError(f"--log {name}: {name} is not installed: pip install 'penstock[{name}]', or leave it out.")


def _names_in(file: Path) -> dict[str, dict[str, str]]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _shown(name: str) -> str:
    """What messages call a logger, or the file of their names."""
    return f"--log {name}" if name in OPEN else name


def _record(path: Path) -> dict[int, dict[str, Any]]:
    """The numbers of each step that the run's files hold."""
    rows: dict[int, dict[str, Any]] = {}
    for row in [*read_record(path / "metrics.jsonl"), *read_record(path / "perf.jsonl")]:
        rows.setdefault(row["step"], {}).update(row)
    return dict(sorted(rows.items()))


# --- the libraries --------------------------------------------------------------------------------------------------
# Each opens the run that `names` name, or a new one where they are empty; `last` is the last step of the record.


def _tensorboard(path: Path, config: Row, names: Row, last: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    # Readers drop what earlier files have from purge_step on: steps after the checkpoint, which are made again. A first
    # purge_step is needed too: TensorBoard takes the first that it reads for the beginning, and drops nothing.
    writer = SummaryWriter(str(path / "tensorboard"), purge_step=last + 1 if names else 0)
    if not names:
        writer.add_text("config", _verbatim(json.dumps(config, indent=1)), 0)

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a checkpoint may follow, and then a kill

    def sample(kind: str, table: Table, step: int) -> None:
        cells = [pair for row in table[1] for pair in zip(table[0], row, strict=True)]
        writer.add_text(kind, "\n\n".join(f"{name}\n\n{_verbatim(str(cell))}" for name, cell in cells), step)
        writer.flush()

    has = range(last + 1 if names else 0)
    return Logger({"directory": "tensorboard"}, has, log, sample, lambda ended_well: writer.close())


def _verbatim(text: str) -> str:
    """A block of code in Markdown: nothing in it is markup."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _wandb(path: Path, config: Row, names: Row, last: int) -> Logger:
    import wandb

    settings = wandb.setup().settings
    # Offline a resume begins another file of the same run at step 0, which gets the whole record: `wandb sync` of the
    # newest replaces what the server has.
    run = wandb.init(
        **{"project": settings.project or PROJECT, **names}, name=path.name, dir=str(path), config=dict(config),
        allow_val_change=True, reinit="create_new", resume="allow" if names and settings.mode != "offline" else None,
    )  # fmt: skip
    return Logger(
        {name: getattr(run, name) for name in ("id", "project", "entity") if getattr(run, name)},
        range(run.starting_step), run.log,
        lambda kind, table, step: run.log({kind: wandb.Table(*table, allow_mixed_types=True)}, step),
        lambda ended_well: run.finish(0 if ended_well else 1),
    )  # fmt: skip


def _mlflow(path: Path, config: Row, names: Row, last: int) -> Logger:
    import mlflow
    from mlflow.entities import Metric, Param

    # The default store is in the directory where the run began, and a resume may stand elsewhere.
    own_store = {"tracking_uri": names.get("tracking_uri", mlflow.get_tracking_uri())}
    own_store = {} if mlflow.is_tracking_uri_set() else own_store
    client = mlflow.MlflowClient(**own_store)
    if run_id := names.get("run_id"):
        client.update_run(run_id, "RUNNING")
    else:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment else client.create_experiment(title)
        run_id = client.create_run(number, run_name=path.name).info.run_id
        params = [Param(name, str(value)) for name, value in config.items()]
        for i in range(0, len(params), 100):  # the most that it takes at once
            client.log_batch(run_id, params=params[i : i + 100])

    def log(numbers: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, [Metric(name, value, now, step) for name, value in numbers.items()])

    def sample(kind: str, table: Table, step: int) -> None:
        client.log_dict(run_id, {"columns": table[0], "data": table[1]}, f"{kind}-{step:06d}.json")

    def close(ended_well: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for --json
            client.set_terminated(run_id, "FINISHED" if ended_well else "FAILED")

    has = {metric.step for metric in client.get_metric_history(run_id, "timing/step_seconds")}  # every step has that
    return Logger({"run_id": run_id, **own_store}, has, log, sample, close)


def _trackio(path: Path, config: Row, names: Row, last: int) -> Logger:
    import trackio

    name = names.get("name") or f"{path.name}-{uuid.uuid4().hex[:6]}"  # it finds a run by its name alone
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for --json
        run = trackio.init(project=PROJECT, name=name, config=dict(config), resume="allow", embed=False)

    def close(ended_well: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            run.finish()

    has = range(run._next_step)  # rows arrive in order; there is no public name for it
    return Logger(
        {"name": name}, has, run.log, lambda kind, table, step: run.log({kind: trackio.Table(*table)}, step), close
    )


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
