"""What was trained is what diffusers loads: every key, equal outputs, the trained steps and no others."""

from __future__ import annotations

import pytest
import small_pipelines
import tiny_pipelines as tiny
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from safetensors import safe_open
from torch.testing import assert_close

from distill.adapters import (
    FLOW_LORA_TARGETS,
    LoraSettings,
    adapter_parameters,
    adapter_state_dict,
    add_lora,
    networks_for,
)
from distill.condition import Condition
from distill.few_step import FewStepSampling
from distill.models import denoiser_from_pipeline
from layton.distillation.distilled import (
    FEW_STEP_NAME,
    LORA_NAME,
    load_distilled,
    load_sampling,
    network_of,
    pipeline_arguments,
    save_distilled,
)
from layton.ldm.drawing import TextToImage

TIMES = ((999.0,), (999.0, 499.0), (999.0, 749.0, 499.0, 249.0))
BUILD = {"sd": tiny.tiny_sd, "xl": tiny.tiny_xl, "sd3": tiny.tiny_sd3, "flux": tiny.tiny_flux}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def condition_of(kind) -> Condition:
    condition = {"embeds": draw(1, 1, 5, 16)}
    if kind != "sd":
        condition["pooled"] = draw(2, 1, 12)
    if kind == "xl":
        condition["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    if kind == "flux":
        condition["guidance"] = torch.tensor([3.5])
    return Condition(**condition)


def run(kind, pipe, arguments):
    """Final latents (1, 4, 8, 8) of a pipeline from fixed noise."""
    given = condition_of(kind)
    prompt = {"prompt_embeds": given.embeds}
    if kind != "sd":
        prompt["pooled_prompt_embeds"] = given.pooled
    latents = draw(3, 1, 4, 8, 8)
    if kind == "flux":
        latents = pipe._pack_latents(latents, 1, 4, 8, 8)
    images = pipe(
        **prompt, latents=latents, height=64, width=64, output_type="latent",
        generator=torch.Generator().manual_seed(5), **arguments,
    ).images  # fmt: skip
    return pipe._unpack_latents(images, 64, 64, 8) if kind == "flux" else images


def train_like(pipe, settings, seed=7):
    """A student whose adapter has moved as if trained."""
    networks = networks_for(denoiser_from_pipeline(pipe), settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in networks.student.parameters_of_view():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return networks


def record(network, **fields):
    return FewStepSampling(times=TIMES, prediction="flow" if network in ("sd3", "flux") else "eps", **fields)


@pytest.mark.parametrize("kind", ["sd", "xl", "sd3", "flux"])
@torch.no_grad()
def test_loaded_lora_gives_the_trained_output(kind, tmp_path):
    settings = LoraSettings(targets=FLOW_LORA_TARGETS) if kind in ("sd3", "flux") else LoraSettings()
    assert (settings.rank, settings.alpha) == (64, 8.0)
    networks = train_like(BUILD[kind](), settings)
    flow = kind in ("sd3", "flux")  # their pipelines hand no generator to the scheduler: no noise to compare with
    sampling = record(kind, guidance=3.5 if kind == "flux" else None, kind="ddim" if flow else "renoise")
    save_distilled(networks.student, tmp_path, sampling)
    assert load_sampling(tmp_path) == sampling

    pipe = BUILD[kind]()
    untouched = run(kind, pipe, {"num_inference_steps": 4, "guidance_scale": 1.0})
    assert load_distilled(pipe, tmp_path) == sampling
    network = network_of(denoiser_of(pipe, sampling))
    saved = adapter_state_dict(network_of(networks.student), "student")
    loaded = adapter_state_dict(network, "distilled")
    assert loaded.keys() == saved.keys() and any("to_q" in key for key in saved)
    for key in saved:
        assert_close(loaded[key], saved[key], rtol=0, atol=0)
    assert network.peft_config["distilled"].lora_alpha == 8.0

    condition, x_T = condition_of(kind), draw(3, 1, 4, 8, 8)
    for steps in (1, 4):
        found = run(kind, pipe, pipeline_arguments(sampling, steps))
        trained = sampling.sample(
            networks.student, x_T, condition, num_steps=steps, generator=torch.Generator().manual_seed(5)
        )
        scale = trained.abs().max().item()
        assert_close(found, trained, rtol=1e-5, atol=1e-5 * max(scale, 1.0))
    assert (untouched - found).abs().max() > 1e-2


def denoiser_of(pipe, sampling):
    class Holder:
        unet = getattr(pipe, "unet", None)
        transformer = getattr(pipe, "transformer", None)
        scheduler = BUILD["sd3" if sampling.prediction == "flow" else "sd"]().scheduler

    return denoiser_from_pipeline(Holder())


@torch.no_grad()
def test_plain_diffusers_loads_the_file_with_equal_output(tmp_path):
    networks = train_like(tiny.tiny_sd(), LoraSettings())
    save_distilled(networks.student, tmp_path, record("sd"))
    pipe = tiny.tiny_sd()
    pipe.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    x_t, t, embeds = draw(3, 1, 4, 8, 8), torch.tensor([500]), draw(1, 1, 5, 16)
    expected = networks.student(x_t, t, Condition(embeds=embeds))
    assert_close(pipe.unet(x_t, t, embeds).sample, expected, **CLOSE)
    assert_close(
        pipe.unet(x_t, t, embeds, cross_attention_kwargs={"scale": 0.0}).sample, teacher(networks, x_t, t, embeds)
    )


def teacher(networks, x_t, t, embeds):
    return networks.teacher(x_t, t, Condition(embeds=embeds))


@torch.no_grad()
def test_scales_and_fusing_agree(tmp_path):
    networks = train_like(tiny.tiny_sd(), LoraSettings(rank=4))
    save_distilled(networks.student, tmp_path, record("sd"))
    pipe = tiny.tiny_sd()
    load_distilled(pipe, tmp_path)
    x_t, t, embeds = draw(3, 1, 4, 8, 8), torch.tensor([500]), draw(1, 1, 5, 16)

    def output(**kwargs):
        return pipe.unet(x_t, t, embeds, **kwargs).sample

    full = output()
    half = output(cross_attention_kwargs={"scale": 0.5})
    assert (half - full).abs().max() > 1e-4
    pipe.set_adapters("distilled", adapter_weights=0.5)
    assert_close(output(), half, **CLOSE)
    pipe.set_adapters("distilled", adapter_weights=1.0)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    assert_close(output(), half, **CLOSE)


@torch.no_grad()
def test_whole_network_loads_from_pretrained(tmp_path):
    networks = networks_for(denoiser_from_pipeline(tiny.tiny_sd()))
    for parameter in networks.student.parameters():
        parameter.data.add_(0.02 * draw(9, *parameter.shape))
    save_distilled(networks.student, tmp_path, record("sd"))
    x_t, t, embeds = draw(3, 1, 4, 8, 8), torch.tensor([500]), draw(1, 1, 5, 16)
    expected = networks.student(x_t, t, Condition(embeds=embeds))
    assert_close(UNet2DConditionModel.from_pretrained(tmp_path)(x_t, t, embeds).sample, expected, **CLOSE)
    pipe = tiny.tiny_sd()
    sampling = load_distilled(pipe, tmp_path)
    found = run("sd", pipe, pipeline_arguments(sampling, 2))
    trained = sampling.sample(
        networks.student, draw(3, 1, 4, 8, 8), condition_of("sd"), num_steps=2,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert_close(found, trained, rtol=1e-5, atol=1e-5 * trained.abs().max().item())


@pytest.mark.parametrize("fields", [{"kind": "tcd", "gamma": 0.4}, {"kind": "ddim"}, {"boundary": "lcm"}])
@torch.no_grad()
def test_every_kind_of_sampling_is_the_pipelines(fields, tmp_path):
    networks = train_like(tiny.tiny_sd(), LoraSettings(rank=2))
    sampling = record("sd", **fields)
    save_distilled(networks.student, tmp_path, sampling)
    pipe = tiny.tiny_sd()
    load_distilled(pipe, tmp_path)
    found = run("sd", pipe, pipeline_arguments(sampling, 4))
    trained = sampling.sample(
        networks.student, draw(3, 1, 4, 8, 8), condition_of("sd"), num_steps=4,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert_close(found, trained, rtol=1e-4, atol=1e-5 * trained.abs().max().item())


@torch.no_grad()
def test_only_trained_steps_are_taken_also_after_saving_the_pipeline(tmp_path):
    networks = train_like(tiny.tiny_sd(), LoraSettings(rank=2))
    save_distilled(networks.student, tmp_path, record("sd"))
    pipe = tiny.tiny_sd()
    sampling = load_distilled(pipe, tmp_path)
    with pytest.raises(ValueError, match="1, 2, 4 steps, not for 3"):
        run("sd", pipe, {"num_inference_steps": 3, "guidance_scale": 1.0})
    with pytest.raises(ValueError, match="not for 8"):
        pipeline_arguments(sampling, 8)
    with pytest.raises(ValueError, match="trained for the times"):
        pipe.scheduler.set_timesteps(timesteps=[999, 10])
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    again = type(pipe.scheduler).from_pretrained(tmp_path / "scheduler")
    again.set_timesteps(4)
    assert again.timesteps.tolist() == [999, 749, 499, 249]
    assert isinstance(again, LCMScheduler)


def test_files_that_do_not_fit_are_refused(tmp_path):
    networks = train_like(tiny.tiny_sd(), LoraSettings(rank=2))
    with pytest.raises(ValueError, match=r"few_step\.json"):
        load_distilled(tiny.tiny_sd(), tmp_path)
    save_distilled(networks.student, tmp_path, record("sd"))
    with pytest.raises(ValueError, match=r"matches a layer|has not"):
        load_distilled(tiny.tiny_sd3(), tmp_path)
    shallow = tiny.tiny_sd(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    with pytest.raises(ValueError, match="has not"):
        load_distilled(shallow, tmp_path)
    (tmp_path / LORA_NAME).unlink()
    with pytest.raises(ValueError, match="neither"):
        load_distilled(tiny.tiny_sd(), tmp_path)


def test_files_are_whole_and_half_precision_on_request(tmp_path):
    networks = train_like(tiny.tiny_sd(), LoraSettings(rank=2))
    save_distilled(networks.student, tmp_path, record("sd"), dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([LORA_NAME, FEW_STEP_NAME])
    with safe_open(tmp_path / LORA_NAME, "pt") as file:
        assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())  # noqa: SIM118
        assert all(key.startswith("unet.") for key in file.keys())  # noqa: SIM118


@torch.no_grad()
def test_a_second_lora_at_the_same_time(tmp_path):
    unet = tiny.tiny_sd().unet
    add_lora(unet, LoraSettings(rank=2, alpha=2.0, targets=("to_q", "to_v")), "student")
    for parameter in adapter_parameters(unet, "student"):
        parameter += 0.3 * draw(11, *parameter.shape)
    from layton.distillation.distilled import save_lora

    save_lora(unet, tmp_path / "style", name="student")
    networks = train_like(tiny.tiny_sd(), LoraSettings(rank=4))
    save_distilled(networks.student, tmp_path / "distilled", record("sd"))

    pipe = tiny.tiny_sd()
    pipe.load_lora_weights(tmp_path / "style", weight_name=LORA_NAME, adapter_name="style")
    sampling = load_distilled(pipe, tmp_path / "distilled")
    assert set(pipe.get_active_adapters()) == {"style", "distilled"}
    both = run("sd", pipe, pipeline_arguments(sampling, 2))
    pipe.set_adapters(["style", "distilled"], adapter_weights=[0.0, 1.0])
    alone = run("sd", pipe, pipeline_arguments(sampling, 2))
    trained = sampling.sample(
        networks.student, draw(3, 1, 4, 8, 8), condition_of("sd"), num_steps=2,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert_close(alone, trained, rtol=1e-5, atol=1e-5 * trained.abs().max().item())
    assert (both - alone).abs().max() > 1e-3


def test_loaded_once_more_a_student_takes_its_own_place(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks = train_like(tiny.tiny_sd(), LoraSettings(rank=4 + seed))
        save_distilled(networks.student, tmp_path / str(seed), record("sd"))
    pipe, fresh = tiny.tiny_sd(), tiny.tiny_sd()
    for folder in ("0", "1", "1"):
        sampling = load_distilled(pipe, tmp_path / folder)
    load_distilled(fresh, tmp_path / "1")
    assert pipe.get_active_adapters() == ["distilled"]
    arguments = pipeline_arguments(sampling, 2)
    assert_close(run("sd", pipe, arguments), run("sd", fresh, arguments), **CLOSE)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="fused into the network"):
        load_distilled(pipe, tmp_path / "0")


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_a_students_picture_depends_on_prompt_and_seed_alone(kind, tmp_path):
    pipe = small_pipelines.build(kind)
    pipe.vae.register_to_config(shift_factor=0.0)  # which flow pipelines want to be said
    pipe.save_pretrained(tmp_path / "teacher")
    networks = train_like(pipe, LoraSettings(rank=2, targets=("to_q", "to_v")))
    guidance = 3.5 if kind == "flux" else None
    save_distilled(networks.student, tmp_path / "student", record(kind, guidance=guidance))
    drawer = TextToImage.load_student(tmp_path / "teacher", tmp_path / "student", num_steps=2, device="cpu")
    together = drawer(["a star", "a ring"], [1, 2])
    torch.manual_seed(9)  # of the global generator, from which diffusers' flow pipelines let schedulers draw
    alone = drawer(["a ring"], [2])[0]
    assert abs(together[1].astype(int) - alone.astype(int)).max() <= 1
    assert abs(alone.astype(int) - drawer(["a ring"], [3])[0].astype(int)).max() > 1


def test_the_noise_of_tcd_is_the_trained_one(tmp_path):
    pipe = small_pipelines.build("sd")
    pipe.save_pretrained(tmp_path / "teacher")
    networks = train_like(pipe, LoraSettings(rank=2, targets=("to_q", "to_v")))
    drawn = []
    for gamma in (0.0, 0.8):
        save_distilled(networks.student, tmp_path / str(gamma), record("sd", kind="tcd", gamma=gamma))
        drawer = TextToImage.load_student(tmp_path / "teacher", tmp_path / str(gamma), num_steps=4, device="cpu")
        drawn.append(drawer(["a star"], [1])[0].astype(int))
    assert abs(drawn[0] - drawn[1]).max() > 1
