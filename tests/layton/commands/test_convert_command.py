"""`layton convert`: what it writes loads and decodes; what does not fit is listed and nothing is written."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from command_tools import Run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layton.convert.llamagen import VQGANShape, codebook_layout, vqgan_layout
from layton.decoders import ConsistencyDecoder
from layton.ldm.autoencoder import build_autoencoder
from layton.tokenizer import LaytonTokenizer
from layton.vqgan_decoder import VQGANCodeDecoder

FIXTURES = Path(__file__).parents[2] / "fixtures" / "parity"


def llamagen_state() -> tuple[dict[str, Tensor], nn.Module, nn.Module]:
    torch.manual_seed(0)
    shape = VQGANShape(code_dim=4, channels=32, multipliers=(1, 1), num_res_blocks=1, z_channels=32)
    encoder, decoder = shape.encoder(), shape.decoder()
    state: dict[str, Tensor] = {}
    for part, module in (("encoder", encoder), ("decoder", decoder)):
        for name, slot in vqgan_layout(part, module).items():
            state[name] = module.state_dict()[slot.key].reshape(slot.file_shape).clone()
    (name,) = codebook_layout({}, code_dim=4)
    state[name] = torch.randn(64, 4)
    return state, encoder, decoder


def test_llamagen_checkpoint_becomes_a_tokenizer(run: Run, tmp_path: Path) -> None:
    state, encoder, decoder = llamagen_state()
    torch.save({"model": state}, tmp_path / "vq.pt")
    out = tmp_path / "out"
    run("convert", tmp_path / "vq.pt", "--out", out, "--image-size", 16)
    model = LaytonTokenizer.from_pretrained(out)
    assert isinstance(model.decoder(), VQGANCodeDecoder)
    assert (model.num_tokens, model.vocab_size) == (64, 64)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        codes = model.quantizer.encode(encoder.eval()(images))
        pixels = decoder.eval()(model.quantizer.codes_to_embeddings(codes, (8, 8))).clamp(-1, 1)
    assert torch.equal(model.encode(images), codes)
    torch.testing.assert_close(model.decode(codes), pixels)
    with pytest.raises(ValueError, match="1 steps"):
        model.decode(codes, num_steps=2)
    with pytest.raises(ValueError, match="no conditioning scale"):
        model.decode(codes, conditioning_scale=0.5)


def test_problems_are_listed_and_nothing_is_written(run: Run, fails: Run, tmp_path: Path) -> None:
    state, _, _ = llamagen_state()
    broken = {name: value for name, value in state.items() if not name.startswith("decoder.conv_blocks.")}
    save_file(broken, tmp_path / "vq.safetensors")
    out = tmp_path / "out"
    lines = run("convert", tmp_path / "vq.safetensors", "--out", out, status=1).splitlines()
    assert lines[0].startswith("layton: cannot convert ")
    assert "missing decoder.conv_blocks.0" in lines[1]
    assert len(lines) == 12
    assert lines[-1].endswith("more")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 nothing")
    assert "not a whole file" in run("convert", tmp_path / "cut.pt", "--out", out, status=1)
    assert "no such file" in run("convert", tmp_path / "none.pt", "--out", out, status=1)
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, tmp_path / "gpt.safetensors")
    assert "neither a LaCTok" in run("convert", tmp_path / "gpt.safetensors", "--out", out, status=1)
    assert [path.name for path in tmp_path.iterdir() if path.suffix in ("", ".part")] == []
    out.mkdir()
    fails("convert", tmp_path / "vq.safetensors", "--out", out, status=2)


@pytest.mark.parametrize("lora", ["keep", "merge"])
def test_released_layout_becomes_a_tokenizer(run: Run, tmp_path: Path, lora: str) -> None:
    restore = runpy.run_path(str(FIXTURES / "seeded.py"))["restore"]
    state = restore("vq") | {f"decoder.{name}": value for name, value in restore("ladd").items()}
    torch.save({"model": state}, tmp_path / "released.pth")
    unet = tmp_path / "unet.json"
    unet.write_text(json.dumps(json.loads((FIXTURES / "ladd_config.json").read_text())["unet"]))
    options = ["convert", tmp_path / "released.pth", "--out", tmp_path / "out", "--unet-config", unet]
    options += ["--image-size", 64, "--output-size", 16, "--lora", lora]
    assert "give the folder of one as --vae" in run(*options, status=1)
    torch.manual_seed(0)
    build_autoencoder(latent_channels=4, block_out_channels=(8, 8)).save_pretrained(tmp_path / "vae")
    run(*options, "--vae", tmp_path / "vae")
    model = LaytonTokenizer.from_pretrained(tmp_path / "out")
    recorded = load_file(FIXTURES / "vq_io.safetensors")
    images = recorded["images"]
    features = model.encoder(images)
    torch.testing.assert_close(features, recorded["pre_quant"], rtol=1e-4, atol=1e-5)
    decoder = model.decoder(None)
    assert isinstance(decoder, ConsistencyDecoder)
    assert decoder.latents_per_token == 2
    assert (decoder.network.lora is None) == (lora == "merge")
    pictures = model.decode(torch.zeros(1, 16, dtype=torch.int64), num_steps=1)
    assert pictures.shape == (1, 3, 16, 16)
    assert decoder.sampling.times == ((999.0,), (999.0, 499.0), (999.0, 499.0, 124.0))
    assert (decoder.sampling.kind, decoder.default_steps) == ("renoise", 3)
    with pytest.raises(ValueError, match="trained for 1, 2, 3 steps, not for 25"):
        model.decode(torch.zeros(1, 16, dtype=torch.int64), num_steps=25)


def test_a_llamagen_file_gives_its_averaged_weights_and_refuses_what_does_nothing(
    run: Run, fails: Run, tmp_path: Path
) -> None:
    state, _, _ = llamagen_state()
    averaged = {name: value * 2 if name.startswith("decoder.") else value for name, value in state.items()}
    file = tmp_path / "vq.pt"
    torch.save({"model": state, "ema": {**averaged, "extra.weight": torch.zeros(2)}}, file)
    words = ["convert", file, "--image-size", 16, "--out"]
    assert "extra.weight" in run(*words, tmp_path / "no", status=1)
    run(*words, tmp_path / "out", "--ignore", "extra.")
    tensors = LaytonTokenizer.from_pretrained(tmp_path / "out").decoder().network.state_dict()
    largest = max(float(value.abs().max()) for value in tensors.values())
    assert largest == max(float(value.abs().max()) for name, value in averaged.items() if name.startswith("decoder."))
    for option in (("--lora", "merge"), ("--output-size", 512), ("--vae", tmp_path)):
        assert option[0] in fails(*words, tmp_path / "no", *option, status=2)
    for size in (0, -16):
        fails("convert", file, "--image-size", size, "--out", tmp_path / "no", status=2)
    assert not (tmp_path / "no").exists()
