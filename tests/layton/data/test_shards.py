from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from layton.data.bad import TooManyBadImagesError
from layton.data.images import ImageError, load_image, to_image
from layton.data.shards import ShardSource, expand_shards
from layton.data.tar import ShardError, index_shard
from layton.data.transforms import Fit


def source(shards, **options):
    return ShardSource(shards, transform=Fit(16), **{"split": None, **options})


def test_samples_come_with_caption_key_and_the_pixels_of_the_file(kit, shards):
    data = source(shards)
    assert len(data) == 20 and data.keys[13] == "toy-0001/010003"
    sample = data[13]
    assert sample["key"] == "toy-0001/010003" and sample["caption"] == "a thing 010003" == data.told(13)
    assert torch.equal(sample["image"], Fit(16)(load_image(kit.encode(kit.smooth_image(10003))), seed=0))
    assert data.read_bytes(13) == kit.encode(kit.smooth_image(10003))
    assert to_image(sample["image"]).size == (16, 16)


def test_splits_are_disjoint_and_whole(shards):
    parts = {split: set(source(shards, split=split).keys) for split in ("train", "validation", "test")}
    assert parts["test"] == {f"toy-000{n}/0{n}000{i}" for n in (0, 1) for i in (0, 5)}
    assert {name: len(keys) for name, keys in parts.items()} == {"train": 12, "validation": 4, "test": 4}
    assert set.union(*parts.values()) == set(source(shards).keys)


def test_a_shard_cut_anywhere_is_reported(kit, tmp_path):
    shard = kit.shard(tmp_path / "a.tar", [f"{i:06d}" for i in range(20)])
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        whole = max(member.offset_data + -(-member.size // 512) * 512 for member in tar) + 1024  # two blocks of zeros
    cut = tmp_path / "cut.tar"
    cuts = {edge + shift for edge in range(0, whole, 512) for shift in (-1, 0, 1)} - {-1}
    for end in sorted(cuts):
        if end >= whole:
            continue
        cut.write_bytes(data[:end])
        with pytest.raises(ShardError, match=r"cut\.tar: .*(cut off|empty)"):
            index_shard(cut)
    cut.write_bytes(data[:whole])  # only padding is gone
    assert len(index_shard(cut).keys) == 20


def test_a_cut_names_the_offset_and_the_last_good_member(kit, tmp_path):
    shard = kit.shard(tmp_path / "a.tar", ["000001", "000002"])
    with tarfile.open(shard) as tar:
        member = tar.getmembers()[4]
    shard.write_bytes(shard.read_bytes()[: member.offset])
    with pytest.raises(ShardError, match=rf"{member.offset}.*last good member '000002.jpg'"):
        index_shard(shard)


def members(kit, *names):
    return [(name, kit.encode(kit.smooth_image()) if name.endswith("jpg") else b"text") for name in names]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("1.jpg", "2.jpg", "2.txt", "1.txt"), r"key '1' comes back at '1.txt' .* after '2'"),
        (("1.jpg", "1.txt", "2.jpg", "2.txt", "1.jpg"), r"key '1' comes back"),
        (("1.jpg", "1.txt", "1.jpg"), r"'1' has both '1.jpg' and '1.jpg'"),
        (("1.jpg", "1.jpeg", "1.txt"), r"'1' has both '1.jpg' and '1.jpeg'"),
        (("1.jpg", "2.jpg", "2.txt"), r"half a sample: key '1'"),
        (("1.jpg", "1.txt", "2.jpg"), r"half a sample: key '2'"),
        ((), r"holds no samples"),
        (("1.cls", "2.cls", "README"), r"holds no samples \(passed over: 2 \.cls"),
    ],
)
def test_ambiguous_shards_are_refused_by_name(kit, tmp_path, names, message):
    shard = kit.write_tar(tmp_path / "s.tar", members(kit, *names))
    with pytest.raises(ShardError, match=r"s\.tar.*" + message):
        index_shard(shard)


def test_captions_may_be_optional(kit, tmp_path):
    shard = kit.write_tar(tmp_path / "s.tar", members(kit, "1.jpg", "1.txt", "2.jpg"))
    data = source(str(shard), captions="optional")
    assert [data[i]["caption"] for i in range(2)] == ["text", ""]


def test_empty_compressed_and_missing_files_are_refused(kit, tmp_path):
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "z.tar").write_bytes(gzip.compress(kit.shard(tmp_path / "good.tar", ["1"]).read_bytes()))
    (tmp_path / "junk.tar").write_bytes(b"junk" * 512)
    for name, message in {"zero": "0 bytes", "z": "compressed", "junk": "damaged", "none": "cannot be read"}.items():
        with pytest.raises(ShardError, match=rf"{name}\.tar: .*{message}"):
            index_shard(tmp_path / f"{name}.tar")


def test_a_key_in_two_shards_names_both(kit, tmp_path):
    for name in ("a", "b"):
        kit.shard(tmp_path / f"{name}.tar", ["000001"])
    with pytest.raises(ShardError, match=r"'000001' is in both .*a\.tar and .*b\.tar"):
        source(str(tmp_path / "*.tar"))
    assert source(str(tmp_path / "*.tar"), repeated_keys=True).keys[:] == ["a/000001", "b/000001"]
    (tmp_path / "more").mkdir()
    kit.shard(tmp_path / "more" / "a.tar", ["000001"])  # of the same name: the folder tells them apart
    paths = [str(tmp_path / "a.tar"), str(tmp_path / "more" / "a.tar")]
    assert source(paths, repeated_keys=True).keys[:] == [f"{tmp_path.name}/a/000001", "more/a/000001"]


def test_ranges_of_shards_as_webdataset_writes_them(kit, tmp_path):
    for number in range(3):
        kit.shard(tmp_path / f"s-{number:03d}.tar", [f"{number + 1:06d}"])
    assert expand_shards(str(tmp_path / "s-{000..001}.tar")) == [tmp_path / f"s-{number:03d}.tar" for number in (0, 1)]
    with pytest.raises(ValueError, match=r"no shard matches .*s-003\.tar"):
        expand_shards(str(tmp_path / "s-{002..003}.tar"))


def test_a_caption_without_its_image_is_counted_and_named(kit, tmp_path):
    shard = kit.write_tar(tmp_path / "s.tar", [*kit.sample_members("000001"), *members(kit, "000002.txt")])
    data = source(str(shard))
    assert len(data) == 1 and data.bad.names == ["s/000002"]
    with pytest.raises(TooManyBadImagesError, match="s/000002"):
        source(str(shard), max_bad=0)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_in_a_shard_is_ever_unpickled_or_run(kit, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Canary(canary))
    hostile = [(f"000001.{kind}", bomb) for kind in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "pickle.jpg")]
    shard = kit.write_tar(tmp_path / "s.tar", [*kit.sample_members("000001"), *hostile])
    monkeypatch.setenv("GOPEN_REWRITE", f"{shard}=pipe:touch {canary}")
    data = source(str(shard))
    assert data[0]["caption"] == "a thing 000001" and sum(data.ignored.values()) == len(hostile)
    for url in (f"pipe:touch {canary}", "scp:host:/x.tar", "http://host/x.tar", "file:/x.tar", "s3://b/x.tar"):
        with pytest.raises(ValueError, match="must be local files"):
            source(url)
    kit.write_tar(tmp_path / "p.tar", [("000002.jpg", bomb), ("000002.txt", b"x"), *kit.sample_members("000003")])
    swapped = source(str(tmp_path / "p.tar"))[0]
    assert swapped["key"] == "p/000003" and swapped["bad"] == ["p/000002: not a JPEG, PNG or WebP file"]
    assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    ["../000001.jpg", "a/../../b.jpg", "/etc/1.jpg", "\\1.jpg", "..\\1.jpg", "C:1.jpg", "a\n1.jpg", "x" * 300 + ".jpg",
     "\u202e1.jpg"],
)  # fmt: skip
def test_member_names_that_could_leave_a_folder_are_refused(kit, tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    shard = kit.write_tar(folder / "s.tar", [(name, kit.encode(kit.smooth_image())), *kit.sample_members("000001")])
    with pytest.raises(ShardError, match="refused member name"):
        index_shard(shard)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "s.tar"]


def test_links_devices_and_folders_are_ignored(kit, tmp_path):
    odd = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        info = tarfile.TarInfo("000009.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        odd.append(info)
    shard = kit.write_tar(tmp_path / "s.tar", [*odd, *kit.sample_members("000001")])
    data = source(str(shard))
    assert data.keys[:] == ["s/000001"] and data.ignored == {"not a regular file": 5}


def test_dotted_prefixes_and_folders_become_keys(kit, tmp_path):
    shard = kit.write_tar(tmp_path / "s.tar", members(kit, "./a/1.jpg", "./a/1.txt", "b/1.jpg", "b/1.txt"))
    assert list(index_shard(shard).keys) == ["a/1", "b/1"]


def test_broken_images_are_replaced_the_same_way_every_time(kit, tmp_path):
    stored = [kit.sample_members(f"{i:06d}") for i in range(8)]
    stored[3][0] = ("000003.jpg", stored[3][0][1][:100])
    shard = kit.write_tar(tmp_path / "s.tar", [member for sample in stored for member in sample])
    first, again = source(str(shard)), source(str(shard))
    sample = first.sample(3, seed=5)
    assert sample["key"] == again.sample(3, seed=9)["key"] != "s/000003"
    assert first.bad.names == ["s/000003"] and "JPEG" in sample["bad"][0]
    first.sample(3, seed=0)
    assert first.bad.count == 1  # the same image is counted once
    with pytest.raises(ImageError, match="s/000003"):
        first.load(3)
    with pytest.raises(TooManyBadImagesError, match=r"1 broken images, 0 allowed.*s/000003"):
        source(str(shard), max_bad=0).sample(3, seed=0)


def test_when_all_images_are_broken_the_error_says_so(kit, tmp_path):
    shard = kit.write_tar(tmp_path / "s.tar", [("1.jpg", b"no"), ("1.txt", b"x")])
    with pytest.raises(ImageError, match="s/1: broken, and so were"):
        source(str(shard)).sample(0, seed=0)


def test_bad_captions_count_as_broken(kit, tmp_path):
    good = kit.encode(kit.smooth_image())
    shard = kit.write_tar(
        tmp_path / "s.tar",
        [("1.jpg", good), ("1.txt", b"\xff\xfe"), ("2.jpg", good), ("2.json", b'{"caption": " a cat "}'),
         ("3.jpg", good), ("3.json", b"[" * 100_000)],
    )  # fmt: skip
    data = source(str(shard))
    assert data.load(1).caption == "a cat"
    for index in (0, 2):
        with pytest.raises(ImageError, match="unreadable caption"):
            data.load(index)


def test_a_shard_that_changed_since_it_was_indexed_is_noticed(kit, tmp_path):
    shard = kit.shard(tmp_path / "s.tar", ["000001"])
    data = source(str(shard))
    kit.shard(shard, ["000001", "000002"])
    with pytest.raises(ShardError, match="changed since it was indexed"):
        data.load(0)


def test_a_source_travels_to_another_process(shards):
    data = source(shards)
    data.load(0)
    twin = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert torch.equal(twin[4]["image"], data[4]["image"])


def test_no_match_and_an_empty_split_are_errors(kit, tmp_path):
    with pytest.raises(ValueError, match=r"no shard matches .*none\*"):
        source(str(tmp_path / "none*.tar"))
    shard = kit.shard(tmp_path / "s.tar", ["000001"])
    with pytest.raises(ValueError, match="'test'"):
        source(str(shard), split="test")


def test_reads_agree_with_tarfile(shards):
    data = source(shards)
    with tarfile.open(data.paths[1]) as tar:
        for index in range(10, 20):
            name = data.keys[index].split("/")[1] + ".jpg"
            assert data.read_bytes(index) == io.BytesIO(tar.extractfile(name).read()).getvalue()


@pytest.mark.skipif("LAYTON_PHOTOS" not in os.environ, reason="needs the photographs: LAYTON_PHOTOS=FOLDER")
def test_the_photographs_can_all_be_read():
    pattern = os.path.join(os.environ["LAYTON_PHOTOS"], "*.tar")
    parts = [source(pattern, split=split) for split in ("train", "validation", "test")]
    assert sum(len(part) for part in parts) == len(source(pattern))
    for part in parts:
        for index in range(len(part)):
            part.sample(index, seed=0)
        assert part.bad.count == 0


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted there")
def test_threads_share_few_open_files_and_leave_none(kit, tmp_path, monkeypatch):
    monkeypatch.setattr("layton.data.shards._MAX_OPEN_SHARDS", 2)
    real = os.open

    def slow(path, *args, **options):  # as on a network disk; the interpreter's lock is free meanwhile
        time.sleep(0.002)
        return real(path, *args, **options)

    for number in range(12):
        kit.shard(tmp_path / f"{number:02d}.tar", [f"{number}{row}" for row in range(4)])
    places = [index % 48 for index in range(48 * 4)]

    def still_open():
        links = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                links.append(os.readlink(descriptor))
        return sum(link.startswith(str(tmp_path)) for link in links)

    def read(threads):
        images = ShardSource(str(tmp_path / "*.tar"), split=None)
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda index: images.load(index).image.tobytes(), places))
        assert 0 < still_open() <= 2
        return found

    wanted = read(1)
    monkeypatch.setattr(os, "open", slow)
    assert read(8) == wanted
    assert still_open() == 0
