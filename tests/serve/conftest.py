"""A server with tiny models, in a thread of the test process, and how tests ask it and wait for it."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from penstock.data.toyland import save_tokenizer
from penstock.serve import auth
from penstock.serve import scheduler as schedulers
from penstock.serve.config import ServeConfig
from penstock.serve.listener import address_of, listen
from penstock.serve.models.catalogue import ServedModel
from penstock.serve.models.worker import Worker
from penstock.serve.server import Web
from penstock.serve.service import Service
from penstock.serve.store import open_store
from tests.conftest import PATIENCE, free_port, save_tiny
from tests.serve.browser import browser, contexts, new_page, open_page, pictures, served, shoot, watch  # noqa: F401 - fixtures

KEY = "a key for the tests"
DEBIANS = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")))
PG_CTL = shutil.which("pg_ctl") or next(iter(DEBIANS), None)
TEXTS = ["What is a penstock? The gated pipe that feeds a turbine."]


def save_chatty(path: Path, seed: int = 0, **changes) -> str:
    """A tiny model with a tokenizer: what it writes is noise, in all of Unicode's broken pieces."""
    save_tiny(path, seed, **{"vocab_size": 400, "max_length": 256, **changes})
    save_tokenizer(path, TEXTS, vocab_size=400)
    return str(path)


@dataclass
class Reply:
    """An answer over HTTP."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """Its error, after a check of the shape."""
        assert self.headers["content-type"] == "application/json"
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert all(isinstance(error[name], str) for name in ("message", "type", "code"))
        assert error["param"] is None or isinstance(error["param"], str)
        return error

    @property
    def events(self):
        """Its server-sent events, [DONE] as None."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [None if line == "[DONE]" else json.loads(line) for line in lines]


def eventually(is_true, seconds=PATIENCE):
    """Waits until `is_true()`. False when the time is up."""
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


start_process = schedulers.start_worker
WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


class WorkerThread(threading.Thread):
    """The worker in a thread of the test's process, so that tests can reach its engines."""

    def __init__(self, connection) -> None:
        self.worker = Worker(connection)
        WORKERS.add(self.worker)
        super().__init__(target=self.worker.run, daemon=True)

    def kill(self) -> None:
        """It ends because its connection is closed."""

    def wait(self) -> int:
        """Waits for its end."""
        self.join(PATIENCE)
        assert not self.is_alive()
        return 0


@pytest.fixture(autouse=True, scope="session")
def worker_in_a_thread():
    """Where a test wants the process, it runs `penstock serve`, or undoes this."""

    def start(threads):
        ours, theirs = multiprocessing.Pipe()
        thread = WorkerThread(theirs)
        thread.start()
        return ours, thread

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedulers, "start_worker", start)
        yield


def worker_of(model: ServedModel) -> Worker:
    """The worker that has a model."""
    return next(worker for worker in WORKERS if model.number in worker.models)


def engine_of(model: ServedModel):
    """What answers for a model."""
    return worker_of(model).models[model.number].engine


@contextlib.contextmanager
def paused(model: ServedModel, until, after=0):
    """Lets a model's engine take `after` steps, and no more until `until()` is true; the worker takes orders meanwhile.
    Yields a list with all steps, and the one that waits."""
    engine, steps, waits = engine_of(model), [], False
    step = engine.step

    def step_or_wait():
        nonlocal waits
        if not waits:
            steps.append(None)
        waits = len(steps) > after and not until()
        if waits:
            time.sleep(0.002)
            return []  # no answer got a token
        return step()

    engine.step = step_or_wait
    yield steps
    engine.step = step


class RunningServer:
    """A server that answers."""

    def __init__(self, service: Service, address: str) -> None:
        self.service, self.address = service, address
        self.port = int(address.rsplit(":", 1)[1])

    def ask(self, method, path, body=None, *, key=KEY, headers=None, data=None) -> Reply:
        """Sends a request; `body` as JSON, or `data` as it is."""
        headers = dict(headers or {})
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        if body is not None:
            data, headers["content-type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return Reply(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def post(self, body, path="/v1/chat/completions", **options) -> Reply:
        """Sends a chat completion, or another request with a body."""
        return self.ask("POST", path, body, **options)

    def idle(self) -> bool:
        """Waits until nothing runs."""
        scheduler = self.service.scheduler
        return eventually(lambda: not scheduler.outstanding and not scheduler.rows_used)


@contextlib.contextmanager
def running(directory: Path, *models: str, wait=True, **flags):
    """A server in a thread, as penstock serve runs it but for the signals."""
    flags = {"rows": 4, "queue": 8, "key": KEY, **flags}
    config = ServeConfig(model=models, port=0, data_dir=str(directory), device="cpu", **flags)
    store = open_store(config.data_dir, config.database)
    auth.settle(store, config.key, False)
    service, listener, started = Service(config, store), listen(config.host, config.port), {}

    async def main() -> None:
        started["loop"], started["web"] = asyncio.get_running_loop(), Web(service)
        await started["web"].run_service(listener)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    try:
        if wait:
            catalogue = service.catalogue
            assert eventually(lambda: catalogue.ready.is_set() or catalogue.problem)
            assert catalogue.ready.is_set(), catalogue.problem
        assert eventually(lambda: service.scheduler is not None)
        yield RunningServer(service, address_of(listener))
    finally:
        if thread.is_alive():
            asyncio.run_coroutine_threadsafe(started["web"].end(), started["loop"])
        thread.join(PATIENCE)
        store.close()
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A shared server with a model `tiny` and another `other`. Tests leave it as it was."""
    directory = tmp_path_factory.mktemp("served")
    models = [save_chatty(directory / "tiny"), save_chatty(directory / "other", seed=1)]
    with running(directory / "data", *models, rows=8, queue=32) as shared:
        yield shared
        assert shared.idle(), "a test left something running"


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL of our own for the session, or a skip where there is none: makes a new database's URL."""
    if PG_CTL is None:
        pytest.skip("no pg_ctl; Debian has it in the package postgresql")
    base = Path(tempfile.mkdtemp(prefix="penstock-postgres-"))
    programs, data = Path(PG_CTL).resolve().parent, base / "data"
    port = free_port()
    user: dict = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(base, "nobody")
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": base, **user}
    initdb = [str(programs / "initdb"), "-D", str(data), "-U", "penstock", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run([*initdb, "--locale=C"], **quiet)
    options = f"-p {port} -k {base} -c listen_addresses=127.0.0.1 -c fsync=off"
    logged = ["-w", "-t", str(PATIENCE), "-o", options, "-l", str(base / "log")]
    subprocess.run([PG_CTL, "-D", str(data), *logged, "start"], **quiet)
    names = []

    def database():
        names.append(f"test{len(names)}")
        url = f"postgresql://penstock@127.0.0.1:{port}/"
        engine = create_engine(url.replace("://", "+psycopg://") + "postgres", isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {names[-1]}"))
        engine.dispose()
        return url + names[-1]

    yield database
    subprocess.run([PG_CTL, "-D", str(data), "-m", "immediate", "stop"], **quiet)
    shutil.rmtree(base)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, tmp_path):
    url = request.getfixturevalue("postgres")() if request.param == "postgresql" else None
    with contextlib.closing(open_store(str(tmp_path / "data"), url)) as opened:
        opened.address = (str(tmp_path / "data"), url)
        yield opened
