"""The table of a profile from traces made by hand: each instant counts once, and the rest is idle."""

import json

from penstock.cli import main
from penstock.commands.bench.profile import table_of, total, union


def event(name, start, end, category="cpu_op", thread=1):
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": end - start, "tid": thread}


def label(name, start, end, thread=1):
    return event(name, start, end, "user_annotation", thread)


def seconds(**given):
    return {name: given.get(name, 0) / 1e6 for name in ("compute", "link", "disk", "optimizer", "idle")}


def test_overlapping_spans_count_once():
    assert union([(5, 7), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 7)]
    assert total(union([(5, 7), (0, 2), (1, 3)])) == 5


def test_a_threads_instants_are_shared_out():
    events = [
        label("bench.train", 0, 100),
        event("aten::mm", 10, 40),
        label("link.fetch", 30, 50),
        event("aten::copy_", 31, 49),
        label("disk.wait", 50, 60),
        label("optimizer", 70, 90),
        event("aten::add", 75, 80),
        event("aten::mm", 0, 100, thread=2),  # another thread: not where the phase waits
        event("aten::mm", 200, 300),  # behind the phase
        {"ph": "i", "name": "a mark", "ts": 5},
    ]
    assert table_of(events) == {"train": seconds(compute=20, link=20, disk=10, optimizer=20, idle=30)}


def test_a_gpus_kernels_and_copies_are_shared_out():
    events = [
        label("bench.score", 0, 100),
        event("a kernel", 0, 30, "kernel", 7),
        event("Memcpy HtoD", 20, 50, "gpu_memcpy", 8),
        event("Memcpy DtoD", 50, 55, "gpu_memcpy", 7),
        event("optimizer", 60, 70, "gpu_user_annotation", 7),
        event("a kernel", 60, 70, "kernel", 7),
        event("aten::mm", 0, 100),
    ]
    found = table_of(events)["score"]
    assert sum(found.values()) * 1e6 == 100
    expected = {"compute": 5 + 20, "link": 30, "disk": 0, "optimizer": 10, "idle": 35}
    assert {name: round(seconds * 1e6) for name, seconds in found.items()} == expected


def test_the_command_writes_a_trace_and_a_table(tmp_path, tiny_model, capsys):
    trace, out = tmp_path / "trace.json", tmp_path / "found.json"
    main([
        "bench", "--model", tiny_model(), "--strategy", "gemini_nvme", "--disk", str(tmp_path), "--prompt-length", "4",
        "--max-length", "8", "--iterations", "1", "--update-timesteps", "1", "--max-epochs", "1", "--device", "cpu",
        "--experience-batch-size", "2", "--train-batch-size", "2", "--profile", str(trace), "--json", str(out),
    ])  # fmt: skip
    names = {one.get("name") for one in json.loads(trace.read_text())["traceEvents"]}
    assert {"bench.rollout", "bench.score", "bench.train", "disk.wait", "link.settle", "optimizer"} <= names
    table = json.loads(out.read_text())["profile"]
    assert list(table) == ["rollout", "score", "train"]
    assert table["train"]["optimizer"] > 0
    assert all(row["compute"] > 0 for row in table.values())
    assert "optimizer" in capsys.readouterr().out
