"""Prompts: the same words as the pictures' captions, in an order that resumes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from layton.data.module import ImageDataModule
from layton.data.prompts import PromptFile, SceneCaptions
from layton.data.sources import ScenesSource
from layton.scenes import sample_scene
from layton.scenes.splits import is_unseen


def test_scene_captions_equal_those_of_the_pictures() -> None:
    options = {"split": "train", "length": 30, "offset": 7, "chinese": 0.4, "reworded": 0.5}
    captions, pictures = SceneCaptions(**options), ScenesSource(**options, size=16)
    for index in range(30):
        wanted = pictures.sample(index, seed=index + 11)
        assert captions.sample(index, seed=index + 11) == {key: wanted[key] for key in ("caption", "key")}
    texts = [captions.sample(i, seed=i)["caption"] for i in range(30)]
    assert any(not text.isascii() for text in texts) and any(text.isascii() for text in texts)


def test_training_prompts_name_no_held_out_combination() -> None:
    train, validation = (SceneCaptions(split=split, length=400) for split in ("train", "validation"))
    assert not any(is_unseen(sample_scene(seed)) for seed in train.seeds)
    assert any(is_unseen(sample_scene(seed)) for seed in validation.seeds)


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffa cat\n\n  一只狗 \r\na bird\nfour\nfive\nsix".encode())
    source = PromptFile(str(path))
    assert [source[i] for i in range(2)] == [
        {"caption": "a cat", "key": "mine/1"},
        {"caption": "一只狗", "key": "mine/3"},
    ]
    parts = [PromptFile(str(path), split=split) for split in ("train", "validation", "test")]
    keys = [part[i]["key"] for part in parts for i in range(len(part))]
    assert sorted(keys) == [f"mine/{n}" for n in (1, 3, 4, 5, 6, 7)]
    assert [part[i]["key"] for part in parts[1:] for i in range(len(part))] == ["mine/1", "mine/6", "mine/5"]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\n \n", "no prompts"), (b"fine\n\xff\xfe", "line 2 is not UTF-8"), (b"x" * 5000, "line 1 has 5000 bytes")],
)
def test_bad_prompt_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        PromptFile(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        PromptFile(str(tmp_path / "absent.txt"))


def test_prompt_batches_resume_exactly() -> None:
    def module() -> ImageDataModule:
        return ImageDataModule(SceneCaptions(length=11, chinese=0.5, reworded=0.5), batch_size=2, seed=3)

    def batches(data: ImageDataModule, count: int) -> list[dict]:
        found, loader = [], data.train_dataloader()
        while len(found) < count:
            for batch in loader:
                found.append(batch)
                if len(found) == count:
                    break
        return found

    whole = batches(module(), 12)
    first = module()
    begun = batches(first, 7)
    second = module()
    second.load_state_dict(first.state_dict())
    assert begun + batches(second, 5) == whole
    assert set(whole[0]) == {"caption", "key"}
    seen = [(key, text) for batch in whole for key, text in zip(batch["key"], batch["caption"], strict=True)]
    by_key = {key: {text for k, text in seen if k == key} for key, _ in seen}
    assert max(len(texts) for texts in by_key.values()) > 1  # said anew in every epoch
