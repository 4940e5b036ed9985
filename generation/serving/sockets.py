"""Addresses at which commands serve."""

from __future__ import annotations

import socket


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        OSError: It is taken, or none of this machine's.
        ValueError: No host, which would mean all addresses of the machine.
    """
    if not host:
        raise ValueError("no host to serve on: 0.0.0.0 is all addresses of this machine")
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        reason = str(error.strerror or error).partition(" (while")[0]
        raise OSError(f"cannot serve on {host}:{port} ({reason})") from error
    # Accepted connections have it from here: without it answers wait 40 ms for a client's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
