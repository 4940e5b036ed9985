"""LlamaGen's convolutional tokenizer: shape, names of the released files, and the way to disk and back."""

from __future__ import annotations

import pytest
import torch

from layton.convert import ConvertError, convert_vqgan
from layton.convert.llamagen import official_name, vqgan_layout
from layton.vqgan import VQGANDecoder, VQGANEncoder
from layton.vqgan_decoder import VQGANCodeDecoder

SMALL = {"channels": 32, "multipliers": (1, 2), "num_res_blocks": 1, "z_channels": 16, "code_dim": 4}


def small_pair():
    torch.manual_seed(0)
    return VQGANEncoder(**SMALL).eval(), VQGANDecoder(**SMALL).eval()


def test_shapes_follow_the_downsampling():
    encoder, decoder = small_pair()
    features = encoder(torch.zeros(2, 3, 8, 12))
    assert (encoder.downsample_factor, encoder.code_dim) == (2, 4)
    assert features.shape == (2, 4, 4, 6)
    assert decoder(features).shape == (2, 3, 8, 12)


def test_published_size_of_vq16():
    """72M parameters (arXiv 2406.06525, table 2: encoder, decoder and codebook of VQ-16)."""
    with torch.device("meta"):
        halves = (VQGANEncoder(), VQGANDecoder())
    count = sum(p.numel() for half in halves for p in half.parameters()) + 16384 * 8
    assert round(count / 1e6) == 72
    with torch.device("meta"):
        assert VQGANEncoder(multipliers=(1, 2, 2, 4)).downsample_factor == 8


def test_wrong_sizes_are_refused():
    encoder, _ = small_pair()
    with pytest.raises(ValueError, match="multiples of 2"):
        encoder(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="norm_groups"):
        VQGANEncoder(channels=20)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_encoder_survives_the_disk(dtype, tmp_path):
    encoder, _ = small_pair()
    encoder.save_pretrained(tmp_path, dtype=dtype)
    again = VQGANEncoder.from_pretrained(tmp_path)
    images = torch.randn(1, 3, 8, 8)
    tolerance = {"rtol": 0.0, "atol": 0.0} if dtype is None else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(again(images), encoder(images), **tolerance)


@pytest.mark.parametrize(
    ("ours", "official"),
    [
        ("encoder.down_blocks.4.resnets.0.conv_shortcut.bias", "encoder.conv_blocks.4.res.0.nin_shortcut.bias"),
        ("encoder.down_blocks.0.downsamplers.0.conv.bias", "encoder.conv_blocks.0.downsample.conv.bias"),
        ("encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid.1.proj_out.weight"),
        ("encoder.mid_block.attentions.0.group_norm.bias", "encoder.mid.1.norm.bias"),
        ("decoder.up_blocks.0.attentions.2.to_k.bias", "decoder.conv_blocks.0.attn.2.k.bias"),
        ("decoder.up_blocks.1.upsamplers.0.conv.bias", "decoder.conv_blocks.1.upsample.conv.bias"),
        ("decoder.conv_norm_out.weight", "decoder.norm_out.weight"),
        ("quant_conv.weight", "quant_conv.weight"),
    ],
)
def test_official_names(ours, official):
    assert official_name(ours) == official


def llamagen_state():
    encoder, decoder = small_pair()
    own = encoder.state_dict() | decoder.state_dict()
    layout = vqgan_layout("encoder", encoder) | vqgan_layout("decoder", decoder)
    state = {name: own[place.key].reshape(place.file_shape) for name, place in layout.items()}
    return state | {"quantize.embedding.weight": torch.randn(6, 4), "quantize.codebook_used": torch.zeros(65536)}


def test_llamagen_file_converts_with_its_shape_read_off(tmp_path):
    encoder, decoder = small_pair()
    torch.save({"model": llamagen_state()}, tmp_path / "vq.pt")
    converted = convert_vqgan(tmp_path / "vq.pt")
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        features = converted.encoder(images)
        torch.testing.assert_close(features, encoder(images))
        torch.testing.assert_close(converted.decoder(features), decoder(features))
    assert converted.quantizer.codebook.shape == (6, 4)
    assert converted.encoder.config == encoder.config


def test_llamagen_file_that_lacks_a_tensor_is_refused(tmp_path):
    state = llamagen_state()
    del state["decoder.mid.1.q.weight"]
    torch.save(state, tmp_path / "vq.pt")
    with pytest.raises(ConvertError) as error:
        convert_vqgan(tmp_path / "vq.pt")
    assert error.value.problems == ("missing decoder.mid.1.q.weight (64, 64, 1, 1)",)


def test_gradients_pass_the_code_decoder():
    decoder = VQGANCodeDecoder(
        code_dim=4, channels=16, multipliers=(1, 1), num_res_blocks=1, z_channels=16, norm_groups=8
    )
    embeddings = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    decoder.decode(embeddings).square().mean().backward()
    assert embeddings.grad.abs().sum() > 0
