"""What a run shows on a terminal, without colours where NO_COLOR asks for that (no-color.org)."""

import io
import re
import sys

import pytest

from penstock.run.progress import Progress

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3|4|9|10)\d(?:;\d+)*m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_signal_is_answered_with_stays_on_the_screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(0, 2, "ppo", lambda line: None)
    assert progress.announce("SIGINT: stops")  # before the first step has been shown
    progress._live.refresh()
    assert "SIGINT: stops" in sys.stderr.getvalue()
    progress.update(1, {"loss": 1.0})
    progress._live.refresh()
    last = sys.stderr.getvalue().rpartition("step 1 of 2")[2]
    progress.close()
    assert "SIGINT: stops" in last
    assert not Progress(0, 2, "ppo", lambda line: None, quiet=True).announce("x")  # nothing is refreshed


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_is_kept_to(monkeypatch, no_color, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    lines: list[str] = []
    progress = Progress(0, 2, "sft", lines.append)
    progress.update(1, {"loss": 1.0, "lr": 1e-4})
    progress.close()
    shown = sys.stderr.getvalue()
    assert "loss" in shown
    assert bool(COLOUR.search(shown)) == coloured
    assert not COLOUR.search(lines[0])
