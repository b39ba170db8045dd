"""Tables as numbered objects, a row each: CSV and TSV, parquet, Arrow. Knows files, not what a record means."""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from penstock.data.jsonl import LONGEST_LINE, FieldError, Item, not_utf8
from penstock.errors import DataError, UserError, one_line

NAME = rb"(?!null|true|false|NaN|Infinity)[A-Za-z_]\w*"
CELL = rb'(?:"[^"\r\n]+"|' + NAME + rb"(?: [\w ]+)?)"
HEADER = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:"
    + NAME + rb"\r?\n\s*[^\s\[{]|" + CELL + rb"(?:[,;\t](?:" + CELL + rb")?)+\r?\n(?!\s*[\[{]))"
)  # fmt: skip


class Cells(dict[str, Any]):
    """A row of a table of texts, in which lists and numbers are texts too."""


def looks_separated(head: bytes) -> bool:
    """Whether a file whose name does not say it begins as CSV does: with a line of names, and no JSON in the next."""
    return HEADER.match(head) is not None


def separated(file: BinaryIO) -> Iterator[Item]:
    """Rows of CSV (RFC 4180) or TSV, under the names of its first row; each with the line that it begins on.

    What separates cells is the comma, semicolon or tab that is most frequent in the first row. The table ends at the
    first mistake in its quotes, behind which no row can be trusted.
    """
    csv.field_size_limit(LONGEST_LINE)
    if (mark := file.peek(2)[:2]) in (b"\xff\xfe", b"\xfe\xff"):  # type: ignore[attr-defined]
        yield 1, not_utf8(mark, UnicodeDecodeError("utf-8", mark, 0, 1, ""))
        return
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first, blank = text.readline(), 0
    while first and not first.strip():
        first, blank = text.readline(), blank + 1
    delimiter = max(",;\t", key=first.count)
    names: list[str] | None = None
    reader = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
    while True:
        number = blank + reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, FieldError("line", f"not valid CSV ({error}); quote cells that hold quotes or line breaks.")
            return
        if names is None:
            names = row
            if problem := _bad_names(names):
                yield number, problem
                return
        elif row:
            yield number, _cells(names, row)


def _bad_names(names: list[str]) -> FieldError | None:
    for i, name in enumerate(names):
        if not name.strip():
            return FieldError("line", f"column {i + 1} of the first row has no name; name each column there.")
        if name in names[:i]:
            return FieldError(name, "stands there twice; keep one of them.")
        if bad := _bad_text(name):
            return bad
    return None


def _cells(names: list[str], row: list[str]) -> "Cells | FieldError":
    if len(row) != len(names):
        problem = f"{len(row)} cells, and the first row names {len(names)}; quote cells that hold a separator."
        return FieldError("line", problem)
    return next(filter(None, map(_bad_text, row)), None) or Cells(zip(names, row, strict=True))


def _bad_text(text: str) -> FieldError | None:
    """What is wrong with text that was read with its bad bytes as surrogates."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return FieldError("line", f"a byte (0x{byte:02x}) that is not UTF-8; save the file as UTF-8.")
    return None


def parquet(path: Path, name: str) -> Iterator[Item]:
    """Rows of a parquet file, some thousands at a time in memory."""
    _need_pyarrow(name)
    import pyarrow
    import pyarrow.parquet

    try:
        yield from rows(pyarrow.parquet.ParquetFile(path).iter_batches())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"not a readable parquet file ({one_line(error)}); fetch or write it again."
        raise DataError(f"{name}: file: {problem}") from error


def arrow(path: Path, name: str) -> Iterator[Item]:
    """Rows of an Arrow file, as a stream (as the datasets library writes them) or with random access."""
    _need_pyarrow(name)
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as file:
            magic = file.read(6)
            file.seek(0)
            if magic == b"ARROW1":
                reader = pyarrow.ipc.open_file(file)
                yield from rows(reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from rows(pyarrow.ipc.open_stream(file))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name}: file: not a readable Arrow file ({one_line(error)}); fetch or write it again."
        ) from error


def unpacked_zstd(path: Path, name: str) -> BinaryIO:
    """The bytes of a .zst file."""
    _need_pyarrow(name)
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _need_pyarrow(name: str) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        kind = {".arrow": "Arrow", ".zst": "zstd"}.get(Path(name).suffix, "parquet")
        raise UserError(f"{name}: reading {kind} needs pyarrow: pip install 'penstock[parquet]'.") from error


def rows(batches: Iterable[Any]) -> Iterator[Item]:
    """The rows of Arrow batches or tables. JSON columns are decoded; nested nulls, which a table has wherever an object
    of another row has a field, are left out."""
    number = 0
    for batch in batches:
        decoders = {field.name: _decoder(field.type) for field in batch.schema}
        for row in batch.to_pylist():
            number += 1
            yield number, _decoded(row, decoders)


def _decoded(row: dict[str, Any], decoders: Mapping[str, Callable[[Any], Any] | None]) -> dict[str, Any] | FieldError:
    values: dict[str, Any] = {}
    for name, value in row.items():
        try:
            values[name] = _without_nulls(decode(value) if (decode := decoders[name]) else value)
        except (ValueError, RecursionError) as error:
            return FieldError(name, f"a column of JSON, and this is none ({error}); write the table again.")
    return values


def _decoder(kind: Any) -> Callable[[Any], Any] | None:
    """What makes JSON's values of an Arrow type that holds JSON as text (as datasets writes mixed columns)."""
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        inner = _decoder(kind.value_type)
        return inner and (lambda values: None if values is None else [inner(value) for value in values])
    if pyarrow.types.is_struct(kind):
        fields = {field.name: _decoder(field.type) for field in kind}
        if any(fields.values()):
            return lambda value: None if value is None else {
                name: decode(part) if (decode := fields[name]) else part for name, part in value.items()
            }  # fmt: skip
    return None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return value
