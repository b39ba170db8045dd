"""JSON lines, or one JSON array, as numbered objects, or the error of a line that is none.

Knows bytes and JSON, not what a record means.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

LONGEST_LINE = 8_000_000
"""Bytes; a longer line is nearly always a whole file without line breaks."""
BOM = b"\xef\xbb\xbf"
"""UTF-8's byte-order mark, as Windows editors write it; it is skipped."""
ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|$)")
"""A file that begins so is one array of objects, as alpaca's and ShareGPT's own files are."""
OPENING, COMMA, CLOSING = re.compile(r"\s*\[\s*"), re.compile(r"\s*,\s*"), re.compile(r"\s*\]\s*\Z")

Item = tuple[int, "dict[str, Any] | FieldError"]
"""A line number (of a binary table: a row number) from 1, and the object there or what is wrong with it."""


class FieldError(Exception):
    """One line's problem: the field, and what is wrong with it and how to fix it."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose fields are all different; Python's own would keep the last of two in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise FieldError(next(name for name in names if names.count(name) > 1), "stands there twice; keep one of them.")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def lines(file: BinaryIO) -> Iterator[Item]:
    """Each line's object. Blank lines are skipped; CRLF is accepted."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
            yield number, FieldError("line", f"longer than {LONGEST_LINE:,} bytes; put one object on each line.")
        elif line.strip():
            yield number, _parse(line.removeprefix(BOM))


def _parse(line: bytes) -> dict[str, Any] | FieldError:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        return _object(DECODER.decode(text), text)
    except UnicodeDecodeError as error:
        return not_utf8(line, error)
    except (ValueError, RecursionError, FieldError) as error:
        return _not_json(error, "line")


def array(data: bytes) -> Iterator[Item]:
    """The objects of one array, each with the line it begins on. It ends at the first mistake."""
    data = data.removeprefix(BOM)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, not_utf8(data, error)
        return
    del data  # the text alone is as much again
    number, counted, at = 1, 0, cast(re.Match[str], OPENING.match(text)).end()
    while True:
        number, counted = number + text.count("\n", counted, at), at
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError, FieldError) as error:
            yield getattr(error, "lineno", number), _not_json(error, "file")
            return
        yield number, _object(value, text[counted:at])
        if CLOSING.match(text, at):
            return
        comma = COMMA.match(text, at)
        if comma is None:
            number += text.count("\n", counted, at)
            yield number, FieldError("line", "a comma or the array's end is expected here; is the file cut short?")
            return
        at = comma.end()


def _object(value: Any, text: str) -> dict[str, Any] | FieldError:
    if not isinstance(value, dict):
        return FieldError("line", f"{kind_name(value)}, and an object with named fields is expected.")
    if "NaN" in text or "Infinity" in text:  # a cheap check that nearly always fails
        name = _non_finite(value)
        if name:
            return FieldError(name, "NaN or Infinity is not JSON; give a number, or leave the field out.")
    return value


def _non_finite(value: dict[str, Any]) -> str | None:
    """The first field that holds no finite number, as messages[0].weight."""
    todo: list[tuple[str, Any]] = [(name, content) for name, content in reversed(value.items())]
    while todo:
        name, content = todo.pop()
        if isinstance(content, dict):
            todo += [(f"{name}.{key}", below) for key, below in reversed(content.items())]
        elif isinstance(content, list):
            todo += [(f"{name}[{i}]", below) for i, below in reversed(list(enumerate(content)))]
        elif isinstance(content, float) and not math.isfinite(content):
            return name
    return None


def not_utf8(data: bytes, error: UnicodeDecodeError) -> FieldError:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return FieldError("line", "UTF-16; save the file as UTF-8.")
    return FieldError(
        "line", f"byte {error.start + 1} (0x{data[error.start]:02x}) is not UTF-8; save the file as UTF-8."
    )


def _not_json(error: Exception, whole: str) -> FieldError:
    if isinstance(error, FieldError):
        return error
    if isinstance(error, RecursionError):
        return FieldError("line", "nested too deeply; give flat objects.")
    if isinstance(error, json.JSONDecodeError):
        problem = f"{error.msg}: column {error.colno}"
        return FieldError("line", f"not valid JSON ({problem}); write one object per line. Is the {whole} cut short?")
    return FieldError("line", "a number with too many digits to read; shorten it.")


def kind_name(value: Any) -> str:
    """A value's kind in words: "a list"."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
