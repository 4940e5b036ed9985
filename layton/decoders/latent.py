"""What all decoders through latents share: noise on the latent grid, a sampler, the autoencoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from distill.noise import gaussian_like
from layton.control import load_unet
from layton.interface import CodeDecoder, Generators, default_generators
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder
from layton.pixel_decoder import PixelDecoder, reader_fingerprints

SAMPLING_FOLDER = "sampling"


class LatentDecoder(CodeDecoder):
    """A diffusion model conditioned on codes gives latents, the VAE decoder pixels.

    Args:
        network: The conditioned denoiser.
        autoencoder: Latents to pixels; frozen.
        latents_per_token: Latent positions per token along one side: 8 for 16x16 tokens on SDXL's 128x128 latents at
            1024 pixels, 1 when both grids are 16x16. Need not be whole: 128 / 14 for the 196 tokens of 224 pixels.
    """

    def __init__(self, network: LADD, autoencoder: Autoencoder, *, latents_per_token: float = 1) -> None:
        super().__init__()
        self.network = network
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.latents_per_token = latents_per_token
        self.needs = () if network.reader_name is None else (network.reader_name,)

    def require_beside(self, decoders: Mapping[str, CodeDecoder]) -> None:
        """See `CodeDecoder.require_beside`."""
        super().require_beside(decoders)
        reader, name = self.network.reader, self.network.reader_name
        if reader is not None and name is not None:
            beside = getattr(decoders[name], "network", None)
            if isinstance(beside, PixelDecoder):  # of another kind none can tell
                require_alike(reader.fingerprints(), reader_fingerprints(beside), name)

    @property
    def default_scale(self) -> float:
        """Factor on the control branch's residuals."""
        return self.network.conditioning_scale

    def decode(
        self,
        embeddings: Tensor,
        *,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """See `CodeDecoder.decode`."""
        latents = self.decode_latents(
            embeddings, num_steps=num_steps, conditioning_scale=conditioning_scale, generator=generator
        )
        return self.autoencoder.decode(latents).float().clamp(-1, 1)

    def decode_latents(
        self,
        embeddings: Tensor,
        *,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """Code embeddings (B, d, h, w) -> scaled latents (B, C, h', w'). Arguments as for `CodeDecoder.decode`."""
        steps = self.check_steps(num_steps)
        noise = default_generators(len(embeddings)) if generator is None else generator
        with self._scaled(conditioning_scale):
            return self.sample(self.initial_noise(embeddings, noise), embeddings, num_steps=steps, generator=noise)

    @abstractmethod
    def sample(self, x_T: Tensor, embeddings: Tensor, *, num_steps: int, generator: Generators) -> Tensor:
        """From noise to latents.

        Args:
            x_T: (B, C, h', w') pure noise.
            embeddings: (B, d, h, w).
            num_steps: Network evaluations, checked.
            generator: Source of what noise is drawn on the way.

        Returns:
            (B, C, h', w') scaled latents.
        """

    def initial_noise(self, embeddings: Tensor, generator: Generators | None) -> Tensor:
        """Noise (B, C, h', w') on the latent grid that belongs to code embeddings (B, d, h, w)."""
        batch, _, h, w = embeddings.shape
        grid = (round(h * self.latents_per_token), round(w * self.latents_per_token))
        empty = embeddings.new_empty(batch, self.autoencoder.latent_channels, *grid)
        return gaussian_like(empty, generator if generator is not None else default_generators(batch))

    @contextmanager
    def _scaled(self, conditioning_scale: float | None) -> Iterator[None]:
        previous = self.network.conditioning_scale
        try:
            if conditioning_scale is not None:
                self.network.conditioning_scale = conditioning_scale
            yield
        finally:
            self.network.conditioning_scale = previous


def read_network(folder: Path, ldm: str | Path | None, *, reader: str | Path | None = None) -> tuple[LADD, Autoencoder]:
    """The stage-1 network of a folder on its latent diffusion model, in float32, and the autoencoder.

    Args:
        folder: What `layton.ladd.LADD.save_pretrained` wrote.
        ldm: The diffusers pipeline (``unet/``, ``vae/``) that it was trained on.
        reader: See `layton.ladd.LADD.from_pretrained`.

    Raises:
        ValueError: If ``ldm`` is missing or does not fit.
    """
    if ldm is None:
        raise ValueError(f"{folder}: this decoder needs the latent diffusion model it was trained on")
    unet = load_unet(Path(ldm) / "unet").float()
    return LADD.from_pretrained(folder, unet=unet, reader=reader), Autoencoder.from_pretrained(Path(ldm) / "vae")


def require_alike(learnt: Collection[str], now: Collection[str], name: str) -> None:
    """Stop unless two lists of `layton.folder.weights_hashes` are of the same weights.

    Raises:
        ValueError: They are not.
    """
    if not set(learnt) & set(now):
        raise ValueError(f"it learnt by a decoder {name!r} of other weights than the one beside it has now")


def check_times(times: Sequence[float], *, num_steps: int, last: float) -> tuple[float, ...]:
    """Times of ``num_steps`` evaluations, noisiest first.

    Raises:
        ValueError: If they are not so many, do not decrease strictly, or leave (0, last].
    """
    given = tuple(float(t) for t in times)
    falling = all(later < earlier for earlier, later in pairwise(given))
    if num_steps < 1 or len(given) != num_steps or not falling or not 0 < given[-1] <= given[0] <= last:
        raise ValueError(f"{num_steps} steps need as many falling times in (0, {last:g}], got {list(given)}")
    return given
