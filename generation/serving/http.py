"""The routes of ``layton serve``. Drawing follows the form of OpenAI's images API, so that its clients can ask for it.

What a client does wrong is told with a status of the 4xx and one sentence, ``{"error": {"message": ...}}``.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteError
from starlette.requests import ClientDisconnect
from torch import Tensor

from generation.serving.body import BodyLimit, RequestLimit
from generation.serving.engine import CodesOrder, Engine, Picture, TextOrder
from generation.serving.worker import ClosedError, QueueFullError, Worker
from layton.data.geometry import FitPolicy, Geometry, fit_image
from layton.data.images import ImageError, ImageLimits, load_image, to_image

DRAW, ENCODE, DECODE = "/v1/images/generations", "/v1/encode", "/v1/decode"
MAX_PROMPT = 4_000
MAX_SEED = 2**32  # torch's generator on a CPU takes no more of a seed
_MORE_THAN_WAIT = 16  # requests beyond those in the queue, such as whose pictures are being written
_JSON_BYTES = 2**18  # a quarter of a megabyte is parsed in a fifth of a second, in which nobody else is served
_IMAGES = ImageLimits(max_pixels=24_000_000)
_IMAGES_AT_ONCE = 2  # one of the largest takes half a gigabyte
_LOOK_EVERY = 0.2  # seconds between two looks whether a client is still there
_CLIENT_GONE = 499  # nginx's

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one server takes on.

    Attributes:
        batch_size: Pictures that are made together at most.
        queue: Pictures that may wait; who asks for more is told to come again (429).
        timeout: Seconds after which a request that is not done is given up (504).
        max_megabytes: Size of an image that a client may send (413).
    """

    batch_size: int = 8
    queue: int = 64
    timeout: float = 120.0
    max_megabytes: int = 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Generation(_Strict):
    """Body of ``POST /v1/images/generations``; the fields after ``response_format`` are for clients that send them."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    n: int | None = Field(default=1, ge=1)
    seed: int | None = Field(
        default=0, ge=0, lt=MAX_SEED, description="of the first picture; the others count up from it"
    )
    response_format: Literal["b64_json"] | None = "b64_json"
    model: str | None = None
    size: str | None = None
    user: str | None = None
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None


class Decoding(_Strict):
    """Body of ``POST /v1/decode``: what ``/v1/encode`` gave."""

    codes: list[int] = Field(max_length=65_536)
    geometry: dict[str, Any] | None = Field(default=None, description="brings the picture back to its size")
    seed: int = Field(default=0, ge=0, lt=MAX_SEED)


def build_app(engine: Engine, limits: ServerLimits | None = None) -> FastAPI:
    """The server of one engine, to be run by uvicorn or any other ASGI server, in one process.

    Its ``state.worker`` is closed when the server ends in good order; who ends it otherwise closes that.

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
    app.state.worker = worker
    larger = {ENCODE: limits.max_megabytes * 2**20}
    app.add_middleware(RequestLimit, most=limits.queue + _MORE_THAN_WAIT, free=("/health",))
    app.add_middleware(BodyLimit, max_bytes=_JSON_BYTES, seconds=limits.timeout, larger=larger)
    _tell_errors(app)
    desk = _Desk(engine, worker, limits)
    app.get("/health")(desk.health)
    app.post(DRAW)(desk.generations)
    app.post(ENCODE)(desk.encode)
    app.post(DECODE, response_class=Response)(desk.decode)
    return app


class _Desk:
    """Takes requests, lets them wait, and hands out what was made."""

    def __init__(self, engine: Engine, worker: Worker, limits: ServerLimits) -> None:
        self.engine, self.worker, self.limits = engine, worker, limits
        self._room = asyncio.Semaphore(_IMAGES_AT_ONCE)

    async def health(self) -> dict[str, Any]:
        """What is served, and how many pictures wait."""
        return {"status": "ok", "model": self.engine.name, "size": self._size, "waiting": self.worker.waiting}

    async def generations(self, request: Request, asked: Generation) -> dict[str, Any]:
        """Pictures of a prompt, with their tokens; the same prompt and seed give the same tokens."""
        end = self._end
        if self.engine.drawer is None:
            raise _bad(f"{self.engine.name} has no generator beside it: it draws nothing from text")
        if not asked.prompt.strip():
            raise _bad("the prompt is empty")
        if asked.size not in (None, "auto", self._size):
            raise _bad(f"size must be {self._size}, got {asked.size!r}")
        count = asked.n or 1
        if count > self.limits.queue:
            raise _bad(f"n must be at most {self.limits.queue}, got {count}")
        seeds = [((asked.seed or 0) + number) % MAX_SEED for number in range(count)]
        orders = [TextOrder(asked.prompt, seed) for seed in seeds]
        pictures = await self._made(request, "draw", orders, end)
        data = await run_in_threadpool(_as_data, pictures, seeds)
        return {"created": int(time.time()), "data": data, "remarks": sorted({each.remark for each in pictures} - {""})}

    async def encode(self, request: Request, policy: FitPolicy = "crop") -> dict[str, Any]:
        """Tokens of the image that is the body, a JPEG, PNG or WebP file, and how it was fitted to the square."""
        end = self._end
        data = await request.body()
        self.worker.require_room()  # before the image is decoded
        size = self.engine.tokenizer.image_size
        try:
            square, geometry = await self._apart(end, _fitted, data, size, policy)
        except ImageError as error:
            raise _bad(str(error)) from error
        (codes,) = await self._made(request, "encode", [square], end)
        return {"codes": codes.tolist(), "geometry": geometry.to_dict()}

    async def decode(self, request: Request, asked: Decoding) -> Response:
        """The picture of some tokens, a PNG file."""
        end = self._end
        try:
            codes = self._checked_codes(asked.codes)
            geometry = None if asked.geometry is None else self._checked_geometry(asked.geometry)
        except ValueError as error:
            raise _bad(str(error)) from error
        (square,) = await self._made(request, "decode", [CodesOrder(codes, asked.seed)], end)
        return Response(await self._apart(end, _brought_back, square, geometry), media_type="image/png")

    @property
    def _size(self) -> str:
        return f"{self.engine.tokenizer.image_size}x{self.engine.tokenizer.image_size}"

    @property
    def _end(self) -> float:
        return time.monotonic() + self.limits.timeout

    def _checked_codes(self, codes: list[int]) -> Tensor:
        tokenizer = self.engine.tokenizer
        if not all(0 <= code < tokenizer.vocab_size for code in codes):  # they may be too large for a tensor
            raise ValueError(f"codes must lie in [0, {tokenizer.vocab_size})")
        checked = torch.tensor(codes, dtype=torch.int64)
        tokenizer.quantizer.check_codes(checked[None], grid=tokenizer.grid)
        return checked

    def _checked_geometry(self, values: dict[str, Any]) -> Geometry:
        geometry = Geometry.from_dict(values)
        height, width = geometry.original_size
        _IMAGES.check_size(width=width, height=height)
        size = self.engine.tokenizer.image_size
        if geometry != Geometry.plan((height, width), size, policy=geometry.policy):
            raise ValueError(f"geometry is none that {ENCODE} gives for a picture of {width}x{height}")
        return geometry

    async def _apart(self, end: float, work: Callable[P, T], /, *args: P.args, **options: P.kwargs) -> T:
        """Work on whole images, in a thread; few at once, since they may be large.

        Raises:
            HTTPException: There was no time for it.
        """
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                await self._room.acquire()
        except TimeoutError as error:
            raise self._late() from error
        try:
            return await run_in_threadpool(work, *args, **options)
        finally:
            self._room.release()

    async def _made(self, request: Request, kind: str, items: Sequence[Any], end: float) -> list[Any]:
        """Results of some items.

        Raises:
            QueueFullError: There is no room for them.
            HTTPException: They took too long, or nobody is there to take them.
        """
        jobs = self.worker.submit(kind, items)
        results = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        results.add_done_callback(lambda found: found.cancelled() or found.exception())  # nobody may be there to ask
        try:
            while time.monotonic() < end:
                done, _ = await asyncio.wait({results}, timeout=_LOOK_EVERY)
                if done:
                    return results.result()
                if await request.is_disconnected():
                    raise HTTPException(_CLIENT_GONE, "nobody waits for this any more")
            raise self._late()
        except asyncio.CancelledError as error:  # by a server that ends at once
            raise ClosedError("the server is going down") from error
        finally:
            self.worker.abandon(jobs)

    def _late(self) -> HTTPException:
        return HTTPException(504, f"not done after {self.limits.timeout:g} seconds")


def _bad(message: str) -> HTTPException:
    return HTTPException(400, message)


def _as_data(pictures: Sequence[Picture], seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "b64_json": base64.b64encode(_png(picture.image)).decode(),
            "seed": seed,
            "codes": picture.codes.tolist(),
        }
        for picture, seed in zip(pictures, seeds, strict=True)
    ]


def _fitted(data: bytes, size: int, policy: FitPolicy) -> tuple[Image.Image, Geometry]:
    return fit_image(load_image(data, name="the body", limits=_IMAGES), size, policy=policy)


def _brought_back(square: Tensor, geometry: Geometry | None) -> bytes:
    return _png(to_image(square if geometry is None else geometry.undo(square)))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _tell_errors(app: FastAPI) -> None:
    """One sentence for each error, in one form."""

    def say(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": {"message": message}}, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return say(400, "the body is no JSON")
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return say(400, f"{place}: {first['msg']}" if place else str(first["msg"]))

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> JSONResponse:
        return say(429, str(error), {"Retry-After": "5"})

    @app.exception_handler(ClosedError)
    async def closed(_: Request, error: ClosedError) -> JSONResponse:
        return say(503, str(error), {"Connection": "close"})

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> JSONResponse:
        return say(_CLIENT_GONE, "the client left before its body was whole")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return say(500, f"this went wrong here, not with you: {type(error).__name__}")

    @app.exception_handler(StarletteError)
    async def http(_: Request, error: StarletteError) -> JSONResponse:
        return say(error.status_code, str(error.detail), error.headers)
