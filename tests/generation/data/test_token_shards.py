from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from laytongen_parts import CODES, TOKENS, tiny_text_encoder, tiny_tokenizer
from PIL import Image

from generation.data.source import TokenShards
from generation.data.token_shards import (
    MANIFEST_NAME,
    PLAN_NAME,
    TokenHeader,
    TokenShard,
    read_json,
    read_shard,
    sha256_of,
    shard_files,
    shard_name,
    verify,
    write_manifest,
    write_shard,
    write_sorted_json,
)
from generation.data.tokenizing import ShardResult, ShardWriter, TokenizeJob, tokenize_dataset
from generation.text.encoders import TransformersTextEncoder
from layton.data.folder import ImageFolderSource
from layton.data.geometry import Geometry
from layton.data.shards import ShardSource
from layton.data.sources import ScenesSource
from layton.data.transforms import Fit
from layton.lock import FolderInUseError, lock_folder
from layton.scenes import render, sample_scene
from layton.tokenizer import LaytonTokenizer

HEADER = TokenHeader("f" * 16, CODES, TOKENS, 32, "e" * 16, "crop")


@pytest.fixture(scope="module")
def tokenizer() -> LaytonTokenizer:
    return tiny_tokenizer()


def scenes_job(tokenizer: LaytonTokenizer, *, count: int = 10, text: bool = False) -> TokenizeJob:
    source = ScenesSource(split="train", length=count, size=tokenizer.image_size)
    encoder = tiny_text_encoder() if text else None
    return TokenizeJob(source, tokenizer, "scenes", shard_size=4, batch_size=3, text_encoder=encoder)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def image_bytes(seed: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(sample_scene(seed), 48)).save(file, form)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_images_come_back_in_their_sizes(tmp_path: Path) -> None:
    codes = torch.randint(CODES, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    path, header = tmp_path / "s.safetensors", replace(HEADER, policy="pad")
    write_shard(path, header, TokenShard(codes, ["a", "b"], ["", ""], sizes=torch.tensor([[30, 60], [50, 20]])))
    found, shard = read_shard(path)
    encoded = shard.encoded(found)
    assert encoded.codes.equal(codes)
    assert [geometry.original_size for geometry in encoded.geometries] == [(30, 60), (50, 20)]
    assert encoded.geometries[0] == Geometry.plan((30, 60), HEADER.image_size, policy="pad")
    write_shard(path, header, TokenShard(codes, ["a", "b"], ["", ""], sizes=torch.tensor([[30, 60], [0, 2**30]])))
    with pytest.raises(ValueError):
        read_shard(path)[1].encoded(header)
    write_shard(path, header, TokenShard(codes, ["a", "b"], ["", ""]))
    with pytest.raises(ValueError, match="does not say what sizes"):
        read_shard(path)[1].encoded(header)
    with pytest.raises(ValueError, match="sizes for 2 images"):
        write_shard(path, header, TokenShard(codes, ["a", "b"], ["", ""], sizes=torch.ones(3, 2)))


def test_a_shard_survives_a_trip_to_disk(tmp_path: Path) -> None:
    codes = torch.randint(CODES, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    shard = TokenShard(codes, ["a", "b/c", "写"], ["", "line\nbreak 😀", "x"], ["d: broken"])
    write_shard(tmp_path / "s.safetensors", HEADER, shard)
    first = (tmp_path / "s.safetensors").read_bytes()
    header, found = read_shard(tmp_path / "s.safetensors")
    assert header == HEADER
    assert found.codes.dtype == torch.uint16
    assert found.codes.long().equal(codes)
    assert (found.keys, found.captions, found.skipped) == (shard.keys, shard.captions, shard.skipped)
    write_shard(tmp_path / "s.safetensors", HEADER, shard)
    assert (tmp_path / "s.safetensors").read_bytes() == first
    with pytest.raises(ValueError, match="codes are not in"):
        write_shard(tmp_path / "t.safetensors", HEADER, TokenShard(codes + CODES, *[["a", "b", "c"]] * 2))
    for length in (0, 7, len(first) // 2, len(first) - 1):
        (tmp_path / "cut.safetensors").write_bytes(first[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read_shard(tmp_path / "cut.safetensors")


def test_an_interrupted_run_goes_on_to_the_same_bytes(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    report = tokenize_dataset(scenes_job(tokenizer), tmp_path / "whole")
    assert (report.inputs, report.samples, report.shards, report.reused) == (10, 10, 3, 0)
    done: list[int] = []

    def stop(count: int) -> None:
        done.append(count)
        if sum(done) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_dataset(scenes_job(tokenizer), tmp_path / "parts", on_progress=stop)
    assert not (tmp_path / "parts" / MANIFEST_NAME).exists()
    with pytest.raises(ValueError, match="unfinished token dataset"):
        TokenShards(str(tmp_path / "parts"))
    assert tokenize_dataset(scenes_job(tokenizer), tmp_path / "parts").reused == 1
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    assert verify(tmp_path / "whole") == []

    codes = TokenShards(str(tmp_path / "whole")).codes()
    images = torch.stack([scenes_job(tokenizer).source.sample(i, seed=0)["image"] for i in range(10)])
    assert codes.equal(tokenizer.encode(images))
    assert codes.unique().numel() > 5

    with pytest.raises(ValueError, match=r"begun with other images \(10, now 11"):
        tokenize_dataset(scenes_job(tokenizer, count=11), tmp_path / "whole")
    with pytest.raises(ValueError, match="fingerprint: stored"):
        tokenize_dataset(scenes_job(tiny_tokenizer(seed=1)), tmp_path / "whole")


def test_other_files_of_the_same_names_are_not_taken_for_those(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    def job(folder: str) -> TokenizeJob:
        source = ShardSource(str(tmp_path / folder / "*.tar"), split=None, transform=Fit(tokenizer.image_size))
        return TokenizeJob(source, tokenizer, "*.tar")

    for folder, text in (("a", b"a red star"), ("b", b"a tan star")):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", {"k.png": image_bytes(0), "k.txt": text})
    tokenize_dataset(job("a"), tmp_path / "out")
    assert tokenize_dataset(job("a"), tmp_path / "out").reused == 1
    with pytest.raises(ValueError, match=r"begun with other images \(1, now 1"):
        tokenize_dataset(job("b"), tmp_path / "out")

    images = tmp_path / "images"
    images.mkdir()
    (images / "k.png").write_bytes(image_bytes(0))
    stamps = {ImageFolderSource(str(images), split=None).stamp() for _ in range(2)}
    (images / "k.txt").write_text("a star")
    stamps.add(ImageFolderSource(str(images), split=None).stamp())
    (images / "captions.jsonl").write_text(json.dumps({"file_name": "k.png", "text": "a ring"}))
    stamps.add(ImageFolderSource(str(images), split=None).stamp())
    assert len(stamps) == 3


def test_shards_written_elsewhere_and_in_any_order_are_the_same(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    tokenize_dataset(scenes_job(tokenizer), tmp_path / "here")

    def backwards(out: Path, numbers: Sequence[int]) -> Iterator[ShardResult]:
        for number in reversed(numbers):
            yield ShardWriter(scenes_job(tokenizer), out)(number)

    told: list[int] = []
    report = tokenize_dataset(scenes_job(tokenizer), tmp_path / "there", on_progress=told.append, elsewhere=backwards)
    assert (report.samples, report.shards, report.reused, told) == (10, 3, 0, [2, 4, 4])
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert tokenize_dataset(scenes_job(tokenizer), tmp_path / "there", elsewhere=backwards).reused == 3


def test_a_damaged_shard_is_found_and_made_again(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    tokenize_dataset(scenes_job(tokenizer), tmp_path)
    before = tree(tmp_path)
    path = shard_files(tmp_path)[1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert [fault.split(":")[0] for fault in verify(tmp_path)] == [path.name]
    path.write_bytes(content[:-9])
    assert tokenize_dataset(scenes_job(tokenizer), tmp_path).reused == 2
    assert tree(tmp_path) == before
    for missing in shard_files(tmp_path)[:2]:
        missing.unlink()
    assert [fault.split(":")[0] for fault in verify(tmp_path)] == [f"tokens-0000{n}.safetensors" for n in (0, 1)]
    manifest = tmp_path / "manifest.json"
    for part in ("header", "shards"):
        manifest.write_text(json.dumps({k: v for k, v in json.loads(before["manifest.json"]).items() if k != part}))
        with pytest.raises(ValueError, match=r"manifest\.json.*damaged"):
            verify(tmp_path)


def test_a_second_writer_is_refused(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    with lock_folder(tmp_path / "out"), pytest.raises(FolderInUseError, match="in use by"):
        tokenize_dataset(scenes_job(tokenizer), tmp_path / "out")


def test_all_faults_are_listed_repeated_keys_beside_damage(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    tokenize_dataset(scenes_job(tokenizer), tmp_path)
    first, second, third = shard_files(tmp_path)
    values = read_json(tmp_path / MANIFEST_NAME)
    entries = values["shards"]
    third.write_bytes(first.read_bytes())
    entries[2] = {**entries[2], **{name: entries[0][name] for name in ("sha256", "samples", "skipped")}}
    write_manifest(tmp_path, values)
    second.write_bytes(second.read_bytes()[:-9])
    faults = verify(tmp_path)
    assert sum(f"is in {first.name} too" in fault for fault in faults) == entries[0]["samples"]
    assert any(fault.startswith(f"{second.name}: its bytes are not") for fault in faults)


def test_no_byte_of_the_manifest_can_change_unseen(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    tokenize_dataset(scenes_job(tokenizer, count=4), tmp_path)
    path = tmp_path / MANIFEST_NAME
    content, name = path.read_bytes(), b'\n "sha256": "'
    seal = content.index(name)  # whose own name says that there is one; older manifests have none
    assert verify(tmp_path) == []
    for place in range(len(content)):
        if not seal <= place < seal + len(name) and content[place : place + 1].strip():
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(ValueError, match=r"manifest\.json"):
                verify(tmp_path)


def test_features_too_large_for_half_precision_are_refused(
    tokenizer: LaytonTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = scenes_job(tokenizer, count=4, text=True)
    small = TransformersTextEncoder._features
    monkeypatch.setattr(TransformersTextEncoder, "_features", lambda *given: small(*given) * 1e6)
    with pytest.raises(ValueError, match="not finite in half precision"):
        tokenize_dataset(job, tmp_path)


def test_a_resume_reads_no_text_features_and_each_file_once(
    tokenizer: LaytonTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, read = scenes_job(tokenizer, text=True), []
    tokenize_dataset(job, tmp_path)
    monkeypatch.setattr(
        "generation.data.tokenizing.sha256_of", lambda path: (read.append(path.name), sha256_of(path))[1]
    )
    monkeypatch.setattr(
        "generation.data.tokenizing.read_shard",
        lambda path, *, with_text: (read.append(with_text), read_shard(path, with_text=with_text))[1],
    )
    assert tokenize_dataset(job, tmp_path).reused == 3
    assert read == [part for number in range(3) for part in (shard_name(number), False)]


def test_broken_images_are_passed_over_and_named(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    good = {f"{n:05d}.{end}": data for n in range(4) for end, data in (("png", image_bytes(n)), ("txt", b"a star"))}
    broken = {**good, "00002.png": b"\x89PNG\r\n\x1a\nno", "00009.txt": b"alone"}
    source = ShardSource([str(write_tar(tmp_path / "s.tar", broken))], split=None, max_bad=None)
    report = tokenize_dataset(TokenizeJob(source, tokenizer, "s"), tmp_path / "out")
    assert report.inputs == report.samples + len(report.skipped) == 5
    assert sorted(reason.split(":")[0] for reason in report.skipped) == ["s/00002", "s/00009"]
    assert read_json(tmp_path / "out" / MANIFEST_NAME)["counts"]["skipped"] == 2
    assert list(TokenShards(str(tmp_path / "out")).keys) == ["s/00000", "s/00001", "s/00003"]
    assert verify(tmp_path / "out") == []


def test_an_image_folder(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(image_bytes(number))
    (tmp_path / "in" / "1.txt").write_text("two hearts")
    source = ImageFolderSource(str(tmp_path / "in"), split=None, max_bad=None)
    tokenize_dataset(TokenizeJob(source, tokenizer, "in", policy="pad"), tmp_path / "out")
    tokens = TokenShards(str(tmp_path / "out"))
    assert [tokens.sample(i, seed=0)["caption"] for i in range(3)] == ["", "two hearts", ""]
    assert tokens.header.policy == "pad"
    header, shard = read_shard(tmp_path / "out" / shard_name(0))
    with Image.open(tmp_path / "in" / "0.png") as image:
        side = image.size
    assert [picture.size for picture in tokenizer.decode_images(shard.encoded(header))] == [side] * 3


def test_the_precision_is_recorded_and_another_one_refused(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    plain, rough = scenes_job(tokenizer, count=4), replace(scenes_job(tokenizer, count=4), precision="bf16")
    tokenize_dataset(plain, tmp_path / "plain")
    tokenize_dataset(rough, tmp_path / "rough")
    first, second = (TokenShards(str(tmp_path / name)) for name in ("plain", "rough"))
    assert (first.header.precision, second.header.precision) == ("fp32", "bf16")
    share = (first.codes() == second.codes()).float().mean()
    assert 0.5 < share < 1.0  # the encoder did compute otherwise
    with pytest.raises(ValueError, match="precision: stored 'fp32', wanted 'bf16'"):
        tokenize_dataset(rough, tmp_path / "plain")
    with pytest.raises(ValueError, match="precision: stored 'bf16', wanted 'fp32'"):
        tokenize_dataset(plain, tmp_path / "rough")


def test_datasets_that_name_no_precision_are_of_fp32(tokenizer: LaytonTokenizer, tmp_path: Path) -> None:
    tokenize_dataset(scenes_job(tokenizer, count=4), tmp_path)
    for name in (PLAN_NAME, MANIFEST_NAME):
        values = read_json(tmp_path / name)
        del values["header"]["precision"]
        values.pop("sha256", None)  # nor do they say a digest
        write_sorted_json(tmp_path / name, values)
    assert verify(tmp_path) == []
    assert tokenize_dataset(scenes_job(tokenizer, count=4), tmp_path).reused == 1
    with pytest.raises(ValueError, match="precision: stored 'fp32'"):
        tokenize_dataset(replace(scenes_job(tokenizer, count=4), precision="bf16"), tmp_path)
