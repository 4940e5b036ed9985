"""The autoencoder: builder, borders in [-1, 1], and standardised latents."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from layton.assets import find_autoencoder
from layton.modules import require_weights, variant_of

_AT_ONCE = 2**20  # pixels


def build_autoencoder(
    *,
    latent_channels: int = 16,
    block_out_channels: tuple[int, ...] = (16, 32, 64, 128, 128),
    layers_per_block: int = 1,
    norm_num_groups: int = 8,
    sample_size: int = 256,
) -> AutoencoderKL:
    """A purely convolutional AutoencoderKL: no attention, so that it runs at sizes that it was not trained on.

    Args:
        latent_channels: Channels of the latent.
        block_out_channels: Widths of the stages; every stage but the last halves the resolution.
        layers_per_block: Residual blocks in each encoder stage (one more in the decoder's).
        norm_num_groups: Groups of the group norms.
        sample_size: Image side that the pipeline takes as its default, pixels.

    Returns:
        A randomly initialised model with scaling factor 1: `standardise_latents` gives unit variance.
    """
    stages = len(block_out_channels)
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        sample_size=sample_size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    initialise_as_pyramid(model, torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def initialise_as_pyramid(model: AutoencoderKL, generator: torch.Generator) -> None:
    """Start an autoencoder as a nearly linear, norm-preserving pyramid.

    With the usual initialisation the signal fades along the twenty convolutions between image and latent, colour
    first, and hundreds of steps pass before anything is learnt. Here residual branches start at zero, every other
    convolution turns its input (a 2x2 block where it strides) by a random orthogonal matrix, and the posterior is
    narrow, as unit noise would drown the latent. Such a start wants a small learning rate: 1e-3 destroys it.

    Args:
        model: Changed in place.
        generator: Of the random matrices.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or name.endswith("quant_conv"):
            continue
        if name.endswith("conv2"):  # the last one of a residual branch
            nn.init.zeros_(module.weight)
        else:
            outputs, inputs, side, _ = module.weight.shape
            block = 2 if module.stride[0] == 2 else 1
            turn = nn.init.orthogonal_(torch.empty(outputs, inputs * block**2), generator=generator)
            weight = torch.randn(module.weight.shape, generator=generator) * (0.1 / inputs) ** 0.5 * (side > block) / 3
            start = (side - block + 1) // 2 if block == 1 else 0
            weight[:, :, start : start + block, start : start + block] = turn.view(outputs, inputs, block, block)
            module.weight.copy_(weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    channels = model.config.latent_channels
    model.quant_conv.weight[channels:] = 0
    model.quant_conv.bias[channels:] = -6.0


class Autoencoder(nn.Module):
    """A diffusers autoencoder behind the two verbs that the rest of the library uses.

    Args:
        model: The AutoencoderKL; None builds the embedded world's (`build_autoencoder`).
        pretrained: Folder of an AutoencoderKL to start from instead.

    Attributes:
        latent_channels: Channels of the latent.
        downsample_factor: Pixels per latent position along one side.
    """

    def __init__(self, model: AutoencoderKL | None = None, *, pretrained: str | None = None) -> None:
        super().__init__()
        if pretrained is not None:
            model = load_autoencoder(pretrained)
        self.model = model if model is not None else build_autoencoder()
        self.latent_channels = int(self.model.config.latent_channels)
        self.downsample_factor = 2 ** (len(self.model.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Autoencoder:
        """Read a diffusers AutoencoderKL: its folder, or what `layton.assets.find_autoencoder` finds it in."""
        return cls(load_autoencoder(find_autoencoder(folder)))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), the mean of the posterior."""
        config = self.model.config
        with _no_float16(images.device):
            parts = _parts(images.to(self.model.dtype), pixels=images.shape[-2] * images.shape[-1])
            latents = torch.cat([self.model.encode(part).latent_dist.mode() for part in parts])
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W), nominally in [-1, 1], not clamped.

        A CPU decodes one image after the other, what it computes of one staying in its cache: 8 of 256 px take 0.6 x
        the time that they take together.
        """
        config = self.model.config
        unscaled = (latents / config.scaling_factor + (config.shift_factor or 0.0)).to(self.model.dtype)
        pixels = latents.shape[-2] * latents.shape[-1] * self.downsample_factor**2
        with _no_float16(latents.device):
            parts = _parts(unscaled, pixels=_AT_ONCE if latents.device.type == "cpu" else pixels)
            return torch.cat([self.model.decode(part).sample for part in parts])

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] through the latent and back, clamped to [-1, 1]."""
        return self.decode(self.encode(images)).float().clamp(-1, 1)


def _parts(batch: Tensor, *, pixels: int) -> tuple[Tensor, ...]:
    """A batch in parts of as many images, of so many pixels each, as are worked on at once where no gradient is kept.

    SDXL's autoencoder takes 2.5 GB for each image of 1024 pixels.
    """
    return (batch,) if torch.is_grad_enabled() else batch.split(max(1, _AT_ONCE // pixels))


def _no_float16(device: torch.device) -> AbstractContextManager[object]:
    """No autocast to float16, in which SDXL's autoencoder (``force_upcast``) overflows; bfloat16 may be."""
    rough = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return torch.autocast(device.type, enabled=False) if rough else nullcontext()


def load_autoencoder(folder: Path | str) -> AutoencoderKL:
    """A local AutoencoderKL folder, in float32 whatever it is stored in.

    Raises:
        ValueError: If the folder holds none.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no AutoencoderKL: neither config.json nor vae/config.json")
    model: AutoencoderKL = AutoencoderKL.from_pretrained(
        str(folder),
        torch_dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        variant=variant_of(folder),
    )
    require_weights(model, folder)
    return model


@torch.no_grad()
def standardise_latents(model: AutoencoderKL, mean: Tensor, std: Tensor) -> AutoencoderKL:
    """A copy of ``model`` whose latent channels have zero mean and unit variance, with the same reconstructions.

    Stable Diffusion's pipeline knows one scale for all channels; a channel of small variance would then drown in the
    diffusion noise. The affine map is folded into the 1x1 convolutions before and after the latent instead. Models
    without these (SD3's, FLUX's) get the one scale by which all channels together have unit power.

    Args:
        model: The model that makes the latents.
        mean: Of its posterior means, for each channel (C,), over a set of images.
        std: Their standard deviation (C,).

    Returns:
        The new model, of scale 1 where there are such convolutions; ``decode(encode(x))`` is unchanged up to rounding.
    """
    std = std.clamp(min=1e-4)
    model = copy.deepcopy(model)
    if model.quant_conv is None or model.post_quant_conv is None:
        model.register_to_config(scaling_factor=float((mean.square() + std.square()).mean().rsqrt()), shift_factor=None)
        return model
    model.register_to_config(scaling_factor=1.0, shift_factor=None)
    before, after = model.quant_conv, model.post_quant_conv
    channels = len(mean)
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()  # the log-variance half
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    return model
