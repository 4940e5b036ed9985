"""Converted weights give what the official code gave: same codes, same features, same predictions, same latents."""

from __future__ import annotations

import pytest
import torch

from distill.denoiser import Condition
from layton.convert import ConvertedParts, convert_tokenizer
from layton.decoders.consistency import sampling_at
from layton.ladd import LADD
from layton.quantizers import CosineVQ
from layton.vqgan import VQGANEncoder


def assert_relative(actual, expected, tolerance=1e-4):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.fixture(params=["keep", "merge"])
def parts(recorded, request, tmp_path) -> ConvertedParts:
    path = recorded.save(tmp_path)
    return convert_tokenizer(path, lora=request.param, unet_config=recorded.config["unet"], vae_config=None)


@pytest.fixture
def three_evaluations(monkeypatch):
    """The decoder as the command writes it, with the noises that the official sampler drew."""

    @torch.no_grad()
    def decode(network, recorded, timesteps):
        noises = iter([recorded.ladd["renoise_1"], recorded.ladd["renoise_2"]])
        monkeypatch.setattr("distill.samplers.gaussian_like", lambda x, generator: next(noises).to(x))
        condition = Condition(spatial=recorded.ladd["codes_embedding"])
        sampling = sampling_at({len(timesteps): timesteps}, network)
        x_T, unused = recorded.ladd["init_noise"], torch.Generator()
        return sampling.sample(network, x_T, condition, num_steps=len(timesteps), generator=unused)

    return decode


def test_converted_tokenizer_computes_what_the_official_one_did(parts, recorded, three_evaluations):
    assert parts.timesteps == tuple(recorded.config["timesteps"])
    assert parts.decoder.conditioning_scale == recorded.config["condition_scale"]
    with torch.no_grad():
        features = parts.encoder(recorded.vq["images"])
        assert_relative(features, recorded.vq["pre_quant"])
        codes = parts.quantizer.encode(features)
        assert torch.equal(codes, recorded.vq["codes"])
        assert_relative(parts.quantizer.codes_to_embeddings(codes, (4, 4)), recorded.vq["quantized"])
        condition = Condition(spatial=recorded.ladd["codes_embedding"])
        prediction = parts.decoder(recorded.ladd["x_t"], torch.tensor(499), condition)
    assert_relative(prediction, recorded.ladd["eps_at_t499_scale0.8"])
    latent = three_evaluations(parts.decoder, recorded, parts.timesteps)
    assert_relative(latent, recorded.ladd["decoded_latent"])


def test_saved_parts_load_with_the_same_outputs(cut_down, tmp_path, three_evaluations):
    parts = convert_tokenizer(cut_down.save(tmp_path), unet_config=cut_down.config["unet"], vae_config=None)
    parts.save_pretrained(tmp_path / "out")
    encoder = VQGANEncoder.from_pretrained(tmp_path / "out" / "encoder")
    quantizer = CosineVQ.from_pretrained(tmp_path / "out" / "quantizer")
    decoder = LADD.from_pretrained(tmp_path / "out" / "decoder")
    with torch.no_grad():
        assert torch.equal(quantizer.encode(encoder(cut_down.vq["images"])), cut_down.vq["codes"])
    latent = three_evaluations(decoder, cut_down, parts.timesteps)
    assert_relative(latent, cut_down.ladd["decoded_latent"])


def test_alpha_of_the_adaptors_matters(cut_down, tmp_path, three_evaluations):
    """The file does not hold alpha: taking it equal to the rank, as many tools do, gives another model."""
    unet_config = cut_down.config["unet"]
    parts = convert_tokenizer(cut_down.save(tmp_path), lora_alpha=4, unet_config=unet_config, vae_config=None)
    latent = three_evaluations(parts.decoder, cut_down, parts.timesteps)
    assert (latent - cut_down.ladd["decoded_latent"]).abs().max() > 1e-2
