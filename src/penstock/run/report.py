"""report.html: one self-contained page of a run, with curves as pictures and answers before and after.

A page is a list of sections, small records below. Nothing is fetched when the page is read. `penstock watch` serves the
same page while runs write.
"""

import base64
import hashlib
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.run import evaluations
from penstock.run.checkpoint import write_whole
from penstock.run.directory import RunDirectory
from penstock.run.metrics import read_record
from penstock.run.progress import clock

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Text:
    """A paragraph; `loud` for a warning."""

    text: str
    loud: bool = False


@dataclass(frozen=True)
class Figures:
    """The few numbers of a page: label -> value as text; text after a line end in the value is small."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Curves:
    """Small pictures side by side: title -> {name: (xs, ys)}."""

    title: str
    pictures: Mapping[str, Mapping[str, Curve]]
    x_label: str = "step"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `folded` tables open on a click."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Samples:
    """Answers to the same prompt side by side: each row is (prompt, {who: (answer, score or None)})."""

    title: str
    rows: Sequence[tuple[str, Mapping[str, tuple[str, float | None]]]]


Section = Text | Figures | Curves | Table | Samples

STYLE = """
:root{--ink:#22303c;--soft:#667684;--paper:#f8f7f3;--card:#fff;--line:#e4e1d8;--accent:#1f6f8b;--tint:#e8f1f3;
--warn:#a3401f;--warn-tint:#fbeee7;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#dde3e8;--soft:#93a1ad;--paper:#13181c;--card:#1a2026;--line:#2c353d;
--accent:#74bfd6;--tint:#1d2f37;--warn:#f0a07e;--warn-tint:#33221b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1060px;margin:0 auto;padding:3rem 1.2rem 4rem}
h1{font-size:1.75rem;line-height:1.25;font-weight:650;margin:0;letter-spacing:-.015em}
h2{font-size:1.02rem;font-weight:600;margin:2.8rem 0 .9rem}
p{max-width:68ch;margin:1rem 0}.sub{color:var(--soft);margin:.3rem 0 1.6rem}
.loud{border-left:3px solid var(--warn);background:var(--warn-tint);color:var(--warn);padding:.7rem 1rem;
border-radius:0 6px 6px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:.8rem;margin:1.6rem 0}
dl .card{padding:.75rem .95rem}dt,figcaption,small,th{color:var(--soft);font-size:.82rem;font-weight:400}
dt{overflow-wrap:anywhere;line-height:1.35;margin-bottom:.15rem}
dd{margin:0;font-size:1.3rem;line-height:1.3;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}small{display:block}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:1rem}
figure{margin:0;padding:.7rem .8rem .5rem}img{width:100%;height:auto;display:block;margin-top:.3rem}
figcaption{display:flex;justify-content:space-between;gap:1rem;font-variant-numeric:tabular-nums}
figcaption b{color:var(--ink);font-weight:500;overflow-wrap:anywhere}
.scroll{overflow-x:auto;padding:.3rem .4rem}table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:.42rem .7rem;font-variant-numeric:tabular-nums}
.long{overflow-wrap:anywhere}.wide{min-width:14rem}tbody td{border-top:1px solid var(--line)}
summary{cursor:pointer;font-weight:600;margin:1.4rem 0 .9rem}
.sample{margin-bottom:1rem;overflow:hidden}
.prompt{padding:.8rem 1rem;color:var(--soft);white-space:pre-wrap;overflow-wrap:anywhere}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(240px,100%),1fr));gap:1px;background:var(--line);
border-top:1px solid var(--line)}
.answers>div{background:var(--card);padding:.7rem 1rem .9rem}
.who{display:flex;justify-content:space-between;align-items:baseline;gap:.6rem;color:var(--soft);font-size:.82rem}
.score{padding:.05rem .5rem;border-radius:99px;border:1px solid var(--line);font-variant-numeric:tabular-nums}
.top{background:var(--tint);border-color:transparent;color:var(--accent);font-weight:600}
.answer{margin-top:.35rem;white-space:pre-wrap;overflow-wrap:anywhere;max-height:20rem;overflow-y:auto}
.none{color:var(--soft);font-style:italic}
"""


def page(
    title: str, subtitle: str, sections: Sequence[Section], pictures: dict[str, str] | None = None, script: str = ""
) -> str:
    """The whole HTML document; it loads no other file. Pictures that are in `pictures` are taken as they are there.
    `script` is ours: what people and models wrote is shown as text, and the page's policy runs nothing else.
    """
    pictures = {} if pictures is None else pictures
    body = "\n".join(_render(section, pictures) for section in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{html.escape(title)}</h1><p class="sub">{html.escape(subtitle)}</p>{body}</main>'
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def _policy(script: str) -> str:
    style, code = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (STYLE, script))
    return (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; connect-src 'self'; "
        f"style-src 'sha256-{style}'; script-src 'sha256-{code}'"
    )


# --- a run's own report ---------------------------------------------------------------------------------------------

HEADLINES = {
    "loss": "loss", "heldout/loss": "held-out loss", "accuracy": "accuracy", "heldout/accuracy": "held-out accuracy",
    "rewards/accuracies": "pairs ordered right", "heldout/rewards/accuracies": "held-out pairs ordered right",
    "rewards/margins": "margin", "heldout/rewards/margins": "held-out margin",
    "objective/scores": "score", "heldout/scores": "held-out score", "objective/used_scores": "used score",
    "val/missing_eos_rate": "cut answers", "objective/kl": "KL, nats",
    "objective/response_length": "answer length, tokens",
    "val/explained_variance": "value explained", "episode": "answers sampled", "perf/tokens_per_second": "tokens/s",
    "perf/host_peak_bytes": "peak host memory", "perf/device_peak_bytes": "peak device memory",
    "perf/device_tier_bytes": "kept on the device", "perf/disk_tier_bytes": "kept on the disk",
    "timing/left_seconds": "time left",
}  # fmt: skip

GROUPS = {
    # a metric's name or its first part -> the heading of its pictures, in the page's order
    "": "Learning", "teacher/": "Learning", "student/": "Learning", "rewards/": "Comparisons", "logps/": "Comparisons",
    "count/": "Comparisons", "objective/": "Objective", "policy/": "Policy", "val/": "Critic",
    "loss/": "Losses", "lr": "Schedule", "epoch": "Schedule", "episode": "Schedule", "perf/": "Speed and memory",
    "timing/": "Seconds",
}  # fmt: skip


def run_report(path: Path, command: str) -> Path:
    """Writes RUN/report.html from the run's metrics and samples, and returns its path."""
    run = RunFiles.read(path)
    title, subtitle = f"penstock {command}", f"{path.name}, {run.steps} steps"
    write_whole(path / "report.html", page(title, subtitle, sections_of({path.name: run})))
    return path / "report.html"


@dataclass(frozen=True)
class RunFiles:
    """What a page shows of one run."""

    config: Mapping[str, Any]
    """config.toml, `command` included."""
    rows: Sequence[Mapping[str, Any]]
    """metrics.jsonl, then perf.jsonl."""
    samples: Sequence[Mapping[str, Any]]
    health: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Sequence[str]] = ()
    """As evaluations.HEADER names them."""

    @staticmethod
    def read(path: Path) -> "RunFiles":
        """Raises UserError where there is no run."""
        metrics, perf, health = (read_record(path / f"{name}.jsonl") for name in ("metrics", "perf", "health"))
        samples = read_record(path / "samples.jsonl", "prompt", "response")
        return RunFiles(RunDirectory.peek(path), [*metrics, *perf], samples, health, evaluations.rows_of(path))

    @property
    def steps(self) -> int:
        return max((row["step"] for row in self.rows), default=0)


def sections_of(runs: Mapping[str, RunFiles]) -> list[Section]:
    """The page of a run; of several by name, with their curves in the same pictures and all else side by side."""
    alone = len(runs) == 1
    sections: list[Section] = [
        Text(text if alone else f"{name}: {text}", loud=True)
        for name, run in runs.items()
        for text in warnings(run.health)
    ]
    figures = {name: headlines(run.rows) for name, run in runs.items()}
    if alone:
        sections += [Figures(values) for values in figures.values() if values]
    else:
        sections.append(Table("Runs", ["", *runs], _side_by_side(figures)))
    if measured := [(name, *row) for name, run in runs.items() for row in run.evaluations]:
        sections.append(Table("Evaluations", ("run", *evaluations.HEADER), measured))
    if pairs := _answers(runs):
        sections.append(Samples("Answers before and after", pairs))
    sections += [Curves(title, pictures) for title, pictures in _curves_of(runs).items()]
    flags = {
        name: {f"--{flag.replace('_', '-')}": str(value) for flag, value in run.config.items() if flag != "command"}
        for name, run in runs.items()
    }
    header = ["flag", *(["value"] if alone else runs)]
    return [*sections, Table("Configuration", header, _side_by_side(flags), folded=True)]


def _answers(runs: Mapping[str, RunFiles]) -> list[tuple[str, dict[str, tuple[str, float | None]]]]:
    """Each prompt with the answers before and after of every run that has it."""
    pairs: dict[str, dict[str, tuple[str, float | None]]] = {}
    for name, run in runs.items():
        for prompt, answers in _before_after(run.samples):
            named = {who if len(runs) == 1 else f"{name}, {who}": answer for who, answer in answers.items()}
            pairs.setdefault(prompt, {}).update(named)
    return list(pairs.items())


def _curves_of(runs: Mapping[str, RunFiles]) -> dict[str, dict[str, dict[str, Curve]]]:
    """Heading -> pictures of all runs, each with their lines."""
    groups: dict[str, dict[str, dict[str, Curve]]] = {heading: {} for heading in GROUPS.values()}
    for name, run in runs.items():
        for heading, pictures in _groups(run.rows).items():
            for title, lines in pictures.items():
                picture = groups.setdefault(heading, {}).setdefault(title, {})
                for line, curve in lines.items():
                    picture[line if len(runs) == 1 else f"{name}, held-out" if line == "held-out" else name] = curve
    return {heading: pictures for heading, pictures in groups.items() if pictures}


def _side_by_side(columns: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """A row for each name in any of the columns."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [[name, *(column.get(name, "").replace("\n", ", ") for column in columns.values())] for name in names]


def warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The warnings of health.jsonl, each with the steps that it was true at."""
    texts: list[str] = []
    begun: dict[str, int] = {}
    for row in rows:
        if "text" in row:
            begun[row["text"].partition(":")[0]] = len(texts)
            texts.append(f"from step {row['step']}: {row['text']}" if row["step"] else row["text"])
        elif row.get("ended") in begun:  # else a line of the record was lost
            place = begun.pop(row["ended"])
            texts[place] = texts[place].replace(":", f" to {row['last']}:", 1)
    return texts


def headlines(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The last value of each headline number, and the first where it differs."""
    figures = {}
    for name, label in HEADLINES.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if name == "timing/left_seconds" and values and values[-1] == 0:
            continue  # the run has ended
        if values:
            first, last = _number(name, values[0]), _number(name, values[-1])
            figures[label] = last if first == last else f"{last}\nfrom {first}"
    return figures


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Curve]]]:
    """Heading -> pictures, one per metric that ever changes; a held-out metric is drawn with its training twin."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "timing/left_seconds") and value is not None:
                xs, ys = points.setdefault(name, ([], []))
                xs.append(row["step"])
                ys.append(value)
    groups: dict[str, dict[str, dict[str, Curve]]] = {heading: {} for heading in GROUPS.values()}
    for name, curve in points.items():
        if len(set(curve[1])) == 1:
            continue
        plain_name = name.removeprefix("heldout/")
        prefix = plain_name.rpartition("/")[0]
        held_out = plain_name != name
        heading = GROUPS.get(plain_name) or GROUPS.get(f"{prefix}/" if prefix else "", prefix)
        lines = groups.setdefault(heading, {}).setdefault(plain_name if plain_name in points else name, {})
        lines["held-out" if held_out else "training" if f"heldout/{name}" in points else name] = curve
    return groups


def _before_after(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, tuple[str, float | None]]]]:
    """The answers of the first and the last greedy samples to each prompt."""
    samples = [sample for sample in samples if sample.get("kind") == "greedy"]
    if not samples:
        return []
    first, last = samples[0]["step"], samples[-1]["step"]
    rows: dict[str, dict[str, tuple[str, float | None]]] = {}
    for sample in samples:
        if sample["step"] in (first, last):
            who = "before" if sample["step"] == first else f"after {last} steps"
            rows.setdefault(sample["prompt"], {})[who] = (sample["response"], sample.get("score"))
    return list(rows.items())


def _number(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if name == "timing/left_seconds":
        return clock(value).strip()
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# --- sections as HTML -----------------------------------------------------------------------------------------------

SHOWN = 6
"""Samples above the fold; the others open on a click."""
WORD = 20
"""Letters of the longest word that stays whole in a table."""
SENTENCE = 40
"""Letters from which a cell's text is no name or number."""


def _render(section: Section, pictures: dict[str, str]) -> str:
    match section:
        case Text(text, loud):
            return f"<p{' class=loud role=alert' if loud else ''}>{html.escape(text)}</p>"
        case Figures(values):
            return f"<dl>{''.join(_figure(label, value) for label, value in values.items())}</dl>"
        case Table(title, header, rows, folded):
            table = f"<div class='card scroll'><table><thead>{_row('th', header)}</thead><tbody>"
            table += "".join(_row("td", row) for row in rows) + "</tbody></table></div>"
            if folded:
                return f"<details><summary>{html.escape(title)}</summary>{table}</details>"
            return f"<h2>{html.escape(title)}</h2>{table}"
        case Samples(title, rows):
            cards = [_sample(prompt, answers) for prompt, answers in rows]
            text = f"<h2>{html.escape(title)}</h2>{''.join(cards[:SHOWN])}"
            if folded_cards := cards[SHOWN:]:
                text += f"<details><summary>{len(folded_cards)} more</summary>{''.join(folded_cards)}</details>"
            return text
        case Curves(title, curves, x_label):
            for name, lines in curves.items():
                if f"{title}/{name}" not in pictures:
                    pictures[f"{title}/{name}"] = _picture(name, lines, x_label)
            figures = "".join(
                _curves(name, lines, x_label, pictures[f"{title}/{name}"]) for name, lines in curves.items()
            )
            return f"<h2>{html.escape(title)}</h2><div class=grid>{figures}</div>"


def _figure(label: str, value: str) -> str:
    value, _, small = value.partition("\n")
    small = f"<small>{html.escape(small)}</small>" if small else ""
    return f"<div class=card><dt>{html.escape(label)}</dt><dd>{html.escape(value)}{small}</dd></div>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(_cell(tag, cell) for cell in cells)}</tr>"


def _cell(tag: str, text: str) -> str:
    """A path may be broken anywhere where a column is narrow, a word not; a sentence is not squeezed."""
    classes = ["long"] * (max(map(len, text.split()), default=0) > WORD) + ["wide"] * (len(text) > SENTENCE)
    kind = f' class="{" ".join(classes)}"' if classes else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


def _sample(prompt: str, answers: Mapping[str, tuple[str, float | None]]) -> str:
    """One prompt and each model's answer; the highest score is marked."""
    scores = [score for _, score in answers.values() if score is not None]
    cells = ""
    for name, (text, score) in answers.items():
        top = " top" if len(scores) > 1 and score == max(scores) and score > min(scores) else ""
        chip = "" if score is None else f"<span class='score{top}'>{score:+.2f}</span>"
        answer = html.escape(text.strip()) if text.strip() else "<span class=none>nothing</span>"
        cells += f"<div><div class=who>{html.escape(name)}{chip}</div><div class=answer>{answer}</div></div>"
    return (
        f"<div class='card sample'><div class=prompt>{html.escape(prompt.strip())}</div>"
        f"<div class=answers>{cells}</div></div>"
    )


def _curves(name: str, lines: Mapping[str, Curve], x_label: str, picture: str) -> str:
    """One picture with its name and, when it is a single line, the last value."""
    ends = [ys[-1] for _, ys in lines.values() if len(ys)]
    last = _number(name, ends[0]) if len(ends) == 1 else ""
    return (
        f"<figure class=card><figcaption><b>{html.escape(name)}</b>{last}</figcaption>"
        f'<img alt="{html.escape(name)} by {html.escape(x_label)}" src="{picture}"></figure>'
    )


# --- pictures -------------------------------------------------------------------------------------------------------

COLOURS = ("#3a8bab", "#d68a3c", "#5f9d6c", "#9a78b5", "#c9605d")
INK = "#84919d"
"""Colours that can be read on white and on near-black: the pictures have no background of their own."""


def _picture(name: str, lines: Mapping[str, Curve], x_label: str) -> str:
    """A plot as a PNG data address."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.3), dpi=144)
    axes = figure.add_axes((0.13, 0.18, 0.85, 0.78))  # fixed: laying out each picture costs more than drawing it
    scale = 1e-9 if name.endswith("_bytes") else 1.0
    for i, (label, (xs, ys)) in enumerate(lines.items()):
        colour, ys = COLOURS[i % len(COLOURS)], [y * scale for y in ys]
        if _noisy(ys):
            axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.35)
            ys = _smoothed(ys)
        text = label.replace("$", r"\$")  # a name, no formula
        axes.plot(xs, ys, color=colour, linewidth=1.7, label=text, marker="o" if len(xs) < 12 else "", markersize=3)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    _quiet(axes, x_label)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", transparent=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _noisy(ys: Sequence[float]) -> bool:
    """A long line that goes up and down much more than it gets anywhere: it is drawn faint, under its average."""
    travelled = sum(abs(b - a) for a, b in pairwise(ys))
    return len(ys) >= 40 and travelled > 2 * (max(ys) - min(ys))


def _smoothed(ys: Sequence[float]) -> list[float]:
    """A centred moving average over a twentieth of the curve, one-sided at its ends."""
    half = max(len(ys) // 40, 2)
    windows = ([y for y in ys[max(i - half, 0) : i + half + 1] if math.isfinite(y)] for i in range(len(ys)))
    return [sum(window) / len(window) if window else math.nan for window in windows]


def _quiet(axes: "Axes", x_label: str) -> None:
    """Thin grey axes, few ticks, a faint grid."""
    axes.set_xlabel(x_label, fontsize=8, color=INK, labelpad=2)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.locator_params(nbins=5)
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color=INK, alpha=0.22, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
        spine.set_alpha(0.5)
