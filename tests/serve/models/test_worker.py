"""The models' process: the server outlives it, and it does not outlive the server."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from penstock.errors import ResourceError
from penstock.serve import scheduler as schedulers
from tests.conftest import PATIENCE
from tests.serve.conftest import KEY, eventually, running, save_chatty, start_process

BODY = {"model": "tiny", "prompt": [1, 40], "seed": 3, "max_tokens": 3000, "logit_bias": {"2": -100}}


@pytest.fixture(autouse=True)
def in_a_process(monkeypatch):
    monkeypatch.setattr(schedulers, "start_worker", start_process)


def test_a_killed_worker_is_an_error_for_who_waits_and_another_one_answers(tmp_path, capfd):
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny", max_length=4000)) as server:
        short = {**BODY, "max_tokens": 20}
        wanted = server.post(short, "/v1/completions").json["choices"]
        replies = []
        thread = threading.Thread(target=lambda: replies.append(server.post(BODY, "/v1/completions")))
        thread.start()
        scheduler = server.service.scheduler
        made = scheduler.tokens_made
        assert eventually(lambda: scheduler.tokens_made > made)
        os.kill(scheduler._process.pid, signal.SIGKILL)
        thread.join(PATIENCE)
        assert (replies[0].status, replies[0].error["code"]) == (500, "model_failed")
        assert "killed by SIGKILL; the system may have had no memory left" in replies[0].error["message"]
        assert server.idle()
        assert eventually(lambda: server.ask("GET", "/health", key=None).status == 200)
        assert server.post(short, "/v1/completions").json["choices"] == wanted
    assert "the models' process was killed by SIGKILL" in capfd.readouterr().err


def test_a_worker_that_ends_before_it_has_loaded_ends_the_server(tmp_path, monkeypatch):
    monkeypatch.setattr(schedulers, "WORKER", "raise SystemExit(7)")
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny"), wait=False) as server:
        catalogue = server.service.catalogue
        assert eventually(lambda: catalogue.problem)
        assert isinstance(catalogue.problem, ResourceError)
        assert "the models' process ended with exit code 7" in str(catalogue.problem)


def test_a_worker_ends_with_its_server(tmp_path):
    words = ["serve", save_chatty(tmp_path / "tiny"), "--port", "0", "--key", KEY, "--data-dir", str(tmp_path / "data")]
    server = subprocess.Popen([sys.executable, "-m", "penstock", *words], stdout=subprocess.PIPE, text=True)
    try:
        server.stdout.readline()
        children = f"/proc/{server.pid}/task/{server.pid}/children"

        def worker():
            with open(children, encoding="ascii") as file:
                return file.read().split()

        assert eventually(worker)
        (pid,) = map(int, worker())
    finally:
        server.kill()
        server.wait()

    def gone():
        try:
            return "State:\tZ" in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        except OSError:
            return True

    assert eventually(gone)
