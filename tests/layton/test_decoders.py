"""`LightDecoder` and `DiffusionDecoder`: steps, scale, noise, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from layton.decoders import DiffusionDecoder, LightDecoder
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder, build_autoencoder
from layton.ldm.unet import build_unet
from layton.pixel_decoder import PixelDecoder


@pytest.fixture(scope="module")
def ldm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ldm")
    build_unet(latent_channels=4, latent_size=4, block_out_channels=(16, 16), text_width=16).save_pretrained(
        folder / "unet"
    )
    build_autoencoder(latent_channels=4, block_out_channels=(8, 8), sample_size=8).save_pretrained(folder / "vae")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.fixture(scope="module")
def diffusion(ldm: Path) -> DiffusionDecoder:
    network = LADD.from_pipeline(ldm, code_dim=4, embedding_channels=(8,)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.controlnet.parameters():  # zero convolutions would hide the codes
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return DiffusionDecoder(network, Autoencoder.from_pretrained(ldm / "vae"), latents_per_token=2).eval()


def codes(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(1))


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


@torch.no_grad()
def test_size_range_and_determinism(diffusion: DiffusionDecoder) -> None:
    images = diffusion.decode(codes(), num_steps=2)
    assert images.shape == (3, 3, 8, 8)
    assert -1 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images, diffusion.decode(codes(), num_steps=2))
    assert torch.equal(images, diffusion.decode(codes(), num_steps=2, generator=seeds(0, 0, 0)))
    assert not torch.equal(images, diffusion.decode(codes(), num_steps=2, generator=seeds(1, 1, 1)))


@torch.no_grad()
def test_an_image_depends_on_its_own_codes_and_noise(diffusion: DiffusionDecoder) -> None:
    together = diffusion.decode(codes(), num_steps=2, generator=seeds(4, 5, 6))
    for index, seed in enumerate((4, 5, 6)):
        alone = diffusion.decode(codes()[index][None], num_steps=2, generator=seeds(seed))
        torch.testing.assert_close(together[index][None], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*diffusion.decode(codes(2), num_steps=2))


@torch.no_grad()
def test_scale_is_used_once_and_given_back(diffusion: DiffusionDecoder) -> None:
    before = diffusion.network.conditioning_scale
    silent = diffusion.decode(codes(2), num_steps=2, conditioning_scale=0.0)
    torch.testing.assert_close(silent[0], silent[1])  # without codes only the noise is left, and that is the same
    assert diffusion.network.conditioning_scale == before


@torch.no_grad()
def test_steps(diffusion: DiffusionDecoder) -> None:
    calls: list[int] = []
    handle = diffusion.network.unet.register_forward_hook(lambda *_: calls.append(1))
    for steps in (1, 3, None):
        calls.clear()
        diffusion.decode(codes(1), num_steps=steps)
        assert len(calls) == (25 if steps is None else steps)
    handle.remove()
    with pytest.raises(ValueError, match="num_steps"):
        diffusion.decode(codes(1), num_steps=0)


@torch.no_grad()
def test_saved_and_loaded(diffusion: DiffusionDecoder, ldm: Path, tmp_path: Path) -> None:
    diffusion.save_pretrained(tmp_path)
    again = DiffusionDecoder.from_pretrained(tmp_path, ldm=ldm)
    assert again.latents_per_token == 2
    assert torch.equal(again.decode(codes(), num_steps=2), diffusion.decode(codes(), num_steps=2))
    with pytest.raises(ValueError, match="latent diffusion model"):
        DiffusionDecoder.from_pretrained(tmp_path)


@torch.no_grad()
def test_light_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    light = LightDecoder(PixelDecoder(4, 32, 1, 2, fine_width=8, num_fine_blocks=1, patch_size=8)).eval()
    images = light.decode(20 * codes())
    assert images.shape == (3, 3, 16, 16)
    assert float(images.abs().max()) <= 1
    light.save_pretrained(tmp_path)
    assert torch.equal(LightDecoder.from_pretrained(tmp_path).decode(20 * codes(), num_steps=1), images)
    with pytest.raises(ValueError, match="1 steps, not for 2"):
        light.decode(codes(), num_steps=2)
    with pytest.raises(ValueError, match="scale"):
        light.decode(codes(), conditioning_scale=1.0)
