"""Progress of a run: live lines in a terminal or a notebook, one plain line per step elsewhere, or JSON."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from penstock.run.metrics import to_json

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    # metric, label, format: shown in this order where the stage has them
    ("loss", "loss", "{:7.4f}".format),
    ("heldout/loss", "held-out loss", "{:7.4f}".format),
    ("accuracy", "accuracy", "{:5.3f}".format),
    ("heldout/accuracy", "held-out accuracy", "{:5.3f}".format),
    ("objective/scores", "score", "{:+7.3f}".format),
    ("objective/scores_std", "std", "{:6.3f}".format),
    ("heldout/scores", "held-out score", "{:+7.3f}".format),
    ("objective/used_scores", "used", "{:+7.3f}".format),
    ("val/missing_eos_rate", "cut", "{:5.1%}".format),
    ("objective/kl", "kl", "{:7.3f}".format),
    ("policy/entropy_avg", "entropy", "{:6.3f}".format),
    ("policy/clipfrac_avg", "clipped", "{:5.1%}".format),
    ("val/explained_variance", "explained", "{:+6.2f}".format),
    ("objective/response_length", "length", "{:5.1f}".format),
    ("lr", "lr", "{:.1e}".format),
    ("perf/tokens_per_second", "tok/s", "{:7.0f}".format),
    ("perf/device_peak_bytes", "device GB", lambda v: f"{v / 1e9:6.2f}"),
    ("perf/host_peak_bytes", "host GB", lambda v: f"{v / 1e9:6.2f}"),
)


REFRESHES = 4
"""Times a second that live lines change."""


class Progress:
    """Shows steps start + 1 .. total, unless `quiet`. `note` gets the plain line too, for log.txt."""

    def __init__(
        self, start: int, total: int, title: str, note: Callable[[str], None], *, json: bool = False,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        self.total, self.title, self.note, self.json, self.quiet = total, title, note, json, quiet
        self._start, self._began = start, time.perf_counter()
        self._widths: dict[str, int] = {}
        self._live = self._cell = None
        self.notice = ""
        if json or quiet:
            return
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            options: Any = {"refresh_per_second": REFRESHES, "transient": False}
            self._live = Live(_Notice(self), console=Console(stderr=True), **options)
            self._live.start()
        elif in_notebook():
            self._cell = _Cell()

    def update(self, step: int, stats: Mapping[str, float]) -> None:
        if self.json:
            print(to_json({"step": step, "total": self.total, **stats}), flush=True)
        fields = self._fields(stats)
        left = clock(self.seconds_per_step(step) * (self.total - step))
        numbers = "  ".join(f"{label} {value}" for label, value in fields)
        plain = f"{self.title} {step:>{len(str(self.total))}}/{self.total}  {numbers}  left {left}"
        self.note(plain)
        if self._live is not None:
            self._live.update(self._screen(step, fields, left))
        elif self._cell is not None:
            self._cell.update(plain, self._page(step, fields, left))
        elif not self.json and not self.quiet:
            print(plain, file=sys.stderr, flush=True)

    def announce(self, text: str) -> bool:
        """Shows a line below the numbers from the next refresh on; False where nothing is refreshed. For a signal's
        handler: it writes nothing."""
        self.notice = text
        return self._live is not None

    def seconds_per_step(self, step: int) -> float:
        """The mean so far, evaluations and checkpoints included, when `step` has just ended."""
        return (time.perf_counter() - self._began) / max(step - self._start, 1)

    def close(self) -> None:
        """Leaves the terminal as it was, with the last step's lines."""
        if self._live is not None:
            self._live.stop()
        if self._cell is not None:
            self._cell.show()

    def _fields(self, stats: Mapping[str, float]) -> list[tuple[str, str]]:
        """(label, text) of each column this run has shown so far; a dash where this step did not measure it."""
        fields = []
        for name, label, form in COLUMNS:
            value = stats.get(name)
            if value is not None:
                text = form(value)
                self._widths[name] = max(self._widths.get(name, 0), len(text))
            elif name in self._widths:
                text = "-"
            else:
                continue
            fields.append((label, f"{text:>{self._widths[name]}}"))
        return fields

    def _screen(self, step: int, fields: list[tuple[str, str]], left: str) -> "RenderableType":
        from rich.columns import Columns
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.total, completed=step, width=32),
            f"step {step} of {self.total}",
            f"{left} left",
        )
        numbers = [Text.assemble((f"{label} ", "dim"), value.strip()) for label, value in fields]
        return Group(head, Columns(numbers, padding=(0, 2), equal=True), _Notice(self))

    def _page(self, step: int, fields: list[tuple[str, str]], left: str) -> str:
        """The same as HTML."""
        numbers = " &nbsp; ".join(f"<small>{label}</small> {value.strip()}" for label, value in fields)
        bar = f'<progress value="{step}" max="{self.total}"></progress>'
        return f"<b>{self.title}</b> {bar} step {step} of {self.total}, {left} left<br>{numbers}"


class _Notice:
    """The line of `announce`, read anew at each refresh."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __rich_console__(self, console: Any, options: Any) -> "Iterator[RenderableType]":
        if self.progress.notice:
            yield self.progress.notice


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process's code: Jupyter's own, an editor's or Colab's."""
    shell = sys.modules.get("ipykernel.zmqshell")
    return shell is not None and shell.ZMQInteractiveShell.initialized()


class _Cell:
    """Lines in a notebook's output, written over. rich's Live would need ipywidgets in the kernel and the front end."""

    def __init__(self) -> None:
        from IPython.display import display

        self._content = {"text/plain": ""}
        self._handle = display(self._content, raw=True, display_id=True)
        self._due = 0.0

    def update(self, plain: str, html: str) -> None:
        self._content = {"text/plain": plain, "text/html": html}
        if time.perf_counter() >= self._due:
            self.show()

    def show(self) -> None:
        """The newest content."""
        self._handle.update(self._content, raw=True)
        self._due = time.perf_counter() + 1 / REFRESHES


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, always as wide."""
    return f"{int(seconds) // 3600:2d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
