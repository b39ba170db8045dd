"""The command: what it prints, how it ends, what it refuses, and how it follows a run."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from penstock import cli
from penstock.run import checkpoint
from tests.serve.conftest import KEY, running, save_chatty
from tests.serve.test_api import eventually


def refused(capsys, *arguments):
    """(exit code, what it said) of a command that does not start."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(one) for one in arguments])
    return stopped.value.code, capsys.readouterr().err


@pytest.fixture
def model(tmp_path):
    return save_chatty(tmp_path / "tiny")


def start(tmp_path, model, *more):
    """The real command, and the address and key lines that it prints."""
    command = [sys.executable, "-m", "penstock", "serve", model, "--port", "0", "--data-dir", str(tmp_path / "data")]
    process = subprocess.Popen(
        [*command, "--threads", "1", *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
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
    assert process.wait(60) == 0
    process, address, line = start(tmp_path, model, "--rows", "8", "--queue", "32")
    assert key not in line
    assert eventually(lambda: is_up(address), 60)
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
        thread.join(60)
    assert process.wait(60) == 0
    assert ends == [b"data: [DONE]"] * 32
    assert "Traceback" not in process.stderr.read()


def test_draining_turns_new_requests_away_and_cuts_off_what_takes_too_long(tmp_path, model, monkeypatch):
    from penstock.serve import service

    monkeypatch.setattr(service, "DRAIN_SECONDS", 1.0)
    long = save_chatty(tmp_path / "long", max_length=20_000)
    with running(tmp_path / "data", long) as one:
        got = []

        def ask():
            body = {"model": "long", "max_tokens": 19_000, "stream": True, "logit_bias": {"2": -100}}
            reply = one.ask("POST", "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": "hi"}]})
            got.append(reply.events[-1])

        thread = threading.Thread(target=ask)
        thread.start()
        assert eventually(lambda: one.service.scheduler.tokens_made > 3)
        with socket.create_connection(("127.0.0.1", one.port)) as kept:
            one.service.draining = True
            reply = one.ask("GET", "/health", key=None)
            assert (reply.status, reply.error["code"]) == (503, "draining")
            assert one.ask("POST", "/v1/completions", {"model": "long", "prompt": "x"}).error["code"] == "draining"
            kept.close()
    thread.join(60)
    assert got[0]["error"]["code"] == "shutting_down"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines could reach"),
        (["--key", "short"], "--key: has 5 characters"),
        (["--key", KEY, "--new-key"], "leave one of them out"),
        (["--host", "no.such.host.invalid", "--key", KEY], "is no address of this machine"),
        (["--port", "99999"], "--port 99999: must be a port"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--data-dir", "/proc/x"], "--data-dir /proc/x: cannot be made"),
        (["--follow"], "no run with a checkpoint"),
        (["--max-length", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_paragraph(tmp_path, model, capsys, flags, says):
    given = ["serve", model, "--port", "0", "--data-dir", tmp_path / "data", *flags]
    code, said = refused(capsys, *given)
    assert code == 2
    assert says in said
    assert "Traceback" not in said


def test_a_port_that_is_taken_is_named(tmp_path, model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, said = refused(capsys, "serve", model, "--port", port, "--data-dir", tmp_path / "data")
    assert code == 2
    assert f"--port {port}: cannot listen there" in said


def test_a_model_that_is_not_there_ends_the_server(tmp_path, capsys):
    code, said = refused(capsys, "serve", tmp_path / "nothing", "--port", "0", "--data-dir", tmp_path / "data")
    assert code == 2
    assert "no such model directory" in said


def test_a_model_without_a_tokenizer_cannot_chat(tmp_path, tiny_model, capsys):
    code, said = refused(capsys, "serve", tiny_model(), "--port", "0", "--data-dir", tmp_path / "data")
    assert code == 2
    assert "has no tokenizer" in said


def test_a_damaged_database_is_exit_code_4(tmp_path, model, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "penstock.db").write_bytes(b"no database" * 1000)
    code, said = refused(capsys, "serve", model, "--port", "0", "--data-dir", tmp_path / "data")
    assert code == 4
    assert "is damaged" in said
    assert "--move-damaged" in said


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
    with running(tmp_path / "data", str(run), follow=True) as one:
        before = one.ask("POST", "/v1/completions", body).json
        engine = one.service.catalogue.models["run"].engine
        step, steps = engine.step, []

        def waits():  # until the swap has happened, so that this answer lives through it
            steps.append(None)
            if len(steps) > 3:
                eventually(lambda: one.service.catalogue.swaps == 1)
            return step()

        engine.step = waits
        got = []
        thread = threading.Thread(target=lambda: got.append(one.ask("POST", "/v1/completions", body).json))
        thread.start()
        assert eventually(lambda: len(steps) > 3)
        write_checkpoint(run, 2, seed=7)
        assert eventually(lambda: one.service.catalogue.swaps == 1)
        thread.join(60)
        after = one.ask("POST", "/v1/completions", body).json
        assert got[0]["choices"] == before["choices"]
        assert got[0]["system_fingerprint"] == before["system_fingerprint"] != after["system_fingerprint"]
        assert after["choices"] != before["choices"]
        # A damaged one is passed over, and said so.
        write_checkpoint(run, 3, seed=9)
        weights = next((run / "checkpoints" / "step-000003" / "model").glob("*.safetensors"))
        assert eventually(lambda: one.service.catalogue.swaps == 2)
        assert one.ask("POST", "/v1/completions", body).json["choices"] != after["choices"]
        shutil.copytree(weights.parents[1], run / "checkpoints" / "step-000004")
        (run / "checkpoints" / "step-000004" / "model" / weights.name).write_bytes(b"broken")
        checkpoint.write_whole(run / "checkpoints" / "latest", "step-000004")
        assert eventually(lambda: one.service.catalogue._seen["run"] == "step-000004")
        time.sleep(0.1)
        assert one.service.catalogue.swaps == 2
        assert one.ask("POST", "/v1/completions", body).status == 200
