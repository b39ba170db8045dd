"""evaluations.jsonl: what was measured of a run's model after its training, one object per evaluation: by `penstock
eval`, by `penstock align` of its end, by lm-eval."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.run.metrics import read_lines

FILE = "evaluations.jsonl"
HEADER = ("date", "prompts", "judged by", "against", "wins", "at equal lengths", "score")


def rows_of(run: Path) -> list[tuple[str, ...]]:
    """A row of text per evaluation, under HEADER."""
    return [_row(result) for result in read_lines(run / FILE)]


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    shown = dict.fromkeys(("against", "wins", "controlled", "score"), "")
    if "against" in result:
        shown["against"] = Path(result["against"]).name
    if "win_rate" in result:
        low, high = result["win_rate_interval"]
        shown["wins"] = f"{result['win_rate']:.1%} ({low:.1%} to {high:.1%})"
        shown["controlled"] = f"{result['win_rate_length_controlled']:.1%}"
    if "score" in result:
        error = f" +- {_text(result['standard_error'])}" if "standard_error" in result else ""
        shown["score"] = f"{_text(result['score'])}{error}"
    if "gain" in result:
        low, high = result["gain_interval"]
        gain = f"{_text(result['gain'], '+')} ({_text(low, '+')} to {_text(high, '+')})"
        shown["score"] = f"{_text(result['end'])}, {gain}"
    by = ", ".join(Path(part).name for part in str(result["by"]).split(", "))
    count = result["prompts"] if "prompts" in result else result["records"]
    return (result["date"], f"{count} of {Path(str(result['data'])).name}", by, *shown.values())


def _text(value: float | None, sign: str = "") -> str:
    """To three places; a line of the file has null for what is no finite number."""
    return "-" if value is None else f"{value:{sign}.3f}"
