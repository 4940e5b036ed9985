"""Released rectified flows are sampled as their own pipeline does it, restyled and controlled as their code does."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel
from tiny_flow import UNET, pipeline, tiny_tokenizer
from torch.testing import assert_close

from layton.distillation.instaflow import InstaFlowPipeline, add_delta, add_style, style_delta


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@torch.no_grad()
def released_loop(pipe, prompts, negatives, latents, steps: int, guidance: float) -> torch.Tensor:
    """The loop of the official pipeline, in words of its paper: Euler on dZ/ds with a real clock from 1000 down."""
    text, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    empty, _ = pipe.encode_prompt(negatives, "cpu", 1, False)
    for i in range(steps):
        clock = torch.ones(len(latents)) * (1.0 - i / steps) * 1000.0
        v = pipe.unet(latents, clock, encoder_hidden_states=text).sample
        if guidance > 1.0:
            v_null = pipe.unet(latents, clock, encoder_hidden_states=empty).sample
            v = v_null + guidance * (v - v_null)
        latents = latents + v / steps
    return latents


@pytest.mark.parametrize(
    ("steps", "guidance", "negative"),
    [(1, 0.0, None), (1, 1.0, "a red square"), (3, 1.5, "a red square"), (5, 2.0, None)],
)
def test_latents_equal_the_released_loops(tokenizer, steps, guidance, negative):
    pipe = pipeline(tokenizer)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    prompts = ["a red square", "a blue circle"]
    found = InstaFlowPipeline(pipe)(
        prompts, negative_prompt=negative, num_inference_steps=steps, guidance_scale=guidance, latents=noise,
        output_type="latent",
    ).images  # fmt: skip
    assert_close(
        found, released_loop(pipe, prompts, [negative or ""] * 2, noise, steps, guidance), rtol=1e-4, atol=1e-5
    )


def test_a_saved_folder_gives_the_same_pictures(tokenizer, tmp_path):
    pipe = pipeline(tokenizer)
    pipe.save_pretrained(tmp_path)
    images = [
        flow("a red square", generator=torch.Generator().manual_seed(0), output_type="pt").images
        for flow in (InstaFlowPipeline(pipe), InstaFlowPipeline.from_pretrained(tmp_path))
    ]
    assert isinstance(images[0], torch.Tensor) and images[0].shape == (1, 3, 8, 8)
    assert_close(images[0], images[1])
    assert float(images[0].min()) >= 0 and float(images[0].max()) <= 1


def test_a_style_is_added_as_a_difference_of_weights(tokenizer):
    flow, style, base = (pipeline(tokenizer, seed) for seed in range(3))
    before = {name: value.clone() for name, value in flow.unet.state_dict().items()}
    add_style(InstaFlowPipeline(flow), style, base, weight=0.5)
    for name, value in flow.unet.state_dict().items():
        wanted = before[name] + 0.5 * (style.unet.state_dict()[name] - base.unet.state_dict()[name])
        assert_close(value, wanted)
    assert flow.vae is style.vae and flow.text_encoder is style.text_encoder


def test_the_flows_own_style_changes_nothing(tokenizer):
    flow, base = pipeline(tokenizer, 0), pipeline(tokenizer, 1)
    before = {name: value.clone() for name, value in flow.unet.state_dict().items()}
    add_style(InstaFlowPipeline(flow), base, base, swap_vae=False, swap_text_encoder=False)
    assert all(torch.equal(value, before[name]) for name, value in flow.unet.state_dict().items())
    assert flow.vae is not base.vae


def test_models_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="differ in 1 tensors"):
        style_delta({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="do not fit"):
        add_delta(torch.nn.Linear(1, 1), {"odd": torch.zeros(1)})


def test_a_controlnet_steers_the_flow_and_an_untrained_one_does_not(tokenizer):
    pipe = pipeline(tokenizer)
    torch.manual_seed(0)
    control = ControlNetModel(conditioning_embedding_out_channels=(8,), **UNET).eval()
    flow = InstaFlowPipeline(pipe, controlnet=control)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))

    def latents(**options) -> torch.Tensor:
        found = flow("a red square", latents=noise, num_inference_steps=2, output_type="latent", **options).images
        assert isinstance(found, torch.Tensor)
        return found

    plain = latents()
    assert_close(latents(control_image=picture), plain)  # zero convolutions
    with torch.no_grad():
        for parameter in control.controlnet_mid_block.parameters():
            parameter.add_(0.05)
    steered = latents(control_image=picture)
    assert not torch.allclose(steered, plain)
    assert_close(latents(control_image=picture, control_scale=0.0), plain)
    guided = latents(control_image=picture, guidance_scale=1.5)
    assert guided.isfinite().all() and not torch.allclose(guided, steered)


def test_what_is_missing_is_said(tokenizer, tmp_path):
    flow = InstaFlowPipeline(pipeline(tokenizer))
    with pytest.raises(ValueError, match="generator"):
        flow("a")
    with pytest.raises(ValueError, match="no ControlNet"):
        flow("a", generator=torch.Generator(), control_image=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="output_type"):
        flow("a", generator=torch.Generator(), output_type="np")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        flow(["a", "b"], generator=torch.Generator(), negative_prompt=["x"], guidance_scale=2.0)
    with pytest.raises(ValueError, match="not a folder"):
        InstaFlowPipeline.from_pretrained(tmp_path / "none")
