"""Data files and model directories with random mistakes in them: each is read, or refused in one paragraph with its
exit code, in bounded time and memory. A trial is known by its number, from which its random numbers follow."""

import csv
import gzip
import io
import json
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reliability.runs import Process, limit_memory, scratch
from tests.conftest import CHATML, save_tiny, save_tokenizer
from tests.models.test_families import CASES, random_model

SECONDS = 60.0
SPACE = 4 * 2**30
"""Bytes of address space that a trial may take above what it has."""
GROWTH = 2**30
"""Resident bytes more than this process' that count as memory out of bounds."""
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    " ", "x" * 10_000, "\ud800", "\u0000", "../../etc/passwd", "1", [], {}, [[]], [None], {"": None}, [1, 2, 3],
    {"a": {"a": {}}},
]  # fmt: skip
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}
ROWS: dict[str, tuple[list[str], list[dict[str, Any]]]] = {
    # kind: the flags of a command that reads it, rows
    "demonstrations": (["sft", "--model"], [{"prompt": "Hello?", "response": "I am fine"}] * 6),
    "conversations": (["sft", "--model"], [{"messages": [USER, ASSISTANT, USER, ASSISTANT]}] * 6),
    "token ids": (["sft", "--model"], [{"prompt_ids": [5, 9], "response_ids": [7, 8, 3]}] * 6),
    "comparisons": (["reward", "--model"],
                    [{"prompt": "Q", "responses": ["a b", "c", "d"], "ranking": [[1], [0, 2]]}] * 6),
    "pairs": (["dpo", "--model"], [{"prompt": "Q", "chosen": "yes", "rejected": "no"}] * 6),
    "votes": (["kto", "--model"], [{"prompt": "Q", "response": "A", "label": number % 2 == 0} for number in range(6)]),
    "prompts": (["ppo", "--reward-fn", "number", "--max-new-tokens", "2", "--actor"],
                [{"prompt": "Q", "answer": "4"}] * 6),
}  # fmt: skip


def data(trials: int) -> Iterator[dict[str, Any]]:
    """Rows of every kind, written as JSON lines, JSON, CSV, parquet, and packed, with mistakes in values, in structure
    or in bytes; every second file is trained on, the others are read by `penstock data check`."""
    with scratch() as home:
        model = save_tokenizer(home / "model", eos_token="<|im_end|>", template=CHATML)
        save_tiny(model, vocab_size=400, max_length=256, hf={"bos_token_id": 0, "eos_token_id": 3})
        for number in range(trials):
            rng = random.Random(f"data {number}")
            kind = [*ROWS][number % len(ROWS)]
            command, rows = ROWS[kind]
            flat = all(not isinstance(value, list) for row in rows for value in row.values())
            suffix = rng.choice([".jsonl", ".jsonl", ".json", ".jsonl.gz", ".parquet", *([".csv", ".tsv"] * flat)])
            path = home / f"data{suffix}"
            what = _write_rows(path, json.loads(json.dumps(rows)), rng)
            short = ["--steps", 1, "--batch-size", 2, "--out", home / "run", "--heldout", 0]
            arguments = (
                ["data", "check", path, "--model", model] if number % 2 else [*command, model, "--data", path, *short]
            )
            yield {"name": kind, **_read(arguments, home), "at": f"{number}: {suffix}, {what}"}


def _write_rows(path: Path, rows: list[dict[str, Any]], rng: random.Random) -> str:
    """Writes the rows with a mistake; returns which."""
    mistakes: dict[str, Callable[[], Any]] = {
        "a value": lambda: _change_node(rows, rng),
        "two values": lambda: [_change_node(rows, rng), _change_node(rows, rng)],
        "bytes": lambda: None,
    }
    what = rng.choice([*mistakes])
    mistakes[what]()
    content = _encoded(rows, path.name)
    if what == "bytes":
        content, what = change_bytes(content, rng)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" and rng.random() < 0.8 else content)
    return what


def _encoded(rows: Any, name: str) -> bytes:
    if name.endswith((".csv", ".tsv")):
        out = io.StringIO()
        names = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)) or ["prompt"]
        writer = csv.DictWriter(out, names, delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writeheader()
        writer.writerows(row for row in rows if isinstance(row, dict))
        return out.getvalue().encode("utf-8", "surrogatepass")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        out_bytes = io.BytesIO()
        try:
            table = pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)])
            pyarrow.parquet.write_table(table, out_bytes)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):  # values of no one type: as text
            texts = [{key: repr(value) for key, value in row.items()} for row in rows if isinstance(row, dict)]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), out_bytes)
        return out_bytes.getvalue()
    if name.endswith(".json"):
        return json.dumps(rows).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _change_node(root: Any, rng: random.Random) -> None:
    """Replaces, removes, renames or doubles something inside a JSON value."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            places.append((value, key))
            walk(value[key])

    walk(root)
    if not places:
        return
    holder, key = rng.choice(places)
    act = rng.randrange(6)
    if act == 0:
        del holder[key]
    elif act == 1 and isinstance(holder, dict):
        holder[rng.choice([f"{key}s", key.upper(), "", "prompt", "messages", "label", "\ud800"])] = holder.pop(key)
    elif act == 2 and isinstance(holder, list):
        holder.extend([holder[key]] * rng.choice([1, 1000]))
    elif act == 3:
        for _ in range(rng.choice([1, 50, 300])):
            holder[key] = [holder[key]]
    else:
        holder[key] = rng.choice(ODD)


def change_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The content with one mistake in its bytes, and which."""
    at = rng.randrange(len(content) + 1)
    size, bit = rng.choice([1, 2, 16, 200]), 1 << rng.randrange(8)
    changes: dict[str, Callable[[], bytes]] = {
        "cut off": lambda: content[:at],
        "beginning lost": lambda: content[at:],
        "bytes lost": lambda: content[:at] + content[at + size :],
        "bytes doubled": lambda: content[:at] + content[at : at + size] * 2 + content[at + size :],
        "noise": lambda: content[:at] + rng.randbytes(size) + content[at + size :],
        "zeros": lambda: content[:at] + bytes(size) + content[at + size :],
        "a bit": lambda: content[:at] + bytes(byte ^ bit for byte in content[at : at + 1]) + content[at + 1 :],
        "UTF-16": lambda: content.decode("utf-8", "replace").encode("utf-16"),
        "a mark in front": lambda: b"\xef\xbb\xbf" + content,
        "brackets": lambda: content[:at] + b"[" * 100_000 + content[at:],
        "a long number": lambda: content[:at] + b"9" * 10_000 + content[at:],
        "twice": lambda: content + content,
        "nothing": lambda: b"",
    }  # fmt: skip
    what = rng.choice([*changes])
    return changes[what](), what


# --- models -----------------------------------------------------------------------------------------------------------
FAMILIES = (
    "gpt2", "opt", "bloom, 6 heads", "gpt_neox", "llama, grouped queries", "mistral, window exceeded", "gpt_oss",
    "mixtral", "phi3, partly rotary, longrope", "ministral3, yarn, longer than its first context", "olmo3, two ropes",
)  # fmt: skip


def models(trials: int) -> Iterator[dict[str, Any]]:
    """Directories of eleven families, with mistakes in config.json, or in the weights: in the header or in its length;
    met by SFT for a step, `plan`, `generate` and `doctor`."""
    with scratch() as home:
        rows = home / "data.jsonl"
        rows.write_text('{"prompt_ids": [5, 9], "response_ids": [7, 8, 3]}\n' * 4)
        short = ["--data", rows, "--out", home / "run", "--steps", 1, "--batch-size", 2, "--heldout", 0]
        whole: dict[str, tuple[bytes, bytes]] = {}
        for number in range(trials):
            rng = random.Random(f"models {number}")
            family = FAMILIES[number % len(FAMILIES)]
            if family not in whole:
                model = home / "whole"
                random_model(*CASES[family]).save_pretrained(model)
                whole[family] = (model / "config.json").read_bytes(), (model / "model.safetensors").read_bytes()
            model = home / "model"
            model.mkdir(exist_ok=True)
            config, weights = whole[family]
            if rng.random() < 0.5:
                config, what = change_config(config, rng)
            else:
                weights, what = change_header(weights, rng)
            (model / "config.json").write_bytes(config)
            (model / "model.safetensors").write_bytes(weights)
            commands = {
                "sft": ["sft", "--model", model, *short],
                "plan": ["plan", "--model", model],
                "generate": ["generate", "--model", model, "--data", rows, "--out", home / "answers.jsonl",
                             "--max-new-tokens", 2],
                "doctor": ["doctor", model],
            }  # fmt: skip
            command = [*commands][number // len(FAMILIES) % len(commands)]
            yield {"name": command, **_read(commands[command], home), "at": f"{number}: {family}, {what}"}


def change_config(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A config.json with one mistake or two."""
    if rng.random() < 0.25:
        content, what = change_bytes(content, rng)
        return content, f"config.json, {what}"
    config = json.loads(content)
    before = json.dumps(config)
    for _ in range(rng.choice([1, 1, 2])):
        _change_node(config, rng)
    changed = [
        key for key in {*config, *json.loads(before)} if repr(config.get(key)) != repr(json.loads(before).get(key))
    ]
    return json.dumps(config).encode(), f"config.json, {', '.join(sorted(changed))[:200]}"


def change_header(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with a mistake in its header, in the header's length or in its own."""
    length = struct.unpack("<Q", content[:8])[0]
    header, tensors = content[8 : 8 + length], content[8 + length :]
    turn = rng.randrange(4)
    if turn == 0:
        size = rng.choice(
            [0, 1, 7, length - 1, length + 1, 2 * length, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(2**64)]
        )
        return struct.pack("<Q", size) + header + tensors, f"header of {size} bytes"
    if turn == 1:
        header, what = change_bytes(header, rng)
    elif turn == 2:
        cut = tensors[: rng.randrange(len(tensors))]
        changed = [(cut, "tensors cut off"), (tensors + bytes(9), "bytes behind the tensors"), (b"", "no tensors")]
        tensors, what = rng.choice(changed)
    else:
        table = json.loads(header)
        _change_node(table, rng)
        header, what = json.dumps(table).encode(), "a value in the header"
    return struct.pack("<Q", len(header)) + header + tensors, f"weights, {what}"


def _read(arguments: list[Any], home: Path) -> dict[str, Any]:
    """The verdict on a command that reads a file with a mistake."""
    shutil.rmtree(home / "run", ignore_errors=True)
    (home / "answers.jsonl").unlink(missing_ok=True)
    ended = Process(arguments, home / "log", prepare=partial(limit_memory, SPACE)).wait(SECONDS)
    if ended.resident_bytes > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + GROWTH:
        return {"verdict": "memory", "text": ended.line}
    if ended.fault is not None:
        return {"verdict": ended.fault, "text": ended.text[-1500:]}
    return {"verdict": "refused", "text": ended.line} if ended.code else {"verdict": "survived"}
