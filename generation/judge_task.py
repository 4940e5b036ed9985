"""Trains a judge of images' tokens on true captions and false ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from generation.caption_judge import CaptionJudge
from generation.data import TokenShards
from generation.foresight import AnswerHead
from generation.judge import Judge
from generation.text_encoders import TextEncoder
from layton.data.sources import walk
from layton.scenes import SHOWN_SIZES
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable
from layton.tokenizer import LaytonTokenizer


class JudgeTask(LaytonTask):
    """Binary cross-entropy of captions that hold, of false ones, and of other images' captions.

    Batches hold ``codes`` (B, N), ``caption``, and ``contrary``, a caption that does not hold, of
    `generation.data.TokenShards`; either of the two may be empty.

    Args:
        judge: Learns.
        text_encoder: Reads the captions; frozen.
        tokenizer: Tokenizer folder or embedded one.
        reading: Weight of the cross-entropy of what is seen in each of the judge's places, batches' ``shown``
            (B, T, 3); 0 does not ask. What can be read off a picture, captions are soon compared with.
        code_dropout: Share of the codes that are replaced by random ones.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.

    Raises:
        ValueError: If the share is not in [0, 1).
    """

    def __init__(
        self,
        judge: Judge,
        *,
        text_encoder: TextEncoder,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        tokenizer: str = "mini",
        reading: float = 0.0,
        code_dropout: float = 0.0,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if not 0.0 <= code_dropout < 1.0:
            raise ValueError(f"code_dropout must be in [0, 1), got {code_dropout}")
        place = LaytonTokenizer.from_pretrained(tokenizer, decoders=[])
        self.judge, self.code_dropout, self.reading = judge, code_dropout, reading
        if reading:
            self.reader = AnswerHead(judge.width, SHOWN_SIZES)  # is no part of what is exported
        # in a list: what is frozen is no part of checkpoints
        self._frozen = [(text_encoder.requires_grad_(False).eval(), place.requires_grad_(False).eval())]

    def setup(self, stage: str) -> None:
        """Refuse token shards of another tokenizer.

        Raises:
            ValueError: With both fingerprints.
        """
        module = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        names = ("train", "validation", "test")
        for source in walk([source for name in names for source in getattr(module, name, None) or []]):
            if isinstance(source, TokenShards):
                source.require_tokenizer(self._frozen[0][1].fingerprint())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        codes = batch["codes"].long()
        if self.code_dropout:
            generator = self.step_generator("judge", device="cpu")
            noise = torch.randint(self._frozen[0][1].vocab_size, codes.shape, generator=generator)
            replaced = torch.rand(codes.shape, generator=generator) < self.code_dropout
            codes = torch.where(replaced.to(codes.device), noise.to(codes.device), codes)
        return self._loss(batch, codes)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """As `training_step`, on the codes as they are."""
        return self._loss(batch, batch["codes"].long())

    def export(self, folder: Path) -> None:
        """Write a folder of `generation.caption_judge.CaptionJudge`."""
        text_encoder, tokenizer = self._frozen[0]
        CaptionJudge(self.judge, text_encoder, tokenizer.fingerprint()).save_pretrained(folder)

    def _loss(self, batch: dict[str, Any], codes: Tensor) -> Tensor:
        text_encoder, tokenizer = self._frozen[0]
        own = batch["caption"], batch.get("contrary", [""] * len(codes))
        said = [true or false for true, false in zip(*own, strict=True)]
        foreign = [
            "" if before in (true, false) else before for true, false, before in zip(*own, _rolled(said), strict=True)
        ]
        asked = [
            (row, caption, kind)
            for kind, captions in enumerate((*own, foreign))
            for row, caption in enumerate(captions)
            if caption
        ]
        rows, captions, kinds = zip(*asked, strict=True)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            text = text_encoder.to(self.device).encode(captions)
            quantizer = tokenizer.to(self.device).quantizer
            embeddings = quantizer.codes_to_embeddings(codes, tokenizer.grid)
        seen = self.judge.see(embeddings)
        length = int(text.mask.sum(1).max())
        owner = torch.tensor(rows, device=seen.device)
        odds = self.judge.compare_with(seen[owner], text.features[:, -length:], text.mask[:, -length:])
        kind = torch.tensor(kinds, device=odds.device)
        holds = (kind == 0).to(odds)
        terms = {"cross_entropy": F.binary_cross_entropy_with_logits(odds, holds)}
        weights: dict[str, float] = {}
        if self.reading:
            known = batch["shown"][:, 0, 0] >= 0
            terms["reading"], weights["reading"] = self.reader(seen, batch["shown"], valid=known), self.reading
        right = ((odds > 0) == holds.bool()).float()
        logged = {}
        for number, name in enumerate(("true", "false", "foreign")):
            if bool((kind == number).any()):
                logged[f"right_{name}"] = right[kind == number].mean()
        return self.log_losses(
            {**terms, **logged}, weights={**weights, **dict.fromkeys(logged, 0.0)}, batch_size=len(codes)
        )


def _rolled(captions: list[str]) -> list[str]:
    return [captions[-1], *captions[:-1]]
