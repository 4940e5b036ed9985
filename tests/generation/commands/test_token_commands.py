"""The chain on tiny parts, by the command line alone: tokenize, fit, generate."""

from __future__ import annotations

import json
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from laytongen_parts import CODES, LENGTH, SIZE, TOKENS, tiny_tokenizer
from PIL import Image

from generation.data.source import TokenShards
from generation.pipeline import LaytonGenPipeline
from layton.cli import main


def run_file(folder: Path, tokens: Path, steps: int) -> Path:
    options = {"folder": str(tokens), "reworded": 0.5, "unbegun": 0.4}
    sources = [{"class_path": "generation.data.source.TokenShards", "init_args": options}]
    transformer = {
        "class_path": "generation.model.transformer.LaytonGenTransformer",
        "init_args": {
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "hidden": 32,
            "caption": {"dim": 16, "length": LENGTH, "null": "learned"},
            "vocab_size": CODES,
            "num_tokens": TOKENS,
            "factors": {"code_dim": 4, "rank": 4},
        },
    }
    words = {"width": 16, "depth": 1, "num_heads": 2, "max_length": LENGTH}
    run = {
        "trainer": {
            "max_steps": steps,
            "accelerator": "cpu",
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "layton.callbacks.SafeCheckpoint", "init_args": {"every_n_train_steps": 2}}],
        },
        "model": {
            "class_path": "generation.tasks.laytongen.LaytonGenTask",
            "init_args": {
                "tokenizer": str(folder / "tokenizer"),
                "transformer": transformer,
                "text_encoder": {"class_path": "generation.text.encoders.small_text_encoder", "init_args": words},
                "code_dropout": 0.1,
                "label_smoothing": 0.1,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "layton.data.module.ImageDataModule",
            "init_args": {"batch_size": 4, "train": sources, "validation": sources},
        },
    }
    path = folder / f"run{steps}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def test_tokenize_fit_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    place, tokens = str(tmp_path / "tokenizer"), tmp_path / "tokens"
    words = ["tokenize", "scenes", "--count", "10", "--out", str(tokens), "--tokenizer", place, "--shard-size", "6"]
    words += ["--textures", "stripes", "noise"]
    assert main(words) == 0
    assert "10 images in 2 shards (0 were there)" in capsys.readouterr().out
    assert main(words) == 0
    assert "(2 were there)" in capsys.readouterr().out
    assert main(["data", "verify", str(tokens)]) == 0

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["fit", "--config", str(run_file(tmp_path, tokens, 4)), "--run_dir", str(whole)]) == 0
    first = run_file(tmp_path, tokens, 2)
    assert main(["fit", "--config", str(first), "--run_dir", str(parts)]) == 0
    more = ["--run_dir", str(parts), "--resume", "auto", "--trainer.max_steps", "4"]
    assert main(["fit", "--config", str(first), *more]) == 0
    for part in ("transformer", "text_encoder/model"):  # a resumed run is the same run, to the bit
        weights = [(run / "export" / part / "model.safetensors").read_bytes() for run in (whole, parts)]
        assert weights[0] == weights[1]

    shutil.copytree(whole / "export", tmp_path / "tokenizer" / "laytongen")
    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "tokenizer")  # the same run with another tokenizer
    assert main([*words[:5], str(tmp_path / "others"), *words[6:]]) == 0
    other = run_file(tmp_path, tmp_path / "others", 6)
    capsys.readouterr()
    assert main(["fit", "--config", str(other), "--run_dir", str(parts), "--resume", "auto"]) == 1
    assert "the checkpoint was trained with another tokenizer (fingerprint: stored" in capsys.readouterr().err
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    figures = tmp_path / "figures.json"
    command = ["generate", "a red circle", "--model", place, "--out", str(tmp_path / "out"), "--images-per-prompt", "2"]
    assert main([*command, "--seed", "5", "--json", str(figures)]) == 0
    files = sorted(path for path in (tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["0000-a_red_circle-5.png", "0001-a_red_circle-6.png"]
    for path in files:
        with Image.open(path) as image:
            assert image.size == (SIZE, SIZE)
    settings = json.loads(figures.read_text())["settings"]
    assert (settings["decoder"], settings["weight_type"]) == ("light", "float32")
    small = [*command[:5], str(tmp_path / "small"), "--weights", "int8", "--json", str(figures)]
    assert main(small) == 0
    assert json.loads(figures.read_text())["settings"]["weight_type"] == "int8"
    assert LaytonGenPipeline.from_pretrained(place).text_encoder.name == "small-16x1"
    assert main([*command, "--steps", "9", "--overwrite"]) == 1
    assert "was trained for 1 steps, not for 9" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")  # theirs
def test_workers_of_ray_write_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="the extra 'scale' is not installed")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["tokenize", "scenes", "--count", "10", "--tokenizer", str(tmp_path / "tokenizer"), "--shard-size", "3"]
    here, there = tmp_path / "here", tmp_path / "there"
    assert main([*words, "--out", str(here)]) == 0
    assert main([*words, "--out", str(there), "--workers", "2"]) == 0
    files = {path.name: path.read_bytes() for path in here.iterdir() if not path.name.startswith(".")}
    assert len(files) == 6 and files == {name: (there / name).read_bytes() for name in files}
    assert main([*words, "--out", str(there), "--workers", "2"]) == 0
    assert "(4 were there)" in capsys.readouterr().out


def test_tokens_are_decoded_with_their_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    place, tokens, out = str(tmp_path / "tokenizer"), tmp_path / "tokens", tmp_path / "shown"
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (40 + number, 20), (50 * number, 0, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"picture {number}")
    words = ["tokenize", str(images), "--out", str(tokens), "--tokenizer", place, "--shard-size", "2"]
    assert main([*words, "--policy", "pad"]) == 0
    show = ["data", "decode", str(tokens), "--tokenizer", place]
    assert main([*show, "--out", str(out), "--count", "3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{n}.{kind}" for n in (0, 1, 3) for kind in ("png", "txt")
    )
    for number in (0, 1, 3):
        with Image.open(out / f"{number}.png") as picture:
            assert picture.size == (40 + number, 20), "the size of the original"
        assert (out / f"{number}.txt").read_text() == f"picture {number}\n"
    assert main([*show, "--out", str(tmp_path / "all"), "--count", "99"]) == 0
    assert len(list((tmp_path / "all").glob("*.png"))) == 5
    one = [
        "data",
        "decode",
        str(tokens / "tokens-00002.safetensors"),
        "--tokenizer",
        place,
        "--out",
        str(tmp_path / "one"),
    ]
    assert main(one) == 0
    assert [path.name for path in (tmp_path / "one").glob("*.png")] == ["4.png"]
    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert main([*show[:4], str(tmp_path / "other"), "--out", str(tmp_path / "none")]) == 1
    assert "was made by another tokenizer" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_tokens_are_exported_as_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra 'datasets' is not installed")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["tokenize", "scenes", "--count", "5", "--tokenizer", str(tmp_path / "tokenizer"), "--shard-size", "3"]
    assert main([*words, "--out", str(tmp_path / "tokens")]) == 0
    assert main(["data", "export", str(tmp_path / "tokens"), "--out", str(tmp_path / "table")]) == 0
    files = sorted((tmp_path / "table").iterdir())
    assert [file.name for file in files] == ["tokens-00000.parquet", "tokens-00001.parquet"]
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    tokens = TokenShards(str(tmp_path / "tokens"), split=None)
    for index, row in enumerate(rows):
        sample = tokens.sample(index, seed=0)
        assert (row["key"], row["caption"]) == (sample["key"], sample["caption"])
        assert row["codes"] == sample["codes"].tolist()
        assert (row["height"], row["width"]) == (SIZE, SIZE)
    assert len(rows) == 5
    said = json.loads(parquet.read_schema(files[0]).metadata[b"layton"])
    assert said["fingerprint"] == tiny_tokenizer().fingerprint()
    assert main(["data", "export", str(tmp_path), "--out", str(tmp_path / "none")]) == 1
    assert "holds no tokens" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_shards_that_use_the_same_keys_are_taken_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    picture = BytesIO()
    Image.new("RGB", (SIZE, SIZE), (200, 30, 30)).save(picture, "PNG")
    for number in range(2):
        with tarfile.open(tmp_path / f"s-{number:03d}.tar", "w") as shard:
            member = tarfile.TarInfo("000001.png")
            member.size = len(picture.getvalue())
            shard.addfile(member, BytesIO(picture.getvalue()))
    shards, out = str(tmp_path / "s-{000..001}.tar"), str(tmp_path / "out")
    call = ["tokenize", shards, "--tokenizer", str(tmp_path / "tokenizer"), "--out", out]
    assert main(call) == 1 and "--repeated-keys, accepts that" in capsys.readouterr().err
    assert main([*call, "--repeated_keys"]) == 0
    assert "2 images have no caption" in capsys.readouterr().err
    assert list(TokenShards(out).keys) == ["s-000/000001", "s-001/000001"]
    assert main(["data", "check", shards, "--repeated_keys"]) == 0
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    assert main(["tokenize", str(tmp_path / "first"), str(tmp_path / "second"), *call[2:]]) == 2
    assert "of folders of images only one is taken at a time" in capsys.readouterr().err
    assert main(["tokenize", "s3://bucket/x.tar", "--out", out]) == 1
    assert "must be local files, got 's3://bucket/x.tar'" in capsys.readouterr().err


def test_folders_of_classes_give_captions_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for number, name in enumerate(("n01440764", "n01443537")):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (SIZE, SIZE), (200, 30, 30)).save(tmp_path / "images" / name / f"{number}.png")
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--class-folders"]
    assert main(["tokenize", str(tmp_path / "images"), "--out", str(tmp_path / "out"), *options]) == 0
    found = TokenShards(str(tmp_path / "out"), split=None)
    assert [found.sample(i, seed=0)["caption"] for i in range(2)] == ["n01440764", "n01443537"]
    capsys.readouterr()
    for sources in ("scenes", str(tmp_path / "*.tar")):
        assert main(["tokenize", sources, "--out", str(tmp_path / "other"), *options]) == 2
        assert "--class-folders" in capsys.readouterr().err


def test_wrong_calls_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(folder)
    wrong = {
        ("tokenize", "nowhere", "--out", str(tmp_path / "t"), "--tokenizer", str(folder)): 1,
        ("tokenize", "scenes", "x", "--out", str(tmp_path / "t"), "--tokenizer", str(folder), "--count", "3"): 2,
        ("generate", "a", "--model", str(folder)): 1,
        ("tokenize", str(folder), "--textures", "plain", "--out", str(tmp_path / "t"), "--tokenizer", str(folder)): 2,
        ("data", "verify", str(folder)): 1,
    }
    for words, status in wrong.items():
        assert main(list(words)) == status, words
        error = capsys.readouterr().err
        assert error.startswith("layton: ") and error.count("\n") == 1
