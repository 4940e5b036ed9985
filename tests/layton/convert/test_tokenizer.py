"""A file converts whole or not at all, and what is wrong with it is said tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from distill.denoiser import Condition
from layton.control import LoraSettings
from layton.convert import ConvertError, convert_tokenizer
from layton.convert.released import SDXL_SCHEDULER, SDXL_UNET, SDXL_VAE
from layton.convert.tokenizer import decoder_layout
from layton.ladd import LADD

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}


def convert(path, cut_down, **settings):
    return convert_tokenizer(path, unet_config=cut_down.config["unet"], **{"vae_config": None, **settings})


def problems(path, cut_down, **settings):
    with pytest.raises(ConvertError) as error:
        convert(path, cut_down, **settings)
    assert all(problem in str(error.value) for problem in error.value.problems)
    return error.value.problems


def test_every_wrong_tensor_is_named(cut_down, tmp_path):
    path = cut_down.save(
        tmp_path,
        **{
            "encoder.conv_in.bias": None,
            "decoder.controlnet.conv_in.weight": torch.zeros(5, 4, 3, 3),
            "decoder.unet.base_model.model.conv_out.bias": torch.full((4,), torch.nan),
            "quantize.embedding.weight": torch.zeros(512, 9),
            "post_quant_conv.bias": None,
            "discriminator.weight": torch.zeros(2),
        },
    )
    assert problems(path, cut_down) == (
        "missing encoder.conv_in.bias (32,)",
        "missing post_quant_conv.bias (64,)",
        "unknown discriminator.weight (2,)",
        "mis-shaped decoder.controlnet.conv_in.weight: (5, 4, 3, 3) in the file, (32, 4, 3, 3) expected",
        "not finite decoder.unet.base_model.model.conv_out.bias",
        "mis-shaped quantize.embedding.weight: (512, 9) in the file, (512, 8) expected",
    )


def test_unknown_tensors_can_be_left_out_by_name(cut_down, tmp_path):
    extra = {"loss.a": torch.zeros(2), "loss.b": torch.zeros(2), "lossy": torch.zeros(2)}
    path = cut_down.save(tmp_path, **extra)
    assert problems(path, cut_down, ignore=["loss."]) == ("unknown lossy (2,)",)
    parts = convert(path, cut_down, ignore=["loss.", "lossy"])
    assert {"loss.a", "loss.b", "lossy", "post_quant_conv.bias"} <= set(parts.unused)


def test_usage_statistic_of_llamagen_is_left_out(cut_down, tmp_path):
    path = cut_down.save(tmp_path, **{"quantize.codebook_used": torch.zeros(65536)})
    assert "quantize.codebook_used" in convert(path, cut_down).unused


def test_a_whole_missing_part_is_told(cut_down, tmp_path):
    encoder = {name: None for name in cut_down.state if name.startswith(("encoder.", "quant_conv."))}
    assert "missing encoder.conv_in.weight (128, 3, 3, 3)" in problems(cut_down.save(tmp_path, **encoder), cut_down)
    assert any("missing vae." in line for line in problems(cut_down.save(tmp_path), cut_down, vae_config=VAE))


def test_one_adaptor_of_another_rank_is_told(cut_down, tmp_path):
    name = next(name for name in cut_down.state if name.endswith("to_q.lora_A.default.weight"))
    path = cut_down.save(tmp_path, **{name: torch.zeros(2, 64)})
    assert f"adaptor {name} has rank 2" in problems(path, cut_down)


def test_autoencoder_is_converted_and_saved_in_the_format_of_diffusers(cut_down, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(VAE).eval()
    path = cut_down.save(tmp_path, **{f"vae.{name}": value for name, value in vae.state_dict().items()})
    parts = convert(path, cut_down, vae_config=VAE)
    assert parts.decoder.pixels_per_latent == 2
    parts.save_pretrained(tmp_path / "out", dtype=torch.float16)
    again = AutoencoderKL.from_pretrained(tmp_path / "out" / "vae")
    assert again.config.scaling_factor == 0.5
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(parts.vae.decode(latents).sample, vae.decode(latents).sample)
        torch.testing.assert_close(again.decode(latents).sample, vae.decode(latents).sample, rtol=0.02, atol=0.02)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    assert unet.config.cross_attention_dim == 8


def test_converted_parts_do_not_change_with_the_file(cut_down, tmp_path):
    path = cut_down.save(tmp_path)
    parts = convert(path, cut_down)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    with torch.no_grad():
        torch.testing.assert_close(parts.encoder(cut_down.vq["images"]), cut_down.vq["pre_quant"])


def test_unet_without_adaptors(cut_down, tmp_path):
    renamed = {name: None for name in cut_down.state if name.startswith("decoder.unet.")}
    for name in renamed.copy():
        plain = name.replace("decoder.unet.base_model.model.", "decoder.unet.").replace(".base_layer.", ".")
        if ".lora_" not in name:
            renamed[plain] = cut_down.state[name]
    parts = convert(cut_down.save(tmp_path, **renamed), cut_down)
    assert parts.decoder.lora is None
    other = convert(cut_down.save(tmp_path), cut_down, lora_alpha=0)
    x_t, condition = cut_down.ladd["x_t"], Condition(spatial=cut_down.ladd["codes_embedding"])
    with torch.no_grad():
        plain, silent = (model(x_t, torch.tensor(499), condition) for model in (parts.decoder, other.decoder))
    torch.testing.assert_close(plain, silent)


def test_safetensors_file_and_container_prefix(cut_down, tmp_path):
    path = tmp_path / "released.safetensors"
    save_file({f"model.{name}": value for name, value in cut_down.state.items()}, path)
    parts = convert(path, cut_down, dtype=torch.bfloat16)
    assert {p.dtype for p in parts.decoder.parameters()} == {torch.bfloat16}
    assert parts.quantizer.codebook.dtype == torch.float32
    assert parts.quantizer.codebook.norm(dim=1).sub(1).abs().max() < 1e-6


def test_settings_of_sdxl_have_the_published_sizes():
    """2,567,463,684 and 83,653,863 parameters, and the released adaptors' rank 64, built without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(SDXL_UNET))
        vae = AutoencoderKL.from_config(dict(SDXL_VAE))
        assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
        model = LADD(unet, code_dim=8, scheduler_config=SDXL_SCHEDULER, lora=LoraSettings())
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    layout = decoder_layout(model)
    stem = "decoder.controlnet.controlnet_cond_embedding."
    assert layout[stem + "conv_out.weight"].shape == (320, 256, 3, 3)
    adaptors = sum(slot.shape[0] * slot.shape[1] for name, slot in layout.items() if ".attn1.to_q.lora_" in name)
    assert adaptors > 0 and all(slot.shape[0] == 64 for name, slot in layout.items() if ".lora_A." in name)
