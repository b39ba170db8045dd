"""`penstock serve`: opens the store, listens, loads the models, and ends in order when it is told to."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

from penstock.config import ServeConfig
from penstock.errors import UserError

try:
    import uvicorn

    from penstock.serve import keys
    from penstock.serve.app import Service, build
    from penstock.serve.store import open_store
    from penstock.serve.wire import Wire
except ModuleNotFoundError as error:
    if (error.name or "").startswith("penstock"):
        raise
    raise UserError(f"penstock serve needs {error.name}: pip install 'penstock[serve]'.") from error

IDLE_SECONDS = 60
"""A connection without a request is closed after it."""


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises PenstockError where a flag, a model or the database says no."""
    if config.key is None and not _is_local(config.host):
        raise UserError(
            f"--host {config.host}: other machines could reach the server there, so it needs a key that you chose: "
            f"--key, with {keys.SHORTEST_KEY} characters or more."
        )
    if config.key is not None and config.new_key:
        raise UserError("--new-key makes a key, and --key gives one; leave one of them out.")
    store = open_store(config.data_dir, config.database, move_damaged=config.move_damaged)
    try:
        made = keys.settle(store, config.key, config.new_key)
        store.end_unfinished()
        service = Service(config, store)
        listener = _listen(config.host, config.port)
        print(f"penstock serve: {_address(listener)}", flush=True)
        print(
            f"key: {made or 'the one of the first start, or of --key (lost it? --new-key makes another)'}", flush=True
        )
        asyncio.run(_run(service, listener))
        if service.catalogue.problem is not None:
            raise service.catalogue.problem
    finally:
        store.close()


async def _run(service: Service, listener: socket.socket) -> None:
    server = _Server(
        uvicorn.Config(
            build(service),
            http=Wire,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=5,
        )
    )
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []

    async def end() -> None:
        await service.drain()
        server.should_exit = True

    def told() -> None:
        if ending:  # a second time: at once
            server.should_exit = server.force_exit = True
        else:
            print("penstock serve: ending; answers that run have 30 seconds", file=sys.stderr, flush=True)
            ending.append(asyncio.create_task(end()))

    def failed() -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)

    def failed_elsewhere() -> None:
        loop.call_soon_threadsafe(failed)

    service.start(failed_elsewhere)
    try:
        await server.serve(sockets=[listener])
    finally:
        service.stop()


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: it would end by the signal, and not with exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `_run`."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Never called."""


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--host {host}: is no address of this machine; try 127.0.0.1.") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another --port, or 0 for a "
            "free one."
        ) from error
    listener.listen(1024)
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
