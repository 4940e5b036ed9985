"""How the application meets the world: a socket, how long connections may say nothing, and an end in good order."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

_SECONDS_TO_ASK = 30.0  # in which who connects has to have asked for something
_SECONDS_TO_END = 5  # in which requests that are nearly done may end
_SECONDS_TO_TELL = 10  # in which the others are told


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until a signal ends it.

    Args:
        app: With its ``state.worker``.
        listener: Of `generation.serving.sockets.listening`.
    """
    try:
        Server(app).run(sockets=[listener])
    finally:
        app.state.worker.close()


class Server(uvicorn.Server):
    """uvicorn's, which at its end tells who still waits that it ends, where uvicorn would say nothing.

    Args:
        app: With its ``state.worker``.
        log_level: Of uvicorn's log.
    """

    def __init__(self, app: FastAPI, *, log_level: str = "warning") -> None:
        seconds = _SECONDS_TO_END + _SECONDS_TO_TELL
        super().__init__(
            uvicorn.Config(app, log_level=log_level, http=_Impatient, timeout_graceful_shutdown=seconds, port=0)
        )
        self._close: Callable[[], None] = app.state.worker.close

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, with the worker closed while there are still answers to give."""
        told = asyncio.get_running_loop().call_later(_SECONDS_TO_END, threading.Thread(target=self._close).start)
        await super().shutdown(sockets)
        told.cancel()


class _Impatient(H11Protocol):
    """Lets go of connections that say nothing: uvicorn has a limit for those alone that have asked before."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._patience = self.loop.call_later(_SECONDS_TO_ASK, self._let_go)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def _let_go(self) -> None:
        if cast(Any, self).cycle is None and not self.transport.is_closing():
            self.transport.close()
