"""The one-GPU RLHF benchmark: its tasks, the columns of a submission, and what makes a row unbelievable.

    python -m benchmarks submit FILE.csv ...    checks submissions: exit code 1 where a row is wrong
    python -m benchmarks submit --columns       prints the head that a file needs

docs/one_gpu_benchmark.md has the rules. Nothing here runs a task; `python -m benchmarks tables` makes our rows
from the results.
"""

import csv
import datetime
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.facts import flags

SUBMISSIONS = Path(__file__).with_name("submissions")
OUR_ROWS = "penstock.csv"
"""Of the submissions, the one that `python -m benchmarks tables` writes."""


@dataclass(frozen=True)
class Task:
    """The work of one step."""

    says: str
    samples: int
    """Rows, answers or pairs."""
    prompt: int
    answer: int
    """Tokens of each. A row of a task without sampling has prompt + answer tokens, all of them learned."""
    blocks: int
    """Parameters in the blocks of one model, without embeddings and head."""
    rows: int = 1
    """Of a sample: 2 in a pair."""
    group: int = 1
    """Answers to one prompt."""
    rollout: bool = False
    """The step begins with a rollout."""
    frozen: int = 0
    """Models that only read."""
    trained: int = 1
    weights: tuple[str, ...] = ("full", "adapters")
    reward: bool = False
    """What is measured is a reward at a KL, beside the cost; answers end where they end."""

    @property
    def tokens(self) -> int:
        """Of all rows, each with its own prompt: what tokens_per_second counts."""
        return self.samples * self.rows * (self.prompt + self.answer)

    def least_flops(self, weights: str) -> float:
        """A step cannot take fewer operations: 2 per weight of the blocks and token read, 4 for the backward pass of a
        trained weight, 2 where only adapters learn; each prompt read once per group, and heads, attention and
        recomputing not counted."""
        read = self.samples * self.rows * self.answer + self.samples * self.rows // self.group * self.prompt
        passes = self.rollout + self.frozen + self.trained * (3 if weights == "full" else 2)
        return 2.0 * self.blocks * read * passes

    def least_bytes(self, weights: str) -> float:
        """All memories together cannot hold less: half a byte per frozen weight of a base (4 bits), and two bytes per
        trained one with two of moments."""
        full = weights == "full"
        return self.blocks * (4.0 * self.trained + 0.5 * self.frozen if full else 0.5)


S, XL, SIX, SMOLLM2 = 12 * (12 * 768**2), 48 * (12 * 1600**2), 30 * (12 * 4096**2), 30 * 3_538_944
TASKS = {
    "sft-124m": Task("a supervised update of GPT-2 small on 4 rows of 128 tokens", 4, 64, 64, S),
    "reward-124m": Task("a reward model's update on 4 pairs of 128 tokens", 4, 64, 64, S, rows=2),
    "dpo-124m": Task("a DPO update on 4 such pairs, the reference read in the step", 4, 64, 64, S, rows=2, frozen=1),
    "ppo-124m": Task(
        "PPO with actor, critic, reference and reward model: 4 prompts of 64 tokens, an answer of 64 to each, scores, "
        "one update of actor and critic", 4, 64, 64, S, rollout=True, frozen=2, trained=2,
    ),
    "grpo-124m": Task(
        "GRPO: 8 prompts of 64 tokens, 8 answers of 64 to each, KL to a reference in the loss, one update on all 64",
        64, 64, 64, S, group=8, rollout=True, frozen=1,
    ),
    "ppo-124m-512": Task(
        "PPO as above: 64 prompts of 400 tokens, answers of 112", 64, 400, 112, S, rollout=True, frozen=2, trained=2
    ),
    "ppo-1558m-512": Task(
        "the same with GPT-2 XL's shape", 64, 400, 112, XL, rollout=True, frozen=2, trained=2
    ),
    "ppo-6b-512": Task(
        "the same with 30 blocks of 4096, adapters of rank 16", 64, 400, 112, SIX, rollout=True, frozen=2,
        trained=2, weights=("adapters",),
    ),
    "sentiment-135m": Task(
        "SmolLM2-135M-Instruct learns to write well of films: 64 answers of at most 32 tokens a step", 64, 0, 32,
        SMOLLM2, rollout=True, reward=True,
    ),
}  # fmt: skip
PRECISIONS = ("fp32", "tf32", "bf16", "bf16-autocast", "fp16", "fp16-autocast", "fp8")
MOST_FLOPS = {"fp32": 1e14, "fp8": 5e15}
"""Per second, of any one GPU of 2026, dense; of every other precision 2.5e15."""
STEPS, SEEDS = 3, 3
"""Measured steps, and seeds of a task with a reward, below which a row is provisional."""
MOST_KL = 8.0
CLOSE = 0.02
"""Relative: by how much a rate may differ from what seconds_per_step makes of it."""


@dataclass(frozen=True)
class Column:
    """One field of a row: how it is read, and for which rows it must be there."""

    says: str
    read: Callable[[str], Any]
    needed: bool = True


def text(value: str) -> str:
    return value


def name_of(names: tuple[str, ...]) -> Callable[[str], str]:
    """Reads one of several words."""

    def read(value: str) -> str:
        if value not in names:
            raise ValueError(f"is none of {', '.join(names)}")
        return value

    return read


def number(least: float, most: float = math.inf, whole: bool = False) -> Callable[[str], float]:
    """Reads a number from `least` to `most`."""

    def read(value: str) -> float:
        amount = int(value) if whole else float(value)
        if not least <= amount <= most or math.isinf(amount):
            raise ValueError(f"must be {f'at least {least:g}' if math.isinf(most) else f'from {least:g} to {most:g}'}")
        return amount

    return read


def day(value: str) -> datetime.date:
    date = datetime.date.fromisoformat(value)
    if not datetime.date(2020, 1, 1) <= date <= datetime.date.today() + datetime.timedelta(days=1):
        raise ValueError("is no day between 2020 and today")
    return date


TINY = 1e-9
COLUMNS = {
    "task": Column("a task's name", name_of(tuple(TASKS))),
    "stack": Column("the software: penstock, TRL, ...", text),
    "version": Column("its release, or the commit", text),
    "date": Column("when it was measured: 2026-11-30", day),
    "device": Column("the GPU as its driver names it, or cpu", text),
    "device_memory_bytes": Column("of the GPU; empty for cpu", number(2**27, whole=True), needed=False),
    "machine": Column("processor, cores, memory", text),
    "precision": Column(", ".join(PRECISIONS), name_of(PRECISIONS)),
    "weights": Column("full, or adapters (rank 16)", name_of(("full", "adapters"))),
    "options": Column("what was set beside the defaults: offloading, recomputing, ...", text, needed=False),
    "seconds_per_step": Column("median of wall seconds", number(TINY)),
    "steps": Column("measured steps, after the warm-up", number(1, whole=True)),
    "samples_per_second": Column("the task's samples over seconds_per_step", number(TINY)),
    "tokens_per_second": Column("prompts and answers, likewise", number(TINY)),
    "peak_device_bytes": Column("most that the allocator held allocated; empty for cpu", number(1, whole=True), False),
    "peak_rss_bytes": Column("most resident memory of the process, or of all together", number(1e7, whole=True)),
    "disk_bytes": Column("weights and states kept on a disk; empty: none", number(0, whole=True), needed=False),
    "joules_per_step": Column("of the device, by its counter; empty: not measured", number(TINY), needed=False),
    "reward": Column("sentiment: mean on the held-out prompts", number(-1, 1), needed=False),
    "reward_se": Column("sentiment: its standard error over seeds", number(TINY, 1), needed=False),
    "kl": Column("sentiment: nats per answer from the start", number(-0.5, MOST_KL), needed=False),
    "seeds": Column("sentiment: runs that reward, reward_se and kl are of", number(1, whole=True), needed=False),
    "command": Column("what was typed", text),
    "evidence": Column("where the whole result can be read: a path here, or an address", text),
}
Row = dict[str, Any]


def read(path: Path) -> Iterator[tuple[str, Row, list[str]]]:
    """Per line of a file: where it is, its values, and its problems. The first line is the head."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        head = next(lines, [])
        if head != list(COLUMNS):
            missing, strange = [c for c in COLUMNS if c not in head], [c for c in head if c not in COLUMNS]
            wrong = [f"has no {', '.join(missing)}"] * bool(missing) + [f"knows no {', '.join(strange)}"] * bool(
                strange
            )
            yield f"{path}:1", {}, [f"head: {'; '.join(wrong) or 'columns are in another order'}; see --columns."]
            return
        for cells in lines:
            where = f"{path}:{lines.line_num}"
            if len(cells) != len(COLUMNS):
                yield where, {}, [f"has {len(cells)} cells, not {len(COLUMNS)}; quote cells that hold commas."]
                continue
            row, problems = _values(cells)
            yield where, row, problems or [*unbelievable(row)]


def _values(cells: list[str]) -> tuple[Row, list[str]]:
    row: Row = {}
    problems = []
    for (name, column), cell in zip(COLUMNS.items(), cells, strict=True):
        cell = cell.strip()
        if not cell:
            problems += [f"{name}: is empty; give {column.says}."] * column.needed
            continue
        try:
            row[name] = column.read(cell)
        except (ValueError, OverflowError) as error:
            problems.append(
                f"{name}: {cell[:60]!r} {error if str(error).startswith(('is', 'must')) else 'is no value'}."
            )
    return row, problems


def unbelievable(row: Row) -> Iterator[str]:
    """What in a row that can be read contradicts the task, another column, or what machines can do."""
    task, weights = TASKS[row["task"]], row["weights"]
    if weights not in task.weights:
        yield f"weights: {row['task']} is of {' or '.join(task.weights)}."
    seconds = row["seconds_per_step"]
    for name, amount in (("samples_per_second", task.samples), ("tokens_per_second", task.tokens)):
        if not math.isclose(row[name], amount / seconds, rel_tol=CLOSE):
            yield f"{name}: {row[name]:g}, but {amount} in {seconds:g} s are {amount / seconds:.4g}."
    yield from _impossible_speed(row, task, weights, seconds)
    yield from _impossible_memory(row, task, weights)
    joules = row.get("joules_per_step")
    if joules is not None and not 1 <= joules / seconds <= 3000:
        yield f"joules_per_step: {joules / seconds:.3g} watts; one GPU takes 1 to 3,000."
    yield from _reward_problems(row, task)


def _impossible_speed(row: Row, task: Task, weights: str, seconds: float) -> Iterator[str]:
    most = MOST_FLOPS.get(row["precision"], 2.5e15)
    rate = task.least_flops(weights) / seconds
    if not task.reward and rate > most:  # answers of such a task may be short
        yield f"seconds_per_step: {rate:.2g} operations a second at the least; no GPU makes {most:.2g} in it."


def _impossible_memory(row: Row, task: Task, weights: str) -> Iterator[str]:
    sizes = {name: row.get(f"{name}_bytes", 0) for name in ("peak_device", "peak_rss", "disk", "device_memory")}
    if row["device"] == "cpu":
        if sizes["peak_device"]:
            yield "peak_device_bytes: a CPU has no device memory; leave it empty."
    elif not sizes["peak_device"] or not sizes["device_memory"]:
        yield "peak_device_bytes: a row of a GPU needs it, and device_memory_bytes."
    elif sizes["peak_device"] > sizes["device_memory"]:
        yield f"peak_device_bytes: {sizes['peak_device']:,} of a device with {sizes['device_memory']:,}."
    total, least = sum(sizes.values()) - sizes["device_memory"], task.least_bytes(weights)
    if total < least:
        yield f"peak_rss_bytes: all memories together held {total:,} bytes; the models alone are {least:,.0f}."


def _reward_problems(row: Row, task: Task) -> Iterator[str]:
    given = [name for name in ("reward", "reward_se", "kl", "seeds") if name in row]
    if not task.reward and given:
        yield f"{given[0]}: {row['task']} has no reward; leave it empty."
    # of one seed there is no standard error
    missing = {"reward", "kl", "seeds", *(["reward_se"] if row.get("seeds") != 1 else [])} - set(given)
    if task.reward and missing:
        yield f"{min(missing)}: is empty; {row['task']} ranks reward within {MOST_KL:g} nats."


def provisional(row: Row) -> list[str]:
    """Why a good row is not ranked yet."""
    reasons = [f"{row['steps']} of {STEPS} steps"] if row["steps"] < STEPS else []
    if "seeds" in row and row["seeds"] < SEEDS:
        reasons.append(f"{row['seeds']} of {SEEDS} seeds")
    return reasons


def check(path: Path) -> tuple[list[Row], list[str]]:
    """The good rows of a file, and a line for each problem."""
    good: list[Row] = []
    problems: list[str] = []
    lines: dict[tuple, str] = {}
    try:
        for where, row, wrong in read(path):
            key = tuple(row.get(name) for name in (*[*COLUMNS][:10], "seconds_per_step"))
            if not wrong and key in lines:
                wrong = [f"is {lines[key]} again; give one of them."]
            if not wrong:
                lines[key] = where
                good.append(row)
            problems += [f"{where}: {problem}" for problem in wrong]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{path}: cannot be read as CSV in UTF-8 ({error}).")
    if not good and not problems:
        problems.append(f"{path}: has no row below its head.")
    return good, problems


def write_rows(rows: list[Row], path: Path) -> None:
    """Rows as a submission; numbers to six digits, bytes and counts whole."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
        out.writeheader()
        for row in rows:
            out.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def main(arguments: list[str]) -> int:
    """Returns 1 where a file has a problem."""
    parser = flags(__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.csv")
    parser.add_argument("--columns", action="store_true", help="print the head that a file needs")
    options = parser.parse_args(arguments)
    if options.columns:
        print(",".join(COLUMNS))
    failed = False
    for path in options.files:
        rows, problems = check(path)
        print("\n".join([*problems, f"{path}: {summary(rows)}"]))
        failed |= bool(problems)
    return int(failed)


def summary(rows: list[Row]) -> str:
    """Example: "12 good rows; 1 of them provisional (2 of 3 steps)"."""
    reasons = [reason for row in rows for reason in provisional(row)]
    waiting = sum(bool(provisional(row)) for row in rows)
    more = f"; {waiting} of them provisional ({', '.join(sorted(set(reasons)))})" if waiting else ""
    return f"{len(rows)} good rows{more}"
