"""The latent diffusion model as an ordinary ``StableDiffusionPipeline`` folder, which plain diffusers loads."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, v-prediction (arXiv 2202.00512), sampled from pure noise down.

    v-prediction: an eps-predicting network says nothing of the image at t = 999, where few-step decoders start.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # as in Stable Diffusion's files; without effect on trailing steps
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def save_pipeline(
    folder: str | Path,
    *,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> None:
    """Write the five parts and ``model_index.json``.

    Args:
        folder: Where to write.
        vae: Autoencoder.
        text_encoder: Text encoder.
        tokenizer: Its tokenizer.
        unet: Denoiser.
    """
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder), safe_serialization=True)
