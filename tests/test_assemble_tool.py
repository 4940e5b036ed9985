"""tools/assemble.py: a generator joins all that a tokenizer folder has."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from laytongen_parts import tiny_generator, tiny_tokenizer

from generation.generator import load_generator, save_generator
from layton.tokenizer import LaytonTokenizer

TOOL = Path(__file__).parents[1] / "tools" / "assemble.py"


def assemble(monkeypatch: pytest.MonkeyPatch, **options: Path) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words])
    monkeypatch.syspath_prepend(TOOL.parent)
    runpy.run_path(str(TOOL), run_name="__main__")


def test_a_generator_joins_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "few_step").mkdir()
    (tmp_path / "whole" / "few_step" / "few_step.json").write_text("{}")
    save_generator(tmp_path / "export", tiny_generator(tokenizer))
    assemble(monkeypatch, tokenizer=tmp_path / "whole", laytongen=tmp_path / "export", out=tmp_path / "new")
    assert "decoders/light, encoder, few_step, laytongen, quantizer" in capsys.readouterr().out
    for path in (path for path in (tmp_path / "whole").rglob("*") if path.is_file()):
        assert (tmp_path / "new" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    load_generator(tmp_path / "new" / "laytongen").card.require_tokenizer(
        LaytonTokenizer.from_pretrained(tmp_path / "new")
    )
    with pytest.raises(SystemExit):
        assemble(monkeypatch, tokenizer=tmp_path / "whole", laytongen=tmp_path / "export", out=tmp_path / "new")
    assert "new exists" in capsys.readouterr().err


def test_what_does_not_fit_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    save_generator(tmp_path / "export", tiny_generator(tiny_tokenizer(seed=1)))
    with pytest.raises(SystemExit) as end:
        assemble(monkeypatch, tokenizer=tmp_path / "whole", laytongen=tmp_path / "export", out=tmp_path / "new")
    assert end.value.code == 1 and capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "whole"]
