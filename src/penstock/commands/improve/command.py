"""`penstock improve`: one round, a round every day, or a person's word on versions. What trains is imported by a round.

A schedule runs each round in a process of its own, so that its memory is free between rounds; rounds are nice to what
serves beside them.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from penstock.commands.align.config import seconds_of
from penstock.commands.improve.config import ImproveConfig
from penstock.commands.improve.text import version_text
from penstock.errors import UserError
from penstock.flags import SECRETS, flags_of, from_dict, to_dict, with_absolute_paths, with_secrets
from penstock.run.versions import Versions

SETTINGS = "improve.toml"
OWN = ("run", "model", "every", "rollback", "to", "trust", "distrust", "database", "json", "quiet")
"""Flags of one start, which are not kept: a database's address has a password in it."""
FIXED = ("heldout", "seed")
"""Flags of the first round that no later one can change: what was held out must stay so."""
NICE = 10


def improve(config: ImproveConfig) -> int | None:
    """Does what the flags say; the exit code where a scheduled round failed."""
    say = (lambda text: None) if config.quiet else functools.partial(print, file=sys.stderr, flush=True)
    if config.every is not None:
        return scheduled(config, say)
    words = config.rollback or config.to is not None or config.trust or config.distrust
    if words:
        print(spoken(config, Versions(existing(config))))
        return None
    config, versions = settled(config)
    if os.nice(0) < NICE:
        os.nice(NICE - os.nice(0))
    from penstock.commands.improve.rounds import improve_once  # late: it imports torch, and a schedule needs none

    row = improve_once(config, versions, say)
    if row is None:
        return None
    print(json.dumps(row) if config.json else version_text(row, versions))
    return None


def existing(config: ImproveConfig) -> Path:
    """The folder of versions. Raises UserError where there is none."""
    if not Versions.exist(config.run):
        raise UserError(f"{config.run}: is no folder of versions; its first round makes one, and takes --model.")
    return Path(config.run)


def settled(config: ImproveConfig) -> tuple[ImproveConfig, Versions]:
    """The flags with those that were kept, and the versions: a new folder at the first round. Raises UserError."""
    from penstock.run.checkpoint import write_whole  # late: torch

    path, start = Path(config.run), with_absolute_paths(to_dict(config)).get("model")
    given = {name: value for name, value in with_absolute_paths(to_dict(config)).items() if name not in OWN}
    given["data_dir"] = str(Path(config.data_dir).absolute())
    given["regression"] = [str(Path(text).absolute()) for text in config.regression]
    if Versions.exist(path):
        versions, kept = Versions(path), saved(path)
        if start is not None and start != versions.numbered[0]["model"]:
            if len(versions.numbered) > 1:
                text = f"{path} has begun with {versions.numbered[0]['model']}; leave it out, or name a new RUN."
                raise UserError(f"--model {config.model}: {text}")
            versions = Versions.begin(path, start)  # no round has begun from the other
        default = {flag.name: flag.default for flag in flags_of(ImproveConfig)}
        changed = {name: given[name] for name in given if getattr(config, name) != default[name]}
        for name in FIXED:
            if name in changed and changed[name] != kept[name]:
                raise UserError(f"--{name}: {path} holds votes out by {kept[name]}, and that stays in all rounds.")
        given = given | kept | changed
    else:
        if start is None:
            raise UserError(f"{path}: is no folder of versions yet; give --model, the model to start from.")
        if path.exists() and any(path.iterdir()):
            raise UserError(f"{path}: exists and is not empty; name a new folder for the versions.")
        versions = Versions.begin(path, start)
    write_whole(path / SETTINGS, tomli_w.dumps(given))
    own = {name: value for name, value in to_dict(config).items() if name in OWN}
    return from_dict(ImproveConfig, {**given, **own}), versions


def saved(path: Path) -> dict[str, Any]:
    """The flags of the rounds before. Raises UserError where the file is damaged."""
    try:
        return tomllib.loads((path / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / SETTINGS}: cannot be read ({error}); mend it, or remove it and give flags."
        ) from error


def spoken(config: ImproveConfig, versions: Versions) -> str:
    """A person's word: which version is served, whose votes count. Returns what has changed."""
    lines = []
    if config.to is not None and not config.rollback:
        raise UserError("--to: says where to roll back to; add --rollback.")
    if config.rollback:
        number = versions.before() if config.to is None else config.to
        versions.serve(number, "rolled back from the command line")
        lines.append(f"version {number} is served from now on")
    for number in config.trust:
        versions.trust(number, True, "trusted from the command line")
        lines.append(f"votes that came with version {number} are trusted")
    for number in config.distrust:
        versions.trust(number, False, "distrusted from the command line")
        lines.append(f"votes that came with version {number} are never learned again")
        if number in versions.learned(versions.current):
            lines.append(f"version {versions.current}, which is served, has learned them: --rollback takes it back")
    return "\n".join(lines)


def scheduled(config: ImproveConfig, say: Any) -> int:
    """A round each --every, in a process of its own, until a signal; a round that is running is stopped with it."""
    seconds, child, stop = seconds_of(str(config.every)), None, False
    environment = with_secrets(database=config.database)

    def on_signal(signum: int, frame: object) -> None:
        nonlocal stop
        stop = True
        if child is not None:
            child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    code = 0
    while not stop:
        began = time.monotonic()
        child = subprocess.Popen([sys.executable, "-m", "penstock", "improve", *words(config)], env=environment)
        code = child.wait()
        child = None
        say(f"the round ended with exit code {code}; the next begins {config.every} after it began")
        if code == UserError.exit_code:
            return code  # the next one would end the same way
        while not stop and (left := began + seconds - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
    return code


def words(config: ImproveConfig) -> list[str]:
    """The command line of one round of a schedule, but for secrets."""
    default = {flag.name: flag.default for flag in flags_of(ImproveConfig)}
    line = [config.run]
    for flag in flags_of(ImproveConfig):
        value = getattr(config, flag.name)
        if flag.name in ("run", "every", *SECRETS) or value == default[flag.name]:
            continue
        line.append(flag.spelling if value is not False else f"--no-{flag.spelling[2:]}")
        if not isinstance(value, bool):
            line += map(str, value if flag.several else [value])
    return line
