"""A served tiny model: one server in a thread of the test process, shared by all tests that leave it as it was."""

import asyncio
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.data.toyland import save_tokenizer
from penstock.serve import auth
from penstock.serve.config import ServeConfig
from penstock.serve.server import Web, address_of, listen
from penstock.serve.service import Service
from penstock.serve.store import open_store
from tests.conftest import save_tiny

KEY = "a key for the tests"
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
        """The error in it, after its shape was checked."""
        assert self.headers["content-type"] == "application/json"
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert all(isinstance(error[name], str) for name in ("message", "type", "code"))
        assert error["param"] is None or isinstance(error["param"], str)
        return error

    @property
    def events(self):
        """The server-sent events in it, [DONE] as None."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [None if line == "[DONE]" else json.loads(line) for line in lines]


class Running:
    """A server that answers."""

    def __init__(self, service: Service, address: str) -> None:
        self.service, self.address = service, address
        self.port = int(address.rsplit(":", 1)[1])

    def ask(self, method, path, body=None, *, key=KEY, headers=None, data=None) -> Reply:
        """One request; `body` as JSON, or `data` as it is."""
        sent = dict(headers or {})
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        if body is not None:
            data, sent["content-type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(self.address + path, data, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Reply(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def chat(self, text="What is a penstock?", **more) -> Reply:
        """A chat completion."""
        messages = [{"role": "user", "content": text}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 8, "seed": 1, **more}
        return self.ask("POST", "/v1/chat/completions", body)

    def idle(self, seconds=30.0) -> bool:
        """Waits until nothing runs."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if not self.service.scheduler.outstanding and not self.service.scheduler.rows_used:
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def running(directory: Path, *models: str, wait=True, **flags):
    """A server in a thread, as penstock serve runs it but for the signals."""
    config = ServeConfig(
        model=models, port=0, key=KEY, data_dir=str(directory), device="cpu", **{"rows": 4, "queue": 8, **flags}
    )  # fmt: skip
    store = open_store(config.data_dir, config.database)
    auth.settle(store, config.key, False)
    service, listener, here = Service(config, store), listen(config.host, config.port), {}

    async def main() -> None:
        here["loop"], here["web"] = asyncio.get_running_loop(), Web(service)
        await here["web"].run_until_told(listener)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    server = Running(service, address_of(listener))
    try:
        if wait:
            assert service.catalogue.ready.wait(60), service.catalogue.problem
            while service.scheduler is None:
                time.sleep(0.01)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(here["web"].end(), here["loop"]) if thread.is_alive() else None
        thread.join(60)
        store.close()
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The shared one, with a model `tiny` and another `other`."""
    directory = tmp_path_factory.mktemp("served")
    models = [save_chatty(directory / "tiny"), save_chatty(directory / "other", seed=1)]
    with running(directory / "data", *models, rows=8, queue=32) as one:
        yield one
        assert one.idle(), "a test left something running"
