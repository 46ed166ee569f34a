"""Where the page listens."""

from __future__ import annotations

import socket

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # of this machine alone


def free_port(host: str, port: int) -> int:
    """The port, if it is free; for 0 any that is.

    Raises:
        OSError: it is not, or this machine does not have that address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as server:
            return server.getsockname()[1]
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port} ({error.strerror}): name another --port, or 0 "
            "for any that is free"
        ) from error
