"""A round again and again: its command lines, and how a signal ends it."""

import os
import signal
import subprocess

from penstock.commands.improve import command
from penstock.commands.improve.config import ImproveConfig
from penstock.flags import parse

SECRET = "postgresql://votes:password@localhost/votes"


def test_the_command_line_of_a_round_is_read_as_the_same_flags():
    config = ImproveConfig(
        run="runs/live", model="gpt2", data=("a.jsonl", "b.jsonl"), regression=("facts.jsonl",), every="24h",
        trust=(2, 3), apply_chat_template=False, quiet=True, margin=0.2, set=("dpo.beta=0.3",), device="cpu",
    )  # fmt: skip
    read = parse(ImproveConfig, command.words(config), "improve", "run")
    assert read == ImproveConfig(**{**config.__dict__, "every": None})


def test_a_signal_ends_the_schedule_and_the_round_that_runs(monkeypatch):
    started, databases, signals = [], [], []
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    class Round:
        """Ends well the first time; the second time a signal comes while it runs."""

        def __init__(self, words, env):
            started.append(words)
            databases.append(env["PENSTOCK_DATABASE"])

        def wait(self):
            if len(started) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return 143 if signals else 0

        def send_signal(self, number):
            signals.append(number)

    monkeypatch.setattr(subprocess, "Popen", Round)
    try:
        code = command.improve(ImproveConfig(run="runs/live", every="1s", quiet=True, database=SECRET))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (code, signals) == (143, [signal.SIGTERM])
    assert [words[-2:] for words in started] == [["runs/live", "--quiet"]] * 2
    assert databases == [SECRET] * 2  # and on no command line


def test_a_round_that_a_person_must_mend_ends_the_schedule(monkeypatch, tmp_path):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(subprocess, "Popen", lambda words, env: type("Round", (), {"wait": lambda self: 2})())
    try:
        assert command.improve(ImproveConfig(run=str(tmp_path), every="24h", quiet=True)) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
