"""`evaluate_reconstruction`: every measure, for the model and for the references, on the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, runtime_checkable
from typing import Protocol as Interface

import torch
from torch import Tensor

from layton.metrics.codebook import CodebookStatistics
from layton.metrics.effnet import NETWORK, EfficientNetLite0
from layton.metrics.external import ExternalMeasures
from layton.metrics.image import DATA_RANGE, PSNR_CAP, round_to_uint8
from layton.metrics.meter import Meter
from layton.metrics.protocol import Protocol
from layton.metrics.references import NUM_COMPONENTS, Reference, fit_references, require_reiterable
from layton.metrics.report import ReconstructionReport

Batch = Tensor | Mapping[str, Any]
"""Images (B, 3, H, W) in [-1, 1], or a loader's batch that has them under ``image``."""


@runtime_checkable
class Reconstructs(Interface):
    """A tokenizer or autoencoder as the evaluation sees it."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the same shape and range."""
        ...


@torch.no_grad()
def evaluate_reconstruction(
    model: Reconstructs | Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    *,
    protocol: Protocol,
    encode: Callable[[Tensor], Tensor] | None = None,
    vocab_size: int | None = None,
    references: Sequence[Reference] | None = None,
    num_components: int = NUM_COMPONENTS,
    perceptual: bool = True,
    network: EfficientNetLite0 | None = None,
    external: ExternalMeasures | None = None,
    bootstrap: int = 20,
    on_batch: Callable[[int], None] | None = None,
    device: torch.device | None = None,
) -> ReconstructionReport:
    """Measures a model's reconstructions, with the two references on the same images.

    Reconstructions are rounded to 8 bits before anything is measured. On several ranks, each with every n-th of the
    images (`layton.ranks.own_share`), figures are those of all images.

    Args:
        model: An object with ``reconstruct(images)``, or any function of images; bind steps, scale and generator with
            ``functools.partial``.
        batches: Images, or loader's batches. Walked through twice more to fit the references unless they are given.
        protocol: What is measured; counts, sizes, hashes and references are filled in.
        encode: (B, 3, H, W) -> codes (B, N), for codebook statistics; by default ``model.encode`` if it exists.
        vocab_size: V; by default ``model.vocab_size``. Without it there are no codebook statistics.
        references: Fitted references; by default `fit_references` on the evaluated images.
        num_components: Numbers per 16x16 patch of the default ``pca``: the channels of the latent at f = 16.
        perceptual: Whether to measure EPD and FD-effnet, most of the time of a fast model's evaluation.
        network: EfficientNet-lite0; by default a new one if the extra ``eval`` is installed, else EPD and FD-effnet
            are reported absent.
        external: Further measures, see `load_external`; by default none is tried.
        bootstrap: Resamples for the spread of the Frechet distance; 0 for none.
        on_batch: Called with the number of images after each batch, for a progress bar.
        device: Where to measure; by default where the images are.

    Returns:
        The report.

    Raises:
        ValueError: No images, wrong shapes, values that are not finite, batches that can be walked through only once
            while references must be fitted, or ``encode`` without ``vocab_size``.
    """
    reconstruct = model.reconstruct if isinstance(model, Reconstructs) else model
    absent = {} if external is None else dict(external.absent)
    network, reason = _network(network, perceptual)
    if reason:
        absent |= {"epd": reason, "fd_effnet": reason}
    if references is None:
        references = _fit(batches, num_components)
    encode, statistics = _codes(model, encode, vocab_size)
    if statistics is None:
        absent["codebook"] = "the model has no codes (encode and vocab_size)"
    methods = {"model": reconstruct} | {reference.name: reference.reconstruct for reference in references}
    meter = Meter(tuple(methods), network, external, keep_features=bootstrap > 1)
    for images in map(_images, batches):
        originals = round_to_uint8(images if device is None else images.to(device))
        results = {name: _checked(name, method(originals), originals) for name, method in methods.items()}
        meter.update(originals, results)
        if statistics is not None and encode is not None:
            statistics.update(_checked_codes(encode(originals), originals))
        if on_batch is not None:
            on_batch(len(images))
    return meter.report(
        protocol=_completed(protocol, references, network),
        statistics=statistics,
        bootstrap=bootstrap,
        absent=absent,
    )


def _images(batch: Batch) -> Tensor:
    images = batch if isinstance(batch, Tensor) else batch["image"]
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected float images (B, 3, H, W) in [-1, 1], got {tuple(images.shape)} {images.dtype}")
    if float(images.min()) < -1.001 or float(images.max()) > 1.001:
        raise ValueError(f"images must lie in [-1, 1], got {float(images.min()):.3f} to {float(images.max()):.3f}")
    return images


def _codes(
    model: object, encode: Callable[[Tensor], Tensor] | None, vocab_size: int | None
) -> tuple[Callable[[Tensor], Tensor] | None, CodebookStatistics | None]:
    """How to get codes and where to count them: what was given, else what the model has."""
    if encode is not None and vocab_size is None:
        raise ValueError("encode was given without vocab_size")
    encode = encode if encode is not None else getattr(model, "encode", None)
    vocab_size = vocab_size if vocab_size is not None else getattr(model, "vocab_size", None)
    if encode is None or vocab_size is None:
        return None, None
    return encode, CodebookStatistics(vocab_size)


def _network(network: EfficientNetLite0 | None, perceptual: bool) -> tuple[EfficientNetLite0 | None, str]:
    """The network to measure with, or None and the reason."""
    if not perceptual:
        return None, "not asked for"
    if network is not None:
        return network, ""
    try:
        return EfficientNetLite0(), ""
    except ImportError as error:
        return None, str(error)


def _checked(name: str, images: Tensor, originals: Tensor) -> Tensor:
    """A method's result, rounded to 8 bits; refuses wrong shapes and values that are not finite."""
    if images.shape != originals.shape:
        raise ValueError(f"{name} returned {tuple(images.shape)} for images {tuple(originals.shape)}")
    if not bool(images.isfinite().all()):
        raise ValueError(f"{name} returned values that are not finite")
    return round_to_uint8(images.to(originals.device))


def _checked_codes(codes: Tensor, originals: Tensor) -> Tensor:
    if codes.ndim != 2 or len(codes) != len(originals):
        raise ValueError(f"encode returned {tuple(codes.shape)} for {len(originals)} images, expected (B, N)")
    return codes.cpu()


def _fit(batches: Iterable[Batch], num_components: int) -> Sequence[Reference]:
    require_reiterable(batches)
    return fit_references(_Rounded(batches), num_components=num_components)


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """The images of batches, rounded to 8 bits, as often as asked."""

    batches: Iterable[Batch]

    def __iter__(self) -> Any:
        return (round_to_uint8(_images(batch)) for batch in self.batches)


def _completed(protocol: Protocol, references: Sequence[Reference], network: EfficientNetLite0 | None) -> Protocol:
    return dataclasses.replace(
        protocol,
        uint8_rounding=True,
        data_range=DATA_RANGE,
        psnr_cap=PSNR_CAP,
        references={reference.name: reference.description for reference in references},
        feature_network=None if network is None else NETWORK,
        feature_weights_sha256=None if network is None else network.weights_sha256,
        feature_preprocessing=None if network is None else "native size, [-1, 1] (mean 0.5, std 0.5)",
    )
