"""What a name means: a part's own folder, a folder that holds the part, or an embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from layton.assets import ASSETS, DIFFUSION, LDM, LIGHT, find_autoencoder, resolve


@pytest.mark.parametrize("part", [LDM, DIFFUSION, LIGHT, "encoder"])
def test_a_part_is_found_wherever_it_lies(part: str) -> None:
    wanted = ASSETS / "mini" / part
    assert resolve("mini", part=part) == resolve(ASSETS / "mini", part=part) == resolve(wanted, part=part) == wanted


def test_a_folder_without_the_part_is_taken_for_the_part(tmp_path: Path) -> None:
    assert resolve(tmp_path, part=LIGHT) == tmp_path
    with pytest.raises(ValueError, match="neither a folder nor an embedded model"):
        resolve("nothing", part=LIGHT)


def test_autoencoders_of_pipelines_and_tokenizers() -> None:
    wanted = ASSETS / "mini/ldm/vae"
    for name in ("mini", ASSETS / "mini", ASSETS / "mini/ldm", wanted):
        assert find_autoencoder(name) == wanted
