"""Trains LaytonGen on what it makes itself: images of one prompt compete for a reward."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from distill.held import Held
from generation.generator import SamplingDefaults
from generation.model.transformer import LaytonGenTransformer
from generation.planner import LayoutPlanner
from generation.tasks.foresight import Foresight
from generation.tasks.laytongen import LaytonGenTask, untold
from generation.tasks.policy import credit_advantages, group_advantages, most_telling, policy_losses, require_policy
from generation.tasks.rewards import Reward, Scores
from generation.text.encoders import TextEncoder, TextFeatures
from layton.tasks.base import LRSchedulerCallable, OptimizerCallable

_PREVIEWS = 8
_AT_ONCE = 32  # images drawn and decoded together


class LaytonGenRewardTask(LaytonGenTask):
    """Group-relative policy optimization (GRPO, arXiv 2402.03300; of image generators AR-GRPO, arXiv 2508.06924).

    Each prompt of a batch is drawn ``group_size`` times, as the exported model will be: with its guidance and
    temperature. Images are decoded and rewarded; of each group the best and the worst ``kept`` teach (PODS,
    arXiv 2504.13818). Each group is used for one step, so that there is no ratio to clip. Nothing holds the model to
    where it began, as a reference model would: real images' codes become less likely, quickly at large learning rates,
    unless ``supervised`` also has them learnt.

    Batches hold ``caption`` and ``key``, for example of `layton.data.prompts.SceneCaptions`, and ``layout`` for a model
    that is told layouts, as its planner will do (``placed`` there); with ``supervised`` all that `LaytonGenTask` needs,
    for example of `generation.data.source.TokenShards`.

    Args:
        transformer: A trained generator, without dropout.
        text_encoder: Its text encoder; learns too if it is trainable. Dropout of its own would be that of the prompts.
        reward: Judges images, see `generation.tasks.rewards`; it is no part of what learns, nor of checkpoints.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
        tokenizer: Tokenizer folder or embedded one.
        group_size: Images of each prompt.
        kept: How many of them teach.
        whole: Weight of what the whole image earned, of which all its codes get the same, beside the credit of places
            where the reward gives that: few codes decide, and those of the background are noise. With 0 nothing says
            that something is missing.
        supervised: Weight of what the same batch's real codes teach: cross-entropy with their captions, and
            ``foresight``. Nothing teaches the model without a caption.
        foresight: See `LaytonGenTask`; its weight counts beside the cross-entropy's.
        layout_dropout: See `LaytonGenTask`; of real codes alone, images are drawn with the batches' layouts.
        planner: See `LaytonGenTask`.
        sampling: How images are drawn, here and by the exported model: temperature, guidance and ``min_entropy``.
        gradient_checkpointing: Recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: If parts do not fit each other, or numbers are out of range.
    """

    def __init__(
        self,
        transformer: LaytonGenTransformer,
        text_encoder: TextEncoder,
        *,
        reward: Reward,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        tokenizer: str = "mini",
        group_size: int = 8,
        kept: int = 4,
        whole: float = 1.0,
        supervised: float = 0.0,
        foresight: Foresight | None = None,
        layout_dropout: float = 0.2,
        planner: LayoutPlanner | None = None,
        sampling: SamplingDefaults | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            transformer,
            text_encoder,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            tokenizer=tokenizer,
            caption_dropout=0.0,
            foresight=foresight,
            layout_dropout=layout_dropout,
            planner=planner,
            sampling=sampling,
            gradient_checkpointing=gradient_checkpointing,
        )
        if not 2 <= kept <= group_size:
            raise ValueError(f"need 2 <= kept <= group_size, got {kept} and {group_size}")
        if whole < 0 or supervised < 0:
            raise ValueError(f"whole and supervised must be >= 0, got {whole} and {supervised}")
        if foresight is not None and not supervised:
            raise ValueError("foresight is learnt of real codes: give supervised > 0")
        if any(asdict(transformer.dropout).values()):
            raise ValueError(
                f"images are drawn without dropout: the transformer must have none, got {transformer.dropout}; a saved "
                "one gets it by generation.pretrained.laytongen_transformer's dropout"
            )
        require_policy(self.sampling.options())
        self._reward = Held(reward)
        self.group_size, self.kept = group_size, kept
        self.whole, self.supervised = whole, supervised

    def why_not_sharded(self) -> str | None:
        """Drawing goes through the blocks a code at a time, and not as modules."""
        return "pictures are drawn within a step"

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch of prompts, ()."""
        text = self._told(batch)
        owner = torch.arange(len(text.features)).repeat_interleave(self.group_size)
        seeds = torch.randint(2**62, (len(owner),), generator=self.step_generator("draws", device="cpu"))
        codes, scores = self._play(batch, text, owner, seeds.tolist())
        groups = scores.total.view(-1, self.group_size)
        chosen = most_telling(groups, self.kept)
        advantages = self.whole * group_advantages(groups.gather(1, chosen)).flatten()[:, None].expand(
            -1, codes.shape[1]
        )
        rows = (chosen + self.group_size * torch.arange(len(groups))[:, None]).flatten()
        if scores.credit is not None:
            advantages = advantages + credit_advantages(scores.credit.flatten(1), self.group_size)[rows]
        telling = (advantages != 0).any(1)  # groups that are all alike teach nothing
        telling[0] |= not telling.any()  # but every rank must go through all parameters
        loss = self._policy_loss(codes[rows[telling]], text, owner[rows[telling]], advantages[telling].to(self.device))
        terms = {"policy": loss / len(rows), "reward": scores.total.mean().to(self.device)}
        weights = {"reward": 0.0}
        if self.supervised:
            learnt, beside = self.supervised_terms(batch)
            terms |= learnt
            weights |= {name: self.supervised * beside.get(name, 1.0) for name in learnt}
        return self.log_losses(terms, weights=weights, batch_size=len(groups))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Minus the mean reward of one image for each prompt, from seeds that are always the same, ()."""
        text = self._told(batch)
        owner = torch.arange(len(text.features))
        _, scores = self._play(batch, text, owner, [batch_idx * len(owner) + int(row) for row in owner])
        return self.log_losses(
            {"reward": scores.total.mean().to(self.device)}, weights={"reward": -1.0}, batch_size=len(owner)
        )

    def picture_grid(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Images generated from validation captions."""
        with torch.autocast(self.device.type, enabled=False):
            text = self._told({name: value[:_PREVIEWS] for name, value in batch.items()})
        return {"generated": self.generate(text, list(range(len(text.features))))}

    @torch.no_grad()
    def _play(
        self, batch: dict[str, Any], text: TextFeatures, owner: Tensor, seeds: list[int]
    ) -> tuple[Tensor, Scores]:
        """Codes (B, N) drawn for the prompts ``owner`` (B,), and their scores on the CPU."""
        training = self.transformer.training
        self.transformer.eval()
        parts = torch.arange(len(owner)).split(_AT_ONCE)
        drawn = [self.draw(text.pick(owner[part]), [seeds[row] for row in part.tolist()]) for part in parts]
        codes = torch.cat(drawn)
        self.transformer.train(training)
        captions, keys = ([batch[name][row] for row in owner.tolist()] for name in ("caption", "key"))
        with torch.autocast(self.device.type, enabled=False):
            images = torch.cat([self.tokenizer.decode(part.clone()) for part in codes.split(_AT_ONCE)])
            scores = self._reward.module.score(images, captions, keys, grid=self.tokenizer.grid)
        return codes, scores.checked(len(images), self.tokenizer.grid)

    def _policy_loss(self, codes: Tensor, text: TextFeatures, owner: Tensor, advantages: Tensor) -> Tensor:
        """Sum over images of the mean of advantages (B, N) times -log probability of their codes."""
        with torch.autocast(self.device.type, enabled=False):  # as they were drawn
            losses = policy_losses(
                self.transformer,
                codes,
                text.pick(owner),
                sampling=self.sampling.options(),
                guidance_scale=self.sampling.guidance_scale,
            )
        return (advantages * losses).mean(1).sum()

    def _told(self, batch: dict[str, Any]) -> TextFeatures:
        """Text features in float32; an empty caption is "none", as for the exported model."""
        text = self.text_of(batch)
        features = self.transformer.drop_condition(text.features.float(), untold(batch).to(self.device))
        dropped = untold(batch).to(self.device)
        layout = None if text.layout is None else self.transformer.drop_layout(text.layout, dropped)
        return replace(text, features=features, layout=layout)
