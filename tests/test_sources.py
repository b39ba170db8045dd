"""What --data names: paths first, then datasets on the hub; weights; and that a resumed run reads the same rows."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w

from penstock import cli, flags, hub, sources
from penstock.config import DataFlags, RunFlags, SFTConfig
from penstock.data import formats
from penstock.errors import UserError
from penstock.hub import pinned, unpinned
from penstock.run import session
from penstock.sources import Hub, hub_of, source_of, weighed
from tests import hub_server
from tests.conftest import PATIENCE, demonstrations

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(("name", "meaning"), [
    ("lab/talks", Hub("lab/talks")), ("lab/talks@v1.0", Hub("lab/talks", "v1.0")),
    ("lab/talks:test", Hub("lab/talks", word="test")), ("lab/a.b-c:x:y", Hub("lab/a.b-c", config="x", split="y")),
    ("lab/talks:en:train[:1000]", Hub("lab/talks", config="en", split="train[:1000]")),
    ("lab/talks:train[10%:20%]", Hub("lab/talks", word="train[10%:20%]")),
    (f"lab/talks@{COMMIT}:train+test", Hub("lab/talks", COMMIT, word="train+test")),
    ("hf://datasets/lab/talks", Hub("lab/talks")),
    ("hf://datasets/lab/talks@refs%2Fpr%2F1/a/b-*.jsonl", Hub("lab/talks", "refs/pr/1", "a/b-*.jsonl")),
    ("data/train.jsonl", None), ("data/part-*.csv", None), ("./lab/talks", None), ("/lab/talks", None), ("a/b/c", None),
    ("talks", None), ("-", None), ("data/[ab].jsonl", None), ("data/talks.jsonl.gz", None),
])  # fmt: skip
def test_a_name_on_the_hub_is_told_from_a_path(name, meaning):
    assert hub_of(name) == meaning


def test_what_exists_is_a_path_whatever_it_looks_like(tmp_path, monkeypatch, jsonl):
    (tmp_path / "lab" / "talks").mkdir(parents=True)
    jsonl(demonstrations(3), "lab/talks/data.jsonl")
    jsonl(demonstrations(2), "a*0.5")
    monkeypatch.chdir(tmp_path)
    assert hub_of("lab/talks") is None
    assert [part.name for part in source_of("lab/talks").parts] == ["lab/talks/data.jsonl"]
    assert (weighed("a*0.5"), weighed("a*0.5*2")) == (("a*0.5", None), ("a*0.5", 2.0))
    assert len(formats.read("a*0.5*2", "demonstrations").records) == 4


def test_a_folder_leaves_out_what_is_no_data_and_other_splits_and_says_so(tmp_path, jsonl):
    for name in ("en/train-0.jsonl", "en/train-1.jsonl", "test.jsonl", "de/validation.jsonl", ".cache/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(demonstrations(1), name)
    (tmp_path / "README.md").touch()
    source = source_of(str(tmp_path))
    assert [part.path.name for part in source.parts] == ["train-0.jsonl", "train-1.jsonl"]
    assert source.note == "not read: 2 of test, validation, which stand beside those of train; 1 that are no data"
    assert len(source_of(f"{tmp_path}/**/*.jsonl").parts) == 4
    assert [part.path.name for part in source_of(str(tmp_path / "de")).parts] == ["validation.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data file is in this folder"):
        source_of(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no file matches"):
        source_of(f"{tmp_path}/x*.jsonl")


def test_a_weight_that_leaves_nothing_is_refused(jsonl):
    path = jsonl(demonstrations(3))
    with pytest.raises(UserError, match="a weight of 0 uses nothing"):
        source_of(f"{path}*0")
    with pytest.raises(Exception, match=r"weight 0\.01: 0 of 3 records"):
        formats.read(f"{path}*0.01", "demonstrations")


def test_sources_mean_the_same_from_another_directory(tmp_path, monkeypatch, jsonl):
    jsonl(demonstrations(3), "a.jsonl")
    monkeypatch.chdir(tmp_path)
    given = ["a.jsonl", "a.jsonl*0.5", "a*.jsonl*2", "lab/talks:train", "-", "x*"]
    assert flags.with_absolute_paths({"data": given})["data"] == [
        *(f"{tmp_path}/{name}" for name in given[:3]),
        *given[3:],
    ]


def test_the_commit_of_a_dataset_is_written_into_its_name_and_taken_out(monkeypatch):
    monkeypatch.setattr(hub, "_commit", lambda name, _: COMMIT)
    for given, name in [
        ("lab/talks", f"lab/talks@{COMMIT}"), ("lab/talks:en:train[:10]*0.5", f"lab/talks@{COMMIT}:en:train[:10]*0.5"),
        ("hf://datasets/lab/talks/a*.csv", f"hf://datasets/lab/talks@{COMMIT}/a*.csv"), ("no.jsonl*2", "no.jsonl*2"),
    ]:  # fmt: skip
        assert (pinned(given), pinned(name), unpinned(name, "run")) == (name, name, given)
    assert pinned("lab/talks@main:test") == f"lab/talks@{COMMIT}:test"


def test_without_the_datasets_library_a_name_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (pinned, lambda name: formats.read(name, "prompts")):
        with pytest.raises(UserError) as error:
            read("lab/talks")
        assert str(error.value) == (
            "--data lab/talks: no such file or folder; as a dataset on the hub it needs the datasets library: "
            "pip install 'penstock[hub]'."
        )


PLAIN = ["--heldout", "0", "--batch-size", "2", "--lr-schedule", "constant", "--warmup", "0"]
"""Of a run that is the same whether it is made at once or resumed to be longer."""


def test_what_came_through_stdin_is_kept_in_the_run_and_a_resume_reads_it(tmp_path, tiny_model, jsonl, monkeypatch):
    path, named, piped = jsonl(demonstrations(8)), tmp_path / "named", tmp_path / "piped"
    common, data = ["sft", "--model", tiny_model(), *PLAIN], Path(path).read_bytes()
    cli.main([*common, "--data", f"{path}*1.5", "--out", str(named), "--steps", "4"])
    sources.standard_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    cli.main([*common, "--data=-*1.5", "--out", str(piped), "--steps", "2"])
    monkeypatch.setattr(sources, "standard_input", None)
    cli.main(["resume", str(piped), "--steps", "4"])
    assert (piped / "stdin").read_bytes() == data
    assert f'"{piped}/stdin*1.5"' in (piped / "config.toml").read_text()
    assert (piped / "metrics.jsonl").read_bytes() == (named / "metrics.jsonl").read_bytes()
    (piped / "stdin").write_bytes(data + data)
    with pytest.raises(SystemExit):
        cli.main(["resume", str(piped), "--steps", "6"])


@pytest.mark.parametrize("given", ["-", "-*2", "lab/talks:train", "hf://datasets/lab/talks/a.csv*0.5"])
def test_a_launcher_that_names_the_data_as_before_goes_on_with_what_the_run_read(tmp_path, monkeypatch, given):
    monkeypatch.setattr(hub, "_commit", lambda name, _: COMMIT)
    read = f"{tmp_path}/stdin{given[1:]}" if given[0] == "-" else pinned(given)
    config, begun, other = (
        SFTConfig(model="m", data=DataFlags(data=(text,)), run=RunFlags(out=str(tmp_path)))
        for text in (given, read, "lab/others")
    )
    (tmp_path / "config.toml").write_text(tomli_w.dumps({"command": "sft", **flags.to_dict(begun)}))
    assert cli.as_begun(config, "sft").data.data == (read,)
    with pytest.raises(UserError, match="--data: --resume-if-present goes on with a run as it was begun"):
        cli.as_begun(other, "sft")


def test_a_terminal_and_several_ranks_give_no_data(monkeypatch):
    sources.standard_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="standard input is a terminal; pipe a file into it"):
        formats.read("-", "prompts")
    config = SFTConfig(model="m", data=DataFlags(data=("a.jsonl", "-")), run=RunFlags(out="r"))
    with pytest.raises(UserError, match="2 ranks cannot share one standard input"):
        session._with_commits(config, SimpleNamespace(size=2, first=True))


README = """---
configs:
- {config_name: english, data_files: [{split: train, path: en/train.jsonl}, {split: test, path: en/test.jsonl}]}
- {config_name: german, data_files: [{split: first, path: de/train.jsonl}, {split: second, path: de/test.jsonl}]}
---
"""
READS = [  # what is named, and the prompts that are read or what is said
    ("lab/talks", ["plain train 0", "plain train 1", "plain train 2"]), ("lab/talks:test[:1]", ["plain test 0"]),
    ("lab/talks@main:train[1:]*2", ["plain train 1"] * 2 + ["plain train 2"] * 2),
    ("lab/many:english:test", ["en test 0", "en test 1", "en test 2"]), ("lab/many:german:first[:1]", ["de train 0"]),
    ("hf://datasets/lab/talks/test.jsonl", ["plain test 0", "plain test 1", "plain test 2"]),
    ("hf://datasets/lab/many/*/te*.jsonl*0.34", ["de test 1", "en test 1"]),
    ("lab/many", "Config name is missing"), ("lab/many:german", "has the splits first, second; name one"),
    ("lab/talks:tset", "Unknown split"), ("lab/nothing", "no such file or folder; and as a dataset on the hub"),
    ("hf://datasets/lab/talks/no.jsonl", "no such file or folder; and as a dataset"), (f"lab/talks@{COMMIT}", COMMIT),
]  # fmt: skip
SCRIPT = """
import json, sys
from penstock import hub
from penstock.data import formats
from penstock.errors import UserError

for text in json.loads(sys.argv[1]):
    try:
        name = hub.pinned(text)
        read = [record.prompt for record in formats.read(name, "prompts").records]
    except UserError as error:
        name, read = "", str(error)
    print(json.dumps([text, name, read]))
"""


def rows(name):
    return "".join(json.dumps({"prompt": f"{name} {i}", "response": "A", "system": None}) + "\n" for i in range(3))


@pytest.fixture
def lab(tmp_path):
    """A hub with lab/talks (two splits) and lab/many (two configurations), and the environment that leads to it."""
    pytest.importorskip("datasets")
    for repo, commit, folders in (("talks", "a" * 40, [""]), ("many", "b" * 40, ["en/", "de/"])):
        for folder in folders:
            for split in ("train", "test"):
                file = tmp_path / "lab" / repo / commit / f"{folder}{split}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(rows(f"{folder[:2] or 'plain'} {split}"))
        (tmp_path / "lab" / repo / "main").write_text(commit)
    (tmp_path / "lab" / "many" / ("b" * 40) / "README.md").write_text(README)
    server = hub_server.serve(tmp_path)
    yield {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    server.shutdown()
    server.server_close()


def script(environment, code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_datasets_on_the_hub_are_read_by_name_and_again_without_a_network(lab):
    answers = [json.loads(line) for line in script(lab, SCRIPT, json.dumps([text for text, _ in READS])).splitlines()]
    names = []
    for (text, expected), (_, name, read) in zip(READS, answers, strict=True):
        if isinstance(expected, str):
            assert expected in read, text
        else:
            assert sorted(read) == sorted(expected) if "*0." not in text else len(read) == 2, (text, read)
            assert ("a" if "talks" in text else "b") * 40 in name
            names.append((name, read))
    offline = [name for name, _ in names if "[:" not in name]  # what was streamed is not in the cache as a whole
    again = script(lab | {"HF_HUB_OFFLINE": "1"}, SCRIPT, json.dumps([name for name in offline if "*/" not in name]))
    for line in again.splitlines():
        text, name, read = json.loads(line)
        assert (name, read) == (text, dict(names)[text])


def test_files_of_a_branch_with_a_slash_in_its_name_are_read_by_name_and_by_pattern(lab, tmp_path):
    branches = ("refs%2Fconvert%2Fparquet", "more%2Fwords")
    for branch in branches:
        file = tmp_path / "lab" / "talks" / branch / "data" / "train.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(rows(branch))
    code = """
import json, sys
from penstock.hub import files_of
from penstock.sources import source_of

for text in sys.argv[1:]:
    (part,) = files_of(source_of(text))
    print(json.dumps([part.name, part.path.read_text()]))
"""
    roots = [f"hf://datasets/lab/talks@{branch}/data" for branch in branches]
    printed = script(lab, code, *(f"{root}/{name}" for root in roots for name in ("train.jsonl", "*.jsonl")))
    expected = [[f"{root}/train.jsonl", rows(branch)] for root, branch in zip(roots, branches, strict=True)]
    assert [json.loads(line) for line in printed.splitlines()] == [expected[0], expected[0], expected[1], expected[1]]


def test_a_run_keeps_the_commit_and_resumes_on_its_rows(lab, tmp_path, tiny_model, make_tokenizer):
    model = tiny_model(vocab_size=320)
    make_tokenizer()
    code = """
import pathlib, shutil, sys
from penstock.cli import main

model, out, talks = sys.argv[1:4]
common = ["sft", "--model", model, *sys.argv[4:]]
main([*common, "--out", out, "--steps", "2", "--data", "lab/talks"])
talks = pathlib.Path(talks)
shutil.copytree(talks / ("a" * 40), talks / ("c" * 40))
(talks / ("c" * 40) / "train.jsonl").write_text('{"prompt": "other", "response": "rows"}\\n')
(talks / "main").write_text("c" * 40)
main(["resume", out, "--steps", "4"])
main([*common, "--out", out + "-other", "--steps", "4", "--data", "lab/talks@" + "a" * 40])
"""
    script(lab, code, model, str(tmp_path / "run"), str(tmp_path / "lab" / "talks"), *PLAIN)
    assert f'"lab/talks@{"a" * 40}"' in (tmp_path / "run" / "config.toml").read_text()
    runs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "run-other")]
    assert runs[0] == runs[1]
    assert len(runs[0].splitlines()) == 4
