"""The card of an exported model: what it was made from and with, and what was measured. README.md, as the hub reads it.

The head is huggingface_hub's ModelCardData, so that the hub links base model, data and licence. Everything else is read
from the run's own files; paths of the machine are cut down to their last part.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from penstock import __version__
from penstock.run import evaluations
from penstock.run.checkpoint import NAME
from penstock.run.directory import RunDirectory
from penstock.run.metrics import read_record
from penstock.run.report import headlines, warnings
from penstock.sources import hub_of, weighed

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PEFT = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("DIRECTORY")  # fetches {base}
"""
TRANSFORMERS = """from transformers import pipeline

chat = pipeline("text-generation", "DIRECTORY")
print(chat([{"role": "user", "content": "Hello!"}], max_new_tokens=100))
"""
PARENTS = ("actor", "model")
"""The flags of a run that name what it began from, the first one that it has."""


def card(run: Path, checkpoint: Path, *, name: str, adapter: bool, licence: str | None) -> str:
    """The whole text. `checkpoint`: the one of the run that was exported, RUN/checkpoints/step-000100."""
    from huggingface_hub import ModelCardData  # slow to import

    line = [*lineage(run)]
    base = _shown(line[-1][1][_parent(line[-1][1])])
    command, config = line[0][1]["command"], line[0][1]
    data = [weighed(text)[0] for _, of_run in line for text in of_run.get("data", ())]
    head = ModelCardData(
        base_model=base if HUB_NAME.fullmatch(base) else None,
        datasets=sorted({hub.repo for source in data if (hub := hub_of(source))}) or None,
        library_name="peft" if adapter else "transformers",
        license=licence,
        pipeline_tag="text-classification" if command == "reward" else "text-generation",
        tags=["penstock", command],
        penstock_version=__version__,
    )
    rows = [row for row in read_record(run / "metrics.jsonl") if row["step"] <= _step(checkpoint)]
    parts = [
        f"# {name}",
        f"{'An adapter for' if adapter else 'Made from'} {base} with penstock {__version__}"
        f" ({' -> '.join(of_run['command'] for _, of_run in reversed(line))}), step {_step(checkpoint)}.",
        f"Licence: {licence}." if licence else f"No licence was given with it; that of {base} holds in any case.",
        "## How it was made",
        *_stages(line),
        "## What was measured",
        _table(("", "value"), _measured(rows)),
        *(f"> WARNING {text}" for text in warnings(read_record(run / "health.jsonl"))),
        "These figures are of the run's own data, from its metrics.jsonl.",
        *([_table(evaluations.HEADER, measured)] if (measured := evaluations.rows_of(run)) else []),
        "## How to use it",
        _usage(adapter, command, base),
        "<details><summary>All settings (config.toml)</summary>",
        f"```toml\n{tomli_w.dumps(_relative(config))}```\n</details>",
    ]
    return f"---\n{head}\n---\n" + "\n\n".join(parts) + "\n"


def lineage(run: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The run with its settings, then the run that it began from, and so on while there is one."""
    seen: set[Path] = set()
    while (run / "config.toml").exists() and run.resolve() not in seen:
        seen.add(run.resolve())
        config = RunDirectory.peek(run)
        yield run, config
        start = Path(config[_parent(config)])
        run = start.parent.parent if NAME.fullmatch(start.name) else start


def _parent(config: Mapping[str, Any]) -> str:
    return next(flag for flag in PARENTS if flag in config)


def _stages(line: Sequence[tuple[Path, Mapping[str, Any]]]) -> Iterator[str]:
    """A paragraph per run of the line, the first one first: its command, what else it used, its data."""
    for run, config in reversed(line):
        others = [
            f"{flag.replace('_', '-')} {_shown(part)}"
            for flag in ("reward", "reward_fn", "reference", "critic", "teacher")
            for part in ([config[flag]] if isinstance(config.get(flag), str) else config.get(flag, ()))
        ]
        tail = f", with {', '.join(others)}" if others else ""
        yield f"**{config['command']}** on {_shown(config[_parent(config)])}{tail}."
        digests = _digests(run)
        rows = [(_shown(text), _identity(text, digests)) for text in config.get("data", ())]
        if rows:
            yield _table(("data", "sha256"), rows)


def _identity(text: str, digests: Mapping[str, str]) -> str:
    """What says which bytes a source of data had: of a dataset on the hub the digest is that of its name."""
    return "as of its commit" if hub_of(weighed(text)[0]) else f"`{digests.get(text, 'not recorded')}`"


def _digests(run: Path) -> dict[str, str]:
    """sha256 of each source of data as the run read it: its checkpoints have them."""
    for state in sorted((run / "checkpoints").glob("step-*/state.json"), reverse=True):
        return dict(json.loads(state.read_text(encoding="utf-8")).get("data", {}))
    return {}


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    figures = headlines(rows)
    return [(label, value.replace("\n", " ")) for label, value in figures.items()]


def _usage(adapter: bool, command: str, base: str) -> str:
    if command == "reward":
        return "`penstock ppo --reward DIRECTORY` and `penstock grpo --reward DIRECTORY` read it as a score."
    return f"```python\n{PEFT.format(base=base) if adapter else TRANSFORMERS}```"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _relative(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with the last part alone of every absolute path."""

    def shown(value: Any) -> Any:
        if isinstance(value, list):
            return [shown(part) for part in value]
        return _shown(value) if isinstance(value, str) else value

    return {flag: shown(value) for flag, value in config.items()}


def _shown(text: str) -> str:
    return Path(text).name if Path(text).is_absolute() else text


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
