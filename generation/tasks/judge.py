"""Trains a judge of images' tokens on true captions and false ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.held import Held
from generation.caption_judge import CaptionJudge
from generation.data.source import TokenShards
from generation.judge import Judge
from generation.tasks.foresight import AnswerHead
from generation.text.encoders import TextEncoder
from layton.data.cache import differences
from layton.data.sources import say, say_contrary, walk
from layton.modules import weights_digest
from layton.scenes import SHOWN_SIZES, sample_scene, seed_of_key
from layton.scenes.contrary import CHANGES
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable
from layton.tokenizer import LaytonTokenizer

_KINDS = ("true", "false", "foreign")
_READS = "judge_reads"  # key of checkpoints


class JudgeTask(LaytonTask):
    """Binary cross-entropy of captions that hold, of false ones, and of other images' captions.

    Batches hold ``codes`` (B, N), ``caption`` and ``key``. Of scenes (keys ``scenes/<seed>``) a true caption is said
    anew and with it every false one that is wrong in one thing (`layton.scenes.contrary`). Of other images, such as
    drawn ones (`generation.tasks.rollouts`), ``caption`` is true and ``contrary`` false where they are not empty.

    Args:
        judge: Learns.
        text_encoder: Reads the captions; frozen.
        tokenizer: Tokenizer folder or embedded one.
        reading: Weight of the cross-entropy of what is seen in each of the judge's places, batches' ``shown``
            (B, T, 3); 0 does not ask. What can be read off a picture, captions are soon compared with.
        code_dropout: Share of the codes that are replaced by random ones.
        chinese: Of scenes, share of captions in Chinese.
        reworded: Of scenes, share of captions said in another way than the canonical one.
        related: Of scenes of two objects, share of captions that say how they stand, where that is clear.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.

    Raises:
        ValueError: If a number is out of range, or parts do not fit each other.
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
        chinese: float = 0.1,
        reworded: float = 0.8,
        related: float = 0.5,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        self._shares = {"chinese": chinese, "reworded": reworded, "related": related}
        if (
            not 0.0 <= code_dropout < 1.0
            or reading < 0
            or not all(0.0 <= each <= 1.0 for each in self._shares.values())
        ):
            raise ValueError(
                "need code_dropout in [0, 1), reading >= 0 and shares in [0, 1], "
                f"got {code_dropout}, {reading} and {self._shares}"
            )
        place = LaytonTokenizer.from_pretrained(tokenizer, decoders=[]).requires_grad_(False).eval()
        self.judge, self.code_dropout, self.reading = judge, code_dropout, reading
        if reading:
            self.reader = AnswerHead(judge.width, SHOWN_SIZES)  # is no part of what is exported
        whole = CaptionJudge(judge, text_encoder.requires_grad_(False).eval(), place.fingerprint())
        whole.require_tokenizer(place)
        self._whole, self._tokenizer = Held(whole), Held(place)

    def setup(self, stage: str) -> None:
        """Refuse token shards of another tokenizer.

        Raises:
            ValueError: With both fingerprints.
        """
        module = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        names = ("train", "validation", "test")
        for source in walk([source for name in names for source in getattr(module, name, None) or []]):
            if isinstance(source, TokenShards):
                place = self._tokenizer.module
                source.require_tokenizer(self._whole.module.fingerprint, encoder=weights_digest(place.encoder))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record whose codes and features were learnt."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_READS] = self._reads()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on other codes or features.

        Raises:
            ValueError: With all fingerprints that differ.
        """
        super().on_load_checkpoint(checkpoint)
        differs = differences(checkpoint.get(_READS) or {}, self._reads())
        if differs:
            raise ValueError(f"the checkpoint was trained with other parts ({differs})")

    def _reads(self) -> dict[str, str]:
        whole = self._whole.module
        return {"tokenizer": whole.fingerprint, "text_encoder": whole.text_encoder.fingerprint()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        codes, generator = batch["codes"].long(), self.step_generator("judge", device="cpu")
        if self.code_dropout:
            noise = torch.randint(self._tokenizer.module.vocab_size, codes.shape, generator=generator)
            replaced = torch.rand(codes.shape, generator=generator) < self.code_dropout
            codes = torch.where(replaced.to(codes.device), noise.to(codes.device), codes)
        return self._loss(batch, codes, generator)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss on the codes as they are, with wordings that depend on the batch's position only, ()."""
        return self._loss(batch, batch["codes"].long(), torch.Generator().manual_seed(batch_idx))

    def export(self, folder: Path) -> None:
        """Write a folder of `generation.caption_judge.CaptionJudge`."""
        self._whole.module.save_pretrained(folder)

    def _loss(self, batch: dict[str, Any], codes: Tensor, generator: torch.Generator) -> Tensor:
        whole, tokenizer = self._whole.module, self._tokenizer.module
        asked = self._asked(batch, generator)
        if not asked:
            raise ValueError(f"a batch has no caption at all: {batch['key'][:3]}")
        if self.reading and "shown" not in batch:
            raise ValueError("reading needs batches that hold 'shown': give TokenShards shown: 8")
        rows, captions, kinds = zip(*asked, strict=True)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            text = whole.text_encoder.to(self.device).encode(captions)
            embeddings = tokenizer.to(self.device).quantizer.codes_to_embeddings(codes, tokenizer.grid)
        seen = self.judge.see(embeddings)
        length = max(1, int(text.mask.sum(1).max()))  # what stands before is padding of all
        odds = self.judge.compare_with(seen[list(rows)], text.features[:, -length:], text.mask[:, -length:])
        true = torch.tensor([kind == "true" for kind in kinds], device=odds.device)
        terms = {"cross_entropy": F.binary_cross_entropy_with_logits(odds, true.to(odds))}
        weights: dict[str, float] = {"told_apart": 0.0}
        if self.reading:
            known = batch["shown"][:, 0, 0] >= 0
            terms["reading"], weights["reading"] = self.reader(seen, batch["shown"], valid=known), self.reading
        terms["told_apart"] = _told_apart(odds.detach(), rows, kinds)
        return self.log_losses(terms, weights=weights, batch_size=len(codes))

    def _asked(self, batch: dict[str, Any], generator: torch.Generator) -> list[tuple[int, str, str]]:
        """What is asked of a batch: rows, captions, and whether they are true, false or foreign.

        Another image's caption is taken for false if it reads otherwise; of Scenes 0.6 % are true in other words.
        """
        seeds = torch.randint(2**62, (len(batch["key"]),), generator=generator).tolist()
        contrary = batch.get("contrary", [""] * len(seeds))
        said = [
            self._said(key, seed) or ([true] if true else [], [false] if false else [])
            for key, seed, true, false in zip(batch["key"], seeds, batch["caption"], contrary, strict=True)
        ]
        asked: list[tuple[int, str, str]] = []
        for row, (true, false) in enumerate(said):
            before = [caption for part in said[row - 1] for caption in part][:1]
            foreign = [caption for caption in before if caption not in (*true, *false)]
            for name, captions in zip(_KINDS, (true, false, foreign), strict=True):
                asked += [(row, caption, name) for caption in captions]
        return asked

    def _said(self, key: str, seed: int) -> tuple[list[str], list[str]] | None:
        """A true caption of a scene and all that are wrong in one thing; None of what is no scene."""
        number = seed_of_key(key)
        if number is None:
            return None
        scene = sample_scene(number)
        false = [say_contrary(scene, seed, [change], **self._shares) for change in CHANGES]
        return [say(scene, seed, **self._shares)], [caption for caption in false if caption]


def _told_apart(odds: Tensor, rows: Sequence[int], kinds: Sequence[str]) -> Tensor:
    """Share of false captions that are less likely than the true one of the same image; a half if there are none."""
    own = {row: place for place, (row, kind) in enumerate(zip(rows, kinds, strict=True)) if kind == "true"}
    pairs = [(own[row], place) for place, row in enumerate(rows) if kinds[place] == "false" and row in own]
    if not pairs:
        return odds.new_tensor(0.5)
    true, false = torch.tensor(pairs, device=odds.device).T
    return (odds[true] > odds[false]).float().mean()
