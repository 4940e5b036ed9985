"""The latent diffusion model's parts: latents, vocabulary, and the folder that plain diffusers loads."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_tools import tiny_tokenizer
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from distill import VPSchedule
from layton.assets import resolve
from layton.data.folder import ImageFolderSource
from layton.data.sources import ScenesSource
from layton.data.transforms import Fit, RandomCrop
from layton.ldm.autoencoder import Autoencoder, build_autoencoder, standardise_latents
from layton.ldm.cache import CachedLatents, autoencoder_digest, codes_digest, digest, name_for
from layton.ldm.latent_data import LatentDataModule
from layton.ldm.pipeline import save_pipeline
from layton.ldm.positions import PlaceTeacher, places
from layton.ldm.text import TextConditioner, build_text_encoder, build_tokenizer, tell_places, unread_words
from layton.ldm.unet import build_unet, use_fast_attention
from layton.quantizers import FSQQuantizer
from layton.scenes import caption, render, sample_scene
from layton.scenes.placed import DIAMETER_TOKENS, SQUARE_TOKENS, placed_caption
from layton.tasks import AutoencoderTask, TextToImageTask


def tiny_autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(build_autoencoder(latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4)).eval()


def tiny_unet(text_width: int = 16) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build_unet(
        latent_channels=4, latent_size=8, block_out_channels=(16, 16), text_width=text_width, norm_num_groups=8
    ).eval()


def test_autoencoder_starts_by_passing_colour_through() -> None:
    torch.manual_seed(1)
    images = torch.rand(4, 3, 1, 1).mul(2).sub(1).expand(4, 3, 64, 64)  # flat colours
    latents = tiny_autoencoder().encode(images)
    distances = torch.cdist(latents.flatten(1), latents.flatten(1))
    assert distances[~torch.eye(4, dtype=torch.bool)].min() > 0.05 * latents.flatten(1).norm(dim=1).mean()


def test_a_decoded_image_is_its_own_whatever_lies_beside_it() -> None:
    autoencoder = tiny_autoencoder()
    latents = torch.randn(5, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    together = autoencoder.decode(latents)  # with gradients: as one batch
    assert together.requires_grad and autoencoder.decode(latents[:0]).shape == (0, 3, 24, 16)
    with torch.no_grad():
        images = autoencoder.decode(latents)
        assert all(torch.equal(images[i : i + 1], autoencoder.decode(latents[i : i + 1])) for i in range(5))
        assert autoencoder.decode(latents[:0]).shape == (0, 3, 24, 16)
    torch.testing.assert_close(images, together.detach(), atol=1e-5, rtol=1e-5)


def test_standardised_latents_have_unit_variance_and_decode_to_the_same_images() -> None:
    autoencoder = tiny_autoencoder()
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    latents = autoencoder.encode(images)
    standard = Autoencoder(standardise_latents(autoencoder.model, latents.mean((0, 2, 3)), latents.std((0, 2, 3))))
    assert torch.allclose(standard.encode(images).mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(standard.encode(images).std((0, 2, 3)), torch.ones(4), atol=1e-3)
    inner = lambda x: x[..., 8:-8, 8:-8]  # noqa: E731 (zero padding before the 1x1 convolutions' neighbours differs)
    torch.testing.assert_close(
        inner(standard.decode(standard.encode(images))), inner(autoencoder.decode(latents)), atol=1e-3, rtol=1e-3
    )
    moved = standard.model.encode(images).latent_dist
    torch.testing.assert_close(
        moved.std / autoencoder.model.encode(images).latent_dist.std,
        torch.ones(6, 4, 8, 8) / (latents.std((0, 2, 3))[None, :, None, None]),
        rtol=1e-3,
        atol=1e-3,
    )


def test_an_autoencoder_without_quant_convolutions_gets_one_scale_and_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4}
    scaled = {"scaling_factor": 1.5, "shift_factor": 0.06}  # as of SD3's and FLUX's
    plain = AutoencoderKL(**blocks, **sizes, **scaled, use_quant_conv=False, use_post_quant_conv=False)
    plain.save_pretrained(tmp_path / "vae")
    for decoder_only in (False, True):
        autoencoder = Autoencoder(pretrained=str(tmp_path / "vae"))
        task = AutoencoderTask(autoencoder, optimizer=torch.optim.SGD, decoder_only=decoder_only)
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        task.training_step({"image": images, "caption": [""] * 4, "key": ["a"] * 4}, 0)
        task.export(tmp_path / str(decoder_only))
        found = Autoencoder.from_pretrained(tmp_path / str(decoder_only))
        torch.testing.assert_close(found.reconstruct(images), autoencoder.reconstruct(images), rtol=0, atol=1e-5)
        power = found.encode(images).square().mean().detach()
        assert decoder_only or float(power) == pytest.approx(1, abs=1e-4)


def test_fsq_codes_of_other_levels_are_other_codes(tmp_path: Path) -> None:
    for number, levels in enumerate([(8, 6, 5), (5, 6, 8)]):
        FSQQuantizer(levels=levels).save_pretrained(tmp_path / str(number) / "quantizer")
        (tmp_path / str(number) / "encoder").mkdir()
        save_file({"weight": torch.zeros(1)}, tmp_path / str(number) / "encoder" / "model.safetensors")
    assert codes_digest(tmp_path / "0") != codes_digest(tmp_path / "1")


def test_a_pipeline_learns_on_in_its_own_schedule(tmp_path: Path) -> None:
    place = tmp_path / "other"
    shutil.copytree(resolve("mini", part="ldm"), place)
    file = place / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "epsilon", "beta_end": 0.012}))
    task = TextToImageTask("mini", optimizer=torch.optim.AdamW, pretrained=str(place))
    assert task.denoiser.prediction_type == "eps"
    usual = VPSchedule(beta_end=0.012)
    times = torch.tensor([500.0, 999.0])
    torch.testing.assert_close(
        task.denoiser.schedule.coefficients(times).alpha, usual.coefficients(times).alpha, rtol=1e-5, atol=1e-6
    )
    task.export(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["prediction_type"], config["beta_end"]) == ("epsilon", 0.012)


def test_places_are_tokens_that_begin_alike_where_they_are_near(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(tokenizer, width=32, depth=1)
    text = TextConditioner(tokenizer, encoder)
    before, known = text(["two red stars"]), len(tokenizer)
    tell_places(tokenizer, encoder)
    assert len(tokenizer) == known + len(DIAMETER_TOKENS) + len(SQUARE_TOKENS)
    assert torch.equal(before, text(["two red stars"]))  # other prompts are heard as they were
    tell_places(tokenizer, encoder)  # again: without effect
    assert len(tokenizer) == encoder.config.vocab_size == len(encoder.get_input_embeddings().weight)
    longest = max((placed_caption(sample_scene(seed)) for seed in range(300)), key=len)
    assert 5 * 5 + 1 == len(tokenizer(longest).input_ids) <= tokenizer.model_max_length
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again(longest).input_ids == tokenizer(longest).input_ids
    h7, h8, p16 = (
        encoder.get_input_embeddings().weight[tokenizer(f"<{square}>").input_ids[1]] for square in ("h7", "h8", "p16")
    )
    assert (h7 - h8).norm() < 0.7 * (h7 - p16).norm()


def test_vocabulary_knows_every_text_and_splits_chinese_into_characters() -> None:
    tokenizer = build_tokenizer()
    for text in ("a red star left of a blue circle", "\U0001f642 naïve 漢字 \x00 z", ""):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[1:-1]  # the unknown token is the end token: it must not occur
    chinese = caption(sample_scene(0), language="zh")
    assert len(tokenizer(chinese).input_ids) - 2 == len(chinese)
    words = "a pink circle and a black star"
    assert len(tokenizer(words).input_ids) - 2 == len(words.split())


def test_captions_fit_into_the_prompt() -> None:
    tokenizer = build_tokenizer()
    for seed in range(200):
        for language in ("en", "zh"):
            assert len(tokenizer(caption(sample_scene(seed), language=language)).input_ids) <= 32


def test_plain_attention_equals_the_fused_one() -> None:
    unet = tiny_unet()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 16))
    with torch.no_grad():
        fused = unet(*inputs).sample
        use_fast_attention(unet)
        torch.testing.assert_close(unet(*inputs).sample, fused, atol=1e-5, rtol=1e-4)


def test_attention_is_chosen_where_the_network_is_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, inputs = tiny_unet(), (torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 16))
    use_fast_attention(unet)  # on the CPU, as tasks do before they are moved
    kernel, calls = torch.nn.functional.scaled_dot_product_attention, []
    counted = lambda *args, **options: calls.append(1) or kernel(*args, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        unet(*inputs)
        assert not calls
        unet.to("meta")(*(each.to("meta") for each in inputs))
        assert calls


def test_saved_pipeline_is_loaded_and_sampled_by_diffusers_alone(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(tokenizer, width=16, depth=1, num_heads=2)
    save_pipeline(
        tmp_path / "ldm",
        vae=tiny_autoencoder().model,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=tiny_unet(),
    )
    program = (
        "import sys, torch\n"
        "from diffusers import StableDiffusionPipeline\n"
        "pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "images = pipe('a red star', num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images\n"
        "assert images[0].size == (32, 32), images[0].size\n"
        "assert not any(name.split('.')[0] in ('layton', 'distill', 'generation') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "ldm")], check=True, cwd=tmp_path)  # noqa: S603


def test_text_conditioner_equals_the_pipeline_encoding() -> None:
    tokenizer = build_tokenizer()
    conditioner = TextConditioner(tokenizer, build_text_encoder(tokenizer, width=16, depth=1, num_heads=2)).eval()
    both = conditioner(["a red star", ""])
    assert both.shape == (2, 32, 16)
    torch.testing.assert_close(both[1], conditioner.null(), atol=1e-6, rtol=1e-5)


def test_cached_latents_equal_those_made_directly_and_refuse_another_autoencoder(tmp_path: Path) -> None:
    autoencoder = tiny_autoencoder()
    autoencoder.model.save_pretrained(tmp_path / "vae")
    source = ScenesSource(split="train", length=3, size=64)
    cached = CachedLatents(source, autoencoder=str(tmp_path / "vae"), folder=str(tmp_path / "cache"), batch_size=2)
    sample = cached.sample(2, seed=0)
    image = source.sample(2, seed=0)["image"]
    with torch.no_grad():
        direct = autoencoder.encode(image[None])[0]
    torch.testing.assert_close(sample["latent"].float(), direct, atol=3e-2, rtol=3e-2)  # the cache is made in bfloat16
    assert sample["caption"] == caption(sample_scene(2)) or sample["key"].startswith("scenes/")
    build_autoencoder(latent_channels=4, block_out_channels=(8, 8, 16), norm_num_groups=4).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(ValueError, match="autoencoder"):
        CachedLatents(source, autoencoder=str(tmp_path / "other"), folder=str(tmp_path / "cache"))
    others = {
        "image_shape": ScenesSource(split="train", length=3, size=32),
        "keys": ScenesSource(split="train", length=3, size=64, offset=1),
        "brightness": ScenesSource(split="train", length=3, size=64, transform=RandomCrop(64, shorter_side=192)),
        "content": ScenesSource(split="train", length=3, size=64, chinese=1.0),
    }
    for field, images in others.items():
        with pytest.raises(ValueError, match=field):
            CachedLatents(images, autoencoder=str(tmp_path / "vae"), folder=str(tmp_path / "cache"))


def test_what_latents_are_scaled_by_tells_autoencoders_apart(tmp_path: Path) -> None:
    vae = tiny_autoencoder().model
    found = []
    for number, (scale, shift) in enumerate([(1.0, None), (0.25, None), (0.25, 0.5)]):
        vae.register_to_config(scaling_factor=scale, shift_factor=shift)
        vae.save_pretrained(tmp_path / str(number))
        found.append(autoencoder_digest(tmp_path / str(number)))
        assert digest(tmp_path / str(number)) == found[0]
    assert len(set(found)) == 3


def test_sizes_of_one_autoencoder_have_caches_of_their_own(tmp_path: Path) -> None:
    tiny_autoencoder().model.save_pretrained(tmp_path / "vae")

    def latents(size: int, textures: tuple[str, ...] = ("plain",)) -> torch.Tensor:
        source = ScenesSource(split="train", length=2, size=size, textures=textures)
        data = LatentDataModule(source, autoencoder=str(tmp_path / "vae"), cache=str(tmp_path / "cache"), batch_size=2)
        data.prepare_data()
        sample: torch.Tensor = data.train[0].sample(0, seed=0)["latent"]
        return sample

    small, large, other = latents(64), latents(96), latents(64, ("stripes",))
    assert large.shape[-1] * 2 == small.shape[-1] * 3 and not torch.equal(small, other)
    assert len(list((tmp_path / "cache").glob("latents-*/train-*"))) == 3
    assert torch.equal(latents(64), small)


def test_cached_files_that_changed_are_refused_and_broken_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_autoencoder().model.save_pretrained(tmp_path / "vae")
    (tmp_path / "images").mkdir()
    for number in range(7):
        Image.fromarray(render(sample_scene(number), 64)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "4.png").write_bytes(b"broken")
    (tmp_path / "images" / "2.txt").write_text("a red star")

    def cache() -> CachedLatents:
        source = ImageFolderSource(str(tmp_path / "images"), split=None, transform=Fit(64))
        return CachedLatents(source, autoencoder=str(tmp_path / "vae"), folder=str(tmp_path / "cache"))

    cache()
    told = capsys.readouterr().err
    assert "passed over: " in told and "4.png" in told and "1 broken images" in told
    cache()
    (tmp_path / "images" / "2.txt").write_text("a tan ring")  # as long as before
    with pytest.raises(ValueError, match="content"):
        cache()


def test_mirrored_images_have_caches_of_their_own(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "1.png")
    names = [
        name_for(ImageFolderSource(str(tmp_path), transform=RandomCrop(64, flip=flip), split=None))
        for flip in (0.0, 0.5, 1.0)
    ]
    assert len(set(names)) == 3
    assert name_for(ImageFolderSource(str(tmp_path), transform=Fit(64), split=None)) == names[0]  # as before
    scenes = [name_for(ScenesSource(length=8, size=64, transform=RandomCrop(64, flip=flip))) for flip in (0.0, 1.0)]
    assert scenes[0] != scenes[1]


def test_fresh_captions_of_cached_latents_are_the_sources_own_with_each_seed(tmp_path: Path) -> None:
    tiny_autoencoder().model.save_pretrained(tmp_path / "vae")
    source = ScenesSource(split="train", length=3, size=64, reworded=1.0, related=1.0)
    folders = {"autoencoder": str(tmp_path / "vae"), "folder": str(tmp_path / "cache")}
    kept, fresh = CachedLatents(source, **folders), CachedLatents(source, fresh_captions=True, **folders)
    assert len({kept.sample(1, seed=seed)["caption"] for seed in range(20)}) == 1
    said = [fresh.sample(1, seed=seed)["caption"] for seed in range(20)]
    assert len(set(said)) > 3 and said == [source.sample(1, seed=seed)["caption"] for seed in range(20)]
    assert torch.equal(kept.sample(1, seed=0)["latent"], fresh.sample(1, seed=7)["latent"])


def test_the_vocabulary_is_the_same_each_time_it_is_made() -> None:
    words = ["one red circle", "two blue stars", "three green crosses left of a brown diamond"] * 3
    made = [build_tokenizer(words, vocab_size=800).backend_tokenizer.to_str() for _ in range(4)]
    assert len(set(made)) == 1
    assert len(build_tokenizer(words, vocab_size=800)("three blue stars")["input_ids"]) == 5


def test_cells_of_a_grid_have_places_of_their_own() -> None:
    found = places(16, "cpu")
    assert found.shape == (16, 8)
    assert torch.cdist(found, found).add(torch.eye(16)).min() > 0.1
    assert torch.equal(found[:4, 4:], found[:1, 4:].expand(4, -1))  # row by row: the first four share y
    with pytest.raises(ValueError, match="12"):
        places(12, "cpu")


def test_a_unet_learns_where_its_cells_are_and_where_to_look() -> None:
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(tokenizer, width=16, depth=1)
    tell_places(tokenizer, encoder)
    text = TextConditioner(tokenizer, encoder)
    unet = tiny_unet()
    teacher = PlaceTeacher(unet, tokenizer)
    optimizer = torch.optim.AdamW([*unet.parameters(), *teacher.parameters(), *text.parameters()], lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    prompts = ["red star <40> <c3>", "blue ring <40> <n12>, red star <30> <d4>", "two red stars", ""]
    losses = []
    for _ in range(80):
        teacher.forget()
        unet(torch.randn(4, 4, 8, 8, generator=generator), torch.full((4,), 900), text(prompts))
        found = teacher.losses(text.tokenize(prompts))
        optimizer.zero_grad()
        (found["position"] + found["attention"]).backward()
        optimizer.step()
        losses.append({name: loss.item() for name, loss in found.items()})
    assert losses[0]["position"] > 0.5 and losses[-1]["position"] < 0.5 * losses[0]["position"]
    assert losses[0]["attention"] > 2.0 and losses[-1]["attention"] < 0.5 * losses[0]["attention"]
    with pytest.raises(ValueError, match="kept were 0"):
        teacher.losses(text.tokenize(prompts))
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 900, text([""]))  # what is only drawn is not kept
    with pytest.raises(ValueError, match="kept were 0"):
        teacher.losses(text.tokenize(prompts))
    with pytest.raises(ValueError, match="does not know"):
        PlaceTeacher(tiny_unet(), build_tokenizer())


def test_the_object_of_a_cell_is_the_one_said_to_be_there() -> None:
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(tokenizer, width=16, depth=1)
    tell_places(tokenizer, encoder)
    text = TextConditioner(tokenizer, encoder)
    prompts = ["red star <24> <d2>, blue ring <20> <m14>", "two red stars"]
    tokens = text.tokenize(prompts)
    at = PlaceTeacher(tiny_unet(), tokenizer).object_at(tokens, 256).view(2, 16, 16)
    star, ring = (tokenizer.convert_tokens_to_ids(square) for square in ("<d2>", "<m14>"))
    assert tokens[0, at[0, 1, 3]] == star and tokens[0, at[0, 13, 12]] == ring
    assert at[0, 8, 8] == 0 and (at[1] == -1).all()
    assert int((at[0] == at[0, 1, 3]).sum()) == pytest.approx(math.pi * (0.12 * 16 + 0.7) ** 2, rel=0.3)


@pytest.mark.parametrize("said", [True, False])
def test_codes_are_of_the_tokenizers_size_and_latents_of_the_images(tmp_path: Path, said: bool) -> None:
    """256 tokens of an image of any size (arXiv 2503.08377), in the cache as in `LaytonTokenizer.encode`."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tok")
    if not said:
        (tmp_path / "tok/config.json").unlink()
    build_autoencoder(latent_channels=4, block_out_channels=(8,) * 3, norm_num_groups=4).save_pretrained(
        tmp_path / "vae"
    )
    source = ScenesSource(split="train", length=3, size=2 * tokenizer.image_size)
    folders = {"autoencoder": str(tmp_path / "vae"), "tokenizer": str(tmp_path / "tok")}
    cached = CachedLatents(source, folder=str(tmp_path / "cache"), images="read", **folders)
    sample = cached.sample(1, seed=0)
    assert sample["latent"].shape == (4, 16, 16)
    assert sample["codes"].shape == ((tokenizer.num_tokens,) if said else (4 * tokenizer.num_tokens,))
    if said:
        assert torch.equal(sample["codes"].long(), tokenizer.encode(sample["image"][None])[0])
        small = ScenesSource(split="train", length=3, size=tokenizer.image_size)
        with pytest.raises(ValueError, match=r"code_size|image_shape"):
            CachedLatents(small, folder=str(tmp_path / "cache"), **folders)


def test_large_images_are_worked_on_one_by_one_where_no_gradient_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_autoencoder()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = model.encode(images)
    assert whole.requires_grad, "with gradients a batch stays one"
    seen: list[int] = []
    encode = model.model.encode
    monkeypatch.setattr(model.model, "encode", lambda part: seen.append(len(part)) or encode(part))
    monkeypatch.setattr("layton.ldm.autoencoder._AT_ONCE", 2 * 32 * 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(images), whole)
    assert seen == [2, 2]


def test_half_precision_does_not_reach_the_autoencoder() -> None:
    """SDXL's overflows in float16."""
    model = tiny_autoencoder()
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = model.decode(latents)
    with torch.autocast("cpu", torch.float16):
        assert model.decode(latents).equal(plain) and model.encode(plain).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decode(latents).dtype == torch.bfloat16


def test_words_that_a_model_of_scenes_has_never_read() -> None:
    tokenizer = build_tokenizer()
    assert unread_words(tokenizer, "A photo of the purple elephant, two stars and a cat") == ["elephant", "cat"]
    assert unread_words(tokenizer, "\u4e00\u4e2a\u7ea2\u8272\u7684\u9f99") == ["\u9f99"]
    for seed in range(200):
        assert not unread_words(tokenizer, placed_caption(sample_scene(seed)))
        assert not unread_words(tokenizer, caption(sample_scene(seed), language="zh", variant=seed))
    assert not unread_words(CLIPTokenizer(vocab={f"w{n}": n for n in range(4096)}, merges=[]), "an elephant")
