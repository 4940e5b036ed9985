from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

from layton.scenes import Scene
from layton.sceneval import FoundObject

Pixels = NDArray[np.uint8]


def jpeg(image: Pixels, quality: int = 50) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def blur(image: Pixels, sigma: float = 1.0) -> Pixels:
    taps = 2 * round(4 * sigma) + 1
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    return gaussian_blur(tensor, [taps, taps], [sigma, sigma]).permute(1, 2, 0).numpy()


def shrink(image: Pixels, factor: int) -> Pixels:
    """Lose what an f4 latent would lose, with some ringing."""
    height, width, _ = image.shape
    small = Image.fromarray(image).resize((width // factor, height // factor), Image.Resampling.LANCZOS)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def noise(image: Pixels, sigma: float, seed: int) -> Pixels:
    grain = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def entirely_right(scene: Scene, found: list[FoundObject]) -> bool:
    """Every object found once, with its shape, colour, place and size, and nothing else."""
    rest = list(found)
    for o in scene.objects:
        match = [
            f
            for f in rest
            if (f.shape, f.colour) == (o.shape, o.colour)
            and max(abs(f.cx - o.cx), abs(f.cy - o.cy)) < 0.02
            and abs(f.diameter - o.diameter) < 0.04
        ]
        if not match:
            return False
        rest.remove(match[0])
    return not rest
