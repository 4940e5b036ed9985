"""Stage 2's loss in pixels: from pure noise in few steps, through the VAE decoder, against the picture itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.denoiser import Condition, Denoiser
from distill.methods.consistency import forget_casts
from distill.noise import Generators, gaussian_like
from distill.samplers import renoise_sample
from layton.ldm.autoencoder import Autoencoder
from layton.ldm.crops import LatentCrop
from layton.losses.perceptual import PictureDistance


@dataclass(frozen=True, slots=True, eq=False)
class PixelExample:
    """What pixel supervision compares.

    Attributes:
        latents: (B, C, h, w) clean latents of the pictures.
        condition: What the denoiser is given.
        images: (B, 3, H, W) in [-1, 1]; None takes what the autoencoder makes of the latents.
    """

    latents: Tensor
    condition: Condition
    images: Tensor | None = None


class PixelSupervision(nn.Module):
    """``L_PR`` of Layton (arXiv 2503.08377, section 3, stage 2), with pixel terms beside the perceptual one.

    The student starts at pure noise; of several steps only the last has a gradient. The loss is taken on one random
    square for the whole batch.

    Args:
        steps: Numbers of steps, one of which is drawn for each batch; the paper's are 1 (-H) and 2 (-L).
        crop: Side of the square in latents; None decodes everything.
        margin: Latents decoded around the square for context.
        perceptual: Distance of images, `layton.losses.perceptual.PerceptualLoss` or DISTS or LPIPS
            (`layton.losses.published.PublishedPerceptualLoss`); None goes without.
        perceptual_weight: Its weight.
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error.
        latent_weight: Weight of the mean squared error of the latents, everywhere and not in the square alone. With no
            other weight nothing is decoded, which on a CPU is most of the work.

    Raises:
        ValueError: If there are no steps, or all weights are zero.
    """

    def __init__(
        self,
        *,
        steps: Sequence[int] = (1, 2),
        crop: int | None = 8,
        margin: int = 2,
        perceptual: PictureDistance | None = None,
        perceptual_weight: float = 0.1,
        l1_weight: float = 1.0,
        l2_weight: float = 1.0,
        latent_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if not steps or min(steps) < 1:
            raise ValueError(f"steps must be numbers >= 1, got {list(steps)}")
        self.steps = tuple(steps)
        self.crop, self.margin = crop, margin
        self.perceptual = perceptual
        self.weights = {"pixel_l1": l1_weight, "pixel_l2": l2_weight}
        if perceptual is not None:
            self.weights["perceptual"] = perceptual_weight
        self._decodes = any(self.weights.values())
        if not self._decodes:
            self.weights = {}
        if latent_weight:
            self.weights["latent_l2"] = latent_weight
        if not self.weights:
            raise ValueError("all weights of the pixel supervision are zero")

    def forward(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,
        example: PixelExample,
        *,
        times: Mapping[int, Sequence[float]],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Unweighted terms, () each, named as in ``weights``.

        Args:
            denoiser: The student.
            autoencoder: Latents to pixels; its weights are frozen.
            example: Pictures and their codes.
            times: The student's times by number of steps.
            generator: Source of the number of steps, the square and the noise.
        """
        steps = self.steps[int(torch.randint(len(self.steps), (), generator=generator, device=generator.device))]
        x_T = gaussian_like(example.latents, generator)
        latents = last_step_sample(denoiser, x_T, times[steps], example.condition, generator=generator)
        terms: dict[str, Tensor] = {}
        if self.weights.get("latent_l2"):
            terms["latent_l2"] = (latents - example.latents).square().mean()
        if not self._decodes:
            return terms
        crop = None
        if self.crop is not None:
            crop = LatentCrop.draw((latents.shape[-2], latents.shape[-1]), self.crop, generator)
        return terms | self.compare(autoencoder, latents, example, crop=crop, generator=generator)

    def compare(
        self,
        autoencoder: Autoencoder,
        latents: Tensor,
        example: PixelExample,
        *,
        crop: LatentCrop | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Terms between what latents (B, C, h, w) decode to and the picture, within a square of it or everywhere."""
        decoded = self._pixels(autoencoder, latents, crop)
        if example.images is None:
            with torch.no_grad():
                target = self._pixels(autoencoder, example.latents, crop)
        else:
            target = example.images if crop is None else crop.of(example.images, factor=autoencoder.downsample_factor)
        error = decoded - target
        terms = {"pixel_l1": error.abs().mean(), "pixel_l2": error.square().mean()}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(decoded, target, generator=generator)
        return terms

    def _pixels(self, autoencoder: Autoencoder, latents: Tensor, crop: LatentCrop | None) -> Tensor:
        if crop is None:
            return autoencoder.decode(latents).float()
        return crop.decode(autoencoder, latents, margin=self.margin).float()


def last_step_sample(
    denoiser: Denoiser, x_T: Tensor, times: Sequence[float], condition: Condition, *, generator: Generators
) -> Tensor:
    """`distill.samplers.renoise_sample`, with the same numbers, but with a gradient through the last step only.

    Args:
        denoiser: The student.
        x_T: (B, C, h, w) pure noise.
        times: Of all evaluations, noisiest first.
        condition: Of batch size B.
        generator: Source of the noise between steps.

    Returns:
        (B, C, h, w) clean latents.
    """
    schedule = torch.tensor(tuple(times), dtype=torch.float64)
    x = x_T
    if len(schedule) > 1:
        with torch.no_grad():
            x_0 = renoise_sample(denoiser, x_T, schedule[:-1], condition, generator=generator)
            forget_casts()
            last = schedule[-1].to(device=x_0.device, dtype=torch.float32).expand(len(x_0))
            x = denoiser.schedule.add_noise(x_0, gaussian_like(x_0, generator), last)
    return renoise_sample(denoiser, x, schedule[-1:], condition)
