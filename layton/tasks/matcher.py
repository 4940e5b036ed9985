"""Trains the image-caption matcher on Scenes, with captions that are wrong in exactly one thing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.condition import Condition
from distill.held import Held
from layton.distillation.matcher import Matcher
from layton.scenes import sample_scene, seed_of_key
from layton.scenes.contrary import CHANGES, Captions, captions_of
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable

Inputs = Literal["image", "latent"]
TextEncoder = Callable[[Sequence[str]], Condition]


class MatcherTask(LaytonTask):
    """Contrastive learning over the batch (CLIP, arXiv 2103.00020) with hard negatives for every image.

    Captions are made here from the scenes themselves: keys must be ``scenes/<seed>``. The text encoder is the frozen
    one of a diffusion pipeline, so that the matcher reads exactly what the student is conditioned on.

    Args:
        pipeline: Folder or name of the pipeline whose text encoder is read; None: give one with `attach`.
        matcher: The network; None builds the default one.
        inputs: What batches hold: ``image`` (B, 3, H, W) or ``latent`` (B, C, h, w).
        noise: Largest deviation of Gaussian noise added to the inputs, because a student's samples are never clean.
        chinese: Share of Chinese captions.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.

    Raises:
        ValueError: Unknown ``inputs`` or negative ``noise``.
    """

    def __init__(
        self,
        pipeline: str | None = None,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        matcher: Matcher | None = None,
        inputs: Inputs = "image",
        noise: float = 0.15,
        chinese: float = 0.1,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if inputs not in get_args(Inputs) or noise < 0:
            raise ValueError(f"inputs must be one of {get_args(Inputs)} and noise >= 0, got {inputs!r} and {noise}")
        self.matcher = matcher if matcher is not None else Matcher()
        self.inputs: Inputs = inputs
        self.noise, self.chinese = noise, chinese
        self._text: Held[TextEncoder] | None = None
        if pipeline is not None:
            from layton.ldm.conditions import PromptEncoder, latent_shape_of
            from layton.ldm.teacher import open_pipeline

            pipe = open_pipeline(pipeline)
            encoder = PromptEncoder(pipe, latent_size=latent_shape_of(pipe)[1:])
            self.attach(lambda captions: encoder(captions, device=self.device))

    def attach(self, text: TextEncoder) -> None:
        """Take a frozen text encoder: B captions to a condition with ``embeds`` (B, L, D)."""
        self._text = Held(text)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        return self._loss(batch, self.step_generator("matcher", device="cpu"))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss with wordings that depend on the batch's position only, ()."""
        return self._loss(batch, torch.Generator().manual_seed(batch_idx))

    def export(self, folder: Path) -> None:
        """Write the matcher."""
        self.matcher.save_pretrained(folder)

    def _loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        pictures = batch[self.inputs].float()
        said = self._captions(batch["key"], generator)
        level = self.noise * torch.rand(len(pictures), 1, 1, 1, generator=generator)
        pictures = pictures + (level * torch.randn(pictures.shape, generator=generator)).to(pictures)
        images = self.matcher.image_tower(pictures)
        true, wrong, owner = self._encode(said)
        scale = self.matcher.scale
        # Products and sums, not a matrix product, which autocast would round to three digits.
        logits = scale * (images[:, None] * true[None]).sum(2)  # (B, B), image by caption
        # Another image's caption that reads the same is no negative.
        same = torch.tensor([[a.true == b.true for b in said] for a in said], device=logits.device)
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
        hard = scale * (images[owner] * wrong).sum(1)  # (K,), each with its own image
        table = torch.full((len(said), len(CHANGES)), -torch.inf, device=logits.device)
        changes = [CHANGES.index(change) for item in said for change in item.wrong]
        slot = torch.tensor(changes, dtype=torch.long, device=logits.device)
        table = table.index_put((owner, slot), hard)
        target = torch.arange(len(said), device=logits.device)
        terms = {
            "image_to_text": F.cross_entropy(torch.cat([logits, table], dim=1), target),
            "text_to_image": F.cross_entropy(logits.T, target),
        }
        self._log_accuracy(logits.diagonal(), table)
        return self.log_losses(terms, batch_size=len(said))

    def _captions(self, keys: list[str], generator: torch.Generator) -> list[Captions]:
        scenes = [seed_of_key(key) for key in keys]
        if None in scenes:
            foreign = keys[scenes.index(None)]
            raise ValueError(f"the matcher learns from Scenes, whose keys are scenes/<seed>; got {foreign!r}")
        seeds = torch.randint(2**62, (len(keys),), generator=generator).tolist()
        return [
            captions_of(sample_scene(scene), random.Random(seed), chinese=self.chinese)  # noqa: S311
            for scene, seed in zip(scenes, seeds, strict=True)
            if scene is not None
        ]

    def _encode(self, said: list[Captions]) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of the true captions (B, dim), of the wrong ones (K, dim), and whose the latter are (K,)."""
        if self._text is None:
            raise ValueError("the matcher's task has no text encoder: name a pipeline or attach one")
        wrong = [text for item in said for text in item.wrong.values()]
        owner = [number for number, item in enumerate(said) for _ in item.wrong]
        # Encoded as for the diffusion model, whatever the precision of training.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            condition = self._text.module([item.true for item in said] + wrong)
        vectors = self.matcher.encode_text(condition)
        return vectors[: len(said)], vectors[len(said) :], torch.tensor(owner, dtype=torch.long, device=vectors.device)

    def _log_accuracy(self, own: Tensor, table: Tensor) -> None:
        """Share of wrong captions that score below the true one, by what is wrong in them."""
        for number, change in enumerate(CHANGES):
            known = torch.isfinite(table[:, number])
            self.log_measure(f"{change}_accuracy", own[known] > table[known, number])
