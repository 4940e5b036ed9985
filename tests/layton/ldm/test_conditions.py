"""What the networks are given equals what their own pipelines give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_pipelines as tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from distill.few_step import FewStepSampling
from distill.models import denoiser_from_pipeline
from generation.text.encoders import text_encoder as load_text_encoder
from layton.assets import find_pipeline, resolve
from layton.control import encode_null_caption, load_unet
from layton.distillation.distilled import save_distilled, student_pipeline
from layton.distillation.instaflow import InstaFlowPipeline
from layton.errors import UsageError
from layton.ldm.autoencoder import load_autoencoder
from layton.ldm.conditions import PromptEncoder, latent_shape_of, takes_guidance
from layton.ldm.drawing import TextToImage
from layton.ldm.teacher import open_outline, open_pipeline

PROMPTS = ["a red circle", "two blue stars"]
KINDS = ["sd", "sd-v", "sdxl", "sd3", "flux"]


class Recorder(torch.nn.Module):
    """Stands before a pipeline's network and notes what it is called with."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, []
        self.config, self.dtype, self.device = network.config, network.dtype, network.device
        for name in ("add_embedding", "cache_context"):
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        return self.network(*args, **kwargs)


def recorded(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The first call of the network inside the whole pipeline."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    network = getattr(pipe, name)
    recorder = Recorder(network)
    setattr(pipe, name, recorder)
    side = 2 * tiny.SIZE
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPTS, num_inference_steps=1, output_type="latent", height=side, width=side, guidance_scale=4.0)
    setattr(pipe, name, network)
    return recorder.calls[0]


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_equal_the_pipelines_own(kind: str) -> None:
    pipe = tiny.build(kind)
    if kind in ("sd", "sd-v"):  # the folder's scheduler skips nothing that matters here
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    encoder = PromptEncoder(pipe, latent_size=(tiny.SIZE, tiny.SIZE), guidance_scale=4.0)
    condition, null = encoder(PROMPTS), encoder.null()
    call = recorded(pipe)
    both = (
        condition.embeds if kind == "flux" else torch.cat([null.embeds.expand_as(condition.embeds), condition.embeds])
    )
    assert torch.allclose(call["encoder_hidden_states"], both, atol=1e-6)
    if kind == "sdxl":
        added = call["added_cond_kwargs"]
        assert torch.allclose(added["text_embeds"][2:], condition.pooled, atol=1e-6)
        assert torch.equal(added["text_embeds"][:2], null.pooled.expand(2, -1))
        assert torch.equal(added["time_ids"][2:], condition.time_ids)
        assert not null.embeds.any()  # this pipeline forces zeros
    elif kind in ("sd3", "flux"):
        assert torch.allclose(call["pooled_projections"][-2:], condition.pooled, atol=1e-6)
    if kind == "flux":
        assert torch.equal(call["guidance"], condition.guidance)
    assert condition.batch_size == 2
    assert null.batch_size == 1


@pytest.mark.parametrize("kind", KINDS)
def test_denoisers_take_the_conditions(kind: str) -> None:
    pipe = tiny.build(kind)
    shape = latent_shape_of(pipe, tiny.SIZE)
    assert shape == (4, tiny.SIZE, tiny.SIZE)
    encoder = PromptEncoder(pipe, latent_size=shape[1:])
    x_t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([900.0, 100.0])
    with torch.no_grad():
        outputs = [denoiser_from_pipeline(pipe)(x_t, t, c) for c in (encoder(PROMPTS), encoder.null().expand(2))]
    assert outputs[0].shape == x_t.shape
    assert not torch.equal(*outputs)


def test_negative_prompts_and_frozen_encoders() -> None:
    pipe = tiny.build("sdxl")
    encoder = PromptEncoder(pipe, latent_size=(8, 8))
    negative = encoder.null("blurry")
    assert negative.embeds.any() and torch.allclose(negative.embeds, encoder(["blurry"]).embeds, atol=1e-6)
    assert negative.time_ids.tolist() == [[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]
    with torch.enable_grad():
        assert not encoder(PROMPTS).embeds.requires_grad
    assert not any(p.requires_grad for p in [*pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters()])
    with pytest.raises(ValueError, match="no prompts"):
        encoder([])


@pytest.mark.parametrize("kind", ["sd-v", "sdxl", "sd3"])
def test_folders_open_frozen_and_equal(kind: str, tmp_path: Path) -> None:
    pipe = tiny.build(kind)
    pipe.save_pretrained(tmp_path / "pipe")
    opened = open_pipeline(tmp_path / "pipe")
    one, two = (PromptEncoder(p, latent_size=(8, 8))(PROMPTS).embeds for p in (pipe, opened))
    assert torch.equal(one, two)
    modules = [part for part in opened.components.values() if isinstance(part, torch.nn.Module)]
    assert modules and not any(m.training or any(p.requires_grad for p in m.parameters()) for m in modules)


@pytest.mark.parametrize("kind", ["sd-v", "sdxl", "sd3", "flux"])
def test_an_outline_says_the_shape_without_any_weights(kind: str, tmp_path: Path) -> None:
    tiny.build(kind).save_pretrained(tmp_path / "pipe")
    opened = open_pipeline(tmp_path / "pipe")
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    outline = open_outline(tmp_path / "pipe")
    assert latent_shape_of(outline) == latent_shape_of(opened) and latent_shape_of(outline, 4)[1:] == (4, 4)
    assert takes_guidance(outline) == takes_guidance(opened) == (kind == "flux")
    network = getattr(outline, "unet", None) or outline.transformer
    assert all(parameter.is_meta for parameter in network.parameters())
    next(
        path for path in (tmp_path / "pipe").glob("*/config.json") if path.parent.name in ("unet", "transformer")
    ).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        open_outline(tmp_path / "pipe")


def test_a_pipeline_that_the_hub_gave_before_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    tiny.build("sd").save_pretrained(snapshot)
    (tmp_path / "hub" / "models--org--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert find_pipeline("org/name").resolve() == resolve("org/name").resolve() == snapshot.resolve()
    assert load_text_encoder("org/name").width == load_text_encoder(str(snapshot)).width
    for absent in ("org/other", "org/name/more", "./org/name"):
        with pytest.raises(UsageError, match="no pipeline folder at"):
            find_pipeline(absent)


def test_bad_folders_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pipeline folder at"):
        open_pipeline(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"neither model_index\.json"):
        open_pipeline(tmp_path)
    tiny.build("sd").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    canary = tmp_path / "canary"
    (tmp_path / "unet" / "mine.py").write_text(f"open({str(canary)!r}, 'w')")
    for change in (
        {"unet": ["mine", "Mine"]},
        {"_class_name": ["pipeline", "Mine"]},
        {"_class_name": "PixArtAlphaPipeline"},
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=r"other libraries|must be one of"):
            open_pipeline(tmp_path)
    assert not canary.exists()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))  # never a fall-back to pickles
    with pytest.raises(ValueError, match=r"cannot be read.*Weights of unet are pickled"):
        open_pipeline(tmp_path)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_prompts_alone_need_no_weights_of_network_and_autoencoder(tmp_path: Path, kind: str) -> None:
    tiny.build(kind).save_pretrained(tmp_path)
    whole = PromptEncoder(open_pipeline(tmp_path), latent_size=(8, 8))(["a star"])
    for weights in (file for name in ("unet", "transformer", "vae") for file in tmp_path.glob(f"{name}/*.safetensors")):
        weights.unlink()
    pipe = open_pipeline(tmp_path, text_only=True)
    network = getattr(pipe, "unet", None) or pipe.transformer
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    alone = PromptEncoder(pipe, latent_size=(8, 8))(["a star"])
    for name in ("embeds", "pooled", "time_ids"):
        told, expected = getattr(alone, name), getattr(whole, name)
        assert told is expected is None or torch.equal(told, expected)


def test_weights_are_read_in_the_type_they_are_used_in_but_the_autoencoders(tmp_path: Path) -> None:
    tiny.build("sd").save_pretrained(tmp_path)
    pipe = open_pipeline(tmp_path, dtype=torch.bfloat16)
    kinds = {name: {p.dtype for p in getattr(pipe, name).parameters()} for name in ("unet", "text_encoder", "vae")}
    assert kinds == {"unet": {torch.bfloat16}, "text_encoder": {torch.bfloat16}, "vae": {torch.float32}}
    exact = open_pipeline(tmp_path).vae.state_dict()
    assert all(value.equal(exact[name]) for name, value in pipe.vae.state_dict().items())  # not rounded on the way


def test_a_pipeline_draws_in_a_smaller_type(tmp_path: Path) -> None:
    tiny.build("sd").save_pretrained(tmp_path)
    whole, small = (
        TextToImage.load(tmp_path, num_steps=2, guidance_scale=1.0, dtype=dtype)(["a star"], [0])[0].astype(float)
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < abs(whole - small).mean() < 10  # of 255 levels


def test_folders_that_hold_the_fp16_variant_alone_are_read(tmp_path: Path) -> None:
    pipe = tiny.build("sd").to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    drawer = TextToImage.load(tmp_path, num_steps=1, guidance_scale=1.0, device="cpu")
    unets = [open_pipeline(tmp_path).unet, drawer.pipeline.unet]
    unets += [InstaFlowPipeline.from_pretrained(tmp_path).pipe.unet, load_unet(tmp_path / "unet").float()]
    for name, weight in pipe.unet.state_dict().items():
        assert all(unet.state_dict()[name].equal(weight.float()) for unet in unets)
    vae = load_autoencoder(tmp_path / "vae").state_dict()
    assert all(vae[name].equal(weight.float()) for name, weight in pipe.vae.state_dict().items())
    null = encode_null_caption(tmp_path)
    assert null.dtype == torch.float32 and null.isfinite().all()
    assert load_text_encoder(str(tmp_path)).width == null.shape[-1]
    export = tmp_path.with_name("export")  # a student of it is a pipeline that can be opened, too
    sampling = FewStepSampling(times=((999.0,),), prediction="eps")
    save_distilled(denoiser_from_pipeline(open_pipeline(tmp_path)), export, sampling)
    student = open_pipeline(student_pipeline(tmp_path, export, tmp_path.with_name("student"))).unet.state_dict()
    assert all(student[name].equal(weight.float()) for name, weight in pipe.unet.state_dict().items())


def test_cached_conditions_are_told_the_guidance_of_the_run_and_not_of_the_cache() -> None:
    pipe = tiny.build("flux")
    cached = PromptEncoder(pipe, latent_size=(8, 8))(["a star", "a ring"])
    run = PromptEncoder(pipe, latent_size=(8, 8), guidance_scale=7.0)
    assert run.has_guidance and cached.guidance is not None and cached.guidance.tolist() == [3.5, 3.5]
    told = run.told(cached)
    assert told.guidance is not None and told.guidance.tolist() == [7.0, 7.0]
    assert told.embeds is cached.embeds and not PromptEncoder(tiny.build("sd"), latent_size=(8, 8)).has_guidance
