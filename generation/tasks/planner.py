"""Trains a planner of layouts on captions and where the objects of their scenes stand; no picture is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from generation.data.source import require_layouts
from generation.planner import PART, LayoutPlanner
from generation.tasks.reading import ReadsText
from generation.text.encoders import TextEncoder, without_common_padding
from layton.tasks.base import LRSchedulerCallable, OptimizerCallable


class LayoutPlannerTask(ReadsText):
    """Cross-entropy of the numbers of layouts, one after another.

    Batches hold ``caption`` and ``layout`` (B, M, F) (`layout` of `layton.data.prompts.SceneCaptions`).

    Args:
        planner: Learns.
        text_encoder: That of the generator. If it is trainable it learns, too, and is exported with the planner: what
            a generator learnt from pictures may have forgotten which of "above" and "below" was said. The generator
            then has to be trained on with it.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.

    Raises:
        ValueError: If the planner takes other captions than the text encoder gives.
    """

    def __init__(
        self,
        planner: LayoutPlanner,
        text_encoder: TextEncoder,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(text_encoder, optimizer=optimizer, lr_scheduler=lr_scheduler)
        caption = planner.transformer.caption
        if caption is None or caption.dim != text_encoder.width or caption.length < text_encoder.max_length:
            raise ValueError(
                f"the planner takes captions {caption}, the text encoder gives "
                f"{text_encoder.max_length} x {text_encoder.width}"
            )
        self.planner = planner

    def setup(self, stage: str) -> None:
        """Refuse data whose layouts are of another kind."""
        require_layouts(self.sources(), self.planner.layout)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        text = without_common_padding(self.text_encoder.encode(batch["caption"]))
        losses = self.planner.losses(text, batch["layout"])
        kinds = len(self.planner.layout.labels)
        terms = {"labels": losses[..., :kinds].sum((1, 2)).mean(), "places": losses[..., kinds:].sum((1, 2)).mean()}
        return self.log_losses(terms, weights={}, batch_size=len(losses))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """As `training_step`."""
        return self.training_step(batch, batch_idx)

    def export(self, folder: Path) -> None:
        """Write ``planner/`` and, if it learnt, ``text_encoder/``, as they lie in a generator's folder."""
        encoder = self._text_encoder.module
        self.planner.text_encoder = self.frozen_text() or encoder.fingerprint()
        self.planner.save_pretrained(folder / PART)
        if encoder.trainable:
            encoder.save_pretrained(folder / "text_encoder")
