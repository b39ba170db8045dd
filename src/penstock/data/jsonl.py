"""JSON lines, or one JSON array, as numbered objects, or the error of a line that is none.

Knows bytes and JSON, not what a record means.
"""

import codecs
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
OPENING, BLANKS = re.compile(r"\s*\["), re.compile(r"\s*")
CHUNK_BYTES = 1 << 20
"""Of an array that are read at a time."""
MARGIN = 16
"""Characters: what ends nearer to the end of what was read may go on behind it: 1 as 1.5e+3, -Inf as -Infinity."""

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


def array(file: BinaryIO, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Item]:
    """The objects of one array, each with the line it begins on. It ends at the first mistake.

    As much of the file is held as the longest object takes, and `chunk_bytes`.
    """
    text = _Text(file, chunk_bytes)
    try:
        yield from _items(text)
    except FieldError as problem:  # bytes that are no text
        yield text.line, problem


def _items(text: "_Text") -> Iterator[Item]:
    while (opening := OPENING.match(text.held)) is None and text.grow():
        pass
    text.go_to(opening.end() if opening else 0)
    while True:
        start, value, mistake = text.skip_blanks(text.at), None, None
        end = close = start
        try:
            value, end = DECODER.raw_decode(text.held, start)
            close = text.skip_blanks(end)
        except (ValueError, RecursionError, FieldError) as error:
            mistake = error
        if _may_change(mistake, len(text.held) - close) and text.grow():
            continue
        text.go_to(start)
        if mistake is not None:
            if isinstance(mistake, json.JSONDecodeError):
                text.go_to(mistake.pos)
                mistake.colno = text.column
            yield text.line, _not_json(mistake, "file")
            return
        yield text.line, _object(value, text.held[start:end])
        text.go_to(end)
        if text.held[close : close + 1] != ",":
            number = text.line
            if text.held[close : close + 1] != "]" or not text.is_blank_behind(close + 1):
                yield number, FieldError("line", "a comma or the array's end is expected here; is the file cut short?")
            return
        text.go_to(close + 1)


def _may_change(mistake: Exception | None, left: int) -> bool:
    """Whether text behind what is held could make another value, or no mistake, of what was read.

    left: characters held behind the value. A parser sees no mistake before it is there, but that of a string.
    """
    if isinstance(mistake, json.JSONDecodeError):
        left = len(mistake.doc) - mistake.pos
        return left < MARGIN or mistake.msg.startswith("Unterminated string")
    return mistake is None and left < MARGIN


class _Text:
    """A file's text. What is held of it begins where the reader was when it last grew."""

    def __init__(self, file: BinaryIO, chunk_bytes: int) -> None:
        self.held, self.at, self.line = "", 0, 1
        """`at` is the reader's place in what is held, and on that line of the file."""
        self._file, self._chunk_bytes, self._decoder = file, chunk_bytes, codecs.getincrementaldecoder("utf-8")()
        self._columns = 0
        """Characters of its first line that are no longer held."""
        self._bytes = 0
        """Read and decoded; the byte-order mark does not count."""
        self._bad: FieldError | None = None
        """The bytes that come next are no text."""

    @property
    def column(self) -> int:
        """Of the reader's place, from 1."""
        newline = self.held.rfind("\n", 0, self.at)
        return self.at - newline + (self._columns if newline < 0 else 0)

    def go_to(self, at: int) -> None:
        self.line += self.held.count("\n", self.at, at)
        self.at = at

    def skip_blanks(self, at: int) -> int:
        """The place of the first character from there on that is no blank."""
        return cast(re.Match[str], BLANKS.match(self.held, at)).end()

    def is_blank_behind(self, at: int) -> bool:
        """Whether only blanks follow to the file's end."""
        self.go_to(at)
        while True:
            self.go_to(self.skip_blanks(self.at))
            if self.at < len(self.held):
                return False
            if not self.grow():
                return True

    def grow(self) -> bool:
        """Reads on, as much as is held at least, and lets go of what is behind the reader. False at the file's end;
        raises FieldError, with `line`, where bytes are no text."""
        if self._bad is not None:
            self.go_to(len(self.held))
            raise self._bad
        data = self._file.read(max(self._chunk_bytes, len(self.held) - self.at))
        if self._bytes == 0:
            data = data.removeprefix(BOM)
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode()
            self._bad = not_utf8(error.object, error, self._bytes)
        else:
            if not data:
                return False
            self._bytes += len(data) + pending - len(self._decoder.getstate()[0])
        self._columns = self.column - 1
        self.held, self.at = self.held[self.at :] + text, 0
        return True


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


def not_utf8(data: bytes, error: UnicodeDecodeError, before: int = 0) -> FieldError:
    """before: bytes of the line, or of the file, before these."""
    if not before and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return FieldError("line", "UTF-16; save the file as UTF-8.")
    return FieldError(
        "line", f"byte {before + error.start + 1} (0x{data[error.start]:02x}) is not UTF-8; save the file as UTF-8."
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
