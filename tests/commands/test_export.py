"""What an exported model says of itself, and how it comes to the hub."""

import errno
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import tomli_w
import yaml
from transformers import AutoModelForCausalLM

from tests import hub_server
from tests.conftest import PATIENCE, cli

DEMONSTRATION = {"prompt": "a b", "response": "c d"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SETTINGS = ("--batch-size", 1, "--steps", 2, "--heldout", 0, "--max-length", 24)


@pytest.fixture
def run(tmp_path, tiny_model, make_tokenizer, jsonl):
    """Two stages: sft, then dpo on its model."""
    model = tiny_model(vocab_size=320)
    make_tokenizer()
    data = [tmp_path / f"{name}.jsonl" for name in ("talks", "pairs")]
    for file, row in zip(data, (DEMONSTRATION, PAIR), strict=True):
        os.rename(jsonl([row] * 2), file)
    assert cli("sft", "--model", model, "--data", data[0], "--out", tmp_path / "sft", *SETTINGS) == 0
    assert cli("dpo", "--model", tmp_path / "sft", "--data", data[1], "--out", tmp_path / "run", *SETTINGS) == 0
    return tmp_path / "run"


def card_of(file):
    """The head of a card as a dictionary, and its text."""
    _, head, text = file.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_tells_the_whole_line_and_no_path_of_the_machine(run, tmp_path):
    assert cli("export", run, "--out", tmp_path / "mine", "--license", "apache-2.0") == 0
    head, text = card_of(tmp_path / "mine" / "README.md")
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "transformers"
    assert head["tags"] == ["penstock", "dpo"]
    assert "base_model" not in head, "the base is a directory, which the hub does not know"
    assert "(sft -> dpo), step 2." in text
    for name in ("talks", "pairs"):
        digest = subprocess.run(["sha256sum", tmp_path / f"{name}.jsonl"], capture_output=True, text=True).stdout[:64]
        assert f"| {name}.jsonl | `{digest}` |" in text
    assert "| loss |" in text
    assert str(tmp_path) not in text
    assert 'model = "sft"' in text
    AutoModelForCausalLM.from_pretrained(tmp_path / "mine")


def test_warnings_and_a_missing_licence_are_said(run, tmp_path):
    with (run / "health.jsonl").open("a") as file:
        file.write('{"step": 2, "text": "loss: is not finite"}\n')
    assert cli("export", run, "--out", tmp_path / "mine.gguf", "--format", "gguf") == 0
    head, text = card_of(tmp_path / "mine.md")
    assert "license" not in head
    assert "No licence was given with it" in text
    assert "> WARNING from step 2: loss: is not finite" in text


def amend(run, **flags):
    config = tomllib.loads((run / "config.toml").read_text())
    (run / "config.toml").write_text(tomli_w.dumps(config | flags))


def test_the_head_names_datasets_of_the_hub_whatever_share_of_them_was_used(run, tmp_path):
    amend(run, data=[f"us/pairs@{'a' * 40}*0.3", "us/pairs:test", str(tmp_path / "pairs.jsonl")])
    amend(tmp_path / "sft", data=["them/talks*2"])
    assert cli("export", run, "--out", tmp_path / "mine") == 0
    head, text = card_of(tmp_path / "mine" / "README.md")
    assert head["datasets"] == ["them/talks", "us/pairs"]
    assert f"| us/pairs@{'a' * 40}*0.3 | as of its commit |" in text


def test_a_run_that_began_from_a_checkpoint_began_from_its_run(run, tmp_path):
    amend(run, model=str(tmp_path / "sft" / "checkpoints" / "step-000002"))
    assert cli("export", run, "--out", tmp_path / "mine") == 0
    assert "(sft -> dpo), step 2." in card_of(tmp_path / "mine" / "README.md")[1]


def test_what_only_an_upload_knows_is_refused_without(run, tmp_path, capsys):
    assert cli("export", run, "--out", tmp_path / "mine", "--private") == 2
    assert "--private: nothing is uploaded" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_a_gguf_file_that_cannot_be_put_there_leaves_no_card(run, tmp_path, capsys, monkeypatch):
    def full(path, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "rename", full)
    before = sorted(tmp_path.iterdir())
    assert cli("export", run, "--out", tmp_path / "mine.gguf", "--format", "gguf") == 3
    assert "--out" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def hub(tmp_path):
    server = hub_server.serve(tmp_path / "hub")
    yield server
    server.shutdown()
    server.server_close()


def push(hub, token, *arguments):
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": token, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "penstock", "export", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_a_model_and_its_card_are_uploaded_in_one_commit(run, tmp_path, hub):
    done = push(hub, hub_server.TOKEN, run, "--out", tmp_path / "mine", "--push", "me/tiny", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("uploaded http")
    folder = tmp_path / "hub" / "models" / "me" / "tiny"
    files = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert files["README.md"].startswith(b"---\n")
    assert b"\n# tiny\n" in files["README.md"]
    assert [(model["name"], model.get("visibility") or model.get("private")) for model in hub.made] in (
        [("tiny", "private")], [("tiny", True)],
    )  # fmt: skip
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_who_may_not_write_there_is_told_before_anything_is_made(run, tmp_path, hub):
    done = push(hub, "another", run, "--out", tmp_path / "mine", "--push", "me/tiny")
    assert done.returncode == 2
    assert re.search(r"--push me/tiny: .*401.*hf auth login.*nothing was written", done.stderr, re.S), done.stderr
    assert not (tmp_path / "mine").exists()
    assert cli("export", run, "--out", tmp_path / "mine", "--push", "no-user") == 2


@pytest.mark.parametrize(
    ("flags", "why"),
    [("--out sft", "exists and is not empty"), ("--out x --merge", "has no adapter"),
     ("--out x --format gguf", "ends in .gguf"), ("--out x --type f16", "shapes a GGUF file")],
)  # fmt: skip
def test_no_repository_is_made_for_what_cannot_be_exported(run, tmp_path, hub, flags, why, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = push(hub, hub_server.TOKEN, run, *flags.split(), "--push", "me/tiny")
    assert done.returncode == 2
    assert why in done.stderr
    assert hub.made == hub.requests == []
