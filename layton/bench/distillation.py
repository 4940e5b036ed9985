"""Steps of distillation: against diffusers' own arithmetic, and against what they should cost.

Bars (P15), with random weights, one LoRA of rank 64 on the published layers, text and latents given:

* an ``lcm`` step / the same step as diffusers' example script computes it (`layton.bench.lcm_peer`), in time and in
  peak memory. The script is measured with the attention that diffusers chooses and with the one that this library
  chooses on a CPU, and the better of the two counts. Before, both sides must give the same loss and the same gradient.
* an ``mlcm`` step (both stages) and a ``scott`` step with its critic / counted forward-equivalents (`distill.budget`,
  a backward counts two) times the time of one forward of the bare UNet, at the batch sizes that occur in the step.

Peak memory is that of a process that does two steps and nothing else, see `layton.bench.memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from distill.adapters import LoraSettings
from distill.method import DistillationMethod
from distill.methods.lcm import LCM
from distill.methods.mlcm import MLCM, Refinement
from distill.methods.scott import SCott
from distill.recompute import Recompute
from layton.bench.distillation_steps import (
    GUIDANCE,
    DistillationShape,
    MethodStep,
    draws_of_lcm,
    learning_parameters,
    make_batch,
    make_unet,
    shake,
)
from layton.bench.lcm_peer import Draws, LCMPeer
from layton.bench.memory import peak_bytes
from layton.bench.report import Bar, Clock, Protocol, Times, bench_clock, make_bar
from layton.ldm.unet import use_fast_attention

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
"""Largest difference of losses, and of gradients by their norm: a speed counts with equal results only. The gradient of
the pseudo-Huber distance is steep (a thousand times) where student and target agree, and magnifies rounding."""
SHAPE = DistillationShape()
PEERS = ("diffusers", "diffusers, plain attention")
COUNTED = ("mlcm", "mlcm stage 2", "scott")

METHODS: dict[str, Callable[[], DistillationMethod]] = {
    "lcm": lambda: LCM(guidance_range=GUIDANCE, target_decay=None),
    "mlcm": lambda: MLCM(guidance_scale=8.0),
    "mlcm stage 2": lambda: MLCM(guidance_scale=8.0, refinement=Refinement(start=0)),
    "scott": lambda: SCott(guidance_range=GUIDANCE),
}
"""As the run files set them."""
RECOMPUTE: dict[str, Recompute] = {"lcm": "cheap"}
"""As the run files set it; the others compute nothing again."""


@dataclass(frozen=True, slots=True)
class DistillationOptions:
    """How much is measured.

    Attributes:
        rounds: Interleaved repeats.
        memory: Whether peak memory is measured, in processes of their own.
    """

    rounds: int = 5
    memory: bool = True


@dataclass(frozen=True, slots=True)
class DistillationReport:
    """Ratios, times and protocol.

    Attributes:
        bars: Ratios.
        milliseconds: Median time by contender; ``forward N`` is the bare UNet on N samples.
        peak_bytes: Peak memory by contender; empty when it was not measured.
        forward_equivalents: Counted cost of a step by method.
        losses: The first loss of an ``lcm`` step, and of the peer's.
        gradient_difference: Of the adapter's gradient, relative to its norm.
        protocol: How it was measured.
    """

    bars: tuple[Bar, ...]
    milliseconds: dict[str, float]
    peak_bytes: dict[str, int]
    forward_equivalents: dict[str, float]
    losses: dict[str, float]
    gradient_difference: float
    protocol: dict[str, object]

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def run_distillation_bench(
    shape: DistillationShape = SHAPE, options: DistillationOptions | None = None
) -> DistillationReport:
    """Measure all bars with the number of threads that torch has.

    Args:
        shape: What to measure.
        options: How much.

    Raises:
        RuntimeError: This library and the peer give different losses or gradients.
    """
    options = options or DistillationOptions()
    clock = bench_clock()
    protocol = Protocol(clock)
    losses, difference = compare(shape)
    if abs(losses["lcm"] - losses[PEERS[0]]) > TOLERANCE or difference > GRADIENT_TOLERANCE:
        raise RuntimeError(f"the steps to compare differ: losses {losses}, gradients by {difference:.1e} of their norm")
    steps = {name: method_step(shape, name) for name in METHODS}
    counts = {name: steps[name].counted() for name in COUNTED}
    times = measure(shape, steps, {size for _, sizes in counts.values() for size in sizes}, options.rounds, clock)
    memory = {name: peak_bytes(shape, name) for name in ("lcm", *PEERS)} if options.memory else {}
    return DistillationReport(
        bars=(*_lcm_bars(times, memory), *(_counted_bar(name, *counts[name], times) for name in COUNTED)),
        milliseconds={name: 1e3 * median(values) for name, values in times.items()},
        peak_bytes=memory,
        forward_equivalents={name: total for name, (total, _) in counts.items()},
        losses=losses,
        gradient_difference=difference,
        protocol=protocol.as_json() | {"rounds": options.rounds, "shape": asdict(shape)},
    )


def method_step(shape: DistillationShape, name: str) -> MethodStep:
    """A step of one of `METHODS`."""
    return MethodStep(
        make_unet(shape),
        METHODS[name](),
        make_batch(shape),
        LoraSettings(rank=shape.rank),
        recompute=RECOMPUTE.get(name, "nothing"),
    )


def make_peer(shape: DistillationShape, name: str) -> LCMPeer:
    """One of `PEERS`."""
    unet = make_unet(shape)
    if name == PEERS[1]:
        use_fast_attention(unet)
    return LCMPeer(unet, LoraSettings(rank=shape.rank))


def runner(shape: DistillationShape, name: str) -> Callable[[], None]:
    """A step of a method or a peer, ready to be repeated."""
    if name in METHODS:
        return method_step(shape, name).step
    peer = make_peer(shape, name)
    x_0, embeds, null, draws = _peer_inputs(shape)
    return lambda: peer.step(x_0, embeds, null, draws)


def compare(shape: DistillationShape) -> tuple[dict[str, float], float]:
    """Losses of both sides from equal weights and numbers, and by how much the adapters' gradients differ.

    Args:
        shape: What to measure.
    """
    own, peer = method_step(shape, "lcm"), make_peer(shape, PEERS[0])
    for unet in (own.denoiser.unet, peer.student):
        shake(unet)
    found, wanted = own.loss(), peer.loss(*_peer_inputs(shape))
    found.backward()
    wanted.backward()
    left, right = _gradient(own.denoiser.unet), _gradient(peer.student)
    difference = float((left - right).norm() / right.norm())
    return {"lcm": float(found.detach()), PEERS[0]: float(wanted.detach())}, difference


def measure(
    shape: DistillationShape, steps: dict[str, MethodStep], sizes: set[int], rounds: int, clock: Clock
) -> Times:
    """Seconds of a step of every contender, and of the bare UNet at every size, in every round.

    Args:
        shape: What to measure.
        steps: Of `METHODS`.
        sizes: Numbers of samples.
        rounds: Interleaved repeats, after one that is not measured.
        clock: Seconds.
    """
    bare = steps["lcm"]
    contenders: dict[str, Callable[[], None]] = {name: step.step for name, step in steps.items()}
    contenders |= {name: runner(shape, name) for name in PEERS}
    contenders |= {f"forward {size}": partial(bare.forward, size) for size in sorted(sizes)}
    times: Times = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if number:
                times[name].append(clock() - start)
    return times


def counted_times(total: float, sizes: Sequence[int], times: Times) -> list[float]:
    """By round: seconds of so many forward-equivalents, each costing what it does on average at these batch sizes.

    Args:
        total: Forward-equivalents of a step, in samples.
        sizes: Batch sizes of the step's evaluations.
        times: Holds ``forward N`` for each size.
    """
    by_round = zip(*(times[f"forward {size}"] for size in sizes), strict=True)
    return [total * sum(seconds) / sum(sizes) for seconds in by_round]


def _lcm_bars(times: Times, memory: dict[str, int]) -> list[Bar]:
    best = [min(pair) for pair in zip(*(times[name] for name in PEERS), strict=True)]
    bars = [make_bar("P15 lcm", "step / diffusers' arithmetic, time", times["lcm"], best, 0.95, at_least=False)]
    if memory:
        least = [float(min(memory[name] for name in PEERS))]
        text = "step / diffusers' arithmetic, peak memory"
        bars.append(make_bar("P15 lcm", text, [float(memory["lcm"])], least, 0.75, at_least=False))
    return bars


def _counted_bar(name: str, total: float, sizes: Sequence[int], times: Times) -> Bar:
    text = f"{name} step / its counted forward-equivalents"
    return make_bar(f"P15 {name}", text, times[name], counted_times(total, sizes, times), 1.1, at_least=False)


def _peer_inputs(shape: DistillationShape) -> tuple[Tensor, Tensor, Tensor, Draws]:
    batch = make_batch(shape)
    x_0, embeds, null = batch.x_0, batch.condition.embeds, batch.null.embeds
    assert x_0 is not None and embeds is not None and null is not None  # noqa: S101  # make_batch sets them
    return x_0, embeds, null.repeat(shape.batch, 1, 1), draws_of_lcm(x_0)


def _gradient(unet: nn.Module) -> Tensor:
    given = (parameter.grad for parameter in learning_parameters(unet).values())
    return torch.cat([gradient.flatten() for gradient in given if gradient is not None])
