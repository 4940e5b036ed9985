"""What tasks with a text encoder have in common: where it lies, and which one a run goes on with."""

from __future__ import annotations

from typing import Any

from distill.held import Held
from generation.text.encoders import TextEncoder
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable

_TEXT = "frozen_text_encoder"  # key of checkpoints


class ReadsText(LaytonTask):
    """A task of captions. Its text encoder learns too if it is trainable; a frozen one is no part of checkpoints.

    Args:
        text_encoder: Reads the captions.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
    """

    def __init__(
        self, text_encoder: TextEncoder, *, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if text_encoder.trainable:
            self.learning_text_encoder = text_encoder
        self._text_encoder = Held(text_encoder)  # a learning one is a child besides
        self._frozen_print: str | None = None

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, on the task's device."""
        held = self._text_encoder
        return held.module if held.module.trainable else held.on(self.device)

    def frozen_text(self) -> str | None:
        """Fingerprint of a text encoder that is no part of checkpoints; None if it learns, and so is."""
        encoder = self._text_encoder.module
        if encoder.trainable:
            return None
        if self._frozen_print is None:  # once: of a large one it reads gigabytes
            self._frozen_print = encoder.fingerprint()
        return self._frozen_print

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which frozen text encoder the captions were read by."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_TEXT] = self.frozen_text()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained with another frozen text encoder.

        Raises:
            ValueError: With both fingerprints.
        """
        super().on_load_checkpoint(checkpoint)
        stored, wanted = checkpoint.get(_TEXT), self.frozen_text()
        if _TEXT in checkpoint and stored != wanted:
            raise ValueError(
                f"the checkpoint was trained with another frozen text encoder (stored {stored}, wanted {wanted})"
            )
