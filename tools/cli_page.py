"""Writes docs/cli.md from the table of commands and the docstrings of their flags: python tools/cli_page.py"""

from dataclasses import MISSING
from pathlib import Path

from penstock.cli import COMMANDS, load
from penstock.flags import Flag, flags_of, usage

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """# Commands

Written by `python tools/cli_page.py` from the commands themselves; `penstock COMMAND --help` prints the same.
Flags may stand in a TOML file: `--config FILE.toml`. Exit codes: 2 user error, 3 resources, 4 data, 5 internal error,
130 and 143 stopped by a signal. `--json` prints for programs, `--quiet` keeps warnings and
results alone, and with the environment's `NO_COLOR=1` nothing is coloured.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section(name) for name in COMMANDS)])


def section(name: str) -> str:
    """One command: what it does, an example, and a table of flags per group."""
    command = COMMANDS[name]
    config_class = load(command.config)
    about = " ".join((config_class.__doc__ or "").split())
    lines = [f"## penstock {name}", "", about, "", "```", usage(config_class, name, command.positional) + " [flags]"]
    lines += ["", *command.example.splitlines(), "```", ""]
    groups: dict[str, list[Flag]] = {}
    for flag in flags_of(config_class):
        groups.setdefault("Required" if flag.default is MISSING else flag.group or "Flags", []).append(flag)
    for group, flags in groups.items():
        lines += [f"| {group} | |", "|---|---|", *(row(flag, command.positional) for flag in flags), ""]
    return "\n".join(lines)


def row(flag: Flag, positional: str) -> str:
    """A flag with its value, text and default."""
    spelling = flag.metavar if flag.name == positional else f"{flag.spelling} {flag.metavar}".strip()
    text = f"{flag.text} (default: `{flag.shown_default}`)" if flag.shown_default else flag.text
    return f"| `{cell(spelling)}` | {cell(text)} |"


def cell(text: str) -> str:
    """Text that does not end its cell of a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
