"""evaluations.jsonl: what `penstock eval` measured of a run's model, one object per evaluation."""

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
    if "win_rate" in result:
        low, high = result["win_rate_interval"]
        shown["against"] = Path(result["against"]).name
        shown["wins"] = f"{result['win_rate']:.1%} ({low:.1%} to {high:.1%})"
        shown["controlled"] = f"{result['win_rate_length_controlled']:.1%}"
    if "score" in result:
        shown["score"] = f"{result['score']:.3f}"
    by = ", ".join(Path(part).name for part in str(result["by"]).split(", "))
    return (result["date"], f"{result['prompts']} of {Path(str(result['data'])).name}", by, *shown.values())
