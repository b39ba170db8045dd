"""Bytes into objects: whatever a file holds, each mistake is named with its line, and nothing else is raised."""

import contextlib
import gzip
import io
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.data import jsonl
from penstock.data.files import objects
from penstock.data.jsonl import FieldError
from penstock.errors import DataError, UserError


def read(path: Path, data: bytes) -> list[tuple[int, Any]]:
    """Line numbers with objects; a problem is given as its text."""
    path.write_bytes(data)
    return [(n, f"{x.name}: {x.problem}" if isinstance(x, FieldError) else x) for n, x in objects(path)]


def not_json(problem: str, cut: str = "line") -> str:
    return f"line: not valid JSON ({problem}); write one object per line. Is the {cut} cut short?"


NO_COMMA = "line: a comma or the array's end is expected here; is the file cut short?"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "plain": b'{"a": 1}\n{"a": 2}\n',
        "no line break at the end": b'{"a": 1}\n{"a": 2}',
        "CRLF": b'{"a": 1}\r\n{"a": 2}\r\n',
        "byte-order mark": b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n',
        "two files with marks, one behind the other": b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n',
        "one array on two lines": b'[{"a": 1},\n{"a": 2}]\n',
        # the time of packing would be part of the test's name, and a parallel run's processes would disagree on it
        "gzip under a plain name": gzip.compress(b'{"a": 1}\n{"a": 2}\n', mtime=0),
        "an array with a mark, zipped": gzip.compress(b'\xef\xbb\xbf[{"a": 1},\n {"a": 2}]', mtime=0),
    }.items(),
)
def test_each_way_to_write_two_objects_reads_the_same(file, name, data):
    assert read(file, data) == [(1, {"a": 1}), (2, {"a": 2})], name


def test_blank_lines_are_passed_over_and_counted(file):
    assert read(file, b'\n{"a": 1}\n\r\n  \n{"a": 2}') == [(2, {"a": 1}), (5, {"a": 2})]


def test_objects_of_a_printed_array_are_named_by_the_line_they_begin_on(file):
    rows = [{"a": "x\ny"}, {"a": [1, 2]}, {"a": {}}]
    data = json.dumps(rows, indent=2)
    begins = [i + 1 for i, line in enumerate(data.splitlines()) if line == "  {"]
    assert read(file, data.encode()) == list(zip(begins, rows, strict=True))


@pytest.mark.parametrize(
    ("data", "number", "problem"),
    [
        (b'{"a": "\xff"}\n', 2, "line: byte 8 (0xff) is not UTF-8; save the file as UTF-8."),
        ('{"a": 1}\n'.encode("utf-16"), 2, "line: UTF-16; save the file as UTF-8."),
        (b'{"a": "cut sh', 2, not_json("Unterminated string starting at: column 7")),
        (b"{\n", 2, not_json("Expecting property name enclosed in double quotes: column 2")),
        (b'{"a": 1} {"a": 2}', 2, not_json("Extra data: column 10")),
        (b"[1, 2]\n", 2, "line: a list, and an object with named fields is expected."),
        (b'"text"\n', 2, "line: text, and an object with named fields is expected."),
        (b"3\n", 2, "line: a number, and an object with named fields is expected."),
        (b"null\n", 2, "line: null, and an object with named fields is expected."),
        (b"NaN\n", 2, "line: a number, and an object with named fields is expected."),
        (b'{"a": NaN}\n', 2, "a: NaN or Infinity is not JSON; give a number, or leave the field out."),
        (b'{"a": [{"b": 1}, {"b": -Infinity}]}\n', 2,
         "a[1].b: NaN or Infinity is not JSON; give a number, or leave the field out."),
        (b"[" * 100_000 + b"\n", 2, "line: nested too deeply; give flat objects."),
        (b'{"a": ' + b"9" * 5000 + b"}\n", 2, "line: a number with too many digits to read; shorten it."),
    ],
)  # fmt: skip
def test_a_line_that_is_no_object_is_named_and_the_next_one_is_read(file, data, number, problem):
    assert read(file, b'{"good": 1}\n' + data)[:2] == [(1, {"good": 1}), (number, problem)]


def test_nan_in_a_text_is_text(file):
    assert read(file, b'{"a": "NaN and Infinity"}') == [(1, {"a": "NaN and Infinity"})]


def test_a_line_of_ten_megabytes_is_named_and_the_next_one_is_read(file):
    data = b'{"a": "' + b"x" * 10_000_000 + b'"}\n{"a": 2}\n'
    problem = "line: longer than 8,000,000 bytes; put one object on each line."
    assert read(file, data) == [(1, problem), (2, {"a": 2})]


def test_the_longest_line_that_is_allowed_is_read(file):
    text = "x" * (jsonl.LONGEST_LINE - len('{"a": ""}\n'))
    data = b'{"a": "' + text.encode() + b'"}\n'
    assert len(data) == jsonl.LONGEST_LINE
    assert read(file, data) == [(1, {"a": text})]


@pytest.mark.parametrize(
    ("data", "objects"),
    [
        (b"[", [(1, not_json("Expecting value: column 2", "file"))]),
        (b'[{"a": 1},\n{"a": ', [(1, {"a": 1}), (2, not_json("Expecting value: column 7", "file"))]),
        (b'[{"a": 1}\n', [(1, {"a": 1}), (1, NO_COMMA)]),
        (b'[{"a": 1}]\n{"b": 2}\n', [(1, {"a": 1}), (1, NO_COMMA)]),
        (b'[{"a": 1},\n 2,\n{"a": NaN},\n{"a": 3}]', [
            (1, {"a": 1}), (2, "line: a number, and an object with named fields is expected."),
            (3, "a: NaN or Infinity is not JSON; give a number, or leave the field out."), (4, {"a": 3})]),
        (b'[{"a": 1},\n{"a": "\xff"}]', [(2, "line: byte 19 (0xff) is not UTF-8; save the file as UTF-8.")]),
    ],
)  # fmt: skip
def test_mistakes_in_an_array(file, data, objects):
    assert read(file, data) == objects


def items(data: bytes, chunk_bytes: int) -> list[tuple[int, str]]:
    return [(n, f"{x.name}: {x.problem}" if isinstance(x, FieldError) else repr(x))
            for n, x in jsonl.array(io.BytesIO(data), chunk_bytes)]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    rows=st.lists(st.deferred(lambda: JSON), min_size=1, max_size=6),
    form=st.sampled_from([{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (" \n,  ", ": ")}]),
    changes=st.lists(st.tuples(st.integers(1, 300), st.binary(max_size=3)), max_size=2),
    chunk_bytes=st.integers(3, 40),
)
@example([{"a": 1.5e300}, 1.5e-7, True, {"a": -math.inf}, {"a": "\U0001f600\\\n"}], {"indent": 1}, [], 3)
@example([{"a": 1}], {}, [(9, b" " * 40)], 3)
@example([{"a": 1}], {}, [(9, b" " * 40 + b"x")], 3)
@example([{"a": 1}] * 4, {}, [(35, b"\xff")], 3)
def test_an_array_reads_the_same_in_chunks_of_any_size(rows, form, changes, chunk_bytes):
    data = json.dumps(rows, **form).encode("utf-8", "surrogatepass")
    for at, inserted in changes:
        data = data[:at] + inserted + data[at:]
    assert items(data, chunk_bytes) == items(data, len(data) + 3)
    if not changes:
        objects = [value for _, value in jsonl.array(io.BytesIO(data), chunk_bytes) if isinstance(value, dict)]
        assert repr(objects) == repr([row for row in rows if isinstance(row, dict) and finite(row)])


def finite(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(finite, inner)) and not (isinstance(value, float) and not math.isfinite(value))


@pytest.mark.parametrize("form", [{}, {"indent": 1}])
def test_what_an_array_takes_does_not_grow_with_the_file(form, tmp_path):
    rows = [{"prompt": str(i) * 100, "n": i} for i in range(20_000)]
    path = tmp_path / "array.json"
    path.write_text(json.dumps(rows, **form), encoding="utf-8")
    tracemalloc.start()
    count = sum(1 for _ in objects(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(rows)
    assert path.stat().st_size > 8 * jsonl.CHUNK_BYTES
    assert peak < 6 * jsonl.CHUNK_BYTES


def test_an_empty_file_has_no_objects(file):
    assert read(file, b"") == []
    assert read(file.with_suffix(".gz"), b"") == []


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file; check the path\."):
        list(objects(tmp_path / "nowhere.jsonl"))


def test_a_directory_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r": is a directory; name the files in it\."):
        list(objects(tmp_path))


def test_a_name_too_long_for_the_disk_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(.*File name too long"):
        list(objects(tmp_path / ("x" * 300)))


def test_an_unreadable_file_is_a_user_error(file, monkeypatch):
    def refuse(*_: object) -> None:  # the tests may run as root, whom no mode bits stop
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"permission denied; make the file readable\."):
        list(objects(file))


@pytest.mark.parametrize("keep", [5, 12, 60])
def test_a_truncated_gzip_is_a_data_error(tmp_path, keep):
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % (i * i) for i in range(100)))
    assert len(whole) > keep
    with pytest.raises(DataError, match=r"data\.jsonl\.gz: file: the gzip stream is damaged or cut short"):
        read(tmp_path / "data.jsonl.gz", whole[:keep])


def test_a_flipped_byte_in_a_gzip_is_a_data_error(tmp_path):
    whole = bytearray(gzip.compress(b'{"a": 1}\n' * 100))
    whole[-6] ^= 1  # in the checksum
    with pytest.raises(DataError, match="damaged or cut short"):
        read(tmp_path / "data.jsonl.gz", bytes(whole))


def test_a_plain_file_called_gz_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="damaged or cut short"):
        read(tmp_path / "data.jsonl.gz", b'{"a": 1}\n')


def test_parquet_rows_are_objects(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"prompt": "a", "turns": [{"role": "user"}]}, {"prompt": None, "turns": []}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert list(objects(tmp_path / "data.parquet")) == [(1, rows[0]), (2, rows[1])]


@pytest.mark.parametrize("data", [b"", b"PAR1", b'{"a": 1}', b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_parquet_file_is_a_data_error(tmp_path, data):
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"data\.parquet: file: not a readable parquet file"):
        read(tmp_path / "data.parquet", data)


def test_parquet_text_that_is_not_utf8_is_a_data_error(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    text = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(objects(tmp_path / "data.parquet"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"reading parquet needs pyarrow: pip install 'penstock\[parquet\]'"):
        read(tmp_path / "data.parquet", b"PAR1")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda data: b"[{" + data),
        st.binary(max_size=100).map(lambda data: b"\x1f\x8b" + data),
        st.binary(max_size=100).map(lambda data: b"PAR1" + data),
        st.lists(JSON, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
        st.lists(JSON, max_size=4).map(lambda rows: json.dumps(rows, indent=1).encode()),
    ),
    cut=st.integers(0, 200),
)
def test_no_bytes_raise_anything_but_a_penstock_error(tmp_path_factory, data, cut):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data[:cut])
    with contextlib.suppress(DataError):
        for number, value in objects(path):
            assert 1 <= number <= data.count(b"\n") + 1
            assert isinstance(value, dict | FieldError)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=8), JSON, max_size=3), max_size=5), data=st.data())
def test_what_json_writes_is_read_back(tmp_path_factory, rows, data):
    path = tmp_path_factory.getbasetemp() / "rows"
    rows = [row for row in rows if not any(word in json.dumps(row) for word in ("NaN", "Infinity"))]
    if rows and data.draw(st.booleans(), label="as an array"):
        path.write_text(json.dumps(rows, indent=data.draw(st.sampled_from([None, 0, 2]))), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [value for _, value in objects(path)] == rows
