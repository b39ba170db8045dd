"""Between the command line, TOML files and the dataclasses of config.py. No torch in here."""

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from penstock.errors import UserError

Config = TypeVar("Config")

PATHS = ("model", "actor", "reward", "critic", "reference", "data", "ptx_data", "normalize", "reward_fn", "adapter")
"""Flags that may name something on this machine."""
SECTIONS = ("data", "run", "optim", "peft")


def field_names(config_class: type) -> list[str]:
    """All flag names of a command, groups flattened."""
    names: list[str] = []
    for one in dataclasses.fields(config_class):
        kind: Any = one.type
        names += field_names(kind) if _is_group(kind) else [one.name]
    return names


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved flags, flat, without the unset ones: what config.toml holds."""
    flat: dict[str, Any] = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if _is_group(one.type):
            flat |= to_dict(value)
        elif one.name != "config" and not (value is None and one.default is None):
            flat[one.name] = "none" if value is None else list(value) if isinstance(value, tuple) else value
    return flat


def with_absolute_paths(flat: dict[str, Any]) -> dict[str, Any]:
    """The same flags, so that they mean the same from any directory; what is no path here (a hub id) stays."""

    def absolute(text: str) -> str:
        path, colon, name = text.rpartition(":")
        if colon and Path(path).is_file():  # file.py:name
            return f"{Path(path).absolute()}:{name}"
        return str(Path(text).absolute()) if Path(text).exists() else text

    return {
        name: value
        if name not in PATHS
        else absolute(value)
        if isinstance(value, str)
        else [absolute(x) for x in value]
        for name, value in flat.items()
    }


def from_dict(config_class: type[Config], flat: dict[str, Any]) -> Config:
    """Inverse of `to_dict`. Raises UserError for a key that is no flag, with the nearest name."""
    return parse(config_class, to_arguments(config_class, flat, "config.toml"))


def to_arguments(config_class: type, flat: dict[str, Any], where: str) -> list[str]:
    """A TOML table as command-line arguments, so that both are checked by the same parser."""
    known = field_names(config_class)
    arguments: list[str] = []
    for key, value in flat.items():
        name = key.replace("-", "_")
        if isinstance(value, dict) and name in SECTIONS:  # it only groups: names are flat
            arguments += to_arguments(config_class, value, where)
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}."
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments += [flag] if value else ["--no-" + flag[2:]]
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)] if value else []
        else:
            arguments += [flag, str(value)]
    return arguments


def parse(config_class: type[Config], arguments: Sequence[str], command: str = "") -> Config:
    """Flags (and the TOML file that --config names) to one checked dataclass. Exits 2 with the nearest flag's name."""
    import tyro

    arguments = list(arguments)
    path = _value_of("--config", arguments)
    if path is not None:
        table = _read_toml(path)
        made_by = table.pop("command", command)  # a run's own config.toml says it
        if made_by != command:
            raise UserError(f"--config {path}: is of penstock {made_by}, and this is penstock {command}.")
        arguments = _unless_given(to_arguments(config_class, table, path), arguments)
    may_be_none = _flags_that_may_be_none(config_class)
    arguments = [
        "None" if one.lower() == "none" and i and arguments[i - 1] in may_be_none else one
        for i, one in enumerate(arguments)
    ]
    return tyro.cli(
        config_class,
        args=arguments,
        prog=f"penstock {command}".strip(),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _flags_that_may_be_none(config_class: type) -> set[str]:
    """Numbers that `none` turns off; for text it is a word like any other."""
    found: set[str] = set()
    for one in dataclasses.fields(config_class):
        kind: Any = one.type
        if _is_group(kind):
            found |= _flags_that_may_be_none(kind)
        elif isinstance(kind, types.UnionType) and types.NoneType in kind.__args__ and str not in kind.__args__:
            found.add("--" + one.name.replace("_", "-"))
    return found


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--config {path}: {error.strerror}; give a TOML file with flags as keys (lr = 1e-5)."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid TOML: {error}.") from error


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for i, one in enumerate(arguments):
        if one == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if one.startswith(flag + "="):
            return one.split("=", 1)[1]
    return None


def _unless_given(from_file: list[str], given: list[str]) -> list[str]:
    """File arguments, without those that the command line gives too, then the command line."""
    names = {one.split("=", 1)[0].removeprefix("--no-").removeprefix("--").replace("_", "-") for one in given}
    kept: list[str] = []
    keep = True
    for one in from_file:
        if one.startswith("--"):
            keep = one.removeprefix("--no-").removeprefix("--") not in names
        if keep:
            kept.append(one)
    return kept + given


def _is_group(kind: object) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)
