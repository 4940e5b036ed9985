from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from laytongen_parts import tiny_tokenizer
from PIL import Image

from layton.cli import main
from layton.data.evaluation import open_images
from layton.data.folder import ImageFolderSource
from layton.data.images import ImageError, ImageLimits
from layton.data.module import ImageDataModule
from layton.data.stored import Columns, open_stored, source_of
from layton.data.transforms import Fit
from layton.errors import UsageError
from layton.scenes import render, sample_scene

datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
from layton.data.hf_datasets import HFDatasetSource  # noqa: E402


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(sample_scene(seed), 40)).save(file, "PNG")
    return file.getvalue()


def table(rows: int = 12, **columns: list[Any]) -> Any:
    images = [{"bytes": picture(seed), "path": None} for seed in range(rows)]
    found = datasets.Dataset.from_dict({"image": images, "caption": [f" scene {n} " for n in range(rows)], **columns})
    return found.cast_column("image", datasets.Image())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def test_saved_and_parquet_tables_are_the_same_images(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "toys")
    (tmp_path / "files" / "toys").mkdir(parents=True)
    table().to_parquet(tmp_path / "files" / "toys" / "train-00000-of-00001.parquet")
    saved = HFDatasetSource(str(tmp_path / "toys"), split=None)
    copied = open_stored([str(tmp_path / "files" / "toys" / "*.parquet")], split=None)
    assert list(saved.keys) == list(copied.keys) == [f"toys/{row:09d}" for row in range(12)]
    for index in (0, 7):
        one, other = saved.load(index), copied.load(index)
        assert one.caption == other.caption == f"scene {index}" == saved.told(index)
        assert one.image.tobytes() == other.image.tobytes() == render(sample_scene(index), 40).tobytes()
    splits = [HFDatasetSource(str(tmp_path / "toys"), split=split) for split in ("train", "validation", "test")]
    assert [len(part) for part in splits] == [6, 3, 3]
    assert sorted(key for part in splits for key in part.keys) == sorted(saved.keys)
    assert splits[2].load(1).caption == "scene 5"


def test_a_stamp_tells_other_images(tmp_path: Path) -> None:
    for name, rows in (("a", 12), ("b", 11)):
        table(rows).save_to_disk(tmp_path / name / "toys")
    first, again, other = (HFDatasetSource(str(tmp_path / name / "toys"), split=None) for name in "aab")
    assert first.stamp() == again.stamp() != other.stamp()
    named = HFDatasetSource(str(tmp_path / "a" / "toys"), split=None, ids="caption")
    assert named.stamp() != first.stamp()


def test_columns_classes_and_ids(tmp_path: Path) -> None:
    found = table(4, url=["w", "x", "y", "z"]).remove_columns("caption")
    found = found.add_column("label", [1, 0, 1, -1]).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    found.rename_column("image", "picture").save_to_disk(tmp_path / "toys")
    place = [str(tmp_path / "toys")]
    with pytest.raises(ValueError, match="no column 'image', only picture, url, label"):
        open_stored(place, split=None)
    source = open_stored(place, split=None, columns=Columns(image="picture", ids="url"))
    assert list(source.keys) == ["toys/w", "toys/x", "toys/y", "toys/z"]
    assert [source.load(index).caption for index in range(4)] == ["dog", "cat", "dog", ""]
    told = open_stored(place, split=None, columns=Columns(image="picture", caption="url"))
    assert told.load(3).caption == "z"
    several = datasets.Dataset.from_dict({"image": [{"bytes": picture(0), "path": None}], "label": [[1, 0]]})
    names = datasets.Sequence(datasets.ClassLabel(names=["cat", "dog"]))
    several.cast_column("label", names).save_to_disk(tmp_path / "several")
    assert open_stored([str(tmp_path / "several")], split=None).load(0).caption == "dog"
    table(2, url=["w", "w"]).save_to_disk(tmp_path / "twice")
    with pytest.raises(ValueError, match="'url' names some images alike"):
        HFDatasetSource(str(tmp_path / "twice"), ids="url")


def test_broken_images_and_paths_are_named(tmp_path: Path) -> None:
    rows = [{"bytes": picture(0)[:200], "path": None}, {"bytes": None, "path": "/etc/hostname"}]
    found = datasets.Dataset.from_dict({"image": rows, "text": [["first", "second"], []]})
    found.save_to_disk(tmp_path / "toys")
    source = HFDatasetSource(str(tmp_path / "toys"), split=None)
    with pytest.raises(ImageError, match="toys/000000000"):
        source.load(0)
    with pytest.raises(ImageError, match="no file of an image in the column 'image', but a path alone"):
        source.load(1)
    table(1).save_to_disk(tmp_path / "large")
    with pytest.raises(ImageError, match="more than the 10 allowed"):
        HFDatasetSource(str(tmp_path / "large"), split=None, limits=ImageLimits(max_bytes=10)).load(0)


def test_several_datasets_urls_and_other_files_are_refused(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(2), "test": table(1)}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"holds several datasets: name one, such as .*both/train"):
        HFDatasetSource(str(tmp_path / "both"))
    assert len(HFDatasetSource(str(tmp_path / "both" / "train"), split=None)) == 2
    with pytest.raises(ValueError, match="must be local files"):
        HFDatasetSource("https://example.org/a.parquet")
    with pytest.raises(ValueError, match="only tables have columns"):
        open_stored(["a.tar"], split=None, columns=Columns(caption="text"))


def test_other_stored_images_are_opened_as_before(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(picture(0))
    source = open_stored([str(tmp_path)], split=None, classes=True)
    assert isinstance(source, ImageFolderSource)
    assert source.load(0).caption == "cat"
    assert source_of(str(tmp_path)) == ("layton.data.folder.ImageFolderSource", {"folder": str(tmp_path)})
    (tmp_path / "metadata.parquet").touch()  # beside images and shards it is what a downloader noted
    assert source_of(str(tmp_path))[0] == "layton.data.folder.ImageFolderSource"
    (tmp_path / "0.tar").touch()
    assert source_of(str(tmp_path)) == ("layton.data.shards.ShardSource", {"shards": str(tmp_path / "*.tar")})
    (tmp_path / "state.json").touch()  # of anything
    assert source_of(str(tmp_path))[0] == "layton.data.shards.ShardSource"
    (tmp_path / "dataset_info.json").touch()
    assert source_of(str(tmp_path)) == ("layton.data.hf_datasets.HFDatasetSource", {"place": str(tmp_path)})
    with pytest.raises(ValueError, match="--class-folders is for"):
        open_stored([str(tmp_path / "x.tar")], split=None, classes=True)


def test_loader_workers_read_it(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "toys")
    source = HFDatasetSource(str(tmp_path / "toys"), split=None, transform=Fit(16))
    data = ImageDataModule(train=[source], batch_size=4, num_workers=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert set(batch["key"]) <= set(source.keys)


def test_evaluations_take_a_table_with_columns_of_other_names(tmp_path: Path) -> None:
    named = table(pixels=[{"bytes": picture(0), "path": None}] * 12, said=["all alike"] * 12)
    named.cast_column("pixels", datasets.Image()).save_to_disk(tmp_path / "toys")
    options = {"split": "all", "count": None, "size": 32, "batch_size": 4}
    alike = open_images([str(tmp_path / "toys")], **options, image_column="pixels", caption_column="said")
    (first, *rest) = alike
    assert all(image.equal(first[0]) for batch in (first, *rest) for image in batch)
    assert alike.source.sample(3, seed=0)["caption"] == "all alike"
    usual = next(iter(open_images([str(tmp_path / "toys")], **options)))
    assert usual[0].equal(first[0]) and not usual[1].equal(first[0])
    with pytest.raises(UsageError, match="only tables"):
        open_images(["scenes"], **{**options, "split": "test", "count": 4}, image_column="pixels")
    report, model = tmp_path / "codebook.json", tmp_path / "model"
    tiny_tokenizer().save_pretrained(model)
    words = ["evaluate", "codebook", "--tokenizer", str(model), "--json", str(report)]
    assert main([*words, "--data", "scenes", str(tmp_path / "toys"), "--count", "3", "--image_column", "pixels"]) == 0
    assert json.loads(report.read_text())["protocol"]["data"] == {"scenes": 3, "toys": 3}
