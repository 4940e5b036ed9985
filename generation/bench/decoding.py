"""Speed of decoding as ratios, side by side in one run.

How it is measured: `layton.bench.report`.

Bars, with random weights and a head that is not zero: P2 floor kernel / step, where the floor kernel is the model's own
linear layers alone, as ``nn.Linear`` computes them (the times tell of the packed ones, which decoding runs, as well);
P3 transformers' generate on a Llama of the same shape and as many rows / step; P4 codes a second of 8 images / of 1;
P5 step at the last code / at the 8th; P6 step / step with int8 weights; P7 guided step / plain step. P2 and P3 are
taken again with steps that are compiled (`generation.model.compiled`) before anything is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from generation.bench.contenders import (
    BenchShape,
    build,
    build_peer,
    captions,
    decode_alike,
    decodes_like_a_full_pass,
    floor_times,
    peer_times,
    step_times,
)
from generation.model.compiled import can_compile, compile_decoding
from generation.model.packing import packed
from generation.model.quantization import quantize_int8
from generation.model.transformer import LaytonGenTransformer
from layton.bench.report import Bar, Clock, Protocol, Times, bench_clock, make_bar

EARLY = 8
"""The code whose step is compared with the last one's."""
WINDOW = 4
"""Steps on either side over which the time of one step is taken."""


SHAPES = (BenchShape("38M", "small", 1.4), BenchShape("111M", "B", 1.25))


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How much is measured.

    Attributes:
        rounds: Interleaved repeats.
        num_codes: Codes that are decoded in each repeat; N when None.
        peer: Whether transformers is measured.
        batch: Images of the larger batch.
        compiled: Whether compiled steps are measured as well, where there is a C++ compiler.
    """

    rounds: int = 5
    num_codes: int | None = None
    peer: bool = True
    batch: int = 8
    compiled: bool = True


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Ratios, times and protocol.

    Attributes:
        bars: Ratios.
        milliseconds: Median time of a step by contender.
        cached_equals_uncached: By shape: decoded codes are those that a full pass finds likeliest; with compiled
            steps the same ones.
        cache_bytes: By shape: memory that keys and values take for one guided image.
        protocol: How it was measured.
    """

    bars: tuple[Bar, ...]
    milliseconds: dict[str, float]
    cached_equals_uncached: dict[str, bool]
    cache_bytes: dict[str, int]
    protocol: dict[str, object]

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def run_bench(shapes: Sequence[BenchShape] = SHAPES, options: BenchOptions | None = None) -> BenchReport:
    """Measure all bars with the number of threads that torch has.

    Args:
        shapes: What to measure.
        options: How much.
    """
    chosen = options or BenchOptions()
    clock = bench_clock()
    protocol = Protocol(clock)
    bars: list[Bar] = []
    milliseconds: dict[str, float] = {}
    equal: dict[str, bool] = {}
    size: dict[str, int] = {}
    for shape in shapes:
        model = build(shape)
        wanted = chosen.compiled and can_compile(next(model.parameters()).device)
        graph = compile_decoding(copy.copy(model)) if wanted else None
        times = measure(model, shape, chosen, clock, graph=graph)
        bars += shape_bars(shape, times, chosen)
        milliseconds |= {f"{shape.name} {name}": 1e3 * median(values) for name, values in times.items()}
        equal[shape.name] = decodes_like_a_full_pass(model, shape)
        if graph is not None:
            equal[f"{shape.name} compiled"] = decode_alike(model, graph, shape)
        size[shape.name] = 2 * 2 * len(model.blocks) * model.width * (shape.caption_length + shape.num_tokens - 1) * 4
    measured = protocol.as_json() | {"rounds": chosen.rounds, "num_codes": chosen.num_codes}
    return BenchReport(tuple(bars), milliseconds, equal, size, measured)


def measure(
    model: LaytonGenTransformer,
    shape: BenchShape,
    options: BenchOptions,
    clock: Clock,
    *,
    graph: LaytonGenTransformer | None = None,
) -> Times:
    """Seconds of a step of every contender in every round; ``graph`` is the same model, to be compiled."""
    count = options.num_codes or shape.num_tokens
    fast = packed(model)
    small = quantize_int8(copy.deepcopy(model))
    contenders: dict[str, Callable[[], list[float]]] = {
        "plain": lambda: step_times(model, captions(shape, 1), 1.0, count, clock),
        "guided": lambda: step_times(model, captions(shape, 1), 2.0, count, clock),
        "floor": lambda: floor_times(model, 2, count, clock),
        "packed floor": lambda: floor_times(fast, 2, count, clock),
        "int8": lambda: step_times(small, captions(shape, 1), 2.0, count, clock),
        "batch": lambda: step_times(model, captions(shape, options.batch), 2.0, count, clock),
    }
    if options.peer:
        peer = build_peer(model, shape)
        contenders["peer"] = lambda: peer_times(peer, shape, 2, count, clock)
    if graph is not None:
        contenders["compiled"] = lambda: step_times(graph, captions(shape, 1), 2.0, count, clock)
        contenders["compiled"]()  # compiles
    times: Times = {name: [] for name in (*contenders, "early", "late")}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            steps = run()
            times[name].append(median(steps))
            if name == "guided":
                early = min(EARLY, len(steps) - 1)
                times["early"].append(median(steps[max(0, early - WINDOW) : early + WINDOW]))
                times["late"].append(median(steps[-2 * WINDOW :]))
    return times


def shape_bars(shape: BenchShape, times: Times, options: BenchOptions) -> list[Bar]:
    """All bars of one shape."""
    bars = [
        make_bar(f"P2 {shape.name}", "floor kernel / step", times["floor"], times["guided"], 0.75, at_least=True),
        make_bar(
            f"P4 {shape.name}",
            f"codes a second of {options.batch} images / of 1",
            times["guided"],
            times["batch"],
            3.0,
            at_least=True,
            factor=options.batch,
        ),
        make_bar(
            f"P5 {shape.name}",
            "step at the last code / at the 8th",
            times["late"],
            times["early"],
            1.25,
            at_least=False,
        ),
        make_bar(
            f"P6 {shape.name}", "step / step with int8 weights", times["guided"], times["int8"], 1.7, at_least=True
        ),
        make_bar(f"P7 {shape.name}", "guided step / plain step", times["guided"], times["plain"], 1.4, at_least=False),
    ]
    if "compiled" in times:
        text = "floor kernel / compiled step"
        bars.append(make_bar(f"P2c {shape.name}", text, times["floor"], times["compiled"], 0.75, at_least=True))
    for name, mark in (("guided", ""), ("compiled", "c")):
        if "peer" in times and name in times:
            text = f"transformers generate / {'compiled ' * (name == 'compiled')}step"
            goal = shape.peer_goal
            bars.append(make_bar(f"P3{mark} {shape.name}", text, times["peer"], times[name], goal, at_least=True))
    return sorted(bars, key=lambda bar: bar.name)
