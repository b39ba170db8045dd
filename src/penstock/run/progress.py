"""The line that a person watches: one live line in a terminal, one plain line per step elsewhere, or JSON."""

import json
import sys
import time
from collections.abc import Callable, Mapping

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    # metric, label, format: the numbers people look for, in this order, those that the stage has
    ("loss", "loss", "{:7.4f}".format),
    ("heldout/loss", "held-out", "{:7.4f}".format),
    ("accuracy", "accuracy", "{:5.3f}".format),
    ("heldout/accuracy", "held-out", "{:5.3f}".format),
    ("objective/scores", "score", "{:+7.3f}".format),
    ("objective/scores_std", "std", "{:6.3f}".format),
    ("objective/kl", "kl", "{:7.3f}".format),
    ("policy/entropy_avg", "entropy", "{:6.3f}".format),
    ("policy/clipfrac_avg", "clipped", "{:5.1%}".format),
    ("val/explained_variance", "explained", "{:+6.2f}".format),
    ("objective/response_length", "length", "{:5.1f}".format),
    ("lr", "lr", "{:.1e}".format),
    ("perf/tokens_per_second", "tok/s", "{:7.0f}".format),
    ("perf/device_peak_bytes", "device GB", lambda v: f"{v / 1e9:5.2f}"),
    ("perf/host_peak_bytes", "host GB", lambda v: f"{v / 1e9:5.2f}"),
)


class Progress:
    """Shows steps of `total`. `note` receives the plain line too (log.txt)."""

    def __init__(self, start: int, total: int, title: str, note: Callable[[str], None], *, json: bool = False) -> None:
        self.total, self.title, self.note, self.json = total, title, note, json
        self._start, self._began = start, time.perf_counter()
        self._live = None
        if sys.stderr.isatty() and not json:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=False)
            self._live.start()

    def update(self, step: int, stats: Mapping[str, float]) -> None:
        """Shows one step's numbers."""
        if self.json:
            print(json.dumps({"step": step, "total": self.total, **stats}), flush=True)
        shown = [(label, form(stats[name])) for name, label, form in COLUMNS if stats.get(name) is not None]
        plain = f"{self.title} {step:>{len(str(self.total))}}/{self.total}  " + "  ".join(f"{k} {v}" for k, v in shown)
        self.note(plain)
        if self._live is not None:
            self._live.update(self._table(step, shown))
        elif not self.json:
            print(plain, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def _table(self, step: int, shown: list[tuple[str, str]]) -> object:
        from rich.table import Table

        done, spent = step - self._start, time.perf_counter() - self._began
        left = spent / max(done, 1) * (self.total - step)
        table = Table(
            title=f"{self.title}: step {step} of {self.total}, {left / 60:.1f} min left", title_justify="left"
        )
        for label, _ in shown:
            table.add_column(label, justify="right", no_wrap=True)
        table.add_row(*(value for _, value in shown))
        return table
