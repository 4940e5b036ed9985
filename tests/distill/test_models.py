"""Wrapped diffusers networks equal direct calls, and our sampler equals whole pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel

from distill.condition import Condition
from distill.denoiser import GuidedDenoiser
from distill.models import (
    FlowTransformerDenoiser,
    UNetDenoiser,
    denoiser_from_pipeline,
    embed_guidance,
    pack_latents,
    unpack_latents,
)
from distill.noise import gaussian_like
from distill.samplers import euler, sample
from distill.schedules import FlowSchedule, VPSchedule
from distill.timesteps import timesteps_from_config

T = torch.tensor([999, 13])
EXACT = {"rtol": 0.0, "atol": 0.0}


def tiny_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(options | changes)).eval()


def tiny_sdxl_unet() -> UNet2DConditionModel:
    return tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
    )


def tiny_sd3(**changes) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**(options | changes)).eval()


def tiny_flux(guidance_embeds: bool) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    ).eval()


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(4)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("prediction_type", ["eps", "v"])
def test_sd_unet_equals_a_direct_call(prediction_type, draw):
    unet, x_t, embeds = tiny_unet(use_linear_projection=prediction_type == "v"), draw(2, 4, 8, 8), draw(2, 5, 16)
    denoiser = UNetDenoiser(unet, VPSchedule(), prediction_type)
    expected = unet(x_t, T, encoder_hidden_states=embeds).sample
    assert_close(denoiser(x_t, T, Condition(embeds=embeds)), expected, **EXACT)
    prediction = denoiser.predict(x_t, T, Condition(embeds=embeds))
    read = prediction.eps if prediction_type == "eps" else prediction.v(VPSchedule().coefficients(T))
    assert_close(read, expected, rtol=1e-4, atol=1e-5)


def test_masked_text_does_not_count(draw):
    denoiser, x_t, embeds = UNetDenoiser(tiny_unet(), VPSchedule()), draw(2, 4, 8, 8), draw(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2).bool()
    masked = denoiser(x_t, T, Condition(embeds=embeds, mask=mask))
    changed = embeds.clone()
    changed[:, 3:] = 7.0
    assert_close(denoiser(x_t, T, Condition(embeds=changed, mask=mask)), masked)
    assert not torch.allclose(denoiser(x_t, T, Condition(embeds=embeds)), masked)


def test_sdxl_unet_equals_a_direct_call(draw):
    unet, x_t, embeds, pooled = tiny_sdxl_unet(), draw(2, 4, 8, 8), draw(2, 5, 16), draw(2, 12)
    time_ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    expected = unet(x_t, T, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
    given = Condition(embeds=embeds, pooled=pooled, time_ids=time_ids)
    denoiser = UNetDenoiser(unet, VPSchedule())
    assert_close(denoiser(x_t, T, given), expected, **EXACT)
    with pytest.raises(ValueError, match="time_ids"):
        denoiser(x_t, T, Condition(embeds=embeds, pooled=pooled))


def test_w_conditioned_unet_equals_a_direct_call(draw):
    unet, x_t, embeds = tiny_unet(time_cond_proj_dim=10), draw(2, 4, 8, 8), draw(2, 5, 16)
    scale = torch.tensor([1.0, 7.5])
    # The pipelines pass guidance_scale - 1.
    embedded = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale - 1, embedding_dim=10)
    assert_close(embed_guidance(scale, 10), embedded)
    expected = unet(x_t, T, encoder_hidden_states=embeds, timestep_cond=embedded).sample
    found = UNetDenoiser(unet, VPSchedule())(x_t, T, Condition(embeds=embeds, guidance=scale))
    assert_close(found, expected)


def test_residuals_of_a_branch_reach_the_network(draw):
    unet, x_t, embeds = tiny_unet(), draw(2, 4, 8, 8), draw(2, 5, 16)
    down = [draw(2, 16, 8, 8), draw(2, 16, 8, 8), draw(2, 16, 4, 4), draw(2, 32, 4, 4)]
    middle = draw(2, 32, 4, 4)
    expected = unet(
        x_t, T, embeds, down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle
    ).sample
    given = Condition(embeds=embeds, spatial=draw(2, 3, 8, 8))
    found = UNetDenoiser(unet, VPSchedule()).evaluate(x_t, T, given, down_residuals=down, mid_residual=middle)
    assert_close(found, expected, **EXACT)


def test_sd3_equals_a_direct_call(draw):
    transformer, x_t, embeds, pooled = tiny_sd3(), draw(2, 4, 8, 8), draw(2, 5, 16), draw(2, 12)
    expected = transformer(
        hidden_states=x_t, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=T.float()
    ).sample
    denoiser = FlowTransformerDenoiser(transformer)
    given = Condition(embeds=embeds, pooled=pooled)
    assert_close(denoiser(x_t, T, given), expected, **EXACT)
    assert_close(denoiser.predict(x_t, T, given).flow, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_flux_equals_a_direct_call(guidance_embeds, draw):
    transformer, x_t, embeds, pooled = tiny_flux(guidance_embeds), draw(2, 4, 8, 6), draw(2, 5, 16), draw(2, 12)
    guidance = torch.tensor([3.5, 7.0]) if guidance_embeds else None
    packed = FluxPipeline._pack_latents(x_t, 2, 4, 8, 6)
    output = transformer(
        hidden_states=packed,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=T.float() / 1000,
        guidance=guidance,
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32),
        txt_ids=torch.zeros(5, 3),
    ).sample
    expected = FluxPipeline._unpack_latents(output, 8 * 8, 6 * 8, 8)
    found = FlowTransformerDenoiser(transformer)(x_t, T, Condition(embeds=embeds, pooled=pooled, guidance=guidance))
    assert_close(found, expected)


def test_packing_is_inverse_to_unpacking(draw):
    x = draw(2, 4, 8, 6)
    assert_close(unpack_latents(pack_latents(x), 8, 6), x, **EXACT)


def test_half_precision_networks_take_and_give_float32_states(draw):
    denoiser = UNetDenoiser(tiny_unet().to(torch.bfloat16), VPSchedule(), "v")
    prediction = denoiser.predict(draw(2, 4, 8, 8), T, Condition(embeds=draw(2, 5, 16)))
    assert (prediction.x_0.dtype, prediction.eps.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("build", "channels"), [(tiny_unet, 4), (tiny_sdxl_unet, 4), (tiny_sd3, 4), (lambda: tiny_flux(True), 4)]
)
def test_networks_run_on_the_meta_device(build, channels):
    with torch.device("meta"):
        network = build()
        given = Condition(embeds=torch.zeros(2, 5, 16), pooled=torch.zeros(2, 12))
        x_t, t = torch.zeros(2, channels, 8, 8), torch.zeros(2)
    if isinstance(network, UNet2DConditionModel):
        denoiser = UNetDenoiser(network, VPSchedule())
        given = Condition(embeds=given.embeds, pooled=given.pooled, time_ids=torch.zeros(2, 6, device="meta"))
    else:
        denoiser = FlowTransformerDenoiser(network)
        if denoiser.is_flux:
            given = Condition(embeds=given.embeds, pooled=given.pooled, guidance=torch.ones(2, device="meta"))
    assert denoiser.predict(x_t, t, given).x_0.shape == x_t.shape


def tiny_vae(**changes) -> AutoencoderKL:
    options = {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**(options | blocks | changes))


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_pipeline_is_reproduced(prediction, guidance_scale, draw):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=10,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=text,
        tokenizer=None,
        unet=tiny_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    embeds, null, x_T = draw(2, 5, 16), draw(1, 5, 16), draw(2, 4, 8, 8)
    expected = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=null.repeat(2, 1, 1), latents=x_T, num_inference_steps=10,
        guidance_scale=guidance_scale, output_type="latent", height=64, width=64,
    ).images  # fmt: skip
    denoiser = GuidedDenoiser(denoiser_from_pipeline(pipe), guidance_scale, Condition(embeds=null))
    times = timesteps_from_config(denoiser.schedule, 10, scheduler.config)
    found = sample(denoiser, x_T, times, Condition(embeds=embeds))
    assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_sd3_pipeline_is_reproduced(draw):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(
        transformer=tiny_sd3(),
        scheduler=scheduler,
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    embeds, pooled, x_T = draw(1, 5, 16), draw(1, 12), draw(1, 4, 8, 8)
    null = Condition(embeds=draw(1, 5, 16), pooled=draw(1, 12))
    expected = pipe(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, negative_prompt_embeds=null.embeds,
        negative_pooled_prompt_embeds=null.pooled, latents=x_T, num_inference_steps=8, guidance_scale=5.0,
        output_type="latent", height=64, width=64,
    ).images  # fmt: skip
    denoiser = GuidedDenoiser(denoiser_from_pipeline(pipe), 5.0, null)
    times = timesteps_from_config(denoiser.schedule, 8, scheduler.config)
    found = sample(denoiser, x_T, times, Condition(embeds=embeds, pooled=pooled), solver=euler)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_pipeline_network_is_shared_not_copied():
    class Pipe:
        unet, scheduler = tiny_unet(), DDIMScheduler(prediction_type="sample")

    denoiser = denoiser_from_pipeline(Pipe())
    assert denoiser.unet is Pipe.unet and denoiser.prediction_type == "x0"


def test_gaussian_noise_is_the_same_for_a_cpu_generator():
    x = torch.zeros(2, 3)
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    assert_close(gaussian_like(x, torch.Generator().manual_seed(1)), expected, **EXACT)


def run(network, given):
    denoiser = (
        UNetDenoiser(network, VPSchedule()) if hasattr(network, "mid_block") else FlowTransformerDenoiser(network)
    )
    return denoiser(
        torch.zeros(2, 4, 8, 7 if given.mask is None and denoiser.prediction_type == "flow" else 8), T, given
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda e, p: run(tiny_unet(), Condition()), "embeds"),
        (lambda e, p: run(tiny_unet(), Condition(embeds=e, spatial=e)), "branch"),
        (lambda e, p: run(tiny_unet(), Condition(embeds=e, guidance=p[:, 0])), "GuidedDenoiser"),
        (lambda e, p: run(tiny_flux(False), Condition(embeds=e, pooled=p)), "8x7"),
        (lambda e, p: run(tiny_flux(False), Condition(embeds=e, mask=p, pooled=p)), "mask"),
        (lambda e, p: FlowTransformerDenoiser(tiny_unet()), "UNet2DConditionModel"),
        (lambda e, p: FlowTransformerDenoiser(tiny_sd3(), FlowSchedule(shift=-1.0)), "-1.0"),
    ],
)
def test_mistakes_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act(torch.zeros(2, 5, 16), torch.zeros(2, 12))
