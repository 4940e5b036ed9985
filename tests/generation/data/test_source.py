from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from laytongen_parts import CODES, LENGTH, TOKENS, tiny_text_encoder, tiny_tokenizer

from generation.data import source
from generation.data.source import TokenShards, split_of
from generation.data.token_shards import read_shard, sha256_of, shard_files, write_shard
from generation.data.tokenizing import TokenizeJob, tokenize_dataset
from layton.data.loader import collate
from layton.data.sources import ScenesSource
from layton.scenes import begun_cells, caption, objects_ahead, sample_scene
from layton.sceneval.prompts import spec_of_caption


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten scenes in three shards, with cached text features."""
    out = tmp_path_factory.mktemp("tokens")
    tokenizer = tiny_tokenizer()
    source = ScenesSource(split="train", length=10, size=tokenizer.image_size)
    tokenize_dataset(TokenizeJob(source, tokenizer, "scenes", "crop", 4, 3, tiny_text_encoder()), out)
    return str(out)


def test_samples_are_batches_in_the_making(folder: str) -> None:
    tokens = TokenShards(folder)
    assert len(tokens) == 10
    batch = collate([tokens.sample(index, seed=0) for index in range(10)])
    assert batch["codes"].shape == (10, TOKENS)
    assert batch["codes"].dtype == torch.int64
    assert 0 <= int(batch["codes"].min()) <= int(batch["codes"].max()) < CODES
    assert batch["key"] == [f"scenes/{seed}" for seed in range(10)]
    assert batch["caption"] == [caption(sample_scene(seed)) for seed in range(10)]


def test_cached_features_are_those_of_the_encoder(folder: str) -> None:
    tokens, encoder = TokenShards(folder), tiny_text_encoder()
    batch = collate([tokens.sample(index, seed=0) for index in range(10)])
    text = encoder.encode(batch["caption"])
    assert batch["text"].shape[1] == LENGTH
    assert batch["text_mask"].equal(text.mask)
    torch.testing.assert_close(batch["text"].float(), text.features, atol=2e-3, rtol=2e-3)
    assert tokens.header.text_encoder == encoder.fingerprint()
    assert "text" not in TokenShards(folder, use_text=False).sample(0, seed=0)


def test_captions_are_said_anew_and_stay_true(folder: str) -> None:
    tokens = TokenShards(folder, use_text=False, reworded=1.0, chinese=0.3)
    said = {tokens.sample(3, seed=seed)["caption"] for seed in range(40)}
    true = {caption(sample_scene(3), language=lang, variant=v) for lang in ("en", "zh") for v in range(24)}
    assert len(said) > 3
    assert said <= true
    assert tokens.sample(3, seed=7)["caption"] == tokens.sample(3, seed=7)["caption"]
    with pytest.raises(ValueError, match="no cached features"):
        TokenShards(folder, reworded=0.5)


def test_splits_and_length(folder: str) -> None:
    assert len(TokenShards(folder, split="train")) == 10
    assert list(TokenShards(folder, length=5).keys) == [f"scenes/{seed}" for seed in range(5)]
    with pytest.raises(ValueError, match="holds no samples"):
        TokenShards(folder, split="test")
    assert [split_of(key) for key in ("scenes/7", "scenes/1000000000", "scenes/2000000000")] == [
        "train",
        "validation",
        "test",
    ]
    assert [split_of(f"photos-0001/{number:06d}") for number in (10, 11, 12)] == ["test", "validation", "train"]


def test_tokens_of_another_tokenizer_are_refused(folder: str) -> None:
    tokens = TokenShards(folder)
    tokens.require_tokenizer(tiny_tokenizer().fingerprint())
    with pytest.raises(ValueError, match=r"another tokenizer \(fingerprint: stored '\w{16}', wanted '\w{16}'\)"):
        tokens.require_tokenizer(tiny_tokenizer(seed=1).fingerprint())


def test_codes_are_kept_narrow_and_features_on_disk(folder: str) -> None:
    tokens = TokenShards(folder)
    assert tokens._codes.dtype == np.uint16  # 2 bytes for each
    assert held_by(tokens) == 10 * (2 * TOKENS + 8)  # codes and places, no features
    assert tokens.codes().dtype == torch.int64
    assert tokens.codes().equal(torch.stack([tokens.sample(index, seed=0)["codes"] for index in range(10)]))


def held_by(tokens: TokenShards) -> int:
    """Bytes in memory, but for keys and captions."""
    parts = [value for part in (tokens, tokens._texts, tokens._shards) for value in vars(part).values()]
    return sum(value.nbytes for value in parts if isinstance(value, torch.Tensor | np.ndarray))


def test_codes_may_stay_on_disk(folder: str) -> None:
    kept, read = TokenShards(folder, split="train"), TokenShards(folder, split="train", in_memory=False)
    assert held_by(read) == 8 * len(read) and len(read) == len(kept)  # places
    assert list(read.keys) == list(kept.keys) and read.codes().equal(kept.codes())
    for index in range(len(kept)):
        left, right = kept.sample(index, seed=1), read.sample(index, seed=1)
        assert left["codes"].equal(right["codes"]) and left["codes"].dtype == right["codes"].dtype
        assert left["caption"] == right["caption"]
    loader = torch.utils.data.DataLoader(read, batch_size=2, num_workers=1, collate_fn=collate)
    assert torch.cat([batch["codes"] for batch in loader]).equal(kept.codes())


def test_shards_are_read_whole_once_as_long_as_nobody_touches_them(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "tokens"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".*"))
    hashed: list[str] = []
    whole = sha256_of
    monkeypatch.setattr("generation.data.token_shards.sha256_of", lambda path: hashed.append(path.name) or whole(path))
    for _ in range(2):
        TokenShards(str(copy))
    shards = [path.name for path in shard_files(copy)]
    assert sorted(name for name in hashed if name in shards) == shards  # once
    last = copy / shards[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is not what was written"):
        TokenShards(str(copy))


def test_every_process_and_split_finds_its_own_features(folder: str) -> None:
    tokens = TokenShards(folder)
    alone = [tokens.sample(index, seed=0) for index in range(10)]
    spawned = pickle.loads(pickle.dumps(tokens))  # noqa: S301  # what a spawned worker gets
    tokens._shards._process = -1  # what a forked worker finds
    for other in (tokens, spawned, TokenShards(folder, split="train", length=7)):
        for index in (6, 0, 4, 3):  # shards of four
            sample = other.sample(index, seed=0)
            assert sample["text"].equal(alone[index]["text"])
            assert sample["text_mask"].equal(alone[index]["text_mask"])
    loader = torch.utils.data.DataLoader(tokens, batch_size=5, num_workers=1, collate_fn=collate)
    assert torch.cat([batch["text"] for batch in loader]).equal(torch.stack([sample["text"] for sample in alone]))


def test_features_that_do_not_fit_their_captions_are_found(folder: str, tmp_path: Path) -> None:
    header, shard = read_shard(shard_files(Path(folder))[0])
    path = tmp_path / "s.safetensors"
    for ends in (shard.text_ends + 1, shard.text_ends.flip(0), shard.text_ends[:-1]):
        write_shard(path, header, replace(shard, text_ends=ends))
        with pytest.raises(ValueError, match=r"damaged text features|do not fit together"):
            read_shard(path, with_text=False)
    write_shard(path, header, replace(shard, text=None, text_ends=None))
    with pytest.raises(ValueError, match="damaged text features"):
        read_shard(path)


def test_a_changed_byte_is_noticed_before_training(folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    path = shard_files(tmp_path / "copy")[1]
    content = bytearray(path.read_bytes())
    content[content.index(read_shard(path)[1].codes.numpy().tobytes())] ^= 1  # still a code
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} is not what was written"):
        TokenShards(str(tmp_path / "copy"))
    assert len(TokenShards(str(tmp_path / "copy"), verify=False, use_text=False)) == 10


def test_scenes_are_kept_by_their_backgrounds(folder: str) -> None:
    rough = [f"scenes/{seed}" for seed in range(10) if sample_scene(seed).background.texture in ("checks", "noise")]
    assert list(TokenShards(folder, textures=["checks", "noise"]).keys) == rough
    assert list(TokenShards(folder, textures=["checks", "noise"], length=1).keys) == rough[:1]
    with pytest.raises(ValueError, match="holds no samples"):
        TokenShards(folder, textures=["plain"])


def test_no_shard_is_read_that_is_not_needed(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "generation.data.source.read_shard", lambda path, **options: (read.append(path), read_shard(path, **options))[1]
    )
    assert len(TokenShards(folder, length=1)) == 1 and len(read) == 1


def test_backgrounds_that_there_are_not_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="textures"):
        TokenShards(folder, textures=[])


def test_codes_before_an_object_begins_weigh_less(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TokenShards(folder, unbegun=0.4)
    for index in range(3):
        begun = torch.from_numpy(begun_cells(sample_scene(index), 4)).flatten()
        assert tokens.sample(index, seed=0)["weights"].tolist() == torch.where(begun, 1.0, 0.4).tolist()
    assert "weights" not in TokenShards(folder).sample(0, seed=0)
    monkeypatch.setattr(source, "seed_of_key", lambda key: None)  # photographs, which lie among scenes in a batch
    assert tokens.sample(0, seed=0)["weights"].equal(torch.ones(16))
    with pytest.raises(ValueError, match=r"unbegun must be in \(0, 1\], got 0"):
        TokenShards(folder, unbegun=0)


def test_a_false_caption_goes_with_the_true_one(folder: str) -> None:
    tokens = TokenShards(folder, contrary=["count", "relation"], reworded=0.8, related=0.5, use_text=False)
    plain = TokenShards(folder, reworded=0.8, related=0.5, use_text=False)
    told = 0
    for index in range(10):
        scene = sample_scene(index)
        for seed in range(4):
            sample = tokens.sample(index, seed=seed)
            assert sample["caption"] == plain.sample(index, seed=seed)["caption"]
            if sample["contrary"]:
                told += 1
                with pytest.raises(ValueError, match="no caption of scene"):
                    spec_of_caption(scene, sample["contrary"])
    assert told > 10
    assert "contrary" not in plain.sample(0, seed=0)
    with pytest.raises(
        ValueError, match=r"contrary must be some of count, colour, relation, shape, kind, got \['size'\]"
    ):
        TokenShards(folder, contrary=["size"])  # type: ignore[list-item]


def test_what_is_ahead_goes_with_scenes_alone(folder: str, tmp_path: Path) -> None:
    tokens = TokenShards(folder, ahead=True)
    batch = collate([tokens.sample(index, seed=0) for index in range(3)])
    assert batch["ahead"].shape == (3, TOKENS, 3)
    assert batch["ahead"][2].tolist() == objects_ahead(sample_scene(2), 4).tolist()
    assert "ahead" not in TokenShards(folder).sample(0, seed=0)
    shutil.copytree(folder, tmp_path / "tokens")
    path = shard_files(tmp_path / "tokens")[0]
    header, shard = read_shard(path)
    write_shard(path, header, replace(shard, keys=["scenes/0", "cats/1", *shard.keys[2:]]))
    with pytest.raises(ValueError, match="also holds 'cats/1'"):
        TokenShards(str(tmp_path / "tokens"), ahead=True, verify=False)
