"""The released InstaFlow and 2-rectified-flow models (arXiv 2309.06380, github.com/gnobitab/InstaFlow).

Their folders look like Stable Diffusion 1.5's but mean something else: the U-Net puts out the velocity ``dZ/ds``, takes
the real-valued clock ``1000 (1 - i / N)`` without input scaling, and the scheduler in the folder is not used. Sampled
as Stable Diffusion they give noise. Guidance is ``v_null + a (v_text - v_null)``, only for ``a > 1``; the one-step
model is meant for one step without guidance, and a negative prompt has no effect then.

Because they were fine-tuned from Stable Diffusion, what was made for it fits: ControlNets as they are, LoRAs through
``pipeline.load_lora_weights``, and other fine-tuned models by their difference from Stable Diffusion (`add_style`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from diffusers import ControlNetModel, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from distill.condition import Condition
from distill.denoiser import Denoiser, GuidedDenoiser
from distill.methods.reflow import VelocityDenoiser
from distill.models import UNetDenoiser
from distill.noise import Generators, gaussian_like
from distill.samplers import euler, sample
from distill.schedules import FlowSchedule
from distill.timesteps import uniform_flow_times
from layton.distillation.distilled import FEW_STEP_NAME, load_sampling
from layton.ldm.teacher import checked_index, load_parts

OutputType = Literal["pil", "pt", "latent"]


@dataclass(frozen=True, slots=True, eq=False)
class FlowImages:
    """Result of `InstaFlowPipeline`."""

    images: list[Image.Image] | Tensor  # pictures, (B, 3, H, W) in [0, 1], or latents (B, C, h, w)


class ControlledUNet(Denoiser):
    """A U-Net with a ControlNet beside it; ``condition.spatial`` is the control picture (B, 3, H, W) in [0, 1].

    Args:
        inner: The U-Net.
        controlnet: Of the U-Net's shape; it is asked at the same time as the U-Net.
        scale: Factor on its residuals.
    """

    def __init__(self, inner: UNetDenoiser, controlnet: ControlNetModel, *, scale: float = 1.0) -> None:
        super().__init__(inner.schedule, inner.prediction_type)
        self.inner = inner
        self.controlnet = controlnet
        self.scale = scale

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction; see ``Denoiser.forward``.

        Raises:
            ValueError: The condition has no control picture or no text.
        """
        if condition.spatial is None or condition.embeds is None:
            raise ValueError("a ControlNet needs a picture in condition.spatial and text in condition.embeds")
        down, mid = self.controlnet(
            x_t.to(self.controlnet.dtype),
            t,
            encoder_hidden_states=condition.embeds.to(self.controlnet.dtype),
            controlnet_cond=condition.spatial.to(self.controlnet.dtype),
            conditioning_scale=self.scale,
            return_dict=False,
        )
        return self.inner.evaluate(x_t, t, replace(condition, spatial=None), down_residuals=down, mid_residual=mid)


class InstaFlowPipeline:
    """Text to image with a released (or self-trained) rectified flow of Stable Diffusion's shape.

    Args:
        pipe: Its parts; only tokenizer, text encoder, U-Net and VAE are used, no safety checker.
        controlnet: A ControlNet for Stable Diffusion 1.5, used when a call is given a control picture.
        toward_image: Sign of the U-Net's output: ``dZ/ds`` in the released models, ``eps - x_0`` in those that
            `layton distill reflow` makes. None tells them apart by the scheduler: only the latter have a flow's.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        *,
        controlnet: ControlNetModel | None = None,
        toward_image: bool | None = None,
    ) -> None:
        self.pipe = pipe
        self.controlnet = controlnet
        ours = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
        self.toward_image = toward_image if toward_image is not None else not ours

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        controlnet: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        toward_image: bool | None = None,
    ) -> InstaFlowPipeline:
        """Read a local pipeline folder, and a ControlNet's.

        Raises:
            ValueError: A folder is not there, or names a part of another library; or it is a student of `layton
                distill` that is no flow (``reading: exact`` keeps its teacher's prediction).
        """
        for path in (folder, controlnet):
            if path is not None and not Path(path).is_dir():
                raise ValueError(f"{path} is not a folder")
        ours = Path(folder) / FEW_STEP_NAME
        if ours.is_file() and load_sampling(Path(folder)).prediction != "flow":
            raise ValueError(f"{folder} is a student that predicts as its teacher does, and no flow: see {ours.name}")
        # not by open_pipeline: the released folders may name a class of their own, which means nothing here
        checked_index(Path(folder))
        unused = {"safety_checker": None, "requires_safety_checker": False}
        pipe = load_parts(StableDiffusionPipeline, Path(folder), unused, dtype=dtype).to(dtype)
        control = None
        if controlnet is not None:
            control = ControlNetModel.from_pretrained(str(controlnet), local_files_only=True, use_safetensors=True)
            control = control.to(dtype)
        return cls(pipe, controlnet=control, toward_image=toward_image)

    def denoiser(self, *, controlled: bool = False, control_scale: float = 1.0) -> Denoiser:
        """The U-Net as a flow on the clock 0..1000, for sampling, measuring straightness or further distillation.

        Raises:
            ValueError: ``controlled`` without a ControlNet.
        """
        network: Denoiser = UNetDenoiser(self.pipe.unet, FlowSchedule(), "flow")
        if controlled:
            if self.controlnet is None:
                raise ValueError("this pipeline has no ControlNet")
            network = ControlledUNet(cast(UNetDenoiser, network), self.controlnet, scale=control_scale)
        return VelocityDenoiser(network, toward_image=self.toward_image)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 1,
        guidance_scale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        generator: Generators | None = None,
        control_image: Tensor | None = None,
        control_scale: float = 1.0,
        output_type: OutputType = "pil",
    ) -> FlowImages:
        """Generate images, one for each prompt.

        Args:
            prompt: One or several.
            negative_prompt: What guidance guides away from, default the empty prompt; one, or one for each prompt.
            num_inference_steps: N; one for InstaFlow, 25 for the 2-rectified flow.
            guidance_scale: a; up to 1 is no guidance; 1.5 for the 2-rectified flow.
            height: Pixels, default the model's own size.
            width: Pixels.
            latents: (B, C, h, w) noise to start from instead of new one.
            generator: Of the noise, one or one for each prompt; needed without ``latents``.
            control_image: (B, 3, H, W) in [0, 1] for the ControlNet.
            control_scale: Factor on the ControlNet's residuals.
            output_type: ``pil``, ``pt`` or ``latent``.

        Raises:
            ValueError: Neither ``latents`` nor ``generator``, a control picture without ControlNet, an output type
                that is not known, or numbers of prompts that differ.
        """
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f"output_type must be pil, pt or latent, got {output_type!r}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        condition = Condition(embeds=self.encode_prompts(prompts))
        noise = self._noise(len(prompts), height, width, generator) if latents is None else latents
        noise = noise.to(device=self.pipe.device, dtype=torch.float32)
        network = self.denoiser(controlled=control_image is not None, control_scale=control_scale)
        if control_image is not None:
            condition = replace(condition, spatial=control_image.to(self.pipe.device).expand(len(prompts), -1, -1, -1))
        if guidance_scale > 1.0:
            null = Condition(embeds=self.encode_prompts(_negatives(negative_prompt, len(prompts))))
            network = GuidedDenoiser(network, guidance_scale, null)
        times = uniform_flow_times(network.schedule, num_inference_steps)
        result = sample(network, noise, times, condition, solver=euler)
        if output_type == "latent":
            return FlowImages(result)
        vae = self.pipe.vae
        decoded = vae.decode((result / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return FlowImages(self.pipe.image_processor.postprocess(decoded.float(), output_type=output_type))

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, L, D) by the pipeline's own encoder."""
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), self.pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return cast(Tensor, embeds)

    def _noise(self, count: int, height: int | None, width: int | None, generator: Generators | None) -> Tensor:
        if generator is None:
            raise ValueError("give a generator, or the noise itself as latents")
        factor, own = self.pipe.vae_scale_factor, int(self.pipe.unet.config.sample_size)
        rows = own if height is None else height // factor
        columns = own if width is None else width // factor
        return gaussian_like(torch.empty(count, int(self.pipe.unet.config.in_channels), rows, columns), generator)


def style_delta(style: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``W_style - W_base`` in float32, by name.

    Raises:
        ValueError: The two do not have the same names and shapes; a few differences are listed.
    """
    wrong = sorted(style.keys() ^ base.keys())
    wrong += sorted(name for name in style.keys() & base.keys() if style[name].shape != base[name].shape)
    if wrong:
        raise ValueError(f"the models differ in {len(wrong)} tensors, for instance {wrong[:3]}")
    return {name: style[name].float() - base[name].float() for name in style}


@torch.no_grad()
def add_delta(module: torch.nn.Module, delta: Mapping[str, Tensor], *, weight: float = 1.0) -> None:
    """``W + weight * delta`` in place, summed in float32.

    Raises:
        ValueError: The module lacks a tensor of the delta, or has it in another shape.
    """
    own = module.state_dict()
    wrong = [name for name, value in delta.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors of the delta do not fit, for instance {wrong[:3]}")
    for name, value in delta.items():
        own[name].copy_(own[name].float() + weight * value.to(own[name].device))


def add_style(
    flow: InstaFlowPipeline,
    style: StableDiffusionPipeline,
    base: StableDiffusionPipeline,
    *,
    weight: float = 1.0,
    swap_vae: bool = True,
    swap_text_encoder: bool = True,
) -> None:
    """Give a flow the style of a fine-tuned Stable Diffusion: ``W_if + weight (W_style - W_sd)`` (``rf_lora.py``).

    Args:
        flow: Changed in place.
        style: The fine-tuned model.
        base: What it was fine-tuned from, the flow's own ancestor (Stable Diffusion 1.5).
        weight: Strength.
        swap_vae: Also take the style's VAE, as the official code does.
        swap_text_encoder: Also take its text encoder.

    Raises:
        ValueError: The models are not of one shape.
    """
    add_delta(flow.pipe.unet, style_delta(style.unet.state_dict(), base.unet.state_dict()), weight=weight)
    if swap_vae:
        flow.pipe.register_modules(vae=style.vae)
    if swap_text_encoder:
        flow.pipe.register_modules(text_encoder=style.text_encoder)


def _negatives(negative: str | Sequence[str] | None, count: int) -> list[str]:
    if negative is None or isinstance(negative, str):
        return [negative or ""] * count
    if len(negative) != count:
        raise ValueError(f"expected one negative prompt or {count}, got {len(negative)}")
    return list(negative)
