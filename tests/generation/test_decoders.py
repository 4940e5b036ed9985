"""The alternative decoders: the contract of all decoders, their training from pairs, and the tokenizer's commands."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import laytongen_parts as laytongen
import pytest
import torch
import yaml
from PIL import Image

from distill.adapters import ATTENTION_LORA_TARGETS, LoraSettings
from distill.methods.hipa import HiPA
from distill.methods.one_step import OneStepDistillation
from distill.methods.pairs import TeacherSolver
from distill.methods.reflow import Reflow
from generation.decoders import HiPADecoder, InstaFlowDecoder
from generation.decoders.pairs import DecoderPairs, read_teacher
from generation.decoders.task import BUDGET, OneStepDecoderTask
from generation.generator import save_generator
from layton.cli import main
from layton.control import copy_encoder
from layton.data.cache import CacheMismatchError
from layton.data.images import to_tensor
from layton.data.loader import collate
from layton.data.sources import SampleSource
from layton.decoders import DiffusionDecoder
from layton.decoders.difference import Adaptation
from layton.encoder import ViTEncoder
from layton.folder import class_name, load_tensors
from layton.interface import CodeDecoder
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder, build_autoencoder
from layton.ldm.pipeline import build_scheduler
from layton.ldm.unet import build_unet
from layton.losses.pixel_supervision import PixelSupervision
from layton.metrics.image import psnr, round_to_uint8
from layton.pixel_decoder import PixelDecoder
from layton.quantizers import CosineVQ
from layton.scenes import render, sample_scene, split_seeds
from layton.tokenizer import LaytonTokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
RANK = LoraSettings(rank=2, alpha=2.0)
ATTENTION = Adaptation(unet="lora", branch="lora", lora=LoraSettings(2, 2.0, ATTENTION_LORA_TARGETS))
EVERYWHERE = Adaptation(unet="lora", branch="lora", lora=RANK)
UNGUIDED = TeacherSolver("dpmpp_2m", 4, 1.0)
SIZE = 64  # pixels; 4 tokens and 4 latents along a side


def _contract() -> ModuleType:
    path = Path(__file__).parents[1] / "layton" / "test_decoders.py"
    spec = importlib.util.spec_from_file_location("decoder_contract", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = _contract()
ldm = contract.ldm
decoder = contract.decoder
test_pictures_have_size_and_range_and_do_not_change = contract.test_pictures_have_size_and_range_and_do_not_change
test_a_picture_depends_on_its_own_codes_and_noise = contract.test_a_picture_depends_on_its_own_codes_and_noise
test_only_known_numbers_of_steps = contract.test_only_known_numbers_of_steps
test_saved_and_loaded_it_gives_the_same_pictures = contract.test_saved_and_loaded_it_gives_the_same_pictures
test_scale_is_used_once_and_given_back = contract.test_scale_is_used_once_and_given_back
test_decoders_through_a_diffusion_model_say_when_it_is_missing = (
    contract.test_decoders_through_a_diffusion_model_say_when_it_is_missing
)


def make(kind: type[CodeDecoder], adaptation: Adaptation, folder: Path) -> CodeDecoder:
    network = contract.make_network(folder)
    record = contract.adapt(network, adaptation)
    contract.scramble(list(record.tensors(network).values()), seed=2, std=0.1)
    autoencoder = Autoencoder.from_pretrained(folder / "vae")
    return kind(network, autoencoder, latents_per_token=2, difference=record).eval()  # type: ignore[call-arg]


DECODERS: dict[str, Callable[[Path], CodeDecoder]] = {
    "instaflow": partial(make, InstaFlowDecoder, EVERYWHERE),
    "hipa": partial(make, HiPADecoder, ATTENTION),
}


@pytest.fixture(scope="module", params=list(DECODERS))
def named(request: pytest.FixtureRequest, ldm: Path) -> tuple[str, CodeDecoder]:
    return request.param, DECODERS[request.param](ldm)


def test_files_name_the_public_class(decoder: CodeDecoder) -> None:
    assert class_name(type(decoder)) == f"generation.decoders.{type(decoder).__name__}"


@torch.no_grad()
def test_one_step_is_one_evaluation_at_the_noisiest_time(decoder: CodeDecoder) -> None:
    assert decoder.steps == (1,)
    times: list[float] = []
    handle = decoder.network.unet.register_forward_pre_hook(lambda _, inputs: times.append(float(inputs[1][0])))  # type: ignore[union-attr,operator]
    decoder.decode(contract.codes(1))
    handle.remove()  # type: ignore[union-attr]
    assert times == [999.0]


def test_hipa_is_attention_alone(ldm: Path) -> None:
    with pytest.raises(ValueError, match="attention"):
        make(HiPADecoder, EVERYWHERE, ldm)
    with pytest.raises(ValueError, match="attention"):
        make(HiPADecoder, Adaptation(unet="frozen", branch="full", lora=ATTENTION.lora), ldm)


@pytest.mark.parametrize("name", ["hipa", "instaflow", "instaflow_reflow"])
def test_shipped_runs_stay_in_the_budget(name: str) -> None:
    init = yaml.safe_load((CONFIGS / "mini" / f"{name}.yaml").read_text())["model"]["init_args"]
    lora = init["adaptation"]["lora"]
    settings = LoraSettings(lora["rank"], lora["alpha"], tuple(lora.get("targets", LoraSettings().targets)))
    with torch.device("meta"):
        unet = build_unet()
        branch = copy_encoder(unet, code_dim=8, hidden_channels=(32, 64))
    total = 0
    for network in (unet, branch):
        for path, module in network.named_modules():
            if f".{path}".endswith(tuple(f".{target}" for target in settings.targets)) and hasattr(module, "weight"):
                total += settings.rank * (module.weight[0].numel() + module.weight.shape[0])
    assert 100_000 < total <= BUDGET


class Codes(SampleSource):
    """Six samples as `CachedLatents` gives them, with pictures."""

    def __len__(self) -> int:
        return 6

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {
            "key": f"scenes/{index}",
            "caption": "",
            "latent": torch.zeros(4, 4, 4).half(),
            "codes": torch.randint(32, (16,), generator=generator).to(torch.int16),
            "image": torch.rand(3, SIZE, SIZE, generator=generator) * 2 - 1,
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder with a latent diffusion model and a stage-1 decoder, all tiny."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    build_unet(latent_channels=4, latent_size=4, block_out_channels=(16, 16), text_width=16).save_pretrained(
        root / "ldm/unet"
    )
    vae = build_autoencoder(latent_channels=4, block_out_channels=(8,) * 5, norm_num_groups=4)
    vae.save_pretrained(root / "ldm/vae")
    build_scheduler().save_pretrained(root / "ldm/scheduler")
    network = LADD.from_pipeline(root / "ldm", code_dim=4, embedding_channels=(8,)).eval()
    contract.scramble(list(network.controlnet.parameters()), seed=0)
    encoder = ViTEncoder(code_dim=4, width=16, depth=1, num_heads=2, stem_width=8)
    quantizer = CosineVQ(vocab_size=32, code_dim=4, start_points=0)
    diffusion = DiffusionDecoder(network, Autoencoder(vae))
    LaytonTokenizer(encoder, quantizer, {"diffusion": diffusion}, image_size=SIZE).save_pretrained(root)
    return root


def make_pairs(world: Path, folder: Path, **options: Any) -> DecoderPairs:
    places = {"ldm": str(world / "ldm"), "tokenizer": str(world), "decoder": str(world / "decoders/diffusion")}
    settings = {"solver": UNGUIDED, "num_pairs": 8, "part_size": 3, "batch_size": 2}
    return DecoderPairs(Codes(), folder=str(folder), **{**places, **settings, **options})


def make_task(world: Path, name: str, **options: Any) -> OneStepDecoderTask:
    adaptation = ATTENTION if name == "hipa" else EVERYWHERE
    return OneStepDecoderTask(
        str(world / "ldm"),
        str(world),
        str(world / "decoders/diffusion"),
        name=name,  # type: ignore[arg-type]
        **{"optimizer": partial(torch.optim.SGD, lr=0.1), "adaptation": adaptation, **options},
    )


@torch.no_grad()
def test_pairs_are_the_decoder_s_own_samples(world: Path, tmp_path: Path) -> None:
    pairs = make_pairs(world, tmp_path / "pairs")
    samples = [pairs.sample(index, seed=0) for index in range(len(pairs))]
    assert len({sample["key"] for sample in samples}) == 8
    assert torch.equal(samples[7]["image"], Codes().sample(1, seed=0)["image"])
    assert torch.equal(samples[7]["codes"], samples[1]["codes"])
    assert not torch.equal(samples[7]["noise"], samples[1]["noise"])
    batch = collate(samples[:2])
    tokenizer = LaytonTokenizer.from_pretrained(world)
    embeddings = tokenizer.quantizer.codes_to_embeddings(batch["codes"].long(), (4, 4))
    expected = tokenizer.decoder("diffusion").sample(batch["noise"], embeddings, num_steps=4, generator=[])  # type: ignore[operator]
    assert (
        batch["latent"].float() - expected
    ).norm() < 0.02 * expected.norm()  # made in bfloat16 where that is quicker
    again = make_pairs(world, tmp_path / "pairs")
    assert torch.equal(again.sample(3, seed=1)["latent"], samples[3]["latent"])
    with pytest.raises(CacheMismatchError, match="seed"):
        make_pairs(world, tmp_path / "pairs", seed=5)
    with pytest.raises(ValueError, match="no guidance"):
        make_pairs(world, tmp_path / "other", solver=TeacherSolver(guidance_scale=2.0))


METHODS: dict[str, Callable[[], Any]] = {
    "reflow": lambda: Reflow(solver=UNGUIDED, step_counts=(1, 2)),
    "instaflow": lambda: OneStepDistillation(solver=UNGUIDED),
    "hipa": lambda: HiPA(solver=UNGUIDED, l2_weight=1.0),
}


@pytest.mark.parametrize("kind", list(METHODS))
def test_training_reduces_its_loss_and_exports_its_decoder(kind: str, world: Path, tmp_path: Path) -> None:
    batch = collate([make_pairs(world, tmp_path / "pairs").sample(index, seed=0) for index in range(4)])
    name = "hipa" if kind == "hipa" else "instaflow"
    task = make_task(world, name, method=METHODS[kind](), latents_per_token=1)
    task.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    calls: list[int] = []
    handle = task._teacher.module.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.Adam(task.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(16):
        loss = _loss(task, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    handle.remove()
    assert not calls  # pairs came with the batch
    assert losses[-1] < 0.97 * losses[0]
    task.export(tmp_path / "export")
    kept = load_tensors(tmp_path / "export/decoder/model.safetensors")
    assert all(".lora_" in key for key in kept)
    assert sum(value.numel() for value in kept.values()) == sum(p.numel() for p in task.trainable_parameters())
    network = read_teacher(tmp_path / "export/decoder", str(world / "ldm"), str(world / "decoders/diffusion"))
    with torch.no_grad():
        t = torch.full((4,), 999.0)
        given = (batch["noise"], t, task._inputs(batch)[1])
        torch.testing.assert_close(network(*given), task.ladd(*given), rtol=1e-4, atol=1e-4)
    if kind == "reflow":
        assert task.decoder().sampling.kind == "ddim" and task.decoder().steps == (1, 2)
    else:
        assert task.decoder().sampling.times == ((999.0,),)


def test_a_student_that_listens_is_a_teacher_and_is_not_hipas(world: Path, tmp_path: Path) -> None:
    PixelDecoder(4, 16, 1, 2, fine_width=8, num_fine_blocks=1).save_pretrained(tmp_path / "light")
    reader = str(tmp_path / "light")
    task = make_task(world, "instaflow", method=METHODS["instaflow"](), reader=reader)
    contract.scramble(task.trainable_parameters(), seed=5, std=0.1)
    task.export(tmp_path / "export")
    places = {"decoder": str(tmp_path / "export/decoder"), "base": str(world / "decoders/diffusion")}
    told = make_pairs(world, tmp_path / "pairs", reader=reader, **places)
    with torch.no_grad():
        sample = told.sample(0, seed=0)
        batch = {name: sample[name][None] for name in ("codes", "latent", "noise")}
        embeddings = task._inputs(batch)[1].spatial
        assert embeddings is not None
        sampler = DiffusionDecoder(task.ladd, task._autoencoder.module)
        expected = sampler.sample(batch["noise"], embeddings, num_steps=4, generator=[])
    assert (
        batch["latent"].float() - expected
    ).norm() < 0.02 * expected.norm()  # made in bfloat16 where that is quicker
    with pytest.raises(ValueError, match="stage 1 has to listen to 'light' itself"):
        make_task(world, "hipa", method=METHODS["hipa"](), reader=reader)


def _loss(task: OneStepDecoderTask, batch: dict[str, Any]) -> torch.Tensor:
    """The method's loss with the same random numbers each time."""
    from distill.method import DistillBatch, Networks

    x_0, condition = task._inputs(batch)
    networks = Networks(task.ladd, task._teacher.module, task._target.module)
    given = DistillBatch(condition, type(condition)(), (4, 4, 4), x_0, batch["noise"])
    assert task.method is not None
    output = task.method.losses(networks, given, step=0, generator=torch.Generator().manual_seed(0))
    return torch.stack([term * task.method.weights.get(key, 1.0) for key, term in output.terms.items()]).sum()


@pytest.mark.parametrize("name", ["instaflow", "hipa"])
def test_a_decoder_of_one_step_that_goes_on_is_not_its_own_teacher(world: Path, tmp_path: Path, name: str) -> None:
    first = make_task(world, name, method=METHODS[name]())
    contract.scramble(first.trainable_parameters(), seed=4, std=0.1)
    first.export(tmp_path)
    again = make_task(world, name, method=METHODS[name](), start=str(tmp_path / "decoder"))
    x_0, condition = again._inputs(collate([Codes().sample(0, seed=0)]))
    t = torch.full((1,), 500.0)
    with torch.no_grad():
        wanted, found = first._teacher.module(x_0, t, condition), again._teacher.module(x_0, t, condition)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(again.ladd(x_0, t, condition), first.ladd(x_0, t, condition))
        assert not torch.allclose(found, again.ladd(x_0, t, condition))


def test_the_second_half_goes_on_from_the_reflowed_flow_and_is_taught_by_it(world: Path, tmp_path: Path) -> None:
    first = make_task(world, "instaflow", method=METHODS["reflow"]())
    contract.scramble(first.trainable_parameters(), seed=4, std=0.1)
    first.export(tmp_path)
    second = make_task(world, "instaflow", method=METHODS["instaflow"](), start=str(tmp_path / "decoder"))
    batch = collate([Codes().sample(index, seed=0) for index in range(2)])
    x_0, condition = second._inputs(batch)
    t = torch.full((2,), 500.0)
    with torch.no_grad():
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
        expected = first.ladd(noise, t, condition)
        for network in (second.ladd, second._teacher.module):
            torch.testing.assert_close(network(noise, t, condition), expected)
        for parameter in second.trainable_parameters():
            parameter.add_(1.0)
        torch.testing.assert_close(second._teacher.module(noise, t, condition), expected)
    assert not any(parameter.requires_grad for parameter in second._teacher.module.parameters())


def test_what_cannot_be_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match="at most 10 may"):
        make_task(world, "hipa", method=METHODS["hipa"](), max_parameters=10)
    with pytest.raises(ValueError, match="attention"):
        make_task(world, "hipa", method=METHODS["hipa"](), adaptation=EVERYWHERE)
    with pytest.raises(ValueError, match="guides its teacher"):
        make_task(world, "hipa", method=HiPA())
    with pytest.raises(ValueError, match="name must be"):
        make_task(world, "fast", method=METHODS["hipa"]())


def test_pixels_are_compared_with_the_originals(world: Path) -> None:
    task = make_task(world, "hipa", method=METHODS["hipa"](), pixels=PixelSupervision(steps=(1,), crop=2, margin=1))
    batch = collate([Codes().sample(index, seed=0) for index in range(2)])
    batch["noise"] = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    terms: dict[str, float] = {}
    task.log_losses = lambda found, **_: terms.update(found) or torch.stack(list(found.values())).sum()  # type: ignore[method-assign,assignment,func-returns-value]
    task.step_generator = lambda *_, **__: torch.Generator().manual_seed(0)  # type: ignore[method-assign,assignment]
    loss = task.training_step(batch, 0)
    assert loss is not None
    assert set(terms) == {"spatial", "frequency", "edges", "l2", "pixel_l1", "pixel_l2"}


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> Path:
    """The same folder with both decoders beside stage 1's, as tools/assemble.py makes it."""
    for name, method in (("instaflow", METHODS["instaflow"]), ("hipa", METHODS["hipa"])):
        task = make_task(world, name, method=method())
        contract.scramble(task.trainable_parameters(), seed=5, std=0.1)
        task.decoder().save_pretrained(world / "decoders" / name, dtype=torch.float16)
    config = json.loads((world / "config.json").read_text())
    config["decoders"] |= {
        "instaflow": "generation.decoders.InstaFlowDecoder",
        "hipa": "generation.decoders.HiPADecoder",
    }
    (world / "config.json").write_text(json.dumps(config))
    return world


@pytest.mark.parametrize("name", ["instaflow", "hipa"])
def test_reconstruct_takes_their_names(name: str, tokenizer: Path, tmp_path: Path) -> None:
    Image.new("RGB", (SIZE, SIZE), (200, 40, 90)).save(tmp_path / "a.png")
    words = ["reconstruct", str(tmp_path / "a.png"), "--tokenizer", str(tokenizer), "--decoder", name]
    report = tmp_path / "report.json"
    assert main([*words, "--out", str(tmp_path / "out"), "--json", str(report)]) == 0
    protocol = json.loads(report.read_text())["protocol"]
    assert (protocol["decoder"], protocol["num_inference_steps"]) == (name, 1)
    assert main([*words, "--out", str(tmp_path / "other"), "--steps", "2"]) == 1


def test_generate_takes_their_names(tokenizer: Path, tmp_path: Path) -> None:
    codes, decoders = laytongen.tiny_tokenizer(), LaytonTokenizer.from_pretrained(tokenizer)
    named = {name: decoders.decoder(name) for name in decoders.decoders}
    model = LaytonTokenizer(codes.encoder, codes.quantizer, named, image_size=laytongen.SIZE).eval()
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(tokenizer / "ldm", tmp_path / "model/ldm")
    save_generator(tmp_path / "model/laytongen", laytongen.tiny_generator(model))
    words = ["generate", "a red circle", "--model", str(tmp_path / "model")]
    pictures = []
    for name in ("instaflow", "hipa"):
        assert main([*words, "--decoder", name, "--out", str(tmp_path / name)]) == 0
        (path,) = (tmp_path / name).glob("*.png")
        pictures.append(to_tensor(Image.open(path)))
    assert pictures[0].shape == (3, SIZE, SIZE) and not torch.equal(*pictures)
    assert main([*words, "--decoder", "hipa", "--steps", "2", "--out", str(tmp_path / "other")]) == 1


def test_a_tokenizer_with_all_of_them_saves_and_loads(tokenizer: Path, tmp_path: Path) -> None:
    model = LaytonTokenizer.from_pretrained(tokenizer)
    model.save_pretrained(tmp_path / "copy", dtype=torch.float16)
    again = LaytonTokenizer.from_pretrained(tmp_path / "copy", ldm=tokenizer / "ldm")
    codes = torch.arange(16)[None]
    for name in ("instaflow", "hipa"):
        torch.testing.assert_close(
            again.decode(codes, decoder=name), model.decode(codes, decoder=name), rtol=1e-2, atol=1e-2
        )
    with pytest.raises(ValueError, match="builds on the decoder 'diffusion'"):
        LaytonTokenizer.from_pretrained(tokenizer, decoders=["hipa"]).save_pretrained(tmp_path / "other")


@pytest.mark.usefixtures("without_timm")
def test_the_table_of_all_decoders(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "table.json"
    words = ["evaluate", "decoders", "--data", "scenes", "--count", "3", "--size", str(SIZE), "--repeats", "2"]
    options = ["--tokenizer", str(tokenizer), "--any-steps", "1", "2", "--objects", "2", "--split", "validation"]
    assert main([*words, *options, "--json", str(report)]) == 0
    written = json.loads(report.read_text())
    rows = {(row["decoder"], row["steps"]): row for row in written["rows"]}
    assert list(rows) == [("diffusion", 1), ("diffusion", 2), ("instaflow", 1), ("hipa", 1)]
    first, hipa = written["rows"][0], rows["hipa", 1]
    assert (first["gap"], first["time_ratio"]) == (0.0, 1.0)
    assert hipa["gap"] == pytest.approx(hipa["psnr"] - first["psnr"], abs=1e-4)
    assert hipa["epd"] is None and "timm" in written["report"]["absent"]["epd"]
    assert 0 <= hipa["objects"] <= 1 and hipa["time_ratio"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["decoder", "steps"] and lines[4].split()[:2] == ["hipa", "1"]
    model = LaytonTokenizer.from_pretrained(tokenizer, decoders=["hipa"])
    images = torch.stack(
        [to_tensor(Image.fromarray(render(sample_scene(seed), SIZE))) for seed in split_seeds("validation", 3)]
    )
    expected = psnr(round_to_uint8(model.reconstruct(images)), round_to_uint8(images)).mean().item()
    assert hipa["psnr"] == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra "eval" is not installed."""
    monkeypatch.setitem(sys.modules, "timm", None)
