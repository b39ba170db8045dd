"""The socket that a server listens at, and its address as text. No HTTP here."""

import socket

from penstock.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError for an address that the machine does not have, or that is taken."""
    try:
        family, socket_type, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--host {host}: is no address of this machine; try 127.0.0.1.") from error
    listener = socket.socket(family, socket_type, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(
            f"--port {port}: cannot listen there, at {host} ({error.strerror}); choose another --port, or 0 for a "
            "free one."
        ) from error
    listener.listen(1024)
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL to open in a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
