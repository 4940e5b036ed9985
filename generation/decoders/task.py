"""Trains the alternative decoders: stage 2's task with another decoder at the end, and its teacher chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from distill.held import Held
from distill.method import DistillationMethod
from generation.decoders.hipa import HiPADecoder, require_attention
from generation.decoders.instaflow import InstaFlowDecoder
from layton.decoders.consistency import ConsistencyDecoder
from layton.decoders.difference import Adaptation, copy_sharing
from layton.folder import load_config, read_class
from layton.losses.pixel_supervision import PixelSupervision
from layton.tasks.base import LRSchedulerCallable, OptimizerCallable
from layton.tasks.consistency_decoder import ConsistencyDecoderTask, PixelTargets
from layton.tasks.critics import CriticSettings

DecoderName = Literal["instaflow", "hipa"]
BUDGET = 500_000


class OneStepDecoderTask(ConsistencyDecoderTask):
    """Distils stage 1's decoder to one step, by `reflow`, `one_step` or `hipa` of `distill.methods`.

    Batches are `generation.decoders.pairs.DecoderPairs`' or, for pairs made on the fly at 25 forwards each,
    `layton.ldm.cache.CachedLatents`' with ``codes``. With ``image`` in them one-step pictures can be compared with the
    originals too, which the papers, text to image, have no counterpart of: codes say nearly all of a picture.

    Args:
        ldm: See `ConsistencyDecoderTask`.
        tokenizer: See there.
        decoder: See there.
        name: Which decoder comes out.
        method: How it is distilled.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
        adaptation: Which weights are trained; for HiPA, adaptors on attention.
        reader: See there.
        start: A finished export ``decoder/`` of the same adaptation to go on from. A 2-rectified flow, where the second
            half of InstaFlow starts, then is the teacher, too; a decoder of one step never is.
        pixels: How one-step pictures are supervised; None without.
        pixel_targets: By what; see `ConsistencyDecoderTask`.
        distillation_weight: Factor of the method's terms.
        pixel_weight: Factor of the terms in pixels.
        latents_per_token: Latent positions per token along one side.
        max_parameters: Most numbers that may be trained, and so saved.

    Raises:
        ValueError: An unknown name, a method that wants guidance, HiPA on more than attention, or too many parameters.
    """

    def __init__(
        self,
        ldm: str,
        tokenizer: str,
        decoder: str,
        *,
        name: DecoderName,
        method: DistillationMethod,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        adaptation: Adaptation,
        reader: str | None = None,
        start: str | None = None,
        pixels: PixelSupervision | None = None,
        pixel_targets: PixelTargets = "image",
        distillation_weight: float = 1.0,
        pixel_weight: float = 1.0,
        latents_per_token: float = 1,
        max_parameters: int = BUDGET,
    ) -> None:
        if name not in get_args(DecoderName):
            raise ValueError(f"name must be one of {get_args(DecoderName)}, got {name!r}")
        super().__init__(
            ldm,
            tokenizer,
            decoder,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            adaptation=adaptation,
            reader=reader,
            start=start,
            method=method,
            pixels=pixels,
            pixel_targets=pixel_targets,
            distillation_weight=distillation_weight,
            pixel_weight=pixel_weight,
            times="method",
            latents_per_token=latents_per_token,
        )
        if name == "hipa":
            require_attention(adaptation, reader=self.difference.reader)
        trained = sum(parameter.numel() for parameter in self.trainable_parameters())
        if trained > max_parameters:
            raise ValueError(f"{trained:,} parameters would be trained, at most {max_parameters:,} may be")
        self.name = name
        # reflow's steps are Euler's; the default puts fresh noise between them
        self.sampling = replace(self.sampling, kind=method.sampling)

    def _build(self, start: str | None, critic: CriticSettings) -> None:
        super()._build(start, critic)
        if start is not None and _is_flow(Path(start)):
            frozen = [parameter for parameter in self.ladd.parameters() if not parameter.requires_grad]
            self._teacher = Held(copy_sharing(self.ladd, frozen))
        if self.method is not None:  # its times are asked for before it sees a batch
            cast(Any, self.method).schedule = self.ladd.schedule

    def decoder(self) -> ConsistencyDecoder:
        """The student as a decoder; it shares the weights in training."""
        kind = HiPADecoder if self.name == "hipa" else InstaFlowDecoder
        return kind(
            self.ladd,
            self._autoencoder.module,
            sampling=self.sampling,
            latents_per_token=self.latents_per_token,
            difference=self.difference,
        )


def _is_flow(decoder: Path) -> bool:
    """Whether a finished decoder is a flow, sampled in as many steps as one likes."""
    sampling = load_config(decoder, expected_class=read_class(decoder)).get("sampling")
    return isinstance(sampling, dict) and sampling.get("kind") == "ddim"
