"""The routes of ``layton serve``. Drawing follows the form of OpenAI's images API, so that its clients can ask for it.

What a client does wrong is told with a status of the 4xx and one sentence, ``{"error": {"message": ...}}``.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteError
from starlette.requests import ClientDisconnect

from generation.serving.body import BodyLimit
from generation.serving.engine import CodesOrder, Engine, Picture, TextOrder
from generation.serving.worker import QueueFullError, Worker
from layton.data.geometry import FitPolicy, Geometry, fit_image
from layton.data.images import DEFAULT_LIMITS, load_image

MAX_PROMPT = 10_000
MAX_SEED = 2**62
_LOOK_EVERY = 0.2  # seconds between two looks whether a client is still there
_CLIENT_GONE = 499  # nginx's


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one server takes on.

    Attributes:
        batch_size: pictures that are made together at most.
        queue: pictures that may wait; who asks for more is told to come again (429).
        timeout: seconds after which a request that is not done is given up (504).
        max_megabytes: size of what a client may send (413).
    """

    batch_size: int = 8
    queue: int = 64
    timeout: float = 120.0
    max_megabytes: int = 32


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Generation(_Strict):
    """Body of ``POST /v1/images/generations``; ``model``, ``size`` and ``user`` are for clients that send them."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    n: int = Field(default=1, ge=1, le=64)
    seed: int = Field(default=0, ge=0, lt=MAX_SEED, description="of the first picture; the others count up from it")
    response_format: Literal["b64_json"] = "b64_json"
    model: str | None = None
    size: str | None = None
    user: str | None = None


class Decoding(_Strict):
    """Body of ``POST /v1/decode``: what ``/v1/encode`` gave."""

    codes: list[int] = Field(max_length=65_536)
    geometry: dict[str, Any] | None = Field(default=None, description="brings the picture back to its size")
    seed: int = Field(default=0, ge=0, lt=MAX_SEED)


def build_app(engine: Engine, limits: ServerLimits | None = None) -> FastAPI:
    """The server of one engine, to be run by uvicorn or any other ASGI server, in one process.

    Args:
        engine: What is served.
        limits: What it takes on.
    """
    limits = limits or ServerLimits()
    worker = Worker(engine.kinds, batch_size=limits.batch_size, queue_size=limits.queue)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(worker.close)

    app = FastAPI(title="layton", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=limits.max_megabytes * 2**20, seconds=limits.timeout)
    _tell_errors(app)
    desk = _Desk(engine, worker, limits.timeout)
    app.get("/health")(desk.health)
    app.post("/v1/images/generations")(desk.generations)
    app.post("/v1/encode")(desk.encode)
    app.post("/v1/decode", response_class=Response)(desk.decode)
    return app


@dataclass(frozen=True, slots=True, eq=False)
class _Desk:
    """Takes requests, lets them wait, and hands out what was made."""

    engine: Engine
    worker: Worker
    timeout: float

    async def health(self) -> dict[str, Any]:
        """What is served, and how many pictures wait."""
        size = self.engine.tokenizer.image_size
        return {"status": "ok", "model": self.engine.name, "size": f"{size}x{size}", "waiting": self.worker.waiting}

    async def generations(self, request: Request, asked: Generation) -> dict[str, Any]:
        """Pictures of a prompt, with their tokens; the same prompt and seed give the same picture."""
        if self.engine.drawer is None:
            raise ValueError(f"{self.engine.name} has no generator beside it: it draws nothing from text")
        if not asked.prompt.strip():
            raise ValueError("the prompt is empty")
        size = (await self.health())["size"]
        if asked.size not in (None, "auto", size):
            raise ValueError(f"size must be {size}, got {asked.size!r}")
        pictures = await self._made(
            request, "draw", [TextOrder(asked.prompt, asked.seed + number) for number in range(asked.n)]
        )
        data = await run_in_threadpool(_as_data, pictures, asked.seed)
        return {"created": int(time.time()), "data": data, "remarks": sorted({each.remark for each in pictures} - {""})}

    async def encode(self, request: Request, policy: FitPolicy = "crop") -> dict[str, Any]:
        """Tokens of the image that is the body, a JPEG, PNG or WebP file, and how it was fitted to the square."""
        size = self.engine.tokenizer.image_size
        square, geometry = await run_in_threadpool(_fitted, await request.body(), size, policy)
        (codes,) = await self._made(request, "encode", [square])
        return {"codes": codes.tolist(), "geometry": geometry.to_dict()}

    async def decode(self, request: Request, asked: Decoding) -> Response:
        """The picture of some tokens, a PNG file."""
        tokenizer = self.engine.tokenizer
        if not all(0 <= code < tokenizer.vocab_size for code in asked.codes):
            raise ValueError(f"codes must lie in [0, {tokenizer.vocab_size})")
        codes = torch.tensor(asked.codes, dtype=torch.int64)
        tokenizer.quantizer.check_codes(codes[None], grid=tokenizer.grid)
        geometry = None if asked.geometry is None else _checked(asked.geometry)
        (picture,) = await self._made(request, "decode", [CodesOrder(codes, asked.seed, geometry)])
        return Response(await run_in_threadpool(_png, picture), media_type="image/png")

    async def _made(self, request: Request, kind: str, items: Sequence[Any]) -> list[Any]:
        """Results of some items.

        Raises:
            QueueFullError: There is no room for them.
            HTTPException: They took too long, or nobody is there to take them.
        """
        jobs = self.worker.submit(kind, items)
        try:
            return await self._waited(request, asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs)))
        except BaseException:
            self.worker.abandon(jobs)
            raise

    async def _waited(self, request: Request, results: asyncio.Future[list[Any]]) -> list[Any]:
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            done, _ = await asyncio.wait({results}, timeout=_LOOK_EVERY)
            if done:
                return results.result()
            if await request.is_disconnected():
                raise HTTPException(_CLIENT_GONE, "nobody waits for this any more")
        raise HTTPException(504, f"not done after {self.timeout:g} seconds")


def _as_data(pictures: Sequence[Picture], seed: int) -> list[dict[str, Any]]:
    return [
        {
            "b64_json": base64.b64encode(_png(picture.image)).decode(),
            "seed": seed + number,
            "codes": picture.codes.tolist(),
        }
        for number, picture in enumerate(pictures)
    ]


def _fitted(data: bytes, size: int, policy: FitPolicy) -> tuple[Image.Image, Geometry]:
    return fit_image(load_image(data, name="the body"), size, policy=policy)


def _checked(values: dict[str, Any]) -> Geometry:
    geometry = Geometry.from_dict(values)
    height, width = geometry.original_size
    DEFAULT_LIMITS.check_size(width=width, height=height)
    return geometry


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _tell_errors(app: FastAPI) -> None:
    """One sentence for each error, in one form."""

    def say(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": {"message": message}}, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return say(400, "the body is no JSON")
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return say(400, f"{place}: {first['msg']}" if place else str(first["msg"]))

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> JSONResponse:
        return say(400, str(error))

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> JSONResponse:
        return say(429, str(error), {"Retry-After": "5"})

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> JSONResponse:
        return say(_CLIENT_GONE, "the client left before its body was whole")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return say(500, f"this went wrong here, not with you: {type(error).__name__}")

    @app.exception_handler(StarletteError)
    async def http(_: Request, error: StarletteError) -> JSONResponse:
        return say(error.status_code, str(error.detail))
