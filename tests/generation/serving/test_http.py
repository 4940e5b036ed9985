"""The server, asked through its routes and, where connections matter, over a socket."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from laytongen_parts import CODES, SIZE, TOKENS, tiny_tokenizer, write_model
from PIL import Image

from generation.pipeline import LaytonGenPipeline
from generation.serving import server as serving
from generation.serving.engine import Engine, load_engine
from generation.serving.http import ServerLimits, build_app
from generation.serving.server import Server
from generation.serving.sockets import listening
from layton.cli import main
from layton.tokenizer import LaytonTokenizer

DRAW, ENCODE, DECODE = "/v1/images/generations", "/v1/encode", "/v1/decode"


@contextmanager
def served(engine: Any, limits: ServerLimits | None = None) -> Iterator[int]:
    """A server on a free port of this machine; yields the port."""
    server = Server(build_app(engine, limits), log_level="critical")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def asked(engine: Engine, limits: ServerLimits | None = None) -> Iterator[httpx.Client]:
    """A client of such a server."""
    with served(engine, limits) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load_engine(str(folder), device="cpu")


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[httpx.Client]:
    with asked(engine) as made:
        yield made


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def codes_body(**changes: Any) -> dict[str, Any]:
    return {"codes": [1] * TOKENS, **changes}


def test_it_draws_what_the_pipeline_draws(client: httpx.Client, folder: Path) -> None:
    found = client.post(DRAW, json={"prompt": "a red circle", "n": 2, "seed": 3, "size": f"{SIZE}x{SIZE}"}).json()
    wanted = LaytonGenPipeline.from_pretrained(str(folder))(
        ["a red circle"], num_images_per_prompt=2, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)]
    )
    assert [each["seed"] for each in found["data"]] == [3, 4] and found["remarks"] == []
    assert [each["codes"] for each in found["data"]] == wanted.codes.tolist()
    for each, picture in zip(found["data"], wanted.images, strict=True):
        assert np.array_equal(pixels(base64.b64decode(each["b64_json"])), np.asarray(picture))


@pytest.mark.filterwarnings("ignore::generation.pipeline.PromptWarning")
def test_it_says_what_it_did_not_read(client: httpx.Client) -> None:
    remarks = client.post(DRAW, json={"prompt": "a red cat " * 40}).json()["remarks"]
    assert len(remarks) == 1 and "cat" in remarks[0] and "tokens are read" in remarks[0]


def test_pictures_become_tokens_and_come_back(client: httpx.Client, folder: Path) -> None:
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    encoded = client.post(ENCODE, content=png(image), params={"policy": "pad"}).json()
    tokenizer = LaytonTokenizer.from_pretrained(folder)
    wanted = tokenizer.encode_images([image], policy="pad")
    assert encoded == {"codes": wanted.codes[0].tolist(), "geometry": wanted.geometries[0].to_dict()}
    answer = client.post(DECODE, json=encoded)
    assert answer.headers["content-type"] == "image/png"
    assert np.array_equal(pixels(answer.content), np.asarray(tokenizer.decode_images(wanted)[0]))
    square = client.post(DECODE, json={"codes": encoded["codes"]})
    assert pixels(square.content).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (DRAW, b"{", "no JSON"),
        (DRAW, b"[]", "dictionary"),
        (DRAW, {}, "prompt"),
        (DRAW, {"prompt": ""}, "prompt"),
        (DRAW, {"prompt": " \n"}, "empty"),
        (DRAW, {"prompt": ["a star"]}, "prompt"),
        (DRAW, {"prompt": "x" * 4_001}, "prompt"),
        (DRAW, {"prompt": "a star", "n": 0}, "n: "),
        (DRAW, {"prompt": "a star", "n": 65}, "n must be at most 64"),
        (DRAW, {"prompt": "a star", "n": 10**400}, "n must be at most 64"),
        (DRAW, {"prompt": "a star", "seed": -1}, "seed"),
        (DRAW, {"prompt": "a star", "seed": 2**32}, "seed"),
        (DRAW, {"prompt": "a star", "stream": True}, "stream"),
        (DRAW, {"prompt": "a star", "size": "1024x1024"}, "size must be 32x32"),
        (DRAW, {"prompt": "a star", "response_format": "url"}, "response_format"),
        (DRAW, {"prompt": "a star", "steps": 4}, "steps"),
        (ENCODE, b"", "the file is empty"),
        (ENCODE, b"\x89PNG\r\n\x1a\n" + b"x" * 50, "the body"),
        (ENCODE, b"GIF89a" + b"x" * 50, "not a JPEG, PNG or WebP"),
        (DECODE, codes_body(codes=[1] * (TOKENS - 1)), "15 codes"),
        (DECODE, codes_body(codes=[CODES] * TOKENS), r"\[0, 64)"),
        (DECODE, codes_body(codes=[-1] * TOKENS), r"\[0, 64)"),
        (DECODE, codes_body(codes=[2**70] * TOKENS), "codes"),
        (DECODE, codes_body(codes=[1.5] * TOKENS), "codes"),
        (DECODE, codes_body(geometry={"size": 3}), "a geometry has"),
        (
            DECODE,
            codes_body(
                geometry={"original_size": [10**5] * 2, "size": SIZE, "policy": "resize", "box": [0, 0, 10**5, 10**5]}
            ),
            "more than the allowed",
        ),
        *(
            (
                DECODE,
                codes_body(geometry={"original_size": [64, 48], "size": size, "policy": "pad", "box": box}),
                "geometry is none that /v1/encode gives",
            )
            for size, box in [
                (10**4, [9999, 9999, 10**4, 10**4]),  # no pixel of it is left in the square
                (10**400, [10**399, 0, 10**399 + 5, 5]),
                (2 * SIZE, [8, 0, 56, 64]),
            ]
        ),
    ],
)
def test_what_a_client_does_wrong_is_told_in_a_sentence(client: httpx.Client, path: str, body: Any, told: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert told.replace("\\", "") in message and "\n" not in message


def test_what_clients_send_as_nothing_is_the_default(client: httpx.Client) -> None:
    bare, told = {"prompt": "a star"}, {"n": None, "response_format": None, "model": None, "size": None, "user": None}
    told |= {"seed": None, "quality": "auto", "output_format": "png", "background": "auto", "stream": False}
    assert client.post(DRAW, json=bare | told).json()["data"] == client.post(DRAW, json=bare).json()["data"]


def test_of_unknown_places_too(client: httpx.Client) -> None:
    for path in ("/nothing", "/../../etc/passwd"):
        assert client.get(path).status_code == 404
    wrong = client.get(DRAW)
    assert wrong.json() == {"error": {"message": "Method Not Allowed"}} and wrong.headers["allow"] == "POST"


def test_a_body_that_is_too_large_is_refused(engine: Engine) -> None:
    with asked(engine, ServerLimits(max_megabytes=1)) as client:
        assert client.post(ENCODE, content=b"x" * (2**20 + 1)).status_code == 413

        def pieces() -> Iterator[bytes]:  # does not say beforehand how much it is
            for _ in range(40):
                yield b"x" * 2**16

        assert client.post(ENCODE, content=pieces()).status_code == 413
        assert client.get("/health").status_code == 200
        many = json.dumps(
            {"prompt": "a star", **{str(n): 1 for n in range(30_000)}}
        )  # an error for each, were it parsed
        assert len(many) < 2**20 and client.post(DRAW, content=many).status_code == 413


def test_what_goes_wrong_here_is_not_the_clients_fault(engine: Engine) -> None:
    class Broken(Slow):
        def encode(self, items: list[Any], unwanted: Callable[[], bool]) -> list[Any]:
            raise ValueError("weights hold NaN")

    with asked(Broken(engine)) as client:
        answer = client.post(ENCODE, content=png(Image.new("RGB", (SIZE, SIZE))))
        assert answer.status_code == 500
        assert answer.json() == {"error": {"message": "this went wrong here, not with you: ValueError"}}


def test_a_tokenizer_alone_draws_nothing(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "alone")
    engine = load_engine(str(tmp_path / "alone"), device="cpu")
    with asked(engine) as client:
        answer = client.post(DRAW, json={"prompt": "a star"})
        assert answer.status_code == 400 and "no generator" in answer.json()["error"]["message"]
        assert client.post(DECODE, json=codes_body()).status_code == 200
    with pytest.raises(ValueError, match="no generator"):
        load_engine(str(tmp_path / "alone"), weights="bf16")


def health(port: int) -> dict[str, Any]:
    return dict(httpx.get(f"http://127.0.0.1:{port}/health").json())


class Slow:
    """An engine's encoding, which waits until it is let go."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.begun, self.go = engine, threading.Event(), threading.Event()

    @property
    def kinds(self) -> dict[str, Any]:
        return {"encode": self.encode}

    def encode(self, items: list[Any], unwanted: Callable[[], bool]) -> list[Any]:
        self.begun.set()
        assert self.go.wait(20)
        return self.engine.encode(items, unwanted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def send(port: int, body: bytes, *, length: int | None = None) -> socket.socket:
    """Begin a request to encode."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST {ENCODE} HTTP/1.1\r\nhost: x\r\ncontent-length: {length or len(body)}\r\n"
    head += "" if length else "connection: close\r\n"
    head += "\r\n"
    connection.sendall(head.encode() + body)
    return connection


def answer(connection: socket.socket) -> tuple[int, bytes]:
    received = b""
    while piece := connection.recv(65536):
        received += piece
    connection.close()
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_a_full_queue_a_client_that_leaves_and_one_that_waits_too_long(engine: Engine) -> None:
    slow = Slow(engine)
    image = png(Image.new("RGB", (SIZE, SIZE), "red"))
    with served(slow, ServerLimits(batch_size=1, queue=1, timeout=2.0)) as port:
        first = send(port, image)
        assert slow.begun.wait(20)
        second = send(port, image)
        deadline = time.monotonic() + 20
        while health(port)["waiting"] < 1:
            assert time.monotonic() < deadline
        status, body = answer(send(port, image))
        assert status == 429 and b"1 of at most 1 wait" in body
        second.close()  # leaves: its place becomes free
        while health(port)["waiting"]:
            assert time.monotonic() < deadline
        assert answer(send(port, image))[0] == 504  # and is freed again
        assert answer(first)[0] == 504
        slow.go.set()
        assert answer(send(port, image))[0] == 200


def test_a_slow_client_is_let_go_and_hinders_nobody(engine: Engine) -> None:
    image = png(Image.new("RGB", (SIZE, SIZE), "red"))
    with served(engine, ServerLimits(timeout=1.0)) as port:
        slow = send(port, image[:10], length=len(image))
        assert answer(send(port, image))[0] == 200
        status, body = answer(slow)  # which ends with the connection
        assert status == 408 and b"has not come within 1 seconds" in body
        send(port, image[:10], length=len(image)).close()
        assert answer(send(port, image))[0] == 200


def test_a_server_that_ends_lets_nobody_wait(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_SECONDS_TO_END", 0.5)
    slow = Slow(engine)
    image = png(Image.new("RGB", (SIZE, SIZE), "red"))
    with served(slow, ServerLimits(batch_size=1)) as port:
        waiting = [send(port, image) for _ in range(3)]
        assert slow.begun.wait(20)
        deadline = time.monotonic() + 20
        while health(port)["waiting"] < 2:
            assert time.monotonic() < deadline
        threading.Timer(2.0, slow.go.set).start()
        began = time.monotonic()
    assert time.monotonic() - began < 10
    answers = sorted(answer(connection) for connection in waiting)
    assert [status for status, _ in answers] == [200, 503, 503]  # what had begun was done
    assert b"the server is going down" in answers[1][1]


def test_who_says_nothing_is_let_go(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_SECONDS_TO_ASK", 0.5)
    with served(engine) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
            assert silent.recv(1) == b""
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            client.get("/health")
            time.sleep(1.0)
            assert client.get("/health").status_code == 200


def test_too_many_at_once_are_told_so_and_health_is_answered(engine: Engine) -> None:
    slow = Slow(engine)
    image = png(Image.new("RGB", (SIZE, SIZE), "red"))
    with served(slow, ServerLimits(batch_size=1, queue=1)) as port:
        many = [send(port, image[:10], length=len(image)) for _ in range(17)]
        time.sleep(0.5)
        found = httpx.post(f"http://127.0.0.1:{port}{ENCODE}", content=image)
        assert found.status_code == 429 and found.headers["retry-after"] == "5"
        assert found.json()["error"]["message"].startswith("17 requests are under way")
        assert health(port)["status"] == "ok"
        for connection in many:
            connection.close()
        slow.go.set()


def test_answers_do_not_wait_for_acknowledgements() -> None:
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        accepted.close()
    with pytest.raises(ValueError, match="no host to serve on"):
        listening("", 0)


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", str(folder), "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"layton: cannot serve on 127.0.0.1:{port} (Address already in use)\n"


def test_the_command_serves_until_it_is_interrupted(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "layton", "serve", "--model", str(folder), "--port", str(port), "--device", "cpu"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603
    assert running.stderr is not None
    try:
        told = running.stderr.readline()
        assert f"http://127.0.0.1:{port}" in told
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                found = httpx.post(f"http://127.0.0.1:{port}{DRAW}", json={"prompt": "a red circle"}, timeout=20)
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        assert found.status_code == 200
        running.send_signal(signal.SIGINT)
        assert running.wait(20) in (0, 130)
        assert "Traceback" not in running.stderr.read()
    finally:
        running.kill()
        running.stderr.close()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "0"], "--port"),
        (["--queue", "0"], "--queue"),
        (["--timeout", "0"], "--timeout"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_words_are_told_before_anything_is_served(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
