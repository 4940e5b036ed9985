"""`layton encode` and `layton decode`, through the command line and real files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_tools import CODES, TOKENS, Run, tiny_tokenizer, tree
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import layton
from layton.cli import main
from layton.codes_file import CodesFile, CodesHeader
from layton.data.folder import ImageFolderSource
from layton.data.images import load_image
from layton.tokenizer import LaytonTokenizer


def encode(run: Run, tokenizer: Path, out: Path, *images: object) -> CodesFile:
    run("encode", *images, "--out", out, "--tokenizer", tokenizer)
    return CodesFile(out)


def test_codes_are_the_tokenizers_own_and_name_their_images(
    run: Run, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    file = encode(run, tokenizer, tmp_path / "codes.safetensors", photos)
    assert file.names == ["a.png", "b.jpg", "c.webp", "z.PNG", "sub/a.png"]
    model = LaytonTokenizer.from_pretrained(tokenizer)
    expected = model.encode_images([load_image(photos / name) for name in file.names])
    assert torch.equal(file.codes(0, 5), expected.codes)
    assert len(expected.codes.unique()) > 5  # random weights still tell patches apart
    assert tuple(file.geometries(0, 5)) == expected.geometries
    assert file.header.fingerprint == model.fingerprint()


def test_any_safetensors_reader_can_read_the_file(run: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    encode(run, tokenizer, tmp_path / "codes.safetensors", photos)
    tensors = load_file(tmp_path / "codes.safetensors")
    assert tensors["codes"].shape == (5, TOKENS)
    assert tensors["codes"].dtype == torch.int16
    assert json.loads(bytes(tensors["names"].numpy()))[0] == "a.png"
    with safe_open(tmp_path / "codes.safetensors", "pt") as file:
        assert file.metadata()["vocab_size"] == str(CODES)


def test_precision_is_recorded_and_files_without_it_are_of_fp32(
    run: Run, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    exact = encode(run, tokenizer, tmp_path / "fp32.safetensors", photos)
    run("encode", photos, "--out", tmp_path / "bf16.safetensors", "--tokenizer", tokenizer, "--precision", "bf16")
    rough = CodesFile(tmp_path / "bf16.safetensors")
    assert (exact.header.precision, rough.header.precision) == ("fp32", "bf16")
    assert 0.5 < (exact.codes(0, 5) == rough.codes(0, 5)).float().mean() < 1.0
    run("decode", tmp_path / "bf16.safetensors", "--out", tmp_path / "out", "--tokenizer", tokenizer)
    values = exact.header.to_metadata()
    del values["precision"]
    assert CodesHeader.from_metadata(values, source=tmp_path) == exact.header
    with pytest.raises(ValueError, match="damaged metadata"):
        CodesHeader.from_metadata({**values, "precision": "fp8"}, source=tmp_path)


def test_names_of_own_classes_reach_the_tokenizer(
    tokenizer: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    load = LaytonTokenizer.from_pretrained

    def note(name: str, **options: Any) -> LaytonTokenizer:
        given.append(tuple(options["allow"]))
        return load(name, **options)

    monkeypatch.setattr(LaytonTokenizer, "from_pretrained", note)
    words = ["encode", str(photos), "--tokenizer", str(tokenizer)]
    assert main([*words, "--out", str(tmp_path / "1"), "--allow", "own_parts."]) == 0
    assert main([*words, "--out", str(tmp_path / "2")]) == 0
    assert given == [("own_parts.",), ()]


def test_codes_do_not_depend_on_batch_or_order(run: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    files = sorted(path for path in photos.rglob("*") if path.is_file())
    whole = encode(run, tokenizer, tmp_path / "whole.safetensors", *files)
    codes = dict(zip(whole.names, whole.codes(0, 5).tolist(), strict=True))
    random.Random(0).shuffle(files)
    for batch_size in (1, 2, 7):
        out = tmp_path / f"{batch_size}.safetensors"
        run("encode", *files, "--out", out, "--tokenizer", tokenizer, "--batch-size", batch_size)
        again = CodesFile(out)
        assert dict(zip(again.names, again.codes(0, 5).tolist(), strict=True)) == codes


@pytest.mark.parametrize("policy", ["crop", "pad", "resize"])
def test_decoded_files_have_the_original_sizes(
    run: Run, tokenizer: Path, photos: Path, tmp_path: Path, policy: str
) -> None:
    codes, out = tmp_path / "codes.safetensors", tmp_path / "out"
    run("encode", photos, "--out", codes, "--tokenizer", tokenizer, "--policy", policy)
    run("decode", codes, "--out", out, "--tokenizer", tokenizer, "--batch-size", 2)
    assert sorted(path.name for path in out.iterdir()) == ["a-2.png", "a.png", "b.png", "c.png", "z.png"]
    names = {"a": (64, 64), "b": (50, 70), "c": (90, 31), "a-2": (40, 40), "z": (33, 47)}
    for stem, size in names.items():
        with Image.open(out / f"{stem}.png") as image:
            assert image.size == (size if policy != "crop" else (min(size), min(size)))


def test_round_trip_is_reconstruction(run: Run, both: Path, photos: Path, tmp_path: Path) -> None:
    codes = tmp_path / "codes.safetensors"
    run("encode", photos / "a.png", "--out", codes, "--tokenizer", both)
    model = LaytonTokenizer.from_pretrained(both)
    encoded = model.encode_images([load_image(photos / "a.png")])
    pictures = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"seed{seed}"
        drawn = ("--decoder", "diffusion", "--steps", 2, "--seed", seed, "--overwrite")
        run("decode", codes, "--out", out, "--tokenizer", both, *drawn)
        pictures[seed] = np.asarray(Image.open(out / "a.png"))
        noise = torch.Generator().manual_seed(seed)
        (expected,) = model.decode_images(encoded, decoder="diffusion", num_steps=2, generator=noise)
        assert np.array_equal(pictures[seed], np.asarray(expected))
    assert not np.array_equal(pictures[0], pictures[1])


def test_pictures_do_not_depend_on_their_neighbours(run: Run, both: Path, photos: Path, tmp_path: Path) -> None:
    codes = tmp_path / "codes.safetensors"
    run("encode", photos, "--out", codes, "--tokenizer", both)
    options = ["--tokenizer", both, "--decoder", "diffusion", "--steps", 2, "--condition-scale", 0.5]
    for batch_size in (1, 3):
        run("decode", codes, "--out", tmp_path / str(batch_size), "--batch-size", batch_size, *options)
    for path in (tmp_path / "1").iterdir():
        one, three = (np.asarray(Image.open(folder / path.name), dtype=int) for folder in (path.parent, tmp_path / "3"))
        assert np.abs(one - three).max() <= 1


def test_unreadable_images_stop_it_and_leave_nothing(fails: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "text.jpg").write_text("not an image")
    out = tmp_path / "new" / "codes.safetensors"
    before = tree(tmp_path)
    assert "text.jpg: not a JPEG, PNG or WebP file" in fails("encode", photos, "--out", out, "--tokenizer", tokenizer)
    assert "no such file" in fails("encode", photos / "none.png", "--out", out, "--tokenizer", tokenizer)
    (tmp_path / "empty").mkdir()
    assert "empty: no .jpg" in fails("encode", tmp_path / "empty", "--out", out, "--tokenizer", tokenizer)
    assert tree(tmp_path) == before
    assert not out.parent.exists()


def test_a_failed_run_leaves_the_earlier_file(
    run: Run, fails: Run, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.safetensors"
    encode(run, tokenizer, out, photos)
    before = tree(tmp_path)
    whole = (photos / "b.jpg").read_bytes()
    (photos / "b.jpg").write_bytes(whole[: len(whole) // 2])
    words = ["encode", photos, "--out", out, "--tokenizer", tokenizer]
    assert "b.jpg: broken JPEG file" in fails(*words, "--overwrite")
    (photos / "b.jpg").write_bytes(whole)
    assert "exists already: take another --out, or say --overwrite" in fails(*words, status=2)
    assert tree(tmp_path) == before
    run(*words, "--overwrite")


def test_codes_go_into_python_and_back(run: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "codes.safetensors", tmp_path / "again.safetensors"
    run("encode", photos, "--out", out, "--tokenizer", tokenizer, "--policy", "pad")
    model = LaytonTokenizer.from_pretrained(tokenizer)
    found = layton.load_codes(out, tokenizer=model)
    assert found.codes.dtype == torch.int64
    assert list(found.names) == CodesFile(out).names
    pictures = model.decode_images(found.encoded)
    with Image.open(photos / found.names[0]) as original:
        assert pictures[0].size == original.size
    layton.save_codes(again, found.encoded, tokenizer=model, names=found.names)
    assert again.read_bytes() == out.read_bytes()
    with pytest.raises(ValueError, match="images but 1 names"):
        layton.save_codes(again, found.encoded, tokenizer=model, names=["one"])
    model.quantizer.set_codebook(model.quantizer.codebook.flip(0))
    with pytest.raises(ValueError, match="another tokenizer"):
        layton.load_codes(out, tokenizer=model)


def test_pictures_of_other_kinds_are_named(run: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("c.BMP", "d.gif", "e.gif", "notes.txt"):
        (photos / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"photos: 3 files of other kinds \(.bmp, .gif\) are not read"):
        run("encode", photos, "--out", tmp_path / "codes.safetensors", "--tokenizer", tokenizer)
    with pytest.warns(UserWarning, match=r"3 files of other kinds \(.bmp, .gif\)"):
        ImageFolderSource(str(photos), split=None)


def test_some_bad_images_can_be_allowed(run: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("bad1.jpg", "bad2.jpg"):
        (photos / name).write_bytes(b"")
    out, report = tmp_path / "codes.safetensors", tmp_path / "report.json"
    options = ["--out", out, "--tokenizer", tokenizer, "--json", report]
    run("encode", photos, *options, "--max-bad", 2)
    assert len(CodesFile(out)) == 5
    figures = json.loads(report.read_text())
    assert figures["images"] == 5
    assert [line.split("/")[-1] for line in figures["passed_over"]] == [
        "bad1.jpg: the file is empty",
        "bad2.jpg: the file is empty",
    ]
    out.unlink()
    passed_over, failure = run("encode", photos, *options, "--max-bad", 1, status=1).splitlines()
    assert "passed over" in passed_over
    assert "bad2.jpg" in failure
    nothing = run("encode", photos / "bad1.jpg", *options, "--max-bad", 1, status=1)
    assert "no images to write codes of" in nothing
    assert not out.exists()


def test_codes_of_another_tokenizer_are_refused(
    run: Run, fails: Run, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    codes = tmp_path / "codes.safetensors"
    ours = encode(run, tokenizer, codes, photos).header.fingerprint
    other = tiny_tokenizer(seed=5)
    other.save_pretrained(tmp_path / "other")
    error = fails("decode", codes, "--out", tmp_path / "out", "--tokenizer", tmp_path / "other")
    assert ours in error
    assert other.fingerprint() in error
    assert not (tmp_path / "out").exists()


def changed(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a codes file with other tensors or, for text, other metadata; None removes."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    for name, value in changes.items():
        place = metadata if isinstance(value, str) else tensors
        if value is None:
            del tensors[name]
        else:
            place[name] = value
    save_file(tensors, target, metadata=metadata)
    return target


def with_code(codes: torch.Tensor, value: int) -> torch.Tensor:
    codes = codes.clone()
    codes[3, 5] = value
    return codes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"codes": with_code(c, -1)}, "codes must be in [0, 63], got -1"),
        (lambda c: {"codes": with_code(c, CODES)}, "codes must be in [0, 63], got"),
        (lambda c: {"codes": c.float()}, "codes must be integers"),
        (lambda c: {"codes": c[:, :-1].contiguous()}, "codes is [5, 15], expected [5, 16]"),
        (lambda c: {"codes": c[:-1].contiguous()}, "codes is [4, 16], expected [5, 16]"),
        (lambda c: {"codes": c[:, :9].contiguous(), "num_tokens": "9"}, "does not fit this tokenizer"),
        (lambda c: {"vocab_size": "100"}, "does not fit this tokenizer"),
        (lambda c: {"image_size": "many"}, "damaged metadata"),
        (lambda c: {"policy": "stretch"}, "damaged metadata"),
        (lambda c: {"format": "something else"}, "is no codes file"),
        (lambda c: {"geometry": None}, "has no geometry"),
        (lambda c: {"geometry": torch.zeros(5, 6, dtype=torch.int32)}, "sizes must be >= 1"),
        (lambda c: {"geometry": torch.full((5, 6), 2**30, dtype=torch.int32)}, "more than the allowed"),
        (lambda c: {"geometry": torch.ones(5, 5, dtype=torch.int32)}, "geometry is [5, 5], expected [5, 6]"),
        (lambda c: {"names": torch.tensor(list(b'["a"'), dtype=torch.uint8)}, "names are damaged"),
        (lambda c: {"names": torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)}, "names are damaged"),
    ],
)
def test_codes_that_mean_nothing_are_refused(
    run: Run, fails: Run, tokenizer: Path, photos: Path, tmp_path: Path, change: object, message: str
) -> None:
    good = tmp_path / "good.safetensors"
    encode(run, tokenizer, good, photos)
    bad = changed(good, tmp_path / "bad.safetensors", **change(load_file(good)["codes"]))
    before = tree(tmp_path)
    assert message in fails("decode", bad, "--out", tmp_path / "out", "--tokenizer", tokenizer)
    assert tree(tmp_path) == before


def test_cut_and_foreign_files_are_refused(run: Run, fails: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    encode(run, tokenizer, good, photos)
    content, out = good.read_bytes(), tmp_path / "out"
    bad = tmp_path / "bad.safetensors"
    for length in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:length])
        assert "not a whole safetensors file" in fails("decode", bad, "--out", out, "--tokenizer", tokenizer)
    bad.write_bytes(b"\xff" * 8 + content[8:])
    assert "not a whole safetensors file" in fails("decode", bad, "--out", out, "--tokenizer", tokenizer)
    assert "no such file" in fails("decode", tmp_path / "none", "--out", out, "--tokenizer", tokenizer)
    weights = tokenizer / "encoder" / "model.safetensors"
    assert "is no codes file" in fails("decode", weights, "--out", out, "--tokenizer", tokenizer)
    assert not out.exists()


def test_wrong_decoders_and_steps_are_refused(
    run: Run, fails: Run, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    codes, out = tmp_path / "codes.safetensors", tmp_path / "out"
    encode(run, tokenizer, codes, photos)
    options = ["decode", codes, "--out", out, "--tokenizer", tokenizer]
    assert "no decoder 'diffusion'" in fails(*options, "--decoder", "diffusion")
    assert "trained for 1 steps, not for 4" in fails(*options, "--steps", 4)
    assert "no conditioning scale" in fails(*options, "--condition-scale", 2.0)
    assert "--seed must be at least 0" in run(*options, "--seed", -1, status=2)
    assert "neither a folder nor an embedded model" in fails("decode", codes, "--out", out, "--tokenizer", "maxi")
    assert "device 'abacus'" in fails(*options, "--device", "abacus")
    assert not out.exists()
    run("encode", "x.png", status=2)  # --out is missing


def test_a_failure_half_way_leaves_the_folder_as_it_was(
    run: Run, fails: Run, tokenizer: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, out = tmp_path / "codes.safetensors", tmp_path / "out"
    encode(run, tokenizer, codes, photos)
    run("decode", codes, "--out", out, "--tokenizer", tokenizer)
    (out / "mine.txt").write_text("mine")
    before = tree(tmp_path)
    saves = []
    save = Image.Image.save

    def full_disk(self: Image.Image, *args: object, **options: object) -> None:
        saves.append(args)
        if len(saves) == 4:
            raise OSError("no space left on device")
        save(self, *args, **options)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    assert "no space left" in fails("decode", codes, "--out", out, "--tokenizer", tokenizer, "--overwrite")
    assert len(saves) == 4
    assert tree(tmp_path) == before
    monkeypatch.undo()
    run("decode", codes, "--out", out, "--tokenizer", tokenizer, "--overwrite")
    assert tree(tmp_path) == before  # the same pictures, and what was there besides


def test_hostile_names_stay_inside(run: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    good, out = tmp_path / "good.safetensors", tmp_path / "here" / "out"
    file = encode(run, tokenizer, good, photos)
    names = ["../../up.png", "/etc/passwd", "..", "a\0b\n.png", "\uff0e\uff0e\uff0f" + "x" * 300]
    assert len(names) == len(file)
    content = torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8)
    run("decode", changed(good, tmp_path / "bad.safetensors", names=content), "--out", out, "--tokenizer", tokenizer)
    written = sorted(tree(tmp_path / "here"))
    assert written == sorted(["out/up.png", "out/passwd.png", "out/image.png", "out/a_b_.png", f"out/{'x' * 100}.png"])


@pytest.mark.parametrize(
    ("command", "option"),
    [("encode", "--batch-size"), ("decode", "--batch-size"), ("decode", "--steps"), ("reconstruct", "--batch-size")],
)
def test_numbers_that_make_no_sense_are_wrong_usage(run: Run, tmp_path: Path, command: str, option: str) -> None:
    for value in (0, -1):
        told = run(command, tmp_path / "none", "--out", tmp_path / "out", option, value, status=2)
        assert f"{option} must be at least 1, got {value}" in told
    assert "--max-bad" in run("encode", tmp_path, "--out", tmp_path / "codes", "--max-bad", -1, status=2)
    assert not (tmp_path / "out").exists()


def test_damaged_parts_are_named(fails: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("config.json", "encoder/config.json", "encoder/model.safetensors"):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(tokenizer, copy)
        (copy / name).write_bytes((copy / name).read_bytes()[:40])
        told = fails("encode", photos, "--out", tmp_path / "codes", "--tokenizer", copy)
        assert str(copy / name) in told and "damaged" in told


def test_a_name_of_another_format_is_refused(tokenizer: Path, photos: Path, tmp_path: Path, fails: Run) -> None:
    told = fails("encode", photos, "--out", tmp_path / "codes.npy", "--tokenizer", tokenizer, status=2)
    assert "name the file .safetensors" in told


def test_folders_in_the_place_of_files_are_told_before_the_work(tokenizer: Path, photos: Path, fails: Run) -> None:
    words = ("encode", photos, "--tokenizer", tokenizer)
    assert "is a folder" in fails(*words, "--out", photos)
    told = fails(*words, "--out", photos / "codes", "--json", photos, status=2)
    assert told.startswith("layton: --json") and "is a folder" in told
    assert not (photos / "codes").exists()


def test_missing_weights_of_the_latent_diffusion_model_are_named(
    both: Path, photos: Path, tmp_path: Path, fails: Run
) -> None:
    copy = tmp_path / "copy"
    for part in ("unet", "vae"):
        shutil.copytree(both, copy, dirs_exist_ok=True)
        file = copy / "ldm" / part / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        (first, *_) = sorted(weights)
        save_file({name: value for name, value in weights.items() if name != first}, file, metadata={"format": "pt"})
        told = fails("reconstruct", photos, "--out", tmp_path / "out", "--tokenizer", copy, "--decoder", "diffusion")
        assert f"lacks 1 weights, such as {first}" in told
