"""Files as numbered objects, whatever their format: it is told from the name's end, else from the first bytes.

JSON lines, a JSON array, CSV, TSV (also packed as .gz or .zst), parquet, Arrow; and tables of the datasets library.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from penstock.data import jsonl, tables
from penstock.data.jsonl import Item
from penstock.errors import DataError, UserError
from penstock.hub import files_of, tables_of
from penstock.sources import FORMATS, PACKED, Source

HEAD = 4096
"""Bytes from which a format is told."""


def opened(source: Source) -> tuple[list[tuple[str, Iterator[Item]]], str]:
    """Each part of a source: what messages call it, and its objects; and what is to be said of the whole."""
    if source.hub and source.hub.path is None:
        batches, note = tables_of(source)
        return [(source.name, tables.rows(batches))], note
    parts = files_of(source) if source.hub else source.parts
    return [(part.name, objects(part.path, part.name)) for part in parts], source.note


def objects(path: Path, name: str = "") -> Iterator[Item]:
    """Each object of a file with its line, or its row. Blank lines are skipped; CRLF is accepted.

    name: what messages call the file. Raises UserError for a file that cannot be opened, and DataError for one that is
    damaged as a whole.
    """
    name, packed = name or str(path), ""
    try:
        if path.is_dir():
            raise UserError(f"{name}: is a directory; name the files in it.")
        with path.open("rb") as raw:
            head = raw.peek(8)[:8]
            if path.suffix == ".parquet" or head.startswith(b"PAR1"):
                yield from tables.parquet(path, name)
            elif path.suffix == ".arrow" or head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
                yield from tables.arrow(path, name)
            elif path.suffix == ".gz" or head.startswith(b"\x1f\x8b"):
                packed = "gzip"
                yield from _texts(cast(BinaryIO, gzip.GzipFile(fileobj=raw)), path)
            elif path.suffix == ".zst" or head.startswith(b"\x28\xb5\x2f\xfd"):
                packed = "zstd"
                yield from _texts(tables.unpacked_zstd(path, name), path)
            else:
                yield from _texts(raw, path)
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file; check the path.") from error
    except PermissionError as error:
        raise UserError(f"{name}: permission denied; make the file readable.") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{name}: file: the gzip stream is damaged or cut short ({error}); fetch it again.") from error
    except OSError as error:
        if packed == "zstd" and error.errno is None:
            problem = f"the zstd stream is damaged or cut short ({error})"
            raise DataError(f"{name}: file: {problem}; fetch it again.") from error
        raise UserError(f"{name}: cannot be read ({error}); check the path.") from error


def _texts(file: BinaryIO, path: Path) -> Iterator[Item]:
    """Objects of a text file, unpacked."""
    suffix = Path(path.stem if path.suffix in PACKED else path.name).suffix
    head = file.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]  # all three kinds of file can peek
    if suffix in (".csv", ".tsv") or (suffix not in FORMATS and tables.looks_separated(head)):
        yield from tables.separated(file)
    elif jsonl.ARRAY.match(head[:64]):
        yield from jsonl.array(file)
    else:
        yield from jsonl.lines(file)
