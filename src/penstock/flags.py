"""Between the command line, TOML files and the dataclasses of config.py: parsing, writing and --help. No torch in here.

A flag is a field of a config, or of a group of flags in it; all names are flat. What commands there are, and what a
flag does, is known elsewhere.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import os
import shutil
import sys
import textwrap
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from penstock.errors import UserError

Config = TypeVar("Config")

PATHS = (
    "model",
    "actor",
    "reward",
    "critic",
    "reference",
    "teacher",
    "data",
    "ptx_data",
    "normalize",
    "reward_fn",
    "adapter",
    "eval_data",
)
"""Flags that may name something on this machine."""
SOURCES = ("data", "ptx_data", "normalize", "eval_data")
"""Flags whose values name data, as `penstock.sources` reads them."""
SECRETS = {"key": "PENSTOCK_KEY", "database": "PENSTOCK_DATABASE"}
"""Flags that hold a secret, and the variable that is read instead of each: every user of a machine sees command lines,
and nobody but root another user's environment."""
ALIASES = {"model": "actor"}
"""Another name of a flag, in commands that have no flag of that name."""
COMMON = {
    "reward", "reward_fn", "critic", "teacher", "lr", "steps", "epochs", "batch_size", "max_length", "max_new_tokens",
    "strategy", "device_memory", "device", "dtype", "lora", "loss", "beta",
}  # fmt: skip
"""Where a command's flags come in groups, --help shows these first."""
METAVARS = {
    "MODEL": ("model", "actor", "critic", "reference", "critic_model", "teacher", "teacher_model",
              "reward"),
    "RUN": ("run", "adapter"),
    "FILE": ("data", "files", "ptx_data", "normalize", "eval_data", "profile", "json"),
    "NAME": ("strategy",),
    "FILE.py:NAME": ("reward_fn",),
    "DIR": ("data_dir",),
    "PATH": ("out", "disk"),
    "SIZE": ("device_memory", "host_memory", "chunk_size", "activation_budget", "link", "disk_read", "disk_write",
             "host_bandwidth", "network", "network_inside", "device_bandwidth"),
}  # fmt: skip
"""What --help calls the value of a flag, where its type says too little."""


HIDDEN = argparse.SUPPRESS
"""Instead of a help text: the flag works and is not listed."""
LOOSE = "words"
"""Where the parser puts the words that belong to no flag."""


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

    @property
    def shown_default(self) -> str:
        """The default for people; empty where there is none to show."""
        if self.default is True:
            return "on"
        if self.default is False or self.default in (MISSING, None, ()):
            return ""
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


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
    from penstock import sources  # late: it opens files and hashes, and --help does neither

    def absolute(text: str, flag: str) -> str:
        if flag in SOURCES:
            return sources.absolute(text)
        if flag != "reward_fn":
            return str(Path(text).absolute()) if Path(text).exists() else text
        path, colon, name = text.rpartition(":")
        if colon and Path(path).is_file():  # file.py:name
            return f"{Path(path).absolute()}:{name}"
        return f"{path}:{Path(name).absolute()}" if colon and Path(name).is_file() else text  # verifier:file

    paths = {name: flat[name] for name in PATHS if name in flat}
    return flat | {
        name: absolute(value, name) if isinstance(value, str) else [absolute(path, name) for path in value]
        for name, value in paths.items()
    }


def with_sources(flat: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The same flags, each text that names data changed."""
    return flat | {name: [change(text) for text in flat[name]] for name in SOURCES if name in flat}


def from_dict(config_class: type[Config], flat: Mapping[str, Any]) -> Config:
    """Inverse of `to_dict`. Raises UserError for a key that is no flag, with the nearest name."""
    return _build(config_class, _from_table(config_class, flat, "config.toml"))


def from_keywords(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The config with these flags, by their names in Python, flat. Raises UserError as the command line does."""
    name = config_class.__name__
    chosen = _from_table(config_class, values, name)
    if missing := [flag.name for flag in flags_of(config_class) if flag.default is MISSING and flag.name not in chosen]:
        raise UserError(f"{name}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.")
    return _build(config_class, chosen)


def parse(config_class: type[Config], arguments: Sequence[str], command: str = "", positional: str = "") -> Config:
    """Flags, and the TOML file that --config names, as one checked dataclass.

    Words that belong to no flag are values of the flag `positional`. Raises UserError, with the nearest flag's name.
    """
    parser = _parser(config_class, command, positional)
    options, unknown = parser.parse_known_intermixed_args([_with_hyphens(word) for word in arguments])
    if unknown:
        parser.refuse(unknown[0])
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()
    }
    if loose := values.pop(LOOSE, ()):
        several = _flag(config_class, positional).several
        if not several and len(loose) + (positional in values) > 1:
            parser.refuse(loose[-1])
        values[positional] = (*values.get(positional, ()), *loose) if several else loose[0]
    path = values.pop("config", None)
    if path is not None:
        table = _read_toml(path)
        made_by = table.pop("command", command)  # a run's own config.toml names its command
        if made_by != command:
            raise UserError(f"--config {path}: is of penstock {made_by}, and this is penstock {command}.")
        values = _from_table(config_class, table, path) | values
    names = {flag.name for flag in flags_of(config_class)} & SECRETS.keys()
    values = {name: text for name in names if (text := os.environ.get(SECRETS[name]))} | values
    missing = [flag.spelling for flag in flags_of(config_class) if flag.default is MISSING and flag.name not in values]
    if missing:
        be = "is" if len(missing) == 1 else "are"
        raise UserError(f"{', '.join(missing)} {be} missing; penstock {command} --help shows an example.")
    return _build(config_class, values)


def with_secrets(**values: str | None) -> dict[str, str]:
    """The environment of a penstock command that is started, with these of its SECRETS."""
    return {**os.environ, **{SECRETS[name]: value or "" for name, value in values.items()}}


def usage(config_class: type, command: str, positional: str = "") -> str:
    """The command line in short: the positional, the required flags, and that there are more."""
    required = [flag for flag in flags_of(config_class) if flag.default is MISSING and flag.name != positional]
    words = [f"{flag.spelling} {flag.metavar}".rstrip() for flag in required]
    if positional:
        words.insert(0, _flag(config_class, positional).metavar)
    return " ".join(["penstock", command, *words])


def help_text(config_class: type, command: str, example: str, positional: str = "") -> str:
    """What `penstock COMMAND --help` prints: an example, the required and the common flags, then the groups."""
    parser = _parser(config_class, command, positional)
    about = [textwrap.fill(" ".join(part.split()), _width()) for part in (config_class.__doc__ or "").split("\n\n")]
    parser.description = "\n".join(["example:", *(f"  {line}" for line in example.splitlines()), "", *about])
    return parser.format_help().rstrip()


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
        several = get_origin(value) is tuple
        value = get_args(value)[0] if several else value
        choices = get_args(value) if get_origin(value) is Literal else ()
        plain = str if choices else value
        owner = next(base for base in config_class.__mro__ if field.name in _docstrings(base))
        title = group if owner is config_class else _title(owner)
        yield Flag(field.name, plain, choices, several, optional, default, _docstrings(owner)[field.name], title)


def _title(group: type) -> str:
    return (group.__doc__ or "").rstrip(".")


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


# --- the command line -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse with our errors: one paragraph, with the nearest flag."""

    flags: Sequence[Flag] = ()
    positional: Flag | None = None

    def error(self, message: str) -> NoReturn:
        name, _, problem = message.removeprefix("argument ").partition(": ")
        if problem.startswith("expected"):
            raise UserError(f"{name}: a value is missing; {self.prog} --help shows which.")
        raise UserError(f"{name} {problem}." if problem else f"{message}.")

    def refuse(self, word: str) -> NoReturn:
        """Raises UserError for a word that no flag takes."""
        if not word.startswith("--"):
            if self.positional is None:
                raise UserError(f"unexpected {word!r}; flags start with --: {self.prog} --help shows them.")
            metavar = self.positional.metavar
            raise UserError(f"give exactly one {metavar}: {self.prog} {metavar}; all others are flags.")
        name = word.partition("=")[0]
        near = difflib.get_close_matches(name, [flag.spelling for flag in self.flags], n=1)
        raise UserError(
            f"no flag {name}; {f'did you mean {near[0]}?' if near else f'{self.prog} --help shows all flags.'}"
        )


def _with_hyphens(word: str) -> str:
    """--batch_size as --batch-size, for the command lines that were published in 2023."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 120)


def _parser(config_class: type, command: str, positional: str) -> _Parser:
    """The flags in sections: required, common, then the groups. A flag that is not given has no value."""
    flags = flags_of(config_class)
    has_groups = any(flag.group for flag in flags)
    parser = _Parser(
        prog=f"penstock {command}".strip(), usage=f"{usage(config_class, command, positional)} [flags]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=_width()),
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        epilog="--config FILE.toml reads these flags from a file; the command line wins over it.",
    )  # fmt: skip
    parser.flags, parser.positional = flags, _flag(config_class, positional) if positional else None
    sections = {title: parser.add_argument_group(title) for title in ("required", "common flags", "flags")}
    for flag in flags:
        title = "common flags" if has_groups and flag.name in COMMON else flag.group or "flags"
        title = "required" if flag.default is MISSING else title
        section = sections.get(title) or sections.setdefault(title, parser.add_argument_group(title))
        text = flag.text.replace("%", "%%") + (f" (default: {flag.shown_default})" if flag.shown_default else "")
        if flag.name == positional:
            section.add_argument(LOOSE, nargs="*", metavar=flag.metavar.split(" [")[0], help=text)
            text = HIDDEN  # the same by its name
        options: dict[str, Any] = {"dest": flag.name, "help": text}
        if flag.type is bool:
            options["action"] = argparse.BooleanOptionalAction if flag.default is True else "store_true"
            if flag.default is not True:  # --no-FLAG works, and --help does not list it
                parser.add_argument(f"--no-{flag.spelling[2:]}", **options | {"action": "store_false", "help": HIDDEN})
        else:
            options |= {"metavar": flag.metavar.split(" [")[0], "type": functools.partial(_converted, flag)}
            options |= {"nargs": "+" if flag.default is MISSING else "*"} if flag.several else {}
        names = {flag.name for flag in flags}
        other = [f"--{alias}" for alias, name in ALIASES.items() if name == flag.name and alias not in names]
        section.add_argument(flag.spelling, *other, **options)
    parser.add_argument("--config", help=HIDDEN)
    return parser


# --- values ---------------------------------------------------------------------------------------------------------


def _from_table(config_class: type, table: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The values that a TOML table gives, by flag; a section only groups, because names are flat."""
    known = {flag.name: flag for flag in flags_of(config_class)}
    sections = {field.name for field in dataclasses.fields(config_class) if _is_group(field.type)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        name = name if name in known else ALIASES.get(name, name)
        if isinstance(value, dict) and name in sections:
            values |= _from_table(config_class, value, file)
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}."
            raise UserError(f"{file}: unknown key {key!r}; {hint}")
        words = value if isinstance(value, list | tuple) else [value]
        try:
            converted = tuple(_converted(known[name], word) for word in words)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{file}: {key} {error}.") from error
        values[name] = converted if known[name].several else converted[0]
    return values


def _converted(flag: Flag, value: Any) -> Any:
    """A word of the command line or a value of TOML as the field's type. Raises ArgumentTypeError where it is none."""
    text = str(value)
    if flag.type is bool:
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{text}: give true or false")
        return text.lower() == "true"
    if flag.optional and text.lower() == "none" and (flag.type is not str or flag.choices) and not flag.several:
        return None  # for other text it is a word like any other
    if flag.choices and text not in flag.choices:
        raise argparse.ArgumentTypeError(f"{text}: there are {', '.join(flag.choices)}")
    try:
        return flag.type(text)
    except ValueError as error:
        wanted = "a whole number" if flag.type is int else "a number"
        raise argparse.ArgumentTypeError(f"{text}: give {wanted}") from error


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--config {path}: {error.strerror}; give a TOML file with flags as keys (lr = 1e-5)."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid TOML: {error}.") from error
