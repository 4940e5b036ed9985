"""Code decoders: one contract for all of them, then what is particular to each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from distill.denoiser import Condition
from layton.control import load_unet
from layton.decoders import ConsistencyDecoder, DiffusionDecoder, LightDecoder, diffusion
from layton.decoders.consistency import HYPER_TIMES, LAYTON_TIMES, sampling_at, time_table
from layton.decoders.difference import Adaptation, adapt, fingerprints, fold_adapters
from layton.folder import class_name, load_tensors, resolve_class
from layton.interface import CodeDecoder
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder, build_autoencoder
from layton.ldm.unet import build_unet
from layton.pixel_decoder import CodeReader, PixelDecoder
from layton.tokenizer import best_decoder

CODE_DIM = 4


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def codes(count: int = 3) -> torch.Tensor:
    return torch.randn(count, CODE_DIM, 2, 2, generator=torch.Generator().manual_seed(1))


def scramble(parameters: list[torch.nn.Parameter], seed: int, std: float = 0.3) -> None:
    """Trained weights in place of zero ones, which would hide the codes and the adaptors."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std, generator=generator)


@pytest.fixture(scope="module")
def ldm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ldm")
    unet = build_unet(latent_channels=4, latent_size=4, block_out_channels=(16, 16), text_width=16)
    unet.save_pretrained(folder / "unet")
    vae = build_autoencoder(latent_channels=4, block_out_channels=(8, 8), sample_size=8)
    vae.save_pretrained(folder / "vae")
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def make_network(ldm: Path, seed: int = 0) -> LADD:
    torch.manual_seed(seed)
    network = LADD.from_pipeline(ldm, code_dim=CODE_DIM, embedding_channels=(8,)).eval()
    scramble(list(network.controlnet.parameters()), seed)
    return network


def make_light(_: Path, seed: int = 0) -> LightDecoder:
    torch.manual_seed(seed)
    return LightDecoder(PixelDecoder(CODE_DIM, 32, 1, 2, fine_width=8, num_fine_blocks=1, patch_size=4)).eval()


def make_other(folder: Path, ldm: Path) -> Path:
    make_light(ldm, seed=5).save_pretrained(folder / "other")
    return folder / "other"


def make_reader(ldm: Path) -> CodeReader:
    return CodeReader(make_light(ldm).network)


def make_diffusion(ldm: Path) -> DiffusionDecoder:
    autoencoder = Autoencoder.from_pretrained(ldm / "vae")
    return DiffusionDecoder(make_network(ldm), autoencoder, latents_per_token=2).eval()


def make_consistency(ldm: Path, adaptation: Adaptation | None = None) -> ConsistencyDecoder:
    network = make_network(ldm)
    record = adapt(network, adaptation or Adaptation())
    scramble(list(record.tensors(network).values()), seed=2, std=0.1)  # type: ignore[arg-type]
    autoencoder = Autoencoder.from_pretrained(ldm / "vae")
    return ConsistencyDecoder(network, autoencoder, latents_per_token=2, difference=record).eval()


def make_told_diffusion(ldm: Path) -> DiffusionDecoder:
    """Stage 1 that listens to the light decoder."""
    decoder = make_diffusion(ldm)
    decoder.network.listen_to(make_reader(ldm))
    scramble(list(decoder.network.controlnet.parameters()), seed=3)
    return DiffusionDecoder(decoder.network, decoder.autoencoder, latents_per_token=2).eval()


def make_straight_consistency(ldm: Path) -> ConsistencyDecoder:
    """Stage 2 with a shortcut from what its stage 1 listens to."""
    network = make_told_diffusion(ldm).network
    record = adapt(network, Adaptation(branch="lora", shortcut=3), base="told_diffusion")
    scramble(list(record.tensors(network).values()), seed=2, std=0.1)  # type: ignore[arg-type]
    autoencoder = Autoencoder.from_pretrained(ldm / "vae")
    return ConsistencyDecoder(network, autoencoder, latents_per_token=2, difference=record).eval()


def make_told_consistency(ldm: Path) -> ConsistencyDecoder:
    """Stage 2 that listens to it, while its stage 1 does not."""
    network = make_network(ldm)
    record = adapt(network, Adaptation(branch="lora"), reader=make_reader(ldm))
    scramble(list(record.tensors(network).values()), seed=2, std=0.1)  # type: ignore[arg-type]
    autoencoder = Autoencoder.from_pretrained(ldm / "vae")
    return ConsistencyDecoder(network, autoencoder, latents_per_token=2, difference=record).eval()


DECODERS: dict[str, Callable[[Path], CodeDecoder]] = {
    "light": make_light,
    "diffusion": make_diffusion,
    "consistency": make_consistency,
    "told_diffusion": make_told_diffusion,
    "told_consistency": make_told_consistency,
    "straight_consistency": make_straight_consistency,
}
"""Every decoder of the library; a new one joins the contract here."""


@pytest.fixture(scope="module", params=list(DECODERS))
def named(request: pytest.FixtureRequest, ldm: Path) -> tuple[str, CodeDecoder]:
    return request.param, DECODERS[request.param](ldm)


@pytest.fixture
def decoder(named: tuple[str, CodeDecoder]) -> CodeDecoder:
    return named[1]


def steps_of(decoder: CodeDecoder) -> tuple[int, ...]:
    return decoder.steps if decoder.steps is not None else (1, 3)


@torch.no_grad()
def test_pictures_have_size_and_range_and_do_not_change(decoder: CodeDecoder) -> None:
    for steps in steps_of(decoder):
        images = decoder.decode(20 * codes(), num_steps=steps)
        assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
        assert -1 <= float(images.min()) < float(images.max()) <= 1
        assert torch.equal(images, decoder.decode(20 * codes(), num_steps=steps))
        assert torch.equal(images, decoder.decode(20 * codes(), num_steps=steps, generator=seeds(0, 0, 0)))


@torch.no_grad()
def test_a_picture_depends_on_its_own_codes_and_noise(decoder: CodeDecoder) -> None:
    steps = steps_of(decoder)[-1]
    together = decoder.decode(codes(), num_steps=steps, generator=seeds(4, 5, 6))
    for index, seed in enumerate((4, 5, 6)):
        alone = decoder.decode(codes()[index][None], num_steps=steps, generator=seeds(seed))
        torch.testing.assert_close(together[index][None], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*decoder.decode(codes(2), num_steps=steps))


@torch.no_grad()
def test_weights_in_half_precision_give_nearly_the_same_pictures(decoder: CodeDecoder) -> None:
    half = copy.deepcopy(decoder).to(torch.bfloat16)
    images, wanted = (each.decode(codes(), generator=seeds(4, 5, 6)) for each in (half, decoder))
    assert images.dtype == torch.float32
    assert float((images - wanted).abs().mean()) < 0.05


@torch.no_grad()
def test_times_are_not_sent_to_a_device_that_may_have_no_float64(ldm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, seen = make_diffusion(ldm), []

    def sampled(
        network: LADD, x_T: torch.Tensor, times: torch.Tensor, *rest: object, **options: object
    ) -> torch.Tensor:
        seen.append(times.device.type)
        return x_T

    monkeypatch.setattr(diffusion, "sample", sampled)
    elsewhere = torch.zeros(1, 4, 2, 2, device="meta")
    decoder.sample(elsewhere, elsewhere, num_steps=3, generator=[])
    assert seen == ["cpu"]  # `distill.samplers.sample` moves them, in a type that the device has


def test_grids_need_not_divide_each_other(ldm: Path) -> None:
    decoder = DiffusionDecoder(make_network(ldm), Autoencoder.from_pretrained(ldm / "vae"), latents_per_token=4 / 3)
    odd = torch.randn(2, CODE_DIM, 3, 3, generator=torch.Generator().manual_seed(1))
    assert decoder.decode(odd, num_steps=1).shape == (2, 3, 8, 8)  # 3x3 codes on 4x4 latents of 2 pixels


@torch.no_grad()
def test_only_known_numbers_of_steps(decoder: CodeDecoder) -> None:
    with pytest.raises(ValueError, match="steps"):
        decoder.decode(codes(1), num_steps=0)
    assert decoder.check_steps(None) == decoder.default_steps
    if decoder.steps is not None:
        assert decoder.default_steps in decoder.steps
        unknown = max(decoder.steps) + 1
        trained = ", ".join(map(str, decoder.steps))
        with pytest.raises(ValueError, match=f"trained for {trained} steps, not for {unknown}"):
            decoder.decode(codes(1), num_steps=unknown)


@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same_pictures(named: tuple[str, CodeDecoder], ldm: Path, tmp_path: Path) -> None:
    name, decoder = named
    for needed in decoder.needs:
        DECODERS[needed](ldm).save_pretrained(tmp_path / needed)
    decoder.save_pretrained(tmp_path / name)
    again = resolve_class(class_name(type(decoder)), CodeDecoder).from_pretrained(tmp_path / name, ldm=ldm)
    assert (again.steps, again.default_steps, again.needs) == (decoder.steps, decoder.default_steps, decoder.needs)
    for steps in steps_of(decoder):
        expected = decoder.decode(codes(), num_steps=steps)
        torch.testing.assert_close(again.decode(codes(), num_steps=steps), expected, rtol=1e-5, atol=1e-5)


def test_files_name_the_public_class(decoder: CodeDecoder) -> None:
    assert class_name(type(decoder)) == f"layton.decoders.{type(decoder).__name__}"


@torch.no_grad()
def test_decoders_through_a_diffusion_model_say_when_it_is_missing(decoder: CodeDecoder, tmp_path: Path) -> None:
    decoder.save_pretrained(tmp_path / "decoder")
    for base in ("diffusion", "told_diffusion"):
        (tmp_path / base).mkdir()
    if decoder.needs_ldm:
        with pytest.raises(ValueError, match="latent diffusion model"):
            type(decoder).from_pretrained(tmp_path / "decoder")  # type: ignore[attr-defined]


@torch.no_grad()
def test_scale_is_used_once_and_given_back(decoder: CodeDecoder) -> None:
    steps = steps_of(decoder)[-1]
    if not decoder.needs_ldm:
        with pytest.raises(ValueError, match="scale"):
            decoder.decode(codes(), conditioning_scale=1.0)
        return
    before = decoder.decode(codes(2), num_steps=steps)
    silent = decoder.decode(codes(2), num_steps=steps, conditioning_scale=0.0)
    torch.testing.assert_close(silent[0], silent[1])  # without codes only the noise is left, and that is the same
    assert torch.equal(decoder.decode(codes(2), num_steps=steps), before)


@torch.no_grad()
@pytest.mark.parametrize("make", [make_diffusion, make_consistency])
def test_seeds_matter_and_steps_are_network_evaluations(make: Callable[[Path], CodeDecoder], ldm: Path) -> None:
    decoder = make(ldm)
    assert not torch.equal(
        decoder.decode(codes(1), num_steps=2), decoder.decode(codes(1), num_steps=2, generator=seeds(1))
    )
    times: list[float] = []
    handle = decoder.network.unet.register_forward_pre_hook(lambda _, inputs: times.append(float(inputs[1][0])))  # type: ignore[union-attr]
    for steps in (1, 2, 3, None):
        times.clear()
        decoder.decode(codes(1), num_steps=steps)
        assert len(times) == (decoder.default_steps if steps is None else steps)
        if isinstance(decoder, ConsistencyDecoder):
            assert tuple(times) == LAYTON_TIMES[steps or 3]
    handle.remove()  # type: ignore[union-attr]


def test_presets_are_the_published_times() -> None:
    assert LAYTON_TIMES[3] == (999, 499, 124)
    assert time_table("hyper") == dict(HYPER_TIMES) == {1: (800.0,)}
    with pytest.raises(ValueError, match="no preset 'fast'"):
        time_table("fast")


@pytest.mark.parametrize("times", [{}, {2: (999.0,)}, {2: (499.0, 999.0)}, {1: (1000.0,)}, {1: (0.0,)}])
def test_times_that_cannot_be(times: dict[int, tuple[float, ...]], ldm: Path) -> None:
    with pytest.raises(ValueError, match=r"times"):
        sampling_at(times, make_network(ldm))


@torch.no_grad()
def test_an_adapted_network_starts_as_its_base(ldm: Path) -> None:
    before = make_diffusion(ldm).decode(codes(), num_steps=3)
    decoder = make_diffusion(ldm)
    adapt(decoder.network, Adaptation(unet="lora", branch="lora"))
    torch.testing.assert_close(decoder.decode(codes(), num_steps=3), before)


@torch.no_grad()
@pytest.mark.parametrize(
    ("adaptation", "share"),
    [
        (Adaptation(unet="lora", branch="lora"), None),
        (Adaptation(unet="frozen", branch="full"), "controlnet."),
        (Adaptation(unet="full", branch="frozen"), "unet."),
    ],
)
def test_only_what_was_trained_is_saved(adaptation: Adaptation, share: str | None, ldm: Path, tmp_path: Path) -> None:
    decoder = make_consistency(ldm, adaptation)
    make_diffusion(ldm).save_pretrained(tmp_path / "diffusion")
    decoder.save_pretrained(tmp_path / "consistency")
    names = load_tensors(tmp_path / "consistency" / "model.safetensors")
    assert all(".lora_" in name if share is None else name.startswith(share) for name in names)
    again = ConsistencyDecoder.from_pretrained(tmp_path / "consistency", ldm=ldm)
    torch.testing.assert_close(again.decode(codes()), decoder.decode(codes()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wrong_base_is_refused_and_a_rounded_one_is_not(dtype: torch.dtype, ldm: Path, tmp_path: Path) -> None:
    base = make_diffusion(ldm)
    base.save_pretrained(tmp_path / "diffusion", dtype=dtype)
    make_consistency(ldm).save_pretrained(tmp_path / "consistency", dtype=dtype)
    rounded = DiffusionDecoder.from_pretrained(tmp_path / "diffusion", ldm=ldm).network
    assert not torch.equal(rounded.controlnet.conv_in.weight, base.network.controlnet.conv_in.weight)
    assert fingerprints(rounded)["unet"] == fingerprints(base.network)["unet"]
    ConsistencyDecoder.from_pretrained(tmp_path / "consistency", ldm=ldm)
    make_diffusion(ldm).save_pretrained(tmp_path / "diffusion", dtype=torch.float32)
    ConsistencyDecoder.from_pretrained(tmp_path / "consistency", ldm=ldm)
    DiffusionDecoder(make_network(ldm, seed=5), base.autoencoder).save_pretrained(tmp_path / "diffusion")
    with pytest.raises(ValueError, match="trained on another 'diffusion' decoder"):
        ConsistencyDecoder.from_pretrained(tmp_path / "consistency", ldm=ldm)


@torch.no_grad()
def test_a_missing_base_is_named(ldm: Path, tmp_path: Path) -> None:
    make_consistency(ldm).save_pretrained(tmp_path / "consistency")
    with pytest.raises(ValueError, match="what differs from the decoder 'diffusion'"):
        ConsistencyDecoder.from_pretrained(tmp_path / "consistency", ldm=ldm)


@torch.no_grad()
def test_a_decoder_that_begins_to_listen_says_the_same_until_it_has_learnt(ldm: Path) -> None:
    plain, told = make_network(ldm), make_network(ldm)
    told.listen_to(make_reader(ldm))
    x_t = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    condition, t = Condition(spatial=codes()), torch.tensor(700.0)
    before = plain(x_t, t, condition)
    assert torch.equal(told(x_t, t, condition), before)
    scramble(list(told.controlnet.parameters()), seed=3)
    assert not torch.allclose(told(x_t, t, condition), before, atol=1e-3)
    assert not any(name.startswith("reader") for name in told.branch_state_dict())
    assert not any(parameter.requires_grad for parameter in told.reader.parameters())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="listens to 'light' itself"):
        adapt(told, Adaptation(), reader=make_reader(ldm))


@torch.no_grad()
def test_codes_are_read_once_for_all_steps_of_a_picture(ldm: Path) -> None:
    decoder = make_told_diffusion(ldm)
    calls: list[int] = []
    decoder.network.reader.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    one, other = codes(), codes().flip(0)
    quick = [decoder.decode(each, num_steps=3) for each in (one, other)]
    assert len(calls) == 2
    for each, wanted in zip((one, other), quick, strict=True):
        slow = [decoder.decode(each[row][None].clone(), num_steps=3, generator=seeds(row)) for row in range(3)]
        torch.testing.assert_close(torch.cat(slow), decoder.decode(each, num_steps=3, generator=seeds(0, 1, 2)))
        assert torch.equal(decoder.decode(each, num_steps=3), wanted)
    reused = one.clone()
    decoder.decode(reused, num_steps=3)
    assert torch.equal(decoder.decode(reused.copy_(other), num_steps=3), quick[1])  # other codes in the same place
    decoder.network.load_state_dict(
        {n: v * 1.5 if n.startswith("reader") else v for n, v in decoder.network.state_dict().items()}
    )
    assert not torch.equal(decoder.decode(reused, num_steps=3), quick[1])
    with torch.enable_grad():
        decoder.network(torch.randn(3, 4, 4, 4), torch.tensor(9.0), Condition(spatial=other))
        before = len(calls)
        decoder.network(torch.randn(3, 4, 4, 4), torch.tensor(9.0), Condition(spatial=other))
    assert len(calls) == before + 1


@torch.no_grad()
def test_what_a_decoder_listens_to_must_be_there_and_be_the_same(ldm: Path, tmp_path: Path) -> None:
    make_diffusion(ldm).save_pretrained(tmp_path / "diffusion")
    decoder = make_told_consistency(ldm)
    assert decoder.needs == ("light", "diffusion")
    decoder.save_pretrained(tmp_path / "consistency")
    with pytest.raises(ValueError, match="listens to the decoder 'light'"):
        ConsistencyDecoder.from_pretrained(tmp_path / "consistency", ldm=ldm)
    make_light(ldm, seed=5).save_pretrained(tmp_path / "light")
    with pytest.raises(ValueError, match="this one's reader"):
        ConsistencyDecoder.from_pretrained(tmp_path / "consistency", ldm=ldm)
    make_light(ldm).save_pretrained(tmp_path / "elsewhere")
    again = ConsistencyDecoder.from_pretrained(tmp_path / "consistency", ldm=ldm, reader=tmp_path / "elsewhere")
    torch.testing.assert_close(again.decode(codes()), decoder.decode(codes()), rtol=1e-5, atol=1e-5)
    whole = make_told_diffusion(ldm)
    ConsistencyDecoder(whole.network, whole.autoencoder, latents_per_token=2).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="learnt by another 'light' decoder"):
        ConsistencyDecoder.from_pretrained(tmp_path / "whole", ldm=ldm)
    make_light(ldm).save_pretrained(tmp_path / "light")
    ConsistencyDecoder.from_pretrained(tmp_path / "whole", ldm=ldm)
    whole.save_pretrained(tmp_path / "stage1")
    with pytest.raises(ValueError, match="learnt by another 'light' decoder"):
        LADD.from_pretrained(tmp_path / "stage1", unet=load_unet(ldm / "unet"), reader=make_other(tmp_path, ldm))
    wide = PixelDecoder(CODE_DIM + 1, 32, 1, 2, fine_width=8, num_fine_blocks=1, patch_size=4)
    with pytest.raises(ValueError, match="reads codes of 5 dimensions, not 4"):
        make_network(ldm).listen_to(CodeReader(wide))


@torch.no_grad()
def test_without_a_base_everything_is_saved(ldm: Path, tmp_path: Path) -> None:
    network = make_network(ldm)
    autoencoder = Autoencoder.from_pretrained(ldm / "vae")
    whole = ConsistencyDecoder(network, autoencoder, sampling=sampling_at("hyper", network)).eval()
    whole.save_pretrained(tmp_path / "consistency")
    again = ConsistencyDecoder.from_pretrained(tmp_path / "consistency", ldm=ldm)
    assert again.sampling.times == ((800.0,),) and again.needs == ()
    assert torch.equal(again.decode(codes()), whole.decode(codes()))


@torch.no_grad()
def test_folded_adapters_come_out_again(ldm: Path) -> None:
    decoder = make_consistency(ldm)
    weight = decoder.network.unet.conv_in.weight.clone()
    apart = decoder.decode(codes())
    fold_adapters(decoder.network)
    torch.testing.assert_close(decoder.decode(codes()), apart, rtol=1e-5, atol=1e-5)
    fold_adapters(decoder.network, fold=False)
    torch.testing.assert_close(decoder.decode(codes()), apart, rtol=1e-5, atol=1e-5)
    assert torch.equal(decoder.network.unet.conv_in.weight, weight)


def test_the_best_decoder_there_is() -> None:
    assert best_decoder(["light", "diffusion", "consistency"]) == "consistency"
    assert best_decoder(["light", "diffusion"]) == "diffusion"
    assert best_decoder(["other", "light"]) == "light"
    assert best_decoder(["other"]) == "other"
    assert best_decoder([]) == ""


def test_temperature_scales_the_first_noise_and_is_saved(ldm: Path, tmp_path: Path) -> None:
    plain = make_diffusion(ldm)
    with pytest.raises(ValueError, match="-1"):
        DiffusionDecoder(plain.network, plain.autoencoder, temperature=-1.0)
    still = DiffusionDecoder(plain.network, plain.autoencoder, latents_per_token=2, temperature=0.0)
    drawn = [still.decode(codes(1), num_steps=3, generator=seeds(number)) for number in (1, 2)]
    torch.testing.assert_close(*drawn)  # nothing is left of the noise
    cool = DiffusionDecoder(plain.network, plain.autoencoder, latents_per_token=2, temperature=0.5)
    cool.save_pretrained(tmp_path)
    again = DiffusionDecoder.from_pretrained(tmp_path, ldm=ldm)
    assert again.temperature == 0.5
    pictures = [each.decode(codes(1), num_steps=3, generator=seeds(1)) for each in (cool, again, plain)]
    torch.testing.assert_close(pictures[0], pictures[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-3)


def test_shifted_times_are_noisier_and_saved(ldm: Path, tmp_path: Path) -> None:
    plain = make_diffusion(ldm)
    with pytest.raises(ValueError, match="0"):
        DiffusionDecoder(plain.network, plain.autoencoder, time_shift=0.0)
    shifted = DiffusionDecoder(plain.network, plain.autoencoder, latents_per_token=2, time_shift=4.0)
    # shares 1, 0.75, 0.5, 0.25 become 1, 12/13, 4/5, 4/7
    wanted = torch.tensor([1.0, 12 / 13, 4 / 5, 4 / 7], dtype=torch.float64) * 1000 - 1
    torch.testing.assert_close(shifted.times(4), wanted)
    assert plain.times(4).tolist() == [999, 749, 499, 249]
    shifted.save_pretrained(tmp_path)
    again = DiffusionDecoder.from_pretrained(tmp_path, ldm=ldm)
    assert again.time_shift == 4.0
    pictures = [each.decode(codes(1), num_steps=3, generator=seeds(1)) for each in (shifted, again, plain)]
    torch.testing.assert_close(pictures[0], pictures[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-3)


@torch.no_grad()
def test_a_shortcut_begins_at_nothing_and_is_kept_with_the_network(ldm: Path, tmp_path: Path) -> None:
    network = make_told_diffusion(ldm).network
    x_t, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 400.0]), Condition(spatial=codes(2))
    before = network(x_t, t, condition)
    record = adapt(network, Adaptation(unet="frozen", branch="frozen", shortcut=3))
    assert torch.equal(network(x_t, t, condition), before)
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained == list(record.tensors(network))
    assert trained == ["shortcut.0.weight", "shortcut.1.weight", "shortcut.1.bias"]
    scramble(list(network.shortcut.parameters()), seed=1)  # type: ignore[union-attr]
    after = network(x_t, t, condition)
    assert not torch.allclose(after, before, atol=1e-3)
    network.save_pretrained(tmp_path / "network", include_unet=True)
    make_light(ldm).save_pretrained(tmp_path / "light")
    torch.testing.assert_close(LADD.from_pretrained(tmp_path / "network")(x_t, t, condition), after)
    with pytest.raises(ValueError, match="needs a reader"):
        adapt(make_network(ldm), Adaptation(shortcut=3))
    with pytest.raises(ValueError, match="shortcut must be"):
        Adaptation(shortcut=-1)
