"""`penstock serve`: opens the store, listens, loads the models, and ends cleanly at a signal."""

import asyncio
import contextlib
import ipaddress
import re
import signal
import socket
import sys
from collections.abc import Iterator

from penstock.errors import UserError
from penstock.serve.config import ServeConfig

try:
    import uvicorn

    from penstock.serve import auth
    from penstock.serve.app import build
    from penstock.serve.http_protocol import LimitedHttpProtocol
    from penstock.serve.labelling.preparation import Preparation
    from penstock.serve.listener import address_of, listen
    from penstock.serve.service import Service
    from penstock.serve.store import open_store
except ModuleNotFoundError as error:
    if (error.name or "").startswith("penstock"):
        raise
    raise UserError(f"penstock serve needs {error.name}: pip install 'penstock[serve]'.") from error

ROOT_PATH = re.compile(r"(?!/(api|v1|assets)(/|$))(/[A-Za-z0-9_.~-]+)+")
IDLE_SECONDS = 60
"""A connection without a request is closed after this time."""


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises PenstockError for a wrong flag, model or database."""
    if config.key is None and not _is_local(config.host):
        raise UserError(
            f"--host {config.host}: other machines could reach the server there, so it needs a key that you chose: "
            f"--key, with {auth.SHORTEST_KEY} characters or more."
        )
    if config.key is not None and config.new_key:
        raise UserError("--new-key makes a key, and --key gives one; leave one of them out.")
    if config.root_path and not ROOT_PATH.fullmatch(config.root_path):
        raise UserError(
            f"--root-path {config.root_path}: give a path that begins with a slash and ends without one, as /penstock, "
            "and that is no route of the server's own (/api, /v1, /assets)."
        )
    store = open_store(config.data_dir, config.database, move_damaged=config.move_damaged)
    try:
        new_key = auth.settle(store, config.key, config.new_key)
        store.end_unfinished()
        service = Service(config, store)
        listener = listen(config.host, config.port)
        asyncio.run(_run(service, listener, new_key))
        if service.catalogue.problem is not None:
            raise service.catalogue.problem
    finally:
        store.close()


async def _run(service: Service, listener: socket.socket, new_key: str | None) -> None:
    """Prints the address and the key, and serves until a signal or a model that cannot be loaded."""
    server, loop = Web(service), asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []

    def on_signal() -> None:
        if ending:  # the second signal: at once
            server.should_exit = server.force_exit = True
        else:
            print("penstock serve: ending; answers that run have 30 seconds", file=sys.stderr, flush=True)
            ending.append(asyncio.create_task(server.end()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    address = address_of(listener) + service.config.root_path
    print(f"penstock serve: {address}")
    print(f"key: {new_key or 'the one of the first start, or of --key (lost it? --new-key makes another)'}")
    if new_key:
        print(f"page: {address}/#key={new_key}")
    sys.stdout.flush()
    await server.run_service(listener)


class Web(uvicorn.Server):
    """uvicorn around a service. Handles no signals: uvicorn would end by the signal, and not with exit code 0."""

    def __init__(self, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                build(service),
                http=LimitedHttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # the metrics count broken requests
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=5,
            )
        )
        self._service = service

    async def run_service(self, listener: socket.socket) -> None:
        """Loads and serves until `end`, or until a model cannot be loaded."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self.should_exit = True

        def on_failure() -> None:  # called from the thread that loads
            loop.call_soon_threadsafe(stop)

        self._service.start(on_failure)
        preparing = asyncio.create_task(Preparation(self._service).run())
        try:
            await self.serve(sockets=[listener])
        finally:
            preparing.cancel()
            self._service.stop()

    async def end(self) -> None:
        """Waits for running answers, then stops the server."""
        await self._service.drain()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
