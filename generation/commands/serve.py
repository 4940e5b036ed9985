"""``layton serve``: pictures from text, and pictures to tokens and back, over HTTP."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec

from generation.model.weight_types import Weights
from generation.sampling.choice import SamplingChoice, require_sampling
from layton.errors import UsageError
from layton.options import require_least

_SAMPLING = SamplingChoice()


def serve(
    *,
    model: str = "mini",
    decoder: str | None = None,
    steps: int | None = None,
    sampling: SamplingChoice = _SAMPLING,
    weights: Weights | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_size: int = 8,
    queue: int = 64,
    timeout: float = 120.0,
    max_megabytes: int = 16,
    device: str | None = None,
    allow: list[str] | None = None,
) -> None:
    """Serve a model over HTTP: POST /v1/images/generations draws, /v1/encode and /v1/decode are the tokenizer.

    Requests that come at the same time are done together; the tokens of a picture do not depend on its neighbours, and
    its pixels by no more than rounding. There is no encryption and no login: what the world may reach needs a reverse
    proxy before it.

    Args:
        model: embedded model, or folder of a tokenizer; the LaytonGen beside it draws, if there is one.
        decoder: name of the code decoder; the tokenizer's own choice by default.
        steps: network evaluations of the decoder; its own number by default.
        sampling: how LaytonGen is sampled.
        weights: of LaytonGen: bf16, or int8 on a CPU, to be quicker; by default as they are saved.
        host: address to serve; 127.0.0.1 is reached from this machine only.
        port: to serve on.
        batch_size: pictures that are made together at most.
        queue: pictures that may wait; who asks for more is told to come again (429).
        timeout: seconds after which a request that is not done is given up (504).
        max_megabytes: size of an image that a client may send (413).
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UsageError("layton serve needs fastapi and uvicorn: pip install 'layton[serve]'")
    if not 0 < port < 65536:
        raise UsageError(f"--port must lie in 1 to 65535, got {port}")
    require_least(1, {"batch_size": batch_size, "queue": queue, "max_megabytes": max_megabytes, "steps": steps})
    if not timeout > 0:
        raise UsageError(f"--timeout must be above 0, got {timeout}")
    require_sampling(sampling)
    from generation.pipeline import PromptWarning
    from generation.serving.engine import load_engine
    from generation.serving.http import ServerLimits, build_app
    from generation.serving.server import run
    from generation.serving.sockets import listening

    with listening(host, port) as listener:  # before the model is loaded: a port that is taken is told at once
        engine = load_engine(
            model,
            decoder=decoder,
            num_steps=steps,
            sampling=sampling,
            weights=weights,
            device=device,
            allow=allow or (),
        )
        warnings.filterwarnings("ignore", category=PromptWarning)  # remarks tell it, to whom it concerns
        app = build_app(engine, ServerLimits(batch_size, queue, timeout, max_megabytes))
        where = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        sys.stderr.write(f"layton: {model} on {where}, what it takes in /openapi.json; Ctrl-C ends it\n")
        run(app, listener)
