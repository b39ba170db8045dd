"""The command: what it prints, how it ends, what it refuses, and how it follows a run."""

import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest

from penstock import cli
from penstock.run import checkpoint
from tests.conftest import PATIENCE
from tests.serve.conftest import KEY, eventually, paused, running, save_chatty, worker_of
from tests.zygote import zygotic


def refused(capsys, *arguments):
    """(exit code, error message) of a command that does not start."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code, capsys.readouterr().err


@pytest.fixture
def model(tmp_path):
    return save_chatty(tmp_path / "tiny")


def start(tmp_path, model, *flags):
    """The real command, and the address and key lines that it prints."""
    command = zygotic("-m", "penstock", "serve", model, "--port", "0", "--data-dir", tmp_path / "data")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--threads", "1", *flags], **pipes)
    address = process.stdout.readline().strip().removeprefix("penstock serve: ")
    return process, address, process.stdout.readline().strip().removeprefix("key: ")


def get(address, path, key):
    request = urllib.request.Request(address + path, headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def is_up(address):
    try:
        with urllib.request.urlopen(f"{address}/health"):
            return True
    except OSError:
        return False


def test_the_key_is_printed_once_and_goes_on_working_and_sigterm_lets_streams_end(tmp_path, model):
    process, address, key = start(tmp_path, model)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
    assert key.startswith("pk-")
    process.terminate()  # while it loads
    assert process.wait(PATIENCE) == 0
    process, address, line = start(tmp_path, model, "--rows", "8", "--queue", "32")
    assert key not in line
    assert eventually(lambda: is_up(address))
    assert get(address, "/v1/models", key)["data"][0]["id"] == "tiny"
    # SIGTERM with 32 streams, most of which still wait for a row.
    body = {"model": "tiny", "stream": True, "max_tokens": 40, "messages": [{"role": "user", "content": "hi"}]}
    head = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), head)
    streams = [urllib.request.urlopen(request) for _ in range(32)]
    ends = []
    threads = [threading.Thread(target=lambda s=s: ends.append(s.read().rstrip().rsplit(b"\n\n")[-1])) for s in streams]
    for thread in threads:
        thread.start()
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(PATIENCE)
    assert process.wait(PATIENCE) == 0
    assert ends == [b"data: [DONE]"] * 32
    assert "Traceback" not in process.stderr.read()


def test_draining_turns_new_requests_away_and_cuts_off_what_takes_too_long(tmp_path, model, monkeypatch):
    from penstock.serve import service

    monkeypatch.setattr(service, "DRAIN_SECONDS", 1.0)
    long = save_chatty(tmp_path / "long", max_length=20_000)
    with running(tmp_path / "data", long) as server:
        last_events = []

        def ask():
            body = {"model": "long", "max_tokens": 19_000, "stream": True, "logit_bias": {"2": -100}}
            reply = server.post({**body, "messages": [{"role": "user", "content": "hi"}]})
            last_events.append(reply.events[-1])

        thread = threading.Thread(target=ask)
        thread.start()
        assert eventually(lambda: server.service.scheduler.tokens_made > 3)
        server.service.draining = True
        reply = server.ask("GET", "/health", key=None)
        assert (reply.status, reply.error["code"]) == (503, "draining")
        assert server.post({"model": "long", "prompt": "x"}, "/v1/completions").error["code"] == "draining"
    thread.join(PATIENCE)
    assert last_events[0]["error"]["code"] == "shutting_down"


@pytest.mark.parametrize(("flags", "says"), [
    (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines could reach"),
    (["--key", "short"], "--key: has 5 characters"), (["--key", KEY, "--new-key"], "leave one of them out"),
    (["--host", "no.such.host.invalid", "--key", KEY], "is no address of this machine"),
    (["--port", "99999"], "--port 99999: must be a port"), (["--rows", "0"], "--rows 0: must be at least 1"),
    (["--data-dir", "/proc/x"], "--data-dir /proc/x: cannot be made"), (["--follow"], "no run with a checkpoint"),
    (["--max-length", "0"], "must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_is_one_paragraph(tmp_path, model, capsys, flags, says):
    code, message = refused(capsys, "serve", model, "--port", "0", "--data-dir", tmp_path / "data", *flags)
    assert code == 2
    assert says in message
    assert "Traceback" not in message


def test_a_port_that_is_taken_is_named(tmp_path, model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, message = refused(capsys, "serve", model, "--port", port, "--data-dir", tmp_path / "data")
    assert code == 2
    assert f"--port {port}: cannot listen there" in message


def test_a_model_that_cannot_chat_ends_the_server(tmp_path, tiny_model, capsys):
    for path, words in ((tmp_path / "nothing", "no such model directory"), (tiny_model(), "has no tokenizer")):
        code, message = refused(capsys, "serve", path, "--port", "0", "--data-dir", tmp_path / "data")
        assert code == 2
        assert words in message


def test_a_damaged_database_is_exit_code_4(tmp_path, model, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "penstock.db").write_bytes(b"no database" * 1000)
    code, message = refused(capsys, "serve", model, "--port", "0", "--data-dir", tmp_path / "data")
    assert code == 4
    assert "is damaged" in message
    assert "--move-damaged" in message


# --- following a run --------------------------------------------------------------------------------------------------
def write_checkpoint(run: Path, step: int, seed: int) -> None:
    """What a training run leaves at a step."""
    (run / "config.toml").write_text('command = "sft"\n')
    checkpoint.save(run / "checkpoints", step, lambda path: save_chatty(path / "model", seed) and None, {})


def test_a_newer_checkpoint_takes_over_and_what_runs_ends_on_the_old_one(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint(run, 1, seed=0)
    body = {"model": "run", "prompt": [1, 40], "seed": 3, "max_tokens": 200, "logit_bias": {"2": -100}}
    with running(tmp_path / "data", str(run), follow=True) as server:
        catalogue = server.service.catalogue

        def complete():
            return server.post(body, "/v1/completions").json

        before, answers = complete(), []
        with paused(catalogue.models["run"], lambda: catalogue.swaps == 1, after=3) as steps:
            thread = threading.Thread(target=lambda: answers.append(complete()))  # it lives through the swap
            thread.start()
            assert eventually(lambda: len(steps) > 3)
            write_checkpoint(run, 2, seed=7)
            assert eventually(lambda: catalogue.swaps == 1)
            thread.join(PATIENCE)
        after = complete()
        assert eventually(lambda: len(worker_of(catalogue.models["run"]).models) == 1)
        assert answers[0]["choices"] == before["choices"]
        assert answers[0]["system_fingerprint"] == before["system_fingerprint"] != after["system_fingerprint"]
        assert after["choices"] != before["choices"]
        # A damaged checkpoint is skipped.
        write_checkpoint(run, 3, seed=9)
        weights = next((run / "checkpoints" / "step-000003" / "model").glob("*.safetensors"))
        assert eventually(lambda: catalogue.swaps == 2)
        assert complete()["choices"] != after["choices"]
        shutil.copytree(weights.parents[1], run / "checkpoints" / "step-000004")
        (run / "checkpoints" / "step-000004" / "model" / weights.name).write_bytes(b"broken")
        checkpoint.write_whole(run / "checkpoints" / "latest", "step-000004")
        assert eventually(lambda: catalogue._seen["run"] == "step-000004")
        assert catalogue.swaps == 2
        assert complete()["choices"]
