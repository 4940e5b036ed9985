from __future__ import annotations

import os

import pytest

from layton.data.folder import ImageFolderSource
from layton.data.images import ImageError
from layton.data.transforms import Fit


@pytest.fixture
def folder(kit, tmp_path):
    root = tmp_path / "pets"
    (root / "sub").mkdir(parents=True)
    for number in range(5):
        (root / f"{number}.jpg").write_bytes(kit.encode(kit.smooth_image(number)))
    (root / "sub" / "cat.PNG").write_bytes(kit.encode(kit.smooth_image(9), "PNG"))
    (root / "1.txt").write_text("one \n")
    (root / "notes.md").write_text("ignored")
    return root


def make(folder, **options):
    return ImageFolderSource(str(folder), transform=Fit(8), **{"split": None, **options})


def test_images_are_found_sorted_with_captions_beside_them(folder):
    data = make(folder)
    assert data.keys[:] == [*(f"pets/{i}" for i in range(5)), "pets/sub/cat"]
    assert [data[i]["caption"] for i in range(3)] == ["", "one", ""] == [data.told(i) for i in range(3)]
    assert data[5]["image"].shape == (3, 8, 8)


def test_integer_names_split_modulo_five_and_others_by_hash(folder):
    assert make(folder, split="validation").keys[:] == ["pets/1"]
    assert make(folder, split="test").keys[:] == ["pets/0"]
    assert make(folder, split="train").keys[:] == ["pets/2", "pets/3", "pets/4", "pets/sub/cat"]


def test_folders_at_the_top_are_classes_where_that_is_said(folder):
    with pytest.raises(ValueError, match=r"0\.jpg: lies in no class's folder"):
        make(folder, classes=True)
    for number in range(5):
        (folder / "dog" / "big").mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").rename(folder / "dog" / "big" / f"{number}.jpg")
    data, plain = make(folder, classes=True), make(folder)
    assert [data[i]["caption"] for i in range(6)] == ["dog"] * 5 + ["sub"]
    assert data.stamp() != plain.stamp() and data.keys[:] == plain.keys[:]


def test_a_captions_file_wins_and_its_orphans_are_named(folder):
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "1.jpg", "text": "from the list"}\n\n{"file_name": "../../etc/passwd", "text": "x"}\n'
    )
    data = make(folder)
    assert data[1]["caption"] == "from the list" and data.bad.names == ["../../etc/passwd"]


@pytest.mark.parametrize(
    "line", ["not json", "[]", '{"text": "x"}', '{"file_name": 3}', '{"file_name": "1.jpg"}\n' * 2]
)
def test_a_malformed_captions_file_is_refused_with_its_line(folder, line):
    (folder / "captions.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"captions\.jsonl:\d"):
        make(folder)


def test_two_images_of_one_key_are_refused(kit, folder):
    (folder / "1.png").write_bytes(kit.encode(kit.smooth_image(), "PNG"))
    with pytest.raises(ValueError, match=r"1\.jpg and 1\.png"):
        make(folder)


def test_broken_images_are_named_and_replaced(folder):
    (folder / "2.jpg").write_bytes(b"<html>")
    data = make(folder)
    assert data[2]["key"] != "pets/2" and data.bad.names == [str(folder / "2.jpg")]


def test_files_stand_in_the_order_of_their_paths_and_take_little_memory(tmp_path):
    root = tmp_path / "pets"
    names = [
        "a/x.jpg",
        "a.jpg",
        "a-b/y.jpg",
        "a-b.jpg",
        "a/b/c/z.webp",
        "a/b.jpeg",
        "Z.jpg",
        "é\udcff.jpg",
        "a/b.txt",
        "0",
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "link").symlink_to(root / "a")
    data = make(root)
    wanted = sorted(
        path.relative_to(root) for path in root.rglob("*.*") if path.suffix != ".txt" and "link" not in path.parts
    )
    assert [f"pets/{path.with_suffix('').as_posix()}" for path in wanted] == data.keys[:] and len(data) == 8
    (root / "captions.jsonl").write_text(
        "".join(f'{{"file_name": "{n}", "text": "{i}"}}\n' for i, n in enumerate(names[:6]))
    )
    listed = make(root)
    assert [listed.told(place) for place in range(8)] == ["", *"450231", ""]
    kept = (
        listed._files._content,
        listed._files._ends,
        listed._listed._content,
        listed._listed._spans,
        listed._keys._rows,
    )
    assert sum(memoryview(part).nbytes for part in kept) == sum(len(os.fsencode(n)) for n in names[:8]) + 2 + 6 + 8 * 32


def test_a_key_is_one_images_also_where_others_stand_between(kit, folder):
    for name in ("1.jpg.png", "1.png"):
        (folder / name).write_bytes(kit.encode(kit.smooth_image(), "PNG"))
    with pytest.raises(ValueError, match=r"1\.jpg and 1\.png would share the key 'pets/1'"):
        make(folder)


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        make(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no images"):
        make(tmp_path)


def test_what_cannot_be_read_is_not_missing_unseen(folder, monkeypatch):
    whole = make(folder).keys[:]
    (folder / "sub" / "loop").symlink_to("loop")
    assert make(folder).keys[:] == whole
    scandir = os.scandir

    def stale(place):
        if str(place).endswith("sub/"):
            raise OSError(116, "Stale file handle")
        return scandir(place)

    monkeypatch.setattr("layton.data.folder.os.scandir", lambda place: stale(f"{place}/"))
    with pytest.raises(ValueError, match=r"sub.* cannot be read \(Stale file handle\)"):
        make(folder)


def test_names_and_captions_of_any_bytes(kit, tmp_path):
    name = os.fsencode(str(tmp_path)) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(kit.encode(kit.smooth_image(), "PNG"))
    for split in ("train", "validation", "test", None):
        try:
            data = make(tmp_path, split=split)
        except ValueError:
            continue
        assert data.sample(0, seed=0)["key"].endswith("caf\udce9") and len(data.stamp()) == 64
    (tmp_path / "b.png").write_bytes(kit.encode(kit.smooth_image(), "PNG"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa cat\n")
    (tmp_path / "captions.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "caf\\udce9.png", "text": " half \\ud83d"}\n')
    data = make(tmp_path)
    assert [data.told(index) for index in range(2)] == ["a cat", "half ?"]


def test_a_caption_that_is_no_file_does_not_hold_up(kit, folder):
    (folder / "2.txt").unlink(missing_ok=True)
    os.mkfifo(folder / "2.txt")
    with pytest.raises(ImageError, match="no regular file"):
        make(folder).told(2)
