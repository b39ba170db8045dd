"""The run directory: the files of one training run.

    config.toml  metrics.jsonl  perf.jsonl  samples.jsonl  health.jsonl  log.txt  checkpoints/  report.html

One process writes it at a time (a lock on `lock` that the kernel drops when the process dies).
"""

import contextlib
import fcntl
import hashlib
import os
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from penstock.errors import PenstockError, ResourceError, UserError, disk_trouble
from penstock.run import checkpoint
from penstock.run.versions import Versions, served_model

UNCLAIMED, UNFINISHED = ("lock", "log.txt"), "config.toml.tmp-"
"""Files of a run that was killed before it had written config.toml, and what another's name begins with: a directory
with only these counts as empty."""

SIGNATURE = "# sha256 of the lines above: "
"""What the last line of config.toml begins with: a changed bit may be another learning rate. Older runs have none."""


class RunDirectory:
    """An open run directory, from `create` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = _locked(path)
        self._log = (path / "log.txt").open("ab", buffering=0)

    @staticmethod
    def create(path: Path, config: dict[str, Any], command: str) -> "RunDirectory":
        """Makes the directory and writes config.toml. Raises UserError when it is not empty or cannot be written."""
        RunDirectory.refuse_used(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            directory = RunDirectory(path)
            for unfinished in path.glob(f"{UNFINISHED}*"):
                unfinished.unlink()
            checkpoint.write_whole(path / "config.toml", _signed({"command": command, **config}))
        except OSError as error:
            raise refused(f"--out {path}", error) from error
        return directory

    @staticmethod
    def refuse_used(path: Path) -> None:
        """Raises UserError when there is something at the path already."""
        try:
            used = path.exists() and (not path.is_dir() or any(not _unclaimed(file) for file in path.iterdir()))
        except OSError as error:
            raise refused(f"--out {path}", error) from error
        if used:
            hint = f"go on with it (penstock resume {path}), or " if (path / "config.toml").exists() else ""
            raise UserError(f"--out {path}: exists and is not empty; {hint}choose another directory.")

    @staticmethod
    def open(path: Path) -> "RunDirectory":
        """Opens a run to resume, and removes the unfinished files of a killed process."""
        RunDirectory.peek(path)
        try:
            directory = RunDirectory(path)
            if directory.checkpoints.exists():
                checkpoint.sweep(directory.checkpoints)
        except OSError as error:
            raise refused(str(path), error) from error
        return directory

    @staticmethod
    def peek(path: str | Path) -> dict[str, Any]:
        """The run's config.toml, `command` included. Raises UserError when there is none, or it has changed."""
        file = Path(path) / "config.toml"
        try:
            text = file.read_text(encoding="utf-8")
            flags, signature, checksum = text.partition(SIGNATURE)
            config = tomllib.loads(text)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"{path}: is no run directory (no config.toml in it); check the path.") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}).") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: is damaged ({error}); restore it, or start the run again.") from error
        if signature and checksum.strip() != _sha256(flags):
            raise UserError(
                f"{file}: has changed since penstock wrote it (sha256). Put it back, or, if you have changed it and it "
                f"shall be so, remove its last line ({SIGNATURE.strip()} ...)."
            )
        if not isinstance(config.get("command"), str):
            raise UserError(f'{file}: does not say which command made this run; add a line like: command = "sft"')
        return config

    def amend(self, changes: dict[str, Any]) -> None:
        """Changes flags in config.toml; None removes one."""
        config = {**self.peek(self.path), **changes}
        text = _signed({name: value for name, value in config.items() if value is not None})
        checkpoint.write_whole(self.path / "config.toml", text)

    def note(self, text: str) -> None:
        """A line in log.txt only. A full disk is no error here; the metrics and the checkpoints report it."""
        with contextlib.suppress(OSError):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Closes the log and releases the lock."""
        self._log.close()
        os.close(self._lock)


def resolve_model(source: str, which: str = "model") -> str:
    """A run directory's best (or newest) weights of that name; anything else is returned unchanged.

    One checkpoint of a run may be named too (RUN/checkpoints/step-000100), and is verified. `which` falls back to
    `model`, so that a critic can start from a reward run as well as from a ppo run. A folder of versions is the one
    that it serves.
    """
    if Versions.exist(source):
        source = served_model(source)[1]
    path = Path(source)
    if (path / "config.toml").exists():
        chosen = checkpoint.trusted(path / "checkpoints", lambda text: print(text, file=sys.stderr))
        if chosen is None:
            raise UserError(f"{source}: this run has no checkpoint yet; let it finish, or penstock resume it.")
    elif checkpoint.NAME.fullmatch(path.name) and (path / checkpoint.MANIFEST).exists():
        try:
            checkpoint.verify(chosen := path)
        except checkpoint.DamagedError as error:
            raise UserError(f"{error}. Use the run directory itself: it finds the newest whole checkpoint.") from error
    else:
        return source
    return str(chosen / which if (chosen / which).exists() else chosen / "model")


def refused(where: str, error: OSError) -> PenstockError:
    """The error to raise when the operating system cannot write to a path."""
    if trouble := disk_trouble(error):
        reason, remedy = trouble
        return ResourceError(f"{where}: {reason}. {remedy}, and try again.")
    return UserError(
        f"{where}: cannot be written ({error.strerror}); choose another directory or mend its permissions."
    )


def _unclaimed(file: Path) -> bool:
    return file.name in UNCLAIMED or file.name.startswith(UNFINISHED)


def _signed(config: dict[str, Any]) -> str:
    """The text of a config.toml."""
    text = tomli_w.dumps(config)
    return f"{text}{SIGNATURE}{_sha256(text)}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _locked(path: Path) -> int:
    handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"{path}: another process is writing this run; wait for it, or stop it first.") from error
    return handle
