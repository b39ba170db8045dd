"""Sixty data files, whole and broken: the same records and the same errors by path, pattern, folder and stdin."""

import csv
import gzip
import io
import json
import sys
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from pyarrow import ipc

from penstock import sources
from penstock.data import formats
from penstock.data.files import objects
from penstock.data.jsonl import FieldError
from penstock.data.records import KINDS
from penstock.data.tables import looks_separated
from penstock.errors import DataError, UserError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TALK[1]]
IMAGE = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Hi"}]}, TALK[1]]
PAIRS = [{"prompt": "Q1", "response": 'A, "1"\n'}, {"prompt": "Q2 é", "response": "A2"}]
CHOICES = [{"prompt": "Q", "chosen": "good", "rejected": "bad"}, {"chosen": TALK, "rejected": [TALK[0], PARTS[1] | {
    "content": "No."}]}]  # fmt: skip
VOTES = [{"prompt": "Q", "response": "A", "label": True}, {"prompt": "Q", "response": "B", "label": False}]


def lines(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def separated(rows: list[dict[str, Any]], delimiter: str = ",", **options: Any) -> bytes:
    """As csv writes it, with lists as JSON, as pandas and datasets do not."""
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(out, names, delimiter=delimiter, **options)
    table.writeheader()
    for row in rows:
        table.writerow({name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()})
    return out.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def arrow(rows: list[dict[str, Any]], new: Any = ipc.new_stream) -> bytes:
    table, out = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as packed:
        packed.write(data)
    return out.getvalue().to_pybytes()


GOOD: dict[str, tuple[str, bytes]] = {
    "pairs": (".jsonl", lines(*PAIRS)), "messages": (".jsonl", lines({"messages": TALK}, {"messages": PARTS})),
    "votes": (".jsonl", lines(*VOTES)), "comparisons": (".jsonl", lines(*CHOICES)),
    "ids": (".jsonl", lines({"prompt_ids": [1, 2], "response_ids": [3]})),
    "mixed formats": (".jsonl", lines(PAIRS[0], {"messages": TALK}, {"instruction": "Do", "output": "Done"})),
    "a mark": (".jsonl", b"\xef\xbb\xbf" + lines(*PAIRS)), "CRLF": (".jsonl", lines(*PAIRS).replace(b"\n", b"\r\n")),
    "blank lines": (".jsonl", b"\n" + lines(PAIRS[0], "", PAIRS[1]) + b"\n\n"),
    "no last line break": (".jsonl", lines(*PAIRS).rstrip()),
    "nulls": (".jsonl", lines(PAIRS[0] | {"messages": None, "system": None}, {"prompt": None, "messages": TALK})),
    "duplicates": (".jsonl", lines(PAIRS[0] | {"id": 1}, PAIRS[0] | {"id": 1})),
    "other fields": (".jsonl", lines(*({**row, "source": "web", "score": 0.5} for row in PAIRS))),
    "weight 0": (".jsonl", lines(PAIRS[0] | {"weight": 0}, PAIRS[1])),
    "gzip": (".jsonl.gz", gzip.compress(lines(*PAIRS), mtime=0)), "zstd": (".jsonl.zst", zstd(lines(*PAIRS))),
    "an array": (".json", json.dumps(PAIRS).encode()),
    "a printed array": (".json", json.dumps(CHOICES, indent=1).encode()),
    "lines called json": (".json", lines(*PAIRS)),
    "an array, zipped": (".json.gz", gzip.compress(json.dumps(PAIRS).encode(), mtime=0)),
    "CSV": (".csv", separated(PAIRS)), "CSV of votes": (".csv", separated(VOTES)),
    "CSV of comparisons": (".csv", separated(CHOICES)), "CSV of messages": (".csv", separated([{"messages": TALK}])),
    "CSV with a mark": (".csv", b"\xef\xbb\xbf" + separated(PAIRS)),
    "CSV with semicolons": (".csv", separated(PAIRS, ";")), "CSV of prompts": (".csv", b"prompt\nHello?\nYou?\n"),
    "CSV all quoted": (".csv", separated(PAIRS, quoting=csv.QUOTE_ALL)),
    "CSV, zipped": (".csv.gz", gzip.compress(separated(PAIRS), mtime=0)),
    "CSV, zstd": (".csv.zst", zstd(separated(VOTES))),
    "CSV with an empty cell": (".csv", b"instruction,input,output\nDo,,Done\n"),
    "CSV with blank lines": (".csv", b"\nprompt,response\n\nQ,A\n\n"),
    "TSV": (".tsv", separated(PAIRS, "\t")), "TSV of votes": (".tsv", separated(VOTES, "\t")),
    "parquet": (".parquet", parquet(PAIRS)), "parquet of messages": (".parquet", parquet([{"messages": TALK}] * 2)),
    "parquet with nulls": (".parquet", parquet([PAIRS[0] | {"messages": None}, {"messages": TALK, "label": None}])),
    "Arrow": (".arrow", arrow(PAIRS)), "Arrow of votes": (".arrow", arrow(VOTES, ipc.new_file)),
}  # fmt: skip
BROKEN: dict[str, tuple[str, bytes]] = {
    "empty": (".jsonl", b""), "an empty table": (".csv", b"prompt,response\n"),
    "damaged gzip": (".jsonl.gz", gzip.compress(lines(*PAIRS), mtime=0).replace(b"Q", b"q")[:30] + b"\0" * 40),
    "a broken line": (".jsonl", lines(PAIRS[0], '{"prompt": "cut sh', PAIRS[1])),
    "not UTF-8": (".jsonl", lines(PAIRS[0]) + b'{"prompt": "\xff"}\n'),
    "UTF-16": (".jsonl", lines(*PAIRS).decode().encode("utf-16")), "a number": (".jsonl", lines(PAIRS[0], "3")),
    "NaN": (".jsonl", lines(PAIRS[0] | {"score": float("nan")})),
    "a field twice": (".jsonl", b'{"prompt": "a", "prompt": "b", "response": "c"}\n'),
    "no columns that are known": (".jsonl", lines({"frage": "a", "antwort": "b"})),
    "images": (".jsonl", lines({"messages": IMAGE}, PAIRS[0] | {"images": ["a.png"]})),
    "a wrong type": (".jsonl", lines(PAIRS[0] | {"response": 3})), "cut gzip": (".jsonl.gz", gzip.compress(
        lines(*PAIRS), mtime=0)[:-9]), "cut zstd": (".jsonl.zst", zstd(lines(*PAIRS))[:-5]),
    "a cut array": (".json", json.dumps(PAIRS).encode()[:-4]), "cut parquet": (".parquet", parquet(PAIRS)[:-9]),
    "cut Arrow": (".arrow", arrow(PAIRS)[:200]), "CSV with an open quote": (".csv", separated(PAIRS) + b'"a,b\n'),
    "CSV with three cells": (".csv", separated(VOTES) + b"a,b\n"), "CSV, no name": (".csv", b"prompt,,b\n1,2,3\n"),
    "CSV, not UTF-8": (".csv", separated(PAIRS) + b"a,\xe9\n"), "CSV, a name twice": (".csv", b"prompt,prompt\na,b\n"),
    "CSV, Python's lists": (".csv", b"messages\n\"[{'role': 'user', 'content': 'Hi'}]\"\n"),
}  # fmt: skip


def outcome(text: str, name: str, kind: Any) -> Any:
    """Records and errors of a source, whatever messages call it."""

    def nameless(message: str) -> str:
        return message.replace(name, "NAME").replace(f"{text}:", "NAME:")

    try:
        read = formats.read(text, kind, skip_bad=True)
    except (DataError, UserError) as error:
        return type(error), nameless(str(error))
    rows = [{**vars(record), "where": nameless(record.where)} for record in read.records]
    return rows, [nameless(line) for line in read.bad], read.decision.removeprefix(f"{text}: ")


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    sources.standard_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("name", [*GOOD, *BROKEN])
def test_a_file_is_the_same_by_path_by_pattern_by_folder_and_through_stdin(tmp_path, monkeypatch, name):
    suffix, data = (GOOD | BROKEN)[name]
    path = tmp_path / f"data{suffix}"
    path.write_bytes(data)
    pipe(monkeypatch, data)
    outcomes = [outcome(str(path), str(path), kind) for kind in KINDS]
    for kind, expected in zip(KINDS, outcomes, strict=True):
        assert outcome(f"{tmp_path}/d*{suffix}", str(path), kind) == expected
        assert outcome(str(tmp_path), str(path), kind) == expected
        assert outcome(sources.STDIN, "stdin", kind) == expected
    try:
        kind = formats.kind_of(str(path))
    except DataError:
        kind = "prompts"
    records, bad, *_ = outcomes[KINDS.index(kind)]
    assert (bool(records) and not bad) == (name in GOOD)


def test_there_are_sixty_of_them():
    assert len(GOOD | BROKEN) >= 60


CELLS = [  # a table of texts, and the same as JSON lines
    (separated(PAIRS), lines(*PAIRS)), (separated(VOTES), lines(*VOTES)), (separated(CHOICES), lines(*CHOICES)),
    (separated([{"messages": TALK, "tools": []}]), lines({"messages": TALK, "tools": []})),
    (b"prompt,response,label\nQ,A,True\nQ,B,False\n", lines(*({**row, "prompt": "Q"} for row in VOTES))),
    (b"prompt,response,weight\nQ,A,1\nQ,B,\n", lines(*({**row, "label": None} for row in VOTES))),
    (b'prompt_ids,response_ids\n"[1, 2]",[3]\n', lines({"prompt_ids": [1, 2], "response_ids": [3]})),
    (b"prompt,response\n[1],true\n", lines({"prompt": "[1]", "response": "true"})),
]  # fmt: skip


@pytest.mark.parametrize(("table", "rows"), CELLS)
def test_cells_mean_what_the_same_fields_of_json_mean(tmp_path, table, rows):
    kinds = []
    for suffix, data in ((".csv", table), (".jsonl", rows)):
        (tmp_path / f"data{suffix}").write_bytes(data)
    for kind in KINDS:
        as_cells, as_json = (outcome(str(tmp_path / f"data{suffix}"), "", kind) for suffix in (".csv", ".jsonl"))
        if isinstance(as_json[0], list) and as_json[0]:
            kinds.append(kind)
            strip = [[{**row, "where": 0, "fields": 0} for row in rows] for rows in (as_cells[0], as_json[0])]
            assert strip[0] == strip[1]
    assert kinds


@pytest.mark.parametrize(("table", "problems"), [
    (b"prompt,response\nQ\n", ["2 line: 1 cells, and the first row names 2; quote cells that hold a separator."]),
    (b"prompt,response\n\"a\nb\",c\nx,y,z\nQ,A\n",
     ["4 line: 3 cells, and the first row names 2; quote cells that hold a separator."]),
    (b"prompt, \nQ,A\n", ["1 line: column 2 of the first row has no name; name each column there."]),
    (b"prompt,prompt\nQ,A\n", ["1 prompt: stands there twice; keep one of them."]),
    (b"prompt\n\"Q\" x\nA\n",
     ["2 line: not valid CSV (',' expected after '\"'); quote cells that hold quotes or line breaks."]),
    (b"prompt\nQ\xe9\nA\n", ["2 line: a byte (0xe9) that is not UTF-8; save the file as UTF-8."]),
    ("prompt\n".encode("utf-16"), ["1 line: UTF-16; save the file as UTF-8."]),
])  # fmt: skip
def test_what_is_wrong_with_a_table_is_named_with_its_line(tmp_path, table, problems):
    (tmp_path / "t.csv").write_bytes(table)
    rows = list(objects(tmp_path / "t.csv"))
    assert [f"{n} {x.name}: {x.problem}" for n, x in rows if isinstance(x, FieldError)] == problems


@pytest.mark.parametrize(("head", "separates"), [
    (b"prompt,response\nQ,A\n", True), (b"prompt\nQ\n", True), (b'"user question"\tanswer\nQ\tA\n', True),
    (b'{"prompt": "a", "b": 1}\n', False), (b'not json\n{"prompt": 1}\n', False), (b"null\n1\n", False), (b"", False),
    (b"what\n", False), (b"\nprompt,,b\n", True), (b"a,b", False),
    (b'a,b\n{"prompt": 1}\n', False), (b'prompt,response\nQ,"x\n{y"\n', True), (b"prompt\n[\n", False),
    (b"once upon a time\nthere was\n", False), (b"[\n", False), (b"1,2\n3,4\n", False),
])  # fmt: skip
def test_without_a_suffix_a_table_is_told_from_its_first_lines(tmp_path, head, separates):
    assert looks_separated(head) == separates


def test_a_folder_that_datasets_saved_reads_as_the_lines_that_it_was_made_from(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    tables = [
        PAIRS,
        VOTES,
        CHOICES,
        [{"messages": TALK}, {"messages": PARTS}],
        [{"prompt_ids": [1], "response_ids": [2]}],
    ]
    tables.append([PAIRS[0] | {"messages": None}, {"messages": TALK}])
    for i, rows in enumerate(tables):
        (tmp_path / f"{i}.jsonl").write_bytes(lines(*rows))
        table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
        table.to_parquet(tmp_path / f"{i}.parquet")
        table.save_to_disk(tmp_path / f"{i}", num_shards=len(rows))
        datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(tmp_path / f"{i} splits")
        for kind in KINDS:
            expected = outcome(str(tmp_path / f"{i}.jsonl"), "", kind)
            for name in (f"{i}", f"{i}.parquet", f"{i} splits"):
                records = outcome(str(tmp_path / name), "", kind)[0]
                assert isinstance(expected[0], type) == isinstance(records, type)
                if isinstance(records, list):
                    strip = [[{**row, "where": 0, "fields": 0} for row in rows] for rows in (records, expected[0])]
                    assert strip[0] == strip[1]
    decision = formats.read(str(tmp_path / "0 splits"), "prompts").decision
    assert decision == f"{tmp_path}/0 splits: 2 prompts (prompt/response; split train; not read: test)."


def test_a_cell_that_is_no_json_in_a_column_of_json_is_a_bad_line(tmp_path):
    cells = pyarrow.array(['{"a": 1}', "no json", None])
    table = {"prompt": ["a", "b", "c"], "facts": pyarrow.ExtensionArray.from_storage(pyarrow.json_(), cells)}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    (_, good), (_, bad), (_, empty) = objects(tmp_path / "t.parquet")
    assert good == {"prompt": "a", "facts": {"a": 1}}
    assert empty == {"prompt": "c", "facts": None}
    assert isinstance(bad, FieldError)
    assert (bad.name, bad.problem[:38]) == ("facts", "a column of JSON, and this is none (Ex")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.arrow").write_bytes(arrow(PAIRS))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(lines(*PAIRS)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, kind in (("a.arrow", "Arrow"), ("a.jsonl.zst", "zstd")):
        with pytest.raises(UserError, match=rf"reading {kind} needs pyarrow: pip install 'penstock\[parquet\]'"):
            list(objects(tmp_path / name))


def test_wherever_a_parquet_file_has_lost_bytes_the_refusal_is_one_line(tmp_path):
    """Some of what pyarrow says of it ends with a line of its own."""
    whole, path, refusals = parquet(PAIRS), tmp_path / "t.parquet", []
    for at in range(0, len(whole) - 8, 7):
        path.write_bytes(whole[:at] + whole[at + 16 :])
        try:
            list(objects(path))
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert not any("\n" in refusal for refusal in refusals)
