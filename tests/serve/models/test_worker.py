"""The models' process: the server outlives it, and it does not outlive the server."""

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.data.toyland import save_tokenizer
from penstock.errors import ResourceError
from penstock.models.roles import RewardModel
from penstock.serve import scheduler as schedulers
from tests.conftest import PATIENCE, save_tiny
from tests.serve.conftest import KEY, TEXTS, eventually, running, save_chatty, start_process
from tests.serve.test_server import write_checkpoint

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
        assert (replies[0].status, replies[0].error["code"]) == (500, "model_lost")
        assert "killed by SIGKILL; the system may have had no memory left" in replies[0].error["message"]
        assert server.idle()
        assert eventually(lambda: server.ask("GET", "/health", key=None).status == 200)
        assert server.post(short, "/v1/completions").json["choices"] == wanted
    assert "the models' process was killed by SIGKILL" in capfd.readouterr().err


def test_a_worker_that_is_lost_comes_back_with_the_same_weights(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint(run, 1, seed=0)
    body = {**BODY, "model": "run", "max_tokens": 20}
    with running(tmp_path / "data", str(run)) as server:
        wanted = server.post(body, "/v1/completions").json
        write_checkpoint(run, 2, seed=7)
        os.kill(server.service.scheduler._process.pid, signal.SIGKILL)
        assert eventually(lambda: server.post(body, "/v1/completions").status == 200)
        again = server.post(body, "/v1/completions").json
        assert (again["choices"], again["system_fingerprint"]) == (wanted["choices"], wanted["system_fingerprint"])


def test_a_score_of_a_killed_worker_says_so(tmp_path):
    model = RewardModel.from_pretrained(save_tiny(tmp_path / "base", vocab_size=400, max_length=128))
    model.save_pretrained(tmp_path / "taste")
    save_tokenizer(tmp_path / "taste", TEXTS, vocab_size=400)
    with running(tmp_path / "data", str(tmp_path / "taste")) as server, ThreadPoolExecutor(1) as pool:
        pid = server.service.scheduler._process.pid
        os.kill(pid, signal.SIGSTOP)
        reply = pool.submit(server.post, {"model": "taste", "queries": "hi", "documents": "a"}, "/v1/score")
        assert eventually(lambda: server.service.scoring)
        os.kill(pid, signal.SIGKILL)
        assert (reply.result().status, reply.result().error["code"]) == (500, "model_lost")


def test_a_server_that_can_start_no_other_worker_ends(tmp_path, monkeypatch):
    def full(threads):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    with running(tmp_path / "data", save_chatty(tmp_path / "tiny")) as server:
        monkeypatch.setattr(schedulers, "start_worker", full)
        os.kill(server.service.scheduler._process.pid, signal.SIGKILL)
        catalogue = server.service.catalogue
        assert eventually(lambda: catalogue.problem)
        assert isinstance(catalogue.problem, ResourceError)
        assert "another cannot be started (Resource temporarily unavailable)" in str(catalogue.problem)


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
