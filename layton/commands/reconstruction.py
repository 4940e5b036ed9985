"""Images through their tokens and back, measured: what ``layton reconstruct`` and ``layton demo`` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from layton.commands.images import FittedImage
from layton.data.geometry import FitPolicy, fit_image
from layton.loading import decoding_facts, same_noise

if TYPE_CHECKING:
    from torch import Tensor

    from layton.commands.measures import ImageMeasures
    from layton.metrics.protocol import Protocol
    from layton.tokenizer import LaytonTokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Reconstruction:
    """What came back.

    Attributes:
        picture: In the size of the original, with the policy "crop" of the part that was kept.
        figures: psnr (dB), ssim, and epd where it can be measured, on the decoder's square.
    """

    picture: Image.Image
    figures: dict[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class Reconstructor:
    """Reconstructs and measures batches of images with one decoder.

    Attributes:
        tokenizer: With the decoder loaded.
        decoder: Its name.
        measures: What is measured.
        num_steps: Network evaluations; the decoder's own number if None.
        conditioning_scale: Strength of the codes; the decoder's own if None.
        seed: Of the noise, the same for every image.
    """

    tokenizer: LaytonTokenizer
    decoder: str
    measures: ImageMeasures
    num_steps: int | None = None
    conditioning_scale: float | None = None
    seed: int = 0

    def __call__(self, items: Sequence[FittedImage]) -> list[Reconstruction]:
        """One result for each image.

        Raises:
            ValueError: If the decoder refuses steps or scale.
        """
        from layton.data.images import to_image

        squares = self.tokenizer.decode(
            self.tokenizer.encode(stack([item.square for item in items])),
            decoder=self.decoder,
            num_steps=self.num_steps,
            conditioning_scale=self.conditioning_scale,
            generator=same_noise(self.seed, len(items)),
        ).cpu()
        originals = stack([self._original(item, squares.shape[-1]) for item in items])
        return [
            Reconstruction(to_image(item.geometry.undo(square)), figures)
            for item, square, figures in zip(items, squares, self.measures(squares, originals), strict=True)
        ]

    def protocol(self, *, model: str, dataset: str, split: str, policy: FitPolicy, num_images: int) -> Protocol:
        """How the figures were taken; the arguments are fields of the record."""
        from layton.metrics.effnet import NETWORK
        from layton.metrics.protocol import Protocol

        network = self.measures.network
        return Protocol(
            dataset=dataset,
            split=split,
            preprocessing=f"{policy} to the decoder's square, Pillow's bicubic filter",
            model=f"{model}, codebook {self.tokenizer.fingerprint()}",
            num_images=num_images,
            **decoding_facts(
                self.tokenizer,
                self.decoder,
                num_steps=self.num_steps,
                conditioning_scale=self.conditioning_scale,
                seed=self.seed,
            ),
            feature_network=None if network is None else NETWORK,
            feature_weights_sha256=None if network is None else network.weights_sha256,
            feature_preprocessing=None if network is None else "native size, [-1, 1] (mean 0.5, std 0.5)",
        )

    def _original(self, item: FittedImage, size: int) -> Image.Image:
        """The original as the decoder should have given it back."""
        if size == item.square.width or item.original is None:
            return item.square
        return fit_image(item.original, size, policy=item.geometry.policy)[0]


def stack(squares: Sequence[Image.Image]) -> Tensor:
    """Square "RGB" images of one size as one tensor (B, 3, S, S) in [-1, 1]."""
    import torch

    from layton.data.images import to_tensor

    return torch.stack([to_tensor(square) for square in squares])
