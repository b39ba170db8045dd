"""What the experiments share: commands of penstock that are gone on with, and what a model's answers are like."""

import functools
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.facts import ROOT, commit_of, cpu_kind, flags, result_path, write
from penstock.algorithms.experience import logprobs_of, scoring_batches
from penstock.models.roles import Actor
from penstock.rollout.engine import Answer
from penstock.run.directory import resolve_model
from penstock.run.metrics import read_lines

RUNS = ROOT / ".real"
"""Runs of these experiments: what has ended is not run again, what was stopped goes on."""
Record = dict[str, Any]


def penstock(command: str, **flags: Any) -> None:
    """Runs `penstock COMMAND --FLAG VALUE ...`; True is a flag without a value, and a list has several."""
    subprocess.run(words_of(command, **flags), check=True, stdout=sys.stderr, env=own_environment())


def words_of(command: str, **flags: Any) -> list[str]:
    """Of `penstock COMMAND`, as `penstock` runs it."""
    words = [sys.executable, "-m", "penstock", command]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, _listed(value)))]
    return words


def own_environment() -> dict[str, str]:
    """In which this checkout's penstock is the one that is imported."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def train(name: str, command: str, **flags: Any) -> Path:
    """The run .real/NAME of a command: begun, gone on with, or as it is where it has ended."""
    out = RUNS / name
    penstock(command, out=out, resume_if_present=True, quiet=True, **flags)
    return out


class Stepping:
    """A training process that makes a step when it is told, and stands still between them (SIGSTOP).

    It starts with its first step; a step is over when the file of its lines has one more. `close` kills the process.
    """

    def __init__(self, words: Sequence[str], lines: Path, environment: dict[str, str] | None = None) -> None:
        self._lines = lines
        self._start = functools.partial(subprocess.Popen, words, stdout=sys.stderr, env=environment)
        self._process: subprocess.Popen | None = None

    def step(self) -> float:
        """Its wall seconds. Raises RuntimeError where the process ends in it."""
        before, began = self._made(), time.perf_counter()
        self._process = self._process or self._start()
        self._process.send_signal(signal.SIGCONT)
        while self._made() == before:
            if self._process.poll() is not None:
                raise RuntimeError(f"exit code {self._process.returncode}, after {before} steps: {self._process.args}")
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return seconds

    def _made(self) -> int:
        return self._lines.read_bytes().count(b"\n") if self._lines.exists() else 0

    def peak_rss_bytes(self) -> int:
        """The most memory that it has held so far (Linux alone)."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def close(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def last(run: Path) -> Path:
    """What a run ended with. The run's own name stands for its best checkpoint, chosen by held-out prompts."""
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()


def cost(run: Path) -> Record:
    """What a run has taken: seconds of its steps, and the most that its process held."""
    rows = [*read_lines(run / "perf.jsonl")]
    seconds = [row["timing/step_seconds"] for row in rows]
    return {
        "steps": len(rows),
        "seconds": sum(seconds),
        "step_seconds": statistics.median(seconds),
        "peak_rss_bytes": int(max(row["perf/host_peak_bytes"] for row in rows)),
    }


def write_lines(path: Path, rows: Sequence[Record]) -> Path:
    """Rows as a JSON-lines file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(model: Path, prompts: Path, tokens: int, **flags: Any) -> list[Record]:
    """A sampled answer of a model to each prompt of a file, as `penstock generate` writes them."""
    with tempfile.TemporaryDirectory(dir=RUNS) as folder:
        out = Path(folder) / "answers.jsonl"
        penstock("generate", model=model, data=prompts, out=out, max_new_tokens=tokens, batch_size=64, **flags)
        return [*read_lines(out)]


def figures(rows: Sequence[Record], reference: Path, name: str = "score") -> Record:
    """Of answers with a field `name`: its mean and standard error, and how far they are from the reference's."""
    scores = [row[name] for row in rows]
    texts = [row["response"].split() for row in rows]
    bigrams = [pair for words in texts for pair in itertools.pairwise(words)]
    logprobs = logprobs_under(reference, rows)
    own = [sum(row["logprobs"]) for row in rows]
    return {
        "mean": statistics.mean(scores),
        "standard_error": statistics.stdev(scores) / math.sqrt(len(scores)),
        "answers": len(rows),
        "kl": statistics.mean(a - b for a, b in zip(own, logprobs, strict=True)),
        "reference_perplexity": math.exp(-sum(logprobs) / sum(len(row["logprobs"]) for row in rows)),
        "distinct_2": len(set(bigrams)) / max(len(bigrams), 1),
        "tokens": statistics.mean(len(row["response_ids"]) for row in rows),
        "ended": statistics.mean(row["finish_reason"] == "stop" for row in rows),
    }


def logprobs_under(model: Path, rows: Sequence[Record], size: int = 32) -> list[float]:
    """Each answer's log-probability under a model, in nats."""
    actor = Actor.from_pretrained(resolve_model(str(model))).eval()
    given = [Answer(row["prompt_ids"], row["response_ids"], row["logprobs"], row["finish_reason"]) for row in rows]
    sums: list[float] = []
    with torch.no_grad():
        for batch in scoring_batches(given, size, torch.device("cpu")):
            logprobs, _ = logprobs_of(actor, actor(batch.tokens, batch.prompt_lengths + batch.lengths), batch, 1.0)
            sums += logprobs.sum(1).tolist()
    return sums


def collect(
    name: str, doc: str | None, arguments: list[str], settings: Sequence[str], steps: int,
    experiment: Callable[[str, int, int], Record],
) -> int:  # fmt: skip
    """A benchmark's command line: results/NAME.json gets the rows, experiment(setting, seed, steps), that it lacks.
    Each is written as soon as it is measured, beside those that another process has written by then."""
    parser = flags(doc)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"{', '.join(settings)}; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps)
    options = parser.parse_args(arguments)
    path = result_path(name)

    def rows() -> Record:
        return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}

    for seed in options.seeds:
        for setting in options.settings or settings:
            row = f"{setting}, seed {seed}"
            if row not in rows():
                commit = commit_of(ROOT)
                measured = experiment(setting, seed, options.steps)
                print(row, json.dumps({key: measured[key] for key in measured if key != "curve"}), flush=True)
                measured |= {"commit": commit, "threads": torch.get_num_threads(), "cpu": cpu_kind()}
                write(name, {"rows": rows() | {row: measured}}, "transformers", "vaderSentiment")
    return 0
