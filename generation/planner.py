"""Where objects could stand, from a caption: a small LaytonGen whose "image" is a table of objects.

A layout (`generation.model.layout`) has a row for each object and a column for each of its numbers. Written row by row
it is a sequence like that of an image's codes, with its own 2-D positions, so that the same transformer, cache and
sampling serve. Drawing a picture is far easier when it is known from the first code on what stands where (as in
LayoutGPT, arXiv 2305.15393, which asks a language model); the layout can be looked at, changed, or given by the user
instead.

Legend: B images, M objects, F numbers of an object, L caption tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generation.model.layout import UNTOLD, LayoutShape
from generation.model.shapes import CaptionShape, Dropout
from generation.model.transformer import LaytonGenTransformer
from generation.sampling.codes import SamplingOptions
from generation.sampling.decoding import FREE, generate_codes
from generation.text.encoders import TextFeatures
from layton.folder import WEIGHTS_NAME, JsonValue, class_name, load_config, load_tensors, require_match, save_pretrained

PART: Final = "planner"


class LayoutPlanner(nn.Module):
    """Writes layouts for captions.

    Args:
        layout: Shape of the layouts.
        caption: Shape of the captions, those of the generator it plans for.
        width: D of the transformer.
        depth: Its blocks.
        num_heads: Its heads.
        hidden: Width inside its feed-forward layers.
        temperature: At which numbers are drawn; lower keeps to the likelier places.
        tries: Layouts drawn for each image; of those that name the same objects as the first, that one is kept whose
            objects overlap least.
        text_encoder: Fingerprint of the text encoder whose features it reads; set by its training.

    Raises:
        ValueError: If a size or number is out of range.
    """

    def __init__(
        self,
        layout: LayoutShape,
        caption: CaptionShape,
        *,
        width: int = 96,
        depth: int = 4,
        num_heads: int = 4,
        hidden: int = 192,
        temperature: float = 0.8,
        tries: int = 1,
        text_encoder: str = "",
    ) -> None:
        super().__init__()
        if tries < 1:
            raise ValueError(f"tries must be >= 1, got {tries}")
        SamplingOptions(temperature=temperature)  # checks it
        self.tries = tries
        self.layout, self.temperature, self.text_encoder = layout, temperature, text_encoder
        self.side = max(layout.objects, len(layout.sizes))  # positions are those of a square grid
        self._sizes = {"width": width, "depth": depth, "num_heads": num_heads, "hidden": hidden}
        self.transformer = LaytonGenTransformer(
            width=width,
            depth=depth,
            num_heads=num_heads,
            hidden=hidden,
            caption=replace(caption, null="fixed"),  # it is never drawn without a caption
            vocab_size=max(layout.sizes),
            num_tokens=self.side**2,
            dropout=Dropout(0.0, 0.0, 0.0),
        )

    def losses(self, text: TextFeatures, layout: Tensor) -> Tensor:
        """Cross-entropy of each number of layouts (B, M, F), (B, M, F) float32; 0 behind the row that ends a layout."""
        self.layout.check(layout, len(layout))
        if bool((layout == UNTOLD).any()):
            raise ValueError("a planner learns from layouts that are given, some are not")
        written = F.pad(layout, (0, self.side - layout.shape[2], 0, self.side - layout.shape[1])).flatten(1)
        logits = self.transformer(written, text.features, text.mask)
        losses = F.cross_entropy(logits.float().transpose(1, 2), written, reduction="none")
        losses = losses.view(-1, self.side, self.side)[:, : layout.shape[1], : layout.shape[2]]
        there = layout[..., :1] > 0
        ends = F.pad(there, (0, 0, 1, 0), value=True)[:, :-1] & ~there  # only its first column says that it ends
        counted = there.expand_as(losses).clone()
        counted[..., 0] |= ends[..., 0]
        return losses * counted

    @torch.no_grad()
    def draw(self, text: TextFeatures, generators: Sequence[torch.Generator]) -> Tensor:
        """Layouts (B, M, F) int64, each from its own generator; what is no object of the shape is left out."""
        drawn = torch.stack([self._draw(text, generators) for _ in range(self.tries)])
        overlap = self.layout.overlap(drawn.flatten(0, 1)).view(self.tries, -1)
        least = overlap.masked_fill(~self.layout.alike(drawn), math.inf).argmin(0)  # the first of equals
        return drawn[least, torch.arange(drawn.shape[1], device=drawn.device)]

    def _draw(self, text: TextFeatures, generators: Sequence[torch.Generator]) -> Tensor:
        count, sizes = len(self.layout.labels), torch.tensor(self.layout.sizes, device=text.mask.device)
        known = torch.zeros(self.side, self.side, dtype=torch.int64, device=text.mask.device)
        known[: self.layout.objects, : len(sizes)] = FREE  # nothing was learnt of what lies outside
        written = generate_codes(
            self.transformer,
            text.features.to(next(self.parameters()).dtype),
            text.mask,
            generators=generators,
            sampling=SamplingOptions(temperature=self.temperature),
            known=known.flatten().expand(len(text.mask), -1),
        )
        rows = written.view(-1, self.side, self.side)[:, : self.layout.objects, : len(self.layout.sizes)].clone()
        good = ((rows < sizes) & ((rows > 0) | (torch.arange(len(sizes), device=rows.device) >= count))).all(-1)
        going = good.long().cumprod(1).bool()  # the first row that is none ends a layout
        return torch.where(going[..., None], rows, 0)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``; ``dtype`` is what weights are stored as."""
        config: dict[str, JsonValue] = {
            "layout": cast("dict[str, JsonValue]", asdict(self.layout)),
            "caption": cast("dict[str, JsonValue]", asdict(cast(CaptionShape, self.transformer.caption))),
            **self._sizes,
            "temperature": self.temperature,
            "tries": self.tries,
            "text_encoder": self.text_encoder,
        }
        save_pretrained(self, config, Path(folder), dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LayoutPlanner:
        """Read what `save_pretrained` wrote, in eval mode and float32.

        Raises:
            ValueError: If something is missing, damaged or mis-shaped.
        """
        root = Path(folder)
        config: dict[str, Any] = dict(load_config(root, expected_class=class_name(cls)))
        del config["class"]
        try:
            layout, caption = LayoutShape(**config.pop("layout")), CaptionShape(**config.pop("caption"))
            planner = cls(layout, caption, **config)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{root}: config does not fit {cls.__name__}: {error}") from error
        tensors = load_tensors(root / WEIGHTS_NAME)
        require_match(planner.state_dict(), tensors, source=root, target=cls.__name__)
        planner.load_state_dict({name: value.float() for name, value in tensors.items()})
        return planner.eval()
