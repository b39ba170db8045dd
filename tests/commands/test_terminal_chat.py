"""`penstock chat` on a terminal of its own: what is pasted, and what the terminal cannot show."""

import codecs
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from penstock import cli
from penstock.commands.generate import as_json
from penstock.data.toyland import save_tokenizer
from tests.conftest import PATIENCE


class Terminal:
    """A command whose standard streams are a terminal."""

    def __init__(self, *words, encoding):
        self.master, slave = pty.openpty()
        self.encoding, self.shown = encoding, ""
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "penstock", *words]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)

    def type(self, text):
        os.write(self.master, text.encode(self.encoding))

    def read_until(self, pattern):
        """What is shown until the pattern matches, which is then behind us."""
        while not (match := re.search(pattern, self.shown)):
            assert select.select([self.master], [], [], PATIENCE)[0], self.shown
            try:
                self.shown += os.read(self.master, 65536).decode(self.encoding)
            except OSError:  # the other end is closed
                raise AssertionError(self.shown) from None
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before


def test_pasted_lines_are_one_message_and_a_latin_1_terminal_shows_what_it_can(tiny_model):
    model = tiny_model(vocab_size=400, max_length=256)
    save_tokenizer(Path(model), ["What is a penstock? The gated pipe that feeds a turbine."], vocab_size=400)
    terminal = Terminal("chat", model, "--device", "cpu", "--max-new-tokens", "60", "--temperature", "1.3",
                        encoding="latin-1")  # fmt: skip
    assert "\x1b[?2004h" in terminal.read_until("you> ")  # from here on it marks what is pasted
    terminal.type("\x1b[200~def weir():\n\n    pass\x1b[201~, what is \xfc?\n")
    shown = terminal.read_until("you> ")
    assert "^[[200~" not in shown
    assert len(shown.partition("\xfc?")[2].strip()) > 10, "no answer"
    # One answer to three lines; what is typed after it is the next message.
    terminal.type("\x1b[200~/reset\n\x1b[201~\n")
    assert "\ufffd" not in terminal.read_until("you> ")
    for _ in range(6):  # what a random model says is in no alphabet: some of it no latin-1 terminal has
        terminal.type("more\n")
        shown += terminal.read_until("you> ")
    assert "?" in shown.replace("\xfc?", "")
    assert "Error" not in shown
    terminal.type("/quit\n")
    assert "\x1b[?2004l" in terminal.read_until(r"\[\?2004l")
    assert terminal.process.wait(PATIENCE) == 0
    assert termios.tcgetattr(terminal.master)[3] & termios.ECHOCTL  # as it was


@pytest.mark.parametrize(("text", "encoding", "shown"), [
    ("plain \u00fc", "latin-1", "plain \u00fc"),
    ("\u201cna\u00efve\u201d \u2014 \u20ac5\u2026", "latin-1", '"na\u00efve" - EUR5...'),
    ("caf\u00e9 \u0142\u00f3d\u017a", "ascii", "cafe ?odz"), ("\u6c34 \U0001f469\u200d\U0001f680!", "latin-1", "? ??!"),
    ("e\u0301", "ascii", "e"), ("\ufb01sh \u2192 \u00bd", "ascii", "fish -> 1/2"), ("\u20ac", "iso8859-15", "\u20ac"),
])  # fmt: skip
def test_letters_that_a_terminal_lacks_are_replaced_by_the_nearest(text, encoding, shown):
    codecs.register_error("nearest", cli._nearest)
    assert text.encode(encoding, "nearest").decode(encoding) == shown


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "ascii"])
def test_lines_of_json_lose_nothing_whatever_stdout_is(monkeypatch, tmp_path, encoding):
    line = {"response": "\u20ac \u6c34 \U0001f30a \u00fc \ufffd"}
    with open(tmp_path / "out", "w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        print(as_json(line))
    assert json.loads((tmp_path / "out").read_text(encoding=encoding)) == line
