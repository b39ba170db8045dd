"""report.html: one self-contained page of a run, with curves as pictures and answers before and after."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.run.directory import RunDirectory
from penstock.run.metrics import read_lines

Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Text:
    """A paragraph; `loud` for what nobody may overlook."""

    text: str
    loud: bool = False


@dataclass(frozen=True)
class Figures:
    """The few numbers of a page: label -> value as text."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Curves:
    """Small pictures side by side: title -> {name: (xs, ys)}."""

    title: str
    pictures: Mapping[str, Mapping[str, Curve]]
    x_label: str = "step"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Samples:
    """Answers to the same prompt side by side: each row is (prompt, {who: (answer, score or None)})."""

    title: str
    rows: Sequence[tuple[str, Mapping[str, tuple[str, float | None]]]]


Section = Text | Figures | Curves | Table | Samples

STYLE = """
:root{--ink:#1b2733;--soft:#5c6b7a;--paper:#fbfaf7;--card:#fff;--line:#e3e0d8;--blue:#1f6f8b;--warn:#a3401f}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9aa7b3;--paper:#14191e;--card:#1c2329;--line:#2e3840;
--blue:#6cc0da;--warn:#f0946f}img{filter:invert(.88) hue-rotate(180deg)}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2.5rem 1.2rem 4rem}h1{font-size:1.7rem;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.1rem;margin:2.4rem 0 .8rem}.sub,figcaption,dt{color:var(--soft);font-size:.88rem}
.loud{border-left:3px solid var(--warn);padding:.5rem .9rem;color:var(--warn)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.8rem;margin:1.4rem 0}
dl div,.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem .9rem}
dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:1rem}figure{margin:0}
img{width:100%;display:block}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:.35rem .7rem;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:500}.card{margin-bottom:.9rem}.prompt{color:var(--soft);white-space:pre-wrap}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:.9rem;margin-top:.5rem}
.answers b{color:var(--blue);font-weight:600;font-size:.85rem}.answers p{margin:.1rem 0 0;white-space:pre-wrap}
"""


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole HTML document; needs nothing from outside."""
    body = "\n".join(_render(section) for section in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{html.escape(title)}</h1><p class="sub">{html.escape(subtitle)}</p>{body}</main></body></html>\n'
    )


def run_report(path: Path, command: str) -> Path:
    """Writes RUN/report.html from what the run has logged."""
    metrics, perf = read_lines(path / "metrics.jsonl"), read_lines(path / "perf.jsonl")
    sections: list[Section] = []
    if metrics:
        last = {key: value for row in metrics for key, value in row.items() if value is not None}
        sections.append(Figures({name: f"{value:.4g}" for name, value in last.items() if name in HEADLINES}))
        sections.append(Curves("Training", _curves(metrics)))
    if perf:
        sections.append(Curves("Speed and memory", _curves(perf)))
    if pairs := _before_after(read_lines(path / "samples.jsonl")):
        sections.append(Samples("Answers before and after", pairs))
    config = RunDirectory.peek(path)
    sections.append(Table("Configuration", ("flag", "value"), [(k, str(v)) for k, v in config.items()]))
    target = path / "report.html"
    target.write_text(page(f"penstock {command}", str(path.name), sections), encoding="utf-8")
    return target


HEADLINES = (
    "step", "loss", "heldout/loss", "accuracy", "heldout/accuracy", "objective/scores", "objective/kl",
    "objective/response_length", "val/explained_variance", "episode",
)  # fmt: skip


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """One picture per metric that ever changes."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    pictures = {}
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if len({y for _, y in points}) > 1:
            xs, ys = zip(*points, strict=True)
            pictures[name] = {name: (xs, ys)}
    return pictures


def _before_after(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, tuple[str, float | None]]]]:
    samples = [sample for sample in samples if sample["kind"] == "greedy"]
    if not samples:
        return []
    first, last = samples[0]["step"], samples[-1]["step"]
    rows: dict[str, dict[str, tuple[str, float | None]]] = {}
    for sample in samples:
        if sample["step"] in (first, last):
            who = "before" if sample["step"] == first else f"after {last} steps"
            rows.setdefault(sample["prompt"], {})[who] = (sample["response"], sample.get("score"))
    return list(rows.items())


def _render(section: Section) -> str:
    if isinstance(section, Text):
        return f"<p{' class=loud' if section.loud else ''}>{html.escape(section.text)}</p>"
    if isinstance(section, Figures):
        cells = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in section.values.items())
        return f"<dl>{''.join(cells)}</dl>"
    if isinstance(section, Table):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.header)
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in section.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return (
            f"<h2>{html.escape(section.title)}</h2><div class=scroll><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>"
        )
    if isinstance(section, Samples):
        cards = []
        for prompt, answers in section.rows:
            told = "".join(
                f"<div><b>{html.escape(who)}{'' if score is None else f' ({score:+.2f})'}</b><p>{html.escape(text)}</p></div>"
                for who, (text, score) in answers.items()
            )
            cards.append(
                f"<div class=card><div class=prompt>{html.escape(prompt)}</div><div class=answers>{told}</div></div>"
            )
        return f"<h2>{html.escape(section.title)}</h2>{''.join(cards)}"
    figures = (
        f'<figure class=card><img alt="{html.escape(name)}" src="data:image/png;base64,{_picture(lines, section.x_label)}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, lines in section.pictures.items()
    )
    return f"<h2>{html.escape(section.title)}</h2><div class=grid>{''.join(figures)}</div>"


def _picture(lines: Mapping[str, Curve], x_label: str) -> str:
    """A plot as base64 PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    colours = ("#1f6f8b", "#d07a2d", "#5b8c5a", "#8a5a9e", "#b03a48")
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        axes.plot(
            xs, ys, color=colours[i % len(colours)], linewidth=1.6, label=name, marker="." if len(xs) < 15 else ""
        )
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return base64.b64encode(stream.getvalue()).decode("ascii")
