"""Rounds of `penstock improve` that the page begins: a process of its own each, which outlives the server."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from penstock.flags import with_secrets
from penstock.run.versions import Versions
from penstock.serve.config import ServeConfig

LOG = "round.log"
"""In the folder of versions: what the newest round that the page began has said."""


class Rounds:
    """The processes by folder of versions."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def begin(self, source: str) -> None:
        """Begins a round, or goes on with one. Raises ValueError where one runs."""
        if self.runs(source):
            raise ValueError("a round is running already; wait for it, or stop it.")
        place = ["--data-dir", str(Path(self._config.data_dir).absolute())]
        command = [sys.executable, "-m", "penstock", "improve", source, *place]
        with (Path(source) / LOG).open("wb") as log:
            self._running[source] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=with_secrets(database=self._config.database),
            )  # fmt: skip

    def stop(self, source: str) -> None:
        """Has a round end at its next step, after a checkpoint. Raises ValueError where none of the page's runs."""
        process = self._running.get(source)
        if process is None or process.poll() is not None:
            raise ValueError("no round runs that this page began; one of the command line ends by Ctrl-C there.")
        os.killpg(process.pid, signal.SIGTERM)

    def runs(self, source: str) -> bool:
        """Whether a round runs: one of the page's, or any other process's."""
        process = self._running.get(source)
        return (process is not None and process.poll() is None) or Versions(source).busy

    def log(self, source: str) -> str:
        """The last lines that the page's newest round has said."""
        try:
            text = (Path(source) / LOG).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        lines = [line.rpartition("\r")[2] for line in text.splitlines()]
        return "\n".join(lines[-12:])
