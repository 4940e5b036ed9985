"""Requests that are too many at once, and bodies that are too large or come too slowly, are refused while they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_CLOSE = {"Connection": "close"}  # what is left of the body is not read


class RequestLimit:
    """ASGI middleware.

    Args:
        app: What it stands before.
        most: Requests that are answered at once: 429.
        free: Paths that are answered whatever comes.
    """

    def __init__(self, app: ASGIApp, *, most: int, free: Collection[str] = ()) -> None:
        self._app, self._most, self._free, self._now = app, most, frozenset(free), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse what is too much."""
        if scope["type"] != "http" or scope["path"] in self._free:
            await self._app(scope, receive, send)
            return
        if self._now >= self._most:
            told = {"error": {"message": f"{self._now} requests are under way: try again later"}}
            await JSONResponse(told, 429, {**_CLOSE, "Retry-After": "5"})(scope, receive, send)
            return
        self._now += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._now -= 1


class BodyLimit:
    """ASGI middleware.

    Args:
        app: What it stands before.
        max_bytes: Of a body: 413.
        seconds: In which it has to come: 408.
        larger: By path, more bytes for those that take more.
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, seconds: float, larger: Mapping[str, int] | None = None
    ) -> None:
        self._app, self._max_bytes, self._seconds, self._larger = app, max_bytes, seconds, dict(larger or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse what says that it is too large, and watch the rest."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._larger.get(scope["path"], self._max_bytes)
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > most:
            await JSONResponse({"error": {"message": _too_large(most)}}, 413, _CLOSE)(scope, receive, send)
            return
        await self._app(scope, self._watched(receive, most), send)

    def _watched(self, receive: Receive, most: int) -> Receive:
        end = time.monotonic() + self._seconds
        so_far, whole = 0, False

        async def watched() -> Message:
            nonlocal so_far, whole
            if whole:  # what comes now is that the client leaves
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError as error:
                told = f"the body has not come within {self._seconds:g} seconds"
                raise HTTPException(408, told, headers=_CLOSE) from error
            so_far += len(message.get("body", b""))
            if so_far > most:
                raise HTTPException(413, _too_large(most), headers=_CLOSE)
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return watched


def _too_large(most: int) -> str:
    return f"the body has more than the {most} bytes allowed"
