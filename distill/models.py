"""diffusers networks as denoisers; this file and `distill.stacked` alone of this package import diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.parameterization import PredictionType, prediction_type_from_config
from distill.schedules import FlowSchedule, NoiseSchedule, schedule_from_config


def embed_guidance(guidance_scale: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of a guidance scale for LCM-style UNets (``time_cond_proj_dim``).

    The networks were trained with LCM's weight ``w = guidance_scale - 1``, scaled by 1000: sine then cosine, base
    10000 over ``dim / 2 - 1`` (arXiv 2310.04378, and diffusers' pipelines).

    Args:
        guidance_scale: (B,), 1 meaning the plain conditional model.
        dim: Width of the embedding.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=guidance_scale.device)
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * steps)
    phase = (guidance_scale.float() - 1.0)[:, None] * 1000.0 * frequencies
    embedding = torch.cat([phase.sin(), phase.cos()], dim=1)
    return nn.functional.pad(embedding, (0, dim - 2 * half))


class UNetDenoiser(Denoiser):
    """A ``UNet2DConditionModel``: Stable Diffusion 1.x, 2.x (eps or v), SDXL, and LCM-style w-conditioned ones.

    Args:
        unet: The network; it is used as given (device, dtype, training mode, adapters).
        schedule: Noise schedule it was trained on.
        prediction_type: What it predicts.
    """

    def __init__(
        self, unet: UNet2DConditionModel, schedule: NoiseSchedule, prediction_type: PredictionType = "eps"
    ) -> None:
        super().__init__(schedule, prediction_type)
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction; see ``Denoiser.forward``.

        Raises:
            ValueError: The condition lacks a field the network needs, or sets one it cannot use.
        """
        return self.evaluate(x_t, t, condition)

    def evaluate(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
    ) -> Tensor:
        """``forward`` with the residuals of a conditioning branch (ControlNet style) added to the skip connections.

        Args:
            x_t: (B, C, h, w).
            t: (B,).
            condition: ``embeds`` (B, L, D) always; ``pooled`` and ``time_ids`` for SDXL; ``guidance`` if w-conditioned.
            down_residuals: One tensor per skip connection of the down path.
            mid_residual: Added to the middle block's output.

        Returns:
            (B, C, h, w) of kind ``prediction_type``.

        Raises:
            ValueError: As in ``forward``.
        """
        if condition.spatial is not None and down_residuals is None:
            raise ValueError("this network has no conditioning branch, but the condition sets a spatial map")
        dtype = _dtype_of(self.unet)
        residuals = None if down_residuals is None else tuple(down_residuals)
        output: Tensor = self.unet(
            x_t.to(dtype),
            t,
            encoder_hidden_states=_needed(condition, "embeds").to(dtype),
            timestep_cond=self._embedded_guidance(condition, dtype),
            added_cond_kwargs=self._added_conditions(condition, dtype),
            encoder_attention_mask=condition.mask,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=mid_residual,
            return_dict=False,
        )[0]
        return output

    def _embedded_guidance(self, condition: Condition, dtype: torch.dtype) -> Tensor | None:
        width: int | None = self.unet.config.time_cond_proj_dim
        if width is None:
            if condition.guidance is not None:
                raise ValueError("this network is not conditioned on guidance; wrap it in GuidedDenoiser instead")
            return None
        return embed_guidance(_needed(condition, "guidance"), width).to(dtype)

    def _added_conditions(self, condition: Condition, dtype: torch.dtype) -> dict[str, Tensor] | None:
        kind: str | None = self.unet.config.addition_embed_type
        if kind is None:
            return None
        if kind != "text_time":
            raise ValueError(f"UNets with addition_embed_type={kind!r} are not supported")
        return {
            "text_embeds": _needed(condition, "pooled").to(dtype),
            "time_ids": _needed(condition, "time_ids").to(dtype),
        }


def hear_guidance(denoiser: Denoiser, width: int = 256, *, generator: torch.Generator | None = None) -> UNetDenoiser:
    """A copy of a UNet with an input for the guidance scale beside that for the time (LCM, arXiv 2310.04378).

    The new layer is bias-free and adds to the time embedding; all other weights are the denoiser's.

    Args:
        denoiser: A `UNetDenoiser` without such an input; left as it is.
        width: Of the scale's embedding, see `embed_guidance`; 256 in the published networks.
        generator: Draws the new layer's weights, uniform within ``1 / sqrt(width)``; seeded with 0 by default.

    Raises:
        ValueError: The denoiser is no plain UNet, hears the scale already, or the width is too small.
    """
    if not isinstance(denoiser, UNetDenoiser):
        raise ValueError(f"only a UNet can be given an input for the guidance scale, not {type(denoiser).__name__}")
    old = denoiser.unet
    if old.config.time_cond_proj_dim is not None or width < 4:
        raise ValueError(f"need a UNet that does not hear the scale yet and a width >= 4, got {width}")
    unet = UNet2DConditionModel.from_config(old.config, time_cond_proj_dim=width)
    unet.to(next(old.parameters()).device, _dtype_of(old)).train(old.training)
    new = "time_embedding.cond_proj.weight"
    drawn = torch.rand(unet.get_parameter(new).shape, generator=generator or torch.Generator().manual_seed(0))
    unet.load_state_dict({**old.state_dict(), new: (2.0 * drawn - 1.0) / math.sqrt(width)})
    return UNetDenoiser(unet, denoiser.schedule, denoiser.prediction_type)


class FlowTransformerDenoiser(Denoiser):
    """A rectified-flow transformer: SD3 or FLUX. Predicts ``eps - x_0`` on the clock 0..1000.

    FLUX works on 2x2 patches of the latent: they are packed on the way in and unpacked on the way out, so latents are
    (B, C, h, w) here for every network.

    Args:
        transformer: The network, used as given.
        schedule: A flow schedule.
    """

    def __init__(
        self, transformer: SD3Transformer2DModel | FluxTransformer2DModel, schedule: FlowSchedule | None = None
    ) -> None:
        super().__init__(schedule or FlowSchedule(), "flow")
        if not isinstance(transformer, SD3Transformer2DModel | FluxTransformer2DModel):
            raise ValueError(f"expected an SD3 or FLUX transformer, got {type(transformer).__name__}")
        self.transformer = transformer
        self.is_flux = isinstance(transformer, FluxTransformer2DModel)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw velocity; see ``Denoiser.forward``. Needs ``embeds`` and ``pooled``, and ``guidance`` for FLUX dev.

        Raises:
            ValueError: The condition lacks a field the network needs or sets one it cannot use, or FLUX is given odd
                latent sizes.
        """
        for name in ("mask", "time_ids", "spatial"):
            if getattr(condition, name) is not None:
                raise ValueError(f"this network cannot use condition.{name}")
        dtype = _dtype_of(self.transformer)
        shared = {
            "encoder_hidden_states": _needed(condition, "embeds").to(dtype),
            "pooled_projections": _needed(condition, "pooled").to(dtype),
            "return_dict": False,
        }
        clock = t.float() * (1000.0 / self.schedule.num_train_timesteps)
        if self.is_flux:
            return self._flux(x_t.to(dtype), clock, condition, shared)
        if condition.guidance is not None:
            raise ValueError("SD3 is not conditioned on guidance; wrap it in GuidedDenoiser instead")
        output: Tensor = self.transformer(hidden_states=x_t.to(dtype), timestep=clock, **shared)[0]
        return output

    def _flux(self, x_t: Tensor, clock: Tensor, condition: Condition, shared: dict[str, Any]) -> Tensor:
        h, w = x_t.shape[-2:]
        if h % 2 or w % 2:
            raise ValueError(f"FLUX packs 2x2 patches: latent sizes must be even, got {h}x{w}")
        has_guidance: bool = self.transformer.config.guidance_embeds
        if not has_guidance and condition.guidance is not None:
            raise ValueError("this FLUX network is not conditioned on guidance")
        text_ids = torch.zeros(shared["encoder_hidden_states"].shape[1], 3, device=x_t.device, dtype=x_t.dtype)
        output: Tensor = self.transformer(
            hidden_states=pack_latents(x_t),
            timestep=clock / 1000.0,  # the network multiplies by 1000 itself
            guidance=_needed(condition, "guidance").float() if has_guidance else None,
            img_ids=_image_ids(h // 2, w // 2, x_t),
            txt_ids=text_ids,
            **shared,
        )[0]
        return unpack_latents(output, h, w)


def pack_latents(x: Tensor) -> Tensor:
    """FLUX's token order: (B, C, h, w) to (B, h/2 * w/2, 4 C), channels slowest inside a token."""
    packed: Tensor = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    return packed


def unpack_latents(tokens: Tensor, h: int, w: int) -> Tensor:
    """Inverse of ``pack_latents`` for latents of size h x w."""
    latents: Tensor = rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h // 2, w=w // 2, p=2, q=2)
    return latents


def denoiser_from_pipeline(pipe: DiffusionPipeline, *, latent_size: tuple[int, int] | None = None) -> Denoiser:
    """The denoiser of a diffusers pipeline, with the schedule and prediction type of its scheduler's configuration.

    The network is shared with the pipeline, not copied. Guidance is not included; wrap the result in
    ``GuidedDenoiser``.

    Args:
        pipe: Any pipeline with a ``UNet2DConditionModel`` as ``unet`` or an SD3 or FLUX ``transformer``.
        latent_size: (h, w) of the latents, in 2x2 patches of which the shift of FLUX's times is counted; None leaves
            them unshifted where the pipeline's scheduler shifts by the size.

    Raises:
        ValueError: The pipeline has neither, or a flow transformer comes with a non-flow scheduler.
    """
    num_tokens = None if latent_size is None else (latent_size[0] // 2) * (latent_size[1] // 2)
    schedule = schedule_from_config(pipe.scheduler.config, num_tokens=num_tokens)
    unet = getattr(pipe, "unet", None)
    if isinstance(unet, UNet2DConditionModel):
        return UNetDenoiser(unet, schedule, prediction_type_from_config(pipe.scheduler.config))
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise ValueError(f"{type(pipe).__name__} has neither a conditional UNet nor a transformer")
    if not isinstance(schedule, FlowSchedule):
        raise ValueError(f"a flow transformer needs a flow-matching scheduler, got {type(pipe.scheduler).__name__}")
    return FlowTransformerDenoiser(transformer, schedule)


def _needed(condition: Condition, name: str) -> Tensor:
    value: Tensor | None = getattr(condition, name)
    if value is None:
        raise ValueError(f"this network needs condition.{name}")
    return value


def _dtype_of(network: nn.Module) -> torch.dtype:
    """Dtype of the weights: states are kept in float32 between steps and cast where a half-precision network begins."""
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())


def _image_ids(rows: int, columns: int, like: Tensor) -> Tensor:
    """FLUX's position of each token, (rows * columns, 3) as (0, row, column)."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=like.device), torch.arange(columns, device=like.device), indexing="ij"
    )
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1)
    return ids.reshape(-1, 3).to(like.dtype)
