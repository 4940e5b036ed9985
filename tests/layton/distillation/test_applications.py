"""A distilled student at work: image to image, ControlNet, inpainting, Chinese prompts."""

from __future__ import annotations

import json

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from distill.adapters import LoraSettings, networks_for
from distill.few_step import FewStepSampling
from distill.models import denoiser_from_pipeline
from layton.distillation.applications import encode_image, mask_blending
from layton.distillation.distilled import load_distilled, pipeline_arguments, save_distilled
from layton.distillation.few_step_schedulers import FlowMatchUNetScheduler

SAMPLING = FewStepSampling(times=((999.0,), (999.0, 499.0), (999.0, 749.0, 499.0, 249.0)))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distilled(folder, channels=4, **parts):
    """A pipeline with a distilled LoRA in it."""
    networks = networks_for(denoiser_from_pipeline(tiny.tiny_sd(channels)), LoraSettings(rank=4))
    with torch.no_grad():
        for parameter in networks.student.parameters_of_view():
            parameter += 0.3 * draw(7, *parameter.shape)
    save_distilled(networks.student, folder, SAMPLING)
    pipe = tiny.tiny_sd(channels, **parts)
    load_distilled(pipe, folder)
    return pipe


def call(pipe, steps, **arguments):
    if not {"prompt", "prompt_embeds"} & arguments.keys():
        arguments["prompt_embeds"] = draw(1, 1, 5, 16)
    generator = torch.Generator().manual_seed(5)
    return pipe(output_type="latent", generator=generator, **arguments, **pipeline_arguments(SAMPLING, steps)).images


@pytest.fixture
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_image_to_image_starts_inside_the_trained_times(tmp_path, image):
    pipe = StableDiffusionImg2ImgPipeline(**distilled(tmp_path).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def watch(_, __, t, values):
        seen.append(int(t))
        return values

    near = call(pipe, 4, image=image, strength=0.25, callback_on_step_end=watch)
    far = call(pipe, 4, image=image, strength=0.75)
    assert seen == [249]
    known = encode_image(pipe, 2 * image - 1)
    assert (near - known).abs().mean() < (far - known).abs().mean()


@torch.no_grad()
def test_controlnet_steers_the_student(tmp_path):
    base = distilled(tmp_path)
    controlnet = ControlNetModel.from_unet(tiny.tiny_sd().unet, conditioning_embedding_out_channels=(4, 8, 8, 8)).eval()
    hint_out = controlnet.controlnet_cond_embedding.conv_out
    for module in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block, hint_out):
        torch.nn.init.normal_(module.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    pipe = StableDiffusionControlNetPipeline(
        **{key: value for key, value in base.components.items() if key != "image_encoder"},
        controlnet=controlnet,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    hint, latents = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4)), draw(3, 1, 4, 8, 8)
    plain = call(base, 2, latents=latents, height=64, width=64)
    off = call(pipe, 2, image=hint, latents=latents, controlnet_conditioning_scale=0.0)
    steered = call(pipe, 2, image=hint, latents=latents)
    other = call(pipe, 2, image=1.0 - hint, latents=latents)
    assert_close(off, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    assert (steered - plain).abs().max() > 1e-3 and (steered - other).abs().max() > 1e-4


def half_mask():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1.0
    return mask


@torch.no_grad()
def test_plain_inpaint_pipeline_keeps_what_is_not_masked(tmp_path, image):
    pipe = StableDiffusionInpaintPipeline(**distilled(tmp_path).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    found = call(pipe, 4, image=image, mask_image=half_mask(), height=64, width=64, strength=1.0)
    other = call(pipe, 4, image=1 - image, mask_image=half_mask(), height=64, width=64, strength=1.0)
    assert found.shape == (1, 4, 8, 8) and not torch.equal(found[..., :4], other[..., :4])
    prompt = {"prompt_embeds": 9 * draw(8, 1, 5, 16)}
    another = call(pipe, 4, image=image, mask_image=half_mask(), height=64, width=64, strength=1.0, **prompt)
    assert_close(another[..., :4], found[..., :4])  # what is kept does not depend on the prompt, what is painted does
    assert (another - found)[..., 4:].abs().max() > 1e-3


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("steps", [1, 4])
@torch.no_grad()
def test_mask_blending_keeps_the_image_and_paints_the_rest(tmp_path, image, channels, steps):
    pipe = distilled(tmp_path, channels)
    known, noise = encode_image(pipe, 2 * image - 1), draw(3, 1, channels, 8, 8)
    arguments = {"latents": noise, "height": 64, "width": 64}
    free = call(pipe, steps, **arguments)
    blended = call(pipe, steps, **arguments, callback_on_step_end=mask_blending(known, half_mask(), noise))
    assert_close(blended[..., :4], known[..., :4])
    assert (blended[..., 4:] - known[..., 4:]).abs().max() > 1e-2
    everything = call(
        pipe, steps, **arguments, callback_on_step_end=mask_blending(known, torch.ones(1, 1, 64, 64), noise)
    )
    assert_close(everything, free)
    if steps > 1:  # the known half is seen by the network while it paints the other
        assert not torch.allclose(blended[..., 4:], free[..., 4:])


@torch.no_grad()
def test_flow_students_take_known_images_too(image):
    pipe = tiny.tiny_sd()
    pipe.scheduler = FlowMatchUNetScheduler()
    known, noise = encode_image(pipe, 2 * image - 1), draw(3, 1, 4, 8, 8)
    pipe.scheduler.set_timesteps(4)
    for t in pipe.scheduler.timesteps:  # diffusers' own name for it, which its Stable Diffusion pipelines do not use
        assert_close(pipe.scheduler.add_noise(known, noise, t[None]), pipe.scheduler.scale_noise(known, t[None], noise))
    options = {"prompt_embeds": draw(1, 1, 5, 16), "guidance_scale": 1.0, "output_type": "latent"}
    size = {"latents": noise, "height": 64, "width": 64, "num_inference_steps": 4}
    blended = pipe(**options, **size, callback_on_step_end=mask_blending(known, half_mask(), noise)).images
    assert_close(blended[..., :4], known[..., :4])
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    other = StableDiffusionImg2ImgPipeline(**parts, scheduler=FlowMatchUNetScheduler(), requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    found = other(**options, image=image, strength=0.5, num_inference_steps=4).images
    assert found.shape == (1, 4, 8, 8) and bool(found.isfinite().all())


def test_inpaint_pipeline_refuses_16_channels_hence_the_callback(tmp_path, image):
    pipe = StableDiffusionInpaintPipeline(**distilled(tmp_path, 16).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises((ValueError, RuntimeError)):
        call(pipe, 1, image=image, mask_image=half_mask(), height=64, width=64)


@pytest.mark.parametrize(
    ("latents", "mask", "noise", "message"),
    [
        ((1, 4, 8, 8), (1, 1, 8, 8), (1, 4, 8, 9), "latents and noise"),
        ((2, 4, 8, 8), (3, 1, 8, 8), (2, 4, 8, 8), "mask must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(latents, mask, noise, message):
    with pytest.raises(ValueError, match=message):
        mask_blending(torch.zeros(latents), torch.zeros(mask), torch.zeros(noise))


def test_masks_outside_zero_to_one_are_refused():
    with pytest.raises(ValueError, match=r"0\.0 to 255\.0"):
        mask_blending(torch.zeros(1, 4, 8, 8), 255 * half_mask(), torch.zeros(1, 4, 8, 8))


@torch.no_grad()
def test_chinese_prompts_pass_through(tmp_path):
    torch.manual_seed(0)
    byte_level = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = [*byte_level, *(token + "</w>" for token in byte_level), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=24)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    config = CLIPTextConfig(vocab_size=len(tokens), max_position_embeddings=24, **ends, **sizes)
    pipe = distilled(tmp_path / "student", text_encoder=CLIPTextModel(config).eval(), tokenizer=tokenizer)
    arguments = {"latents": draw(3, 1, 4, 8, 8), "height": 64, "width": 64}
    red, green, again = (call(pipe, 2, prompt=text, **arguments) for text in ("红色圆形", "绿色方块", "红色圆形"))
    assert_close(red, again, rtol=0, atol=0)
    assert (red - green).abs().max() > 1e-4
