"""The latent diffusion model as an ordinary ``StableDiffusionPipeline`` folder, which plain diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer


def build_scheduler() -> Any:
    """Stable Diffusion's schedule with a noisier end, v-prediction (arXiv 2202.00512), sampled from pure noise down.

    Sixteen channels say things several times over: at Stable Diffusion's last time (beta_end 0.012, SNR 0.005) they
    still show where objects are. The network learns to trust that, and takes the pure noise that sampling starts from
    for an empty scene (the fault of arXiv 2305.08891). Here the last SNR is 0.0002, and every time has a finite one.

    Pictures are drawn by SDE-DPM-Solver++ (arXiv 2211.01095): the fresh noise of each step mends what earlier ones
    missed, which a small network needs (`configs/mini/README.md`). DDIM's settings stay in its configuration, for
    schedulers that are made from it.
    """
    ddim = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # as in Stable Diffusion's files; without effect on trailing steps
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    return DPMSolverMultistepScheduler.from_config(ddim.config, algorithm_type="sde-dpmsolver++", solver_order=2)


def save_pipeline(
    folder: str | Path,
    *,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: Any = None,
) -> None:
    """Write the five parts and ``model_index.json``.

    Args:
        folder: Where to write.
        vae: Autoencoder.
        text_encoder: Text encoder.
        tokenizer: Its tokenizer.
        unet: Denoiser.
        scheduler: Of diffusers, with the noise that the denoiser knows; `build_scheduler`'s by default.
    """
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler() if scheduler is None else scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder), safe_serialization=True)
