"""A judge with the text encoder that reads its captions: how well images' tokens show what their prompts ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from generation.judge import Judge
from generation.text.encoders import TextEncoder, text_encoder
from layton.folder import CONFIG_NAME, class_name, load_config, resolve_class, save_config
from layton.tokenizer import LDM_FOLDER, LaytonTokenizer

CLASS_NAME = "generation.caption_judge.CaptionJudge"
PART = "judge"


@dataclass(frozen=True, slots=True, eq=False)
class CaptionJudge:
    """What chooses among drawn images; lies in ``judge/`` beside the tokenizer whose codes it reads.

    Attributes:
        judge: Looks and compares.
        text_encoder: Reads; frozen.
        fingerprint: Of the tokenizer's codebook.

    Raises:
        ValueError: If the judge cannot read what the text encoder writes.
    """

    judge: Judge
    text_encoder: TextEncoder
    fingerprint: str

    def __post_init__(self) -> None:
        """Check that the parts fit."""
        config, encoder = self.judge.config, self.text_encoder
        if config["text_width"] != encoder.width or len(self.judge.order) < encoder.max_length:
            raise ValueError(
                f"the judge reads captions of {config['text_length']} x {config['text_width']}, the text encoder "
                f"writes {encoder.max_length} x {encoder.width}"
            )
        if getattr(encoder, "padding", "left") != "left":
            raise ValueError("captions must be padded on the left, as for the generator")

    @torch.no_grad()
    def odds(self, tokenizer: LaytonTokenizer, codes: Tensor, captions: Sequence[str]) -> Tensor:
        """Log odds that images show what their captions say.

        Args:
            tokenizer: Whose codes they are.
            codes: (B, N) int64.
            captions: B texts.

        Returns:
            (B,) float32.
        """
        text = self.text_encoder.encode(captions)
        embeddings = tokenizer.quantizer.codes_to_embeddings(codes, tokenizer.grid)
        found: Tensor = self.judge(embeddings.float(), text.features, text.mask)
        return found

    def require_tokenizer(self, tokenizer: LaytonTokenizer) -> None:
        """Refuse any tokenizer but the one whose codes were learnt.

        Raises:
            ValueError: With both fingerprints, or sizes.
        """
        config = self.judge.config
        if (config["code_dim"], (config["grid"],) * 2) != (tokenizer.quantizer.code_dim, tokenizer.grid):
            raise ValueError(
                f"the judge reads a grid of {config['grid']} with codes of {config['code_dim']} dimensions, "
                f"got {tokenizer.grid} with {tokenizer.quantizer.code_dim}"
            )
        if tokenizer.fingerprint() != self.fingerprint:
            raise ValueError(
                f"the judge reads codes of another tokenizer (codebook {self.fingerprint}, "
                f"got {tokenizer.fingerprint()})"
            )

    def to(self, device: torch.device | str) -> None:
        """Move both parts."""
        self.judge.to(device)
        self.text_encoder.to(device)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a folder; ``config.json``, which makes it one, comes last.

        Args:
            folder: Where to.
            dtype: Floating-point type on disk.
        """
        root = Path(folder)
        self.judge.save_pretrained(root / "network", dtype=dtype)
        self.text_encoder.save_pretrained(root / "text_encoder", dtype=dtype)
        save_config(
            root,
            {
                "class": CLASS_NAME,
                "text_encoder_class": class_name(type(self.text_encoder)),
                "text_encoder": self.text_encoder.fingerprint(),
                "tokenizer": self.fingerprint,
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, allow: Sequence[str] = ()) -> CaptionJudge:
        """Read what `save_pretrained` wrote.

        Args:
            folder: Where it is; without ``text_encoder/`` that of the latent diffusion model beside it is taken.
            allow: Prefixes of class names that may be loaded beside ``layton.`` and ``generation.``.

        Raises:
            ValueError: If something is missing, damaged, or is not what ``config.json`` says.
        """
        root = Path(folder)
        config = load_config(root, expected_class=CLASS_NAME)
        if (root / "text_encoder").is_dir():
            kind = resolve_class(str(config.get("text_encoder_class")), TextEncoder, allow)
            encoder = cast(TextEncoder, kind.from_pretrained(root / "text_encoder"))
        else:
            encoder = text_encoder(str(root.parent / LDM_FOLDER))
        found, wanted = encoder.fingerprint(), str(config.get("text_encoder"))
        if found != wanted:
            raise ValueError(f"{root}: the judge reads features of another text encoder ({wanted}, found {found})")
        judge = Judge.from_pretrained(root / "network").eval().requires_grad_(False)
        return cls(judge, encoder.eval().requires_grad_(False), str(config.get("tokenizer")))


def judge_beside(tokenizer: Path) -> Path | None:
    """The folder of the judge that lies with a tokenizer; None if there is none."""
    folder = tokenizer / PART
    return folder if (folder / CONFIG_NAME).is_file() else None
