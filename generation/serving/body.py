"""Bodies of requests that are too large, or come too slowly, are refused while they come."""

from __future__ import annotations

import asyncio
import time

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware.

    Args:
        app: What it stands before.
        max_bytes: Of a body: 413.
        seconds: In which it has to come: 408.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse what says that it is too large, and watch the rest."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > self._max_bytes:
            error = {"error": {"message": self._too_large()}}
            await JSONResponse(error, 413, {"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, self._watched(receive), send)

    def _watched(self, receive: Receive) -> Receive:
        end = time.monotonic() + self._seconds
        so_far, whole = 0, False

        async def watched() -> Message:
            nonlocal so_far, whole
            if whole:  # what comes now is that the client leaves
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError as error:
                raise HTTPException(408, f"the body has not come within {self._seconds:g} seconds") from error
            so_far += len(message.get("body", b""))
            if so_far > self._max_bytes:
                raise HTTPException(413, self._too_large())
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return watched

    def _too_large(self) -> str:
        return f"the body has more than the {self._max_bytes} bytes allowed"
