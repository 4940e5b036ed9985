"""What `layton app` offers, and that the page holds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_tools import Run
from laytongen_parts import write_model
from PIL import Image

from generation.commands.app import DIFFUSION, LAYTONGEN, Studio, build_page


def test_pictures_come_back_in_their_own_size_with_figures(both: Path, photos: Path) -> None:
    studio = Studio.load(str(both))
    source = next(path for path in sorted(photos.rglob("*")) if path.is_file())
    picture, figures = studio.reconstruct(str(source), "light")
    with Image.open(source) as original:
        assert picture.size == original.size
    assert figures.startswith(f"{studio.tokenizer.num_tokens} tokens, ") and " dB, SSIM" in figures
    again, _ = studio.reconstruct(str(source), "light")
    assert again.tobytes() == picture.tobytes()
    with pytest.raises(ValueError, match="choose a picture"):
        studio.reconstruct(None, "light")
    two, _ = studio.reconstruct(str(source), "diffusion", 2)
    assert two.size == picture.size and two.tobytes() != picture.tobytes()


def test_text_is_drawn_by_what_lies_beside_the_tokenizer(both: Path, tokenizer: Path) -> None:
    studio = Studio.load(str(both))
    assert list(studio.painters) == [DIFFUSION]
    (one, remarks), (other, _) = (studio.draw("a red star", DIFFUSION, 3) for _ in range(2))
    assert one.tobytes() == other.tobytes()
    assert remarks == ""
    alone = Studio.load(str(tokenizer))
    assert not alone.painters
    with pytest.raises(ValueError, match="draws nothing here"):
        alone.draw("a red star", DIFFUSION)


@pytest.mark.filterwarnings("ignore::generation.pipeline.PromptWarning")
def test_what_is_not_read_of_a_prompt_is_told_on_the_page(tmp_path: Path) -> None:
    studio = Studio.load(str(write_model(tmp_path)))
    _, remarks = studio.draw("a red star " * 99, LAYTONGEN)
    assert re.fullmatch(r"\d+ of its \d+ tokens are read", remarks)
    _, remarks = studio.draw("a red zebra", LAYTONGEN, 2**32 - 1)
    assert remarks == "not in its vocabulary: zebra"
    _, remarks = studio.draw("\N{FIRE}", LAYTONGEN)
    assert remarks == "there is no word in it"
    for prompt, seed, told in ((" ", 0, "what to draw"), ("a star", 2**32, "a seed lies in"), ("a star", -1, "a seed")):
        with pytest.raises(ValueError, match=told):
            studio.draw(prompt, LAYTONGEN, seed)


def test_pictures_come_to_it_as_they_are(both: Path, tmp_path: Path) -> None:
    studio = Studio.load(str(both))
    Image.new("RGBA", (32, 32), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    pictures = [studio.reconstruct(str(tmp_path / f"{name}.png"), "light") for name in ("clear", "white")]
    assert pictures[0][0].tobytes() == pictures[1][0].tobytes() and pictures[0][1] == pictures[1][1]
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + b"x" * 50)
    with pytest.raises(ValueError, match=r"^the picture: not a JPEG, PNG or WebP file$"):
        studio.reconstruct(str(tmp_path / "a.gif"), "light")


def test_the_page_has_a_tab_for_each(both: Path, tokenizer: Path) -> None:
    pytest.importorskip("gradio", reason="the extra 'app' is not installed")

    def labels(studio: Studio) -> set[str]:
        return {str(block.get("props", {}).get("label")) for block in build_page(studio).config["components"]}

    assert {"Reconstruct", "Draw from text", "decoder", "prompt"} <= labels(Studio.load(str(both)))
    assert "prompt" not in labels(Studio.load(str(tokenizer)))


def test_without_gradio_it_says_what_to_install(fails: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generation.commands.app.find_spec", lambda name: None)
    assert "layton[app]" in fails("app", status=2)
