"""`LaytonTokenizer`: borders, sizes, files, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from layton import assets
from layton.data.images import load_image, to_tensor
from layton.decoders import LightDecoder
from layton.encoder import ViTEncoder
from layton.folder import resolve_class
from layton.ldm.cache import load_code_parts
from layton.pixel_decoder import PixelDecoder
from layton.quantizers import CosineVQ
from layton.tasks.tokenizer import TokenizerTask
from layton.tokenizer import EncodedImages, LaytonTokenizer
from layton.vqgan import VQGANEncoder


def tiny(code_dim: int = 4, **decoders: LightDecoder) -> LaytonTokenizer:
    torch.manual_seed(0)
    encoder = ViTEncoder(code_dim=4, width=32, depth=1, num_heads=2, patch_size=8, stem_width=8)
    quantizer = CosineVQ(vocab_size=64, code_dim=code_dim, start_points=0)
    quantizer.set_codebook(F.normalize(torch.randn(64, code_dim), dim=-1))
    light = LightDecoder(PixelDecoder(4, 32, 1, 2, fine_width=8, num_fine_blocks=1, patch_size=8))
    return LaytonTokenizer(encoder, quantizer, {"light": light, **decoders}, image_size=32).eval()


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_shapes_ranges_and_types() -> None:
    model = tiny()
    codes = model.encode(torch.rand(2, 3, 50, 70) * 2 - 1)
    assert (codes.shape, codes.dtype) == ((2, 16), torch.int64)
    assert 0 <= int(codes.min()) <= int(codes.max()) < model.vocab_size
    assert model.decode(codes).shape == (2, 3, 32, 32)
    assert model.reconstruct(torch.zeros(1, 3, 100, 100)).shape == (1, 3, 100, 100)


def test_a_tokenizer_in_half_precision_still_works() -> None:
    model, images = tiny(), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = model.encode(images)
    pictures = model.decode(codes)
    half = model.to(torch.bfloat16)
    assert half.encode(images).dtype == torch.int64
    assert float((half.encode(images) == codes).float().mean()) > 0.6
    assert half.decode(codes).dtype == torch.float32
    assert float((half.decode(codes) - pictures).abs().mean()) < 0.05


def test_encoding_multiplies_in_float32_and_leaves_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, model, seen = torch.backends.cudnn, tiny(), []
    settings = lambda: (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic)  # noqa: E731
    monkeypatch.setattr(cudnn, "deterministic", True)
    model.encoder.register_forward_hook(lambda *_: seen.append(settings()))
    before = settings()
    model.encode(torch.zeros(1, 3, model.image_size, model.image_size))
    assert seen == [(False, *before[1:])] and settings() == before


@pytest.mark.parametrize("policy", ["crop", "pad", "resize"])
def test_sizes_come_back(policy: str) -> None:
    model, images = tiny(), [picture(*size) for size in ((40, 20), (1, 1), (32, 32), (3, 200))]
    results = model.decode_images(model.encode_images(images, policy=policy))
    for image, result in zip(images, results, strict=True):
        side = min(image.size)
        assert result.size == ((side, side) if policy == "crop" else image.size)


def test_some_of_the_encoded_images_are_taken_alone() -> None:
    model = tiny()
    images = [picture(40, 20), picture(20, 40), picture(30, 30)]
    encoded = model.encode_images(images, policy="resize")
    assert len(encoded) == 3 and [len(encoded[1:]), len(encoded[-1]), len(encoded[3:])] == [2, 1, 0]
    assert [image.size for image in model.decode_images(encoded[1:])] == [(20, 40), (30, 30)]
    assert torch.equal(encoded[-1].codes, encoded.codes[2:]) and encoded[-1].geometries == encoded.geometries[2:]
    with pytest.raises(IndexError):
        encoded[3]


def test_codes_alone_are_squares_in_any_type_of_integers() -> None:
    model = tiny()
    encoded = model.encode_images([picture(40, 20)], policy="resize")
    (square,) = model.decode_images(encoded.codes.to(torch.uint16))  # as token datasets keep them
    assert square.size == (32, 32)
    assert np.array_equal(np.asarray(square), np.asarray(model.decode_images(encoded.codes)[0]))
    with pytest.raises(ValueError, match="codes must be in"):
        model.decode_images(torch.full((1, 16), 60_000, dtype=torch.uint16))


def test_opened_images_are_read_as_files_are(tmp_path: Path) -> None:
    model, grey = tiny(), picture(40, 20).convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(40, 20).save(tmp_path / "turned.jpg", exif=turned)
    clear = picture(40, 20).convert("RGBA")
    clear.putalpha(grey)
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for file in sorted(tmp_path.iterdir()):
        with Image.open(file) as opened:
            assert model.encode_images([opened]).codes.equal(model.encode_images([load_image(file)]).codes), file.name


def test_images_that_are_none_are_refused() -> None:
    model = tiny()
    good = torch.zeros(1, 3, 32, 32)
    for bad in (good[0], good[:, :1], good + 2, torch.full_like(good, torch.nan), good * torch.inf):
        with pytest.raises(ValueError, match="images must"):
            model.encode(bad)
    with pytest.raises(ValueError, match="no images"):
        model.encode_images([])
    with pytest.raises(ValueError, match="square"):
        model.reconstruct(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match="policy"):
        model.encode(torch.zeros(1, 3, 32, 40), policy="stretch")


def test_codes_that_are_none_are_refused_before_any_network_runs() -> None:
    model = tiny()
    model.decoder().network.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    good = torch.zeros(1, 16, dtype=torch.int64)
    bad = [good - 1, good + 64, good.float(), good[:, :-1], good[0], good.repeat(1, 2), good + 2**40]
    for codes in bad:
        with pytest.raises(ValueError, match="codes"):
            model.decode(codes)
    with pytest.raises(ValueError, match="no decoder 'other'; there are light"):
        model.decode(good, decoder="other")


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    again = LaytonTokenizer.from_pretrained(tmp_path)
    image = [picture(32, 32)]
    assert torch.equal(again.encode_images(image).codes, model.encode_images(image).codes)
    assert again.fingerprint() == model.fingerprint()
    assert not again.training
    codes = model.encode_images(image).codes
    assert torch.equal(again.decode(codes), model.decode(codes))
    assert isinstance(model.encode_images(image), EncodedImages)
    half = tmp_path / "half"
    model.save_pretrained(half, dtype=torch.float16)
    assert LaytonTokenizer.from_pretrained(half).fingerprint() == model.fingerprint()


def test_without_decoders_it_encodes(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    bare = LaytonTokenizer.from_pretrained(tmp_path, decoders=[])
    image = [picture(32, 32)]
    assert torch.equal(bare.encode_images(image).codes, model.encode_images(image).codes)
    with pytest.raises(ValueError, match="there are none"):
        bare.decode(torch.zeros(1, 16, dtype=torch.int64))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="4-d features, quantizer takes 8-d"):
        tiny(code_dim=8)
    model = tiny()
    with pytest.raises(ValueError, match="not a multiple of 8"):
        LaytonTokenizer(model.encoder, model.quantizer, {}, image_size=30)
    with pytest.raises(ValueError, match="no decoder 'none'"):
        LaytonTokenizer(model.encoder, model.quantizer, dict(model.decoders), image_size=32, default_decoder="none")


def test_classes_in_files_are_checked_before_anything_is_imported(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("os.system", "antigravity.Fly", "laytonevil.X", "layton.cli.main", "layton.nowhere.X"):
        path.write_text(json.dumps({**config, "encoder": name}))
        with pytest.raises(ValueError, match=r"not allowed|no class|is no ImageEncoder"):
            LaytonTokenizer.from_pretrained(tmp_path)
    assert "antigravity" not in sys.modules
    assert resolve_class("torch.nn.modules.linear.Linear", torch.nn.Module, ["torch."]) is torch.nn.Linear


class OwnVQ(CosineVQ):
    """A user's."""


class OwnEncoder(ViTEncoder):
    """Likewise."""


class OwnVQGAN(VQGANEncoder):
    """Likewise."""


class OwnDecoder(PixelDecoder):
    """Likewise."""


@pytest.mark.parametrize("kind", ["vit", "vqgan"])
def test_what_a_run_of_own_classes_exports_is_a_tokenizer_for_later_stages(kind: str, tmp_path: Path) -> None:
    vit = {"width": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "stem_width": 8}
    vqgan = {"channels": 8, "multipliers": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 8, "norm_groups": 4}
    encoder = OwnEncoder(code_dim=4, **vit) if kind == "vit" else OwnVQGAN(code_dim=4, **vqgan)
    task = TokenizerTask(
        encoder,
        OwnVQ(vocab_size=64, code_dim=4, start_points=0),
        OwnDecoder(4, 32, 1, 2, fine_width=8, num_fine_blocks=1, patch_size=8),
        optimizer=torch.optim.AdamW,
    )
    task.image_size = 32
    task.export(tmp_path)
    again = LaytonTokenizer.from_pretrained(tmp_path)
    assert type(again.decoders["light"].network) is OwnDecoder and type(again.encoder) is type(encoder)
    assert [type(part) for part in load_code_parts(tmp_path)] == [type(encoder), OwnVQ]
    assert task.quantizer.train()(torch.randn(1, 4, 4, 4)).codes.shape == (1, 16)


def test_a_tokenizer_of_parts_in_training_leaves_them_learning() -> None:
    model = tiny()
    quantizer, before = model.quantizer.train(), model.quantizer.codebook.clone()
    quantizer(torch.randn(1, 4, 8, 8))
    assert not torch.equal(quantizer.codebook, before)


def test_an_own_quantizer_comes_back_where_it_is_allowed(tmp_path: Path) -> None:
    model = tiny()
    own = OwnVQ(vocab_size=64, code_dim=4, start_points=0)
    own.set_codebook(model.quantizer.codebook)
    LaytonTokenizer(model.encoder, own, {}, image_size=32).save_pretrained(tmp_path)
    again = LaytonTokenizer.from_pretrained(tmp_path, allow=[f"{__name__}."])
    assert type(again.quantizer) is OwnVQ and again.fingerprint() == own.fingerprint()
    config = tmp_path / "config.json"  # as it would be read where nobody has imported the class
    config.write_text(config.read_text().replace(__name__, "somewhere.else"))
    with pytest.raises(ValueError, match="not allowed"):
        LaytonTokenizer.from_pretrained(tmp_path)


def test_missing_folders_and_decoders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder nor an embedded model"):
        LaytonTokenizer.from_pretrained("maxi")
    with pytest.raises(ValueError, match="neither a folder nor an embedded model"):
        assets.resolve("../layton")
    with pytest.raises(ValueError, match="not a saved part"):
        LaytonTokenizer.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no decoder 'other'"):
        LaytonTokenizer.from_pretrained(tmp_path, decoders=["other"])


def test_importing_the_package_and_the_command_line_is_light() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'lightning', 'timm', 'torchmetrics'}"
    code = f"import sys, layton, layton.cli; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603


def test_a_saved_tokenizer_comes_with_the_diffusion_model_of_its_decoders(tmp_path: Path) -> None:
    names = ["light", "consistency", "diffusion"]
    model = LaytonTokenizer.from_pretrained("mini", decoders=names)
    model.save_pretrained(tmp_path / "copy")
    copy = LaytonTokenizer.from_pretrained(tmp_path / "copy", decoders=names)
    codes = torch.zeros(1, model.num_tokens, dtype=torch.long)
    assert torch.equal(copy.decode(codes), model.decode(codes))
    (tmp_path / "copy/ldm/unet/config.json").unlink()
    with pytest.raises(ValueError, match="holds no UNet"):
        LaytonTokenizer.from_pretrained(tmp_path / "copy", decoders=names)


def test_a_compiled_part_is_not_saved_as_what_cannot_be_loaded(tmp_path: Path) -> None:
    model = tiny()
    model.encoder = torch.compile(model.encoder)
    with pytest.raises(ValueError, match=r"OptimizedModule is no ImageEncoder.*part.compile\(\) does not"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_encoder_learns_through_the_codes_in_eval_mode_too() -> None:
    model = tiny().eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
    features = model.encoder(images)
    quantized = model.quantizer(features)
    assert torch.equal(quantized.codes, model.encode(images))
    (model.decoder("light").decode(quantized.embeddings) - images).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())


def test_what_is_no_picture_is_told() -> None:
    model = tiny()
    size = model.image_size
    with pytest.warns(UserWarning, match=r"in \[-1, 1\], not \[0, 1\]"):
        model.encode(torch.linspace(0, 1, 3 * size * size).view(1, 3, size, size))
    for wrong in ("a.jpg", ["a.jpg"], Image.new("RGB", (8, 8))):
        with pytest.raises(TypeError, match="list of PIL images"):
            model.encode_images(wrong)
    for wrong in (torch.zeros(1, 3, size, size, dtype=torch.uint8), torch.zeros(1, 3, size, size) > 1):
        with pytest.raises(ValueError, match=r"must be floats in \[-1, 1\]"):
            model.encode(wrong)
    with pytest.raises(ValueError, match="policy must be one of"):
        model.encode(torch.zeros(1, 3, size, size), policy="squeeze")
    with pytest.raises(TypeError, match="decode_images takes what encode_images gave"):
        model.decode_images([1, 2])
    with pytest.raises(ValueError, match="reconstruct takes a tensor"):
        model.reconstruct([Image.new("RGB", (8, 8))])
    with pytest.raises(ValueError, match="at least one image"):
        model.decode(torch.zeros(0, model.num_tokens, dtype=torch.long))


def test_bright_pictures_are_not_taken_for_tensors_in_0_to_1() -> None:
    model = tiny()
    levels = np.random.default_rng(0).integers(128, 256, (32, 32, 3), dtype=np.uint8)
    levels[0, 0], levels[0, 1] = 128, 255
    bright = to_tensor(Image.fromarray(levels))
    assert 0 <= bright.min() < 0.1 and bright.max() > 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(bright[None])
