"""Between the command line, TOML files and the dataclasses of config.py: parsing, writing and --help. No torch in here.

A flag is a field of a config, or of a group of flags in it; all names are flat. What commands there are, and what a
flag does, is known elsewhere.
"""

import ast
import dataclasses
import difflib
import functools
import shutil
import sys
import textwrap
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from penstock.errors import UserError

Config = TypeVar("Config")

PATHS = ("model", "actor", "reward", "critic", "reference", "data", "ptx_data", "normalize", "reward_fn", "adapter")
"""Flags that may name something on this machine."""
COMMON = {
    "reward", "reward_fn", "critic", "lr", "steps", "epochs", "batch_size", "max_length", "max_new_tokens", "strategy",
    "device_memory", "device", "dtype", "lora",
}  # fmt: skip
"""Where a command's flags come in groups, --help shows these first."""
METAVARS = {
    "MODEL": ("model", "actor", "critic", "reference", "critic_model"),
    "RUN": ("run", "reward", "adapter"),
    "FILE": ("data", "files", "ptx_data", "normalize", "profile", "json"),
    "NAME": ("strategy",),
    "FILE.py:NAME": ("reward_fn",),
    "DIR": ("data_dir",),
    "PATH": ("out", "disk"),
    "SIZE": ("device_memory", "host_memory", "chunk_size", "activation_budget", "link", "disk_read", "disk_write",
             "host_bandwidth", "network"),
}  # fmt: skip
"""What --help calls the value of a flag, where its type says too little."""


@dataclass(frozen=True)
class Flag:
    """One flag of a command, whatever group it is in."""

    name: str
    """The field's name: batch_size for --batch-size."""
    type: Any
    """int, float, str or bool: of the value, or of each value."""
    choices: tuple[str, ...]
    """The words that it takes; empty where it takes any."""
    several: bool
    """True where it takes any number of values."""
    optional: bool
    """True where `none` may be given for a number."""
    default: Any
    """MISSING where the flag is required."""
    text: str
    """The field's docstring."""
    group: str
    """The title of its group, from the docstring; empty for a field of the config itself."""

    @property
    def spelling(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def metavar(self) -> str:
        if self.type is bool:
            return ""
        word = next((word for word, names in METAVARS.items() if self.name in names and self.type is str), "")
        word = "|".join(self.choices) or word or {int: "N", float: "X", str: "TEXT"}[self.type]
        return f"{word} [{word} ...]" if self.several else word


def flags_of(config_class: type) -> list[Flag]:
    """All flags of a command, groups flattened, in the order in which they are declared."""
    return list(_flags_of(config_class, None, ""))


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved flags, flat, without the unset ones: what config.toml holds."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= to_dict(value)
        elif not (value is None and field.default is None):
            flat[field.name] = "none" if value is None else list(value) if isinstance(value, tuple) else value
    return flat


def with_absolute_paths(flat: dict[str, Any]) -> dict[str, Any]:
    """The same flags, so that they mean the same from any directory; text that names no file (a hub id) stays."""

    def absolute(text: str) -> str:
        path, colon, name = text.rpartition(":")
        if colon and Path(path).is_file():  # file.py:name
            return f"{Path(path).absolute()}:{name}"
        return str(Path(text).absolute()) if Path(text).exists() else text

    paths = {name: flat[name] for name in PATHS if name in flat}
    return flat | {
        name: absolute(value) if isinstance(value, str) else [absolute(path) for path in value]
        for name, value in paths.items()
    }


def from_dict(config_class: type[Config], flat: Mapping[str, Any]) -> Config:
    """Inverse of `to_dict`. Raises UserError for a key that is no flag, with the nearest name."""
    return _build(config_class, _from_table(config_class, flat, "config.toml"))


def parse(config_class: type[Config], arguments: Sequence[str], command: str = "", positional: str = "") -> Config:
    """Flags, and the TOML file that --config names, as one checked dataclass.

    Words that belong to no flag are values of the flag `positional`. Raises UserError, with the nearest flag's name.
    """
    values = _from_words(config_class, arguments, command, positional)
    path = values.pop("config", None)
    if path is not None:
        table = _read_toml(path)
        made_by = table.pop("command", command)  # a run's own config.toml names its command
        if made_by != command:
            raise UserError(f"--config {path}: is of penstock {made_by}, and this is penstock {command}.")
        values = _from_table(config_class, table, path) | values
    missing = [flag.spelling for flag in flags_of(config_class) if flag.default is MISSING and flag.name not in values]
    if missing:
        be = "is" if len(missing) == 1 else "are"
        raise UserError(f"{', '.join(missing)} {be} missing; penstock {command} --help shows an example.")
    return _build(config_class, values)


def usage(config_class: type, command: str, positional: str = "") -> str:
    """The command line in short: the positional, the required flags, and that there are more."""
    required = [flag for flag in flags_of(config_class) if flag.default is MISSING and flag.name != positional]
    words = [f"{flag.spelling} {flag.metavar}".rstrip() for flag in required]
    if positional:
        words.insert(0, _flag(config_class, positional).metavar)
    return " ".join(["penstock", command, *words])


def help_text(config_class: type, command: str, example: str, positional: str = "") -> str:
    """What `penstock COMMAND --help` prints: an example, the required and the common flags, then the groups."""
    flags = flags_of(config_class)
    grouped = any(flag.group for flag in flags)
    sections: dict[str, list[Flag]] = {"Required:": [], "Common flags:": [], "Flags:": []}
    for flag in flags:
        title = flag.group or "Flags:"
        if flag.default is MISSING:
            title = "Required:"
        elif grouped and flag.name in COMMON:
            title = "Common flags:"
        sections.setdefault(title, []).append(flag)
    width = min(shutil.get_terminal_size().columns, 120)
    about = [textwrap.fill(" ".join(part.split()), width) for part in (config_class.__doc__ or "").split("\n\n")]
    flags_word = " [flags]" * any(flag.default is not MISSING for flag in flags)
    lines = [f"usage: {usage(config_class, command, positional)}{flags_word}", "", *about]
    lines += ["", "Example:", *(f"  {line}" for line in example.splitlines())]
    for title, members in sections.items():
        if members:
            lines += ["", title]
        for flag in members:
            lines += _help_lines(flag, width, positional)
    if flags:
        lines += ["", "--config FILE.toml reads these flags from a file; the command line wins over it."]
    return "\n".join(lines)


# --- declarations ---------------------------------------------------------------------------------------------------


def _flags_of(config_class: type, template: Any, group: str) -> Iterator[Flag]:
    """The flags of a dataclass; defaults are those of `template`, an instance of it, where there is one."""
    for field in dataclasses.fields(config_class):
        value: Any = field.type
        default = field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        if template is not None:
            default = getattr(template, field.name)
        if _is_group(value):
            yield from _flags_of(value, None if default is MISSING else default, _title(value))
            continue
        optional = get_origin(value) in (types.UnionType, Union)  # Literal[...] | None is of the second
        if optional:
            value = next(part for part in get_args(value) if part is not types.NoneType)
        several, choices = get_origin(value) is tuple, get_args(value) if get_origin(value) is Literal else ()
        plain = str if several or choices else value
        owner = next(base for base in config_class.__mro__ if field.name in _docstrings(base))
        title = group if owner is config_class else _title(owner)
        yield Flag(field.name, plain, choices, several, optional, default, _docstrings(owner)[field.name], title)


def _title(group: type) -> str:
    return (group.__doc__ or "").rstrip(".") + ":"


@functools.cache
def _docstrings(config_class: type) -> dict[str, str]:
    """The string under each field of a dataclass, read from its source."""
    source = Path(str(sys.modules[config_class.__module__].__file__)).read_text(encoding="utf-8")
    classes = {node.name: node.body for node in _parsed(source).body if isinstance(node, ast.ClassDef)}
    texts: dict[str, str] = {}
    for declaration, text in pairwise(classes[config_class.__name__]):
        if isinstance(declaration, ast.AnnAssign) and isinstance(text, ast.Expr):
            texts[ast.unparse(declaration.target)] = " ".join(ast.literal_eval(text.value).split())
    return texts


@functools.cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _is_group(annotation: object) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _flag(config_class: type, name: str) -> Flag:
    return next(flag for flag in flags_of(config_class) if flag.name == name)


def _build(config_class: type[Config], values: Mapping[str, Any], template: Any = None) -> Config:
    """The dataclass with these values; those of `template`, and then its own defaults, for the others."""
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if _is_group(field.type):
            default = field.default_factory() if field.default_factory is not MISSING else None
            chosen[field.name] = _build(field.type, values, default)  # type: ignore[arg-type]
        elif field.name in values:
            chosen[field.name] = values[field.name]
        elif template is not None:
            chosen[field.name] = getattr(template, field.name)
    return config_class(**chosen)


# --- values ---------------------------------------------------------------------------------------------------------


def _from_words(config_class: type, arguments: Sequence[str], command: str, positional: str) -> dict[str, Any]:
    """The values that a command line gives, by flag."""
    known = {flag.name: flag for flag in flags_of(config_class)}
    known["config"] = Flag("config", str, (), False, False, None, "", "")
    values: dict[str, Any] = {}
    loose: list[str] = []
    words = list(arguments)
    while words:
        word, equals, attached = words.pop(0).partition("=")
        if not word.startswith("--"):
            loose.append(word + equals + attached)
            continue
        name = word[2:].replace("-", "_")
        off = name.startswith("no_") and name not in known
        flag = known.get(name.removeprefix("no_") if off else name)
        if flag is None or (off and flag.type is not bool):
            near = difflib.get_close_matches(word, [flag.spelling for flag in known.values()], n=1)
            hint = f"did you mean {near[0]}?" if near else f"penstock {command} --help shows all flags."
            raise UserError(f"no flag {word}; {hint}")
        texts = [attached] if equals else []
        while words and not words[0].startswith("--") and not equals and flag.type is not bool:
            texts.append(words.pop(0))
            if not flag.several:
                break
        if flag.type is bool:
            values[flag.name] = _converted(flag, attached, word) if equals else not off
        elif texts or flag.several:
            values[flag.name] = _converted(flag, texts if flag.several else texts[0], word)
        else:
            raise UserError(f"{word}: a value is missing; give {word} {flag.metavar}.")
    if loose:
        _place(loose, known, values, command, positional)
    return values


def _place(loose: list[str], known: Mapping[str, Flag], values: dict[str, Any], command: str, positional: str) -> None:
    """Gives the words that belong to no flag to the flag `positional`."""
    if not positional:
        raise UserError(f"unexpected {loose[0]!r}; flags start with --: penstock {command} --help shows them.")
    flag = known[positional]
    if not flag.several and len(loose) + (positional in values) > 1:
        raise UserError(f"give exactly one {flag.metavar}: penstock {command} {flag.metavar}; all others are flags.")
    values[positional] = (
        (*values.get(positional, ()), *loose) if flag.several else _converted(flag, loose[0], flag.metavar)
    )


def _from_table(config_class: type, table: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The values that a TOML table gives, by flag; a section only groups, because names are flat."""
    known = {flag.name: flag for flag in flags_of(config_class)}
    sections = {field.name for field in dataclasses.fields(config_class) if _is_group(field.type)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if isinstance(value, dict) and name in sections:
            values |= _from_table(config_class, value, file)
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}."
            raise UserError(f"{file}: unknown key {key!r}; {hint}")
        values[name] = _converted(known[name], value, f"{file}: {key}")
    return values


def _converted(flag: Flag, value: Any, origin: str) -> Any:
    """A value of a command line or of TOML as the field's type. Raises UserError where it is none."""
    if flag.several:
        return tuple(map(str, value if isinstance(value, list) else [value]))
    text = str(value)
    if flag.type is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{origin} {text}: give true or false.")
        return text.lower() == "true"
    if flag.optional and text.lower() == "none" and (flag.type is not str or flag.choices):
        return None  # for other text it is a word like any other
    if flag.choices and text not in flag.choices:
        raise UserError(f"{origin} {text}: there are {', '.join(flag.choices)}.")
    try:
        return flag.type(text)
    except ValueError as error:
        wanted = "a whole number" if flag.type is int else "a number"
        raise UserError(f"{origin} {text}: give {wanted}.") from error


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--config {path}: {error.strerror}; give a TOML file with flags as keys (lr = 1e-5)."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid TOML: {error}.") from error


# --- help -----------------------------------------------------------------------------------------------------------


def _help_lines(flag: Flag, width: int, positional: str) -> list[str]:
    """A flag with its values on the left, its text and default on the right."""
    left = f"{flag.spelling} {flag.metavar}".rstrip()
    if flag.name == positional:
        left = flag.metavar
    elif flag.default is True:
        left = f"--[no-]{flag.spelling[2:]}"
    default = flag.default if flag.default not in (MISSING, None, ()) else False
    text = flag.text
    if default is not False:
        shown = "on" if default is True else f"{default:g}" if isinstance(default, float) else default
        text += f" (default:\0{shown})"  # one word: no line ends in it
    column = 30
    lines = textwrap.wrap(text, width - column, break_long_words=False, break_on_hyphens=False)
    lines = [" " * column + line.replace("\0", " ") for line in lines]
    if len(left) > column - 4:
        return [f"  {left}", *lines]
    return [f"  {left:{column - 2}}{lines[0].strip()}", *lines[1:]]
