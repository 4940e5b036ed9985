"""Vector quantizers with a learned codebook: cosine codes (the default) and Euclidean codes."""

from __future__ import annotations

from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from layton.nearest import Metric, nearest_codes
from layton.quantizers.base import ConfigValue, Quantizer, QuantizerOutput, off_meta
from layton.quantizers.ema_codebook import EMACodebook


class _LearnedCodebookVQ(Quantizer):
    """What cosine and Euclidean codes share: `VectorQuantize` around an `EMACodebook`, on features of unit length."""

    def __init__(
        self,
        *,
        metric: Metric,
        vocab_size: int,
        code_dim: int,
        decay: float,
        commitment_weight: float,
        learnable: bool,
        dead_share: float,
        start_points: int | None,
        warmup_steps: int,
        rotation_trick: bool,
        seed: int,
    ) -> None:
        super().__init__(vocab_size=vocab_size, code_dim=code_dim)
        points = 2 * vocab_size if start_points is None else start_points
        if not 0 < decay < 1 or not 0 <= dead_share < 1 or commitment_weight < 0 or warmup_steps < 0:
            raise ValueError(
                "decay must be in (0, 1), dead_share in [0, 1), commitment_weight and warmup_steps >= 0, got "
                f"{decay}, {dead_share}, {commitment_weight}, {warmup_steps}"
            )
        if points < vocab_size and points != 0:
            raise ValueError(f"start_points must be 0 or at least vocab_size = {vocab_size}, got {points}")
        if points == 0 and warmup_steps:
            raise ValueError(f"codes that start at once (start_points 0) have no warm-up, got {warmup_steps} steps")
        self._settings: dict[str, ConfigValue] = {
            "vocab_size": vocab_size,
            "code_dim": code_dim,
            "decay": decay,
            "commitment_weight": commitment_weight,
            "dead_share": dead_share,
            "start_points": start_points,
            "warmup_steps": warmup_steps,
            "rotation_trick": rotation_trick,
            "seed": seed,
        }
        self.metric: Metric = metric
        with off_meta():
            self.vq = VectorQuantize(
                dim=code_dim,
                codebook_size=vocab_size,
                use_cosine_sim=metric == "cosine",
                commitment_weight=commitment_weight,
                rotation_trick=rotation_trick,
                ema_update=not learnable,
                learnable_codebook=learnable,
                sync_codebook=False,  # EMACodebook asks at every step whether there are ranks
            )
            self.vq._codebook = EMACodebook(
                vocab_size=vocab_size,
                code_dim=code_dim,
                metric=metric,
                decay=decay,
                learnable=learnable,
                dead_share=dead_share,
                start_points=points,
                warmup_steps=warmup_steps,
                kmeans_iters=10,
                seed=seed,
            )
        if points == 0:
            self._codes.initted.fill_(True)

    @property
    def codebook(self) -> Tensor:
        """(V, d) float32; unit length for cosine codes."""
        return self._codes.embed[0]

    @property
    def ready(self) -> bool:
        """Whether the codes are started; before, training passes features of unit length on unquantized."""
        return self._codes.ready

    def freeze(self) -> Self:
        """Stops collecting, averages and revival too; see `Quantizer.freeze`."""
        self.vq.freeze_codebook = True
        return super().freeze()

    @torch.no_grad()
    def set_codebook(self, codes: Tensor) -> None:
        """Takes codes (V, d) as they are, all to be used alike, and ends the collecting.

        Raises:
            ValueError: On another shape or on values that are not finite.
        """
        expected = (self.vocab_size, self.code_dim)
        if tuple(codes.shape) != expected or not bool(torch.isfinite(codes).all()):
            raise ValueError(f"codes must be finite and of shape {expected}, got {tuple(codes.shape)}")
        self._codes.reset_to(codes.detach().float().to(self.codebook.device))

    def config(self) -> dict[str, ConfigValue]:
        """Constructor arguments."""
        return dict(self._settings)

    def _weights(self) -> dict[str, Tensor]:
        return {"codebook": self.codebook}

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        self.set_codebook(weights["codebook"])

    @property
    def _codes(self) -> EMACodebook:
        codebook: EMACodebook = self.vq._codebook
        return codebook

    def _search(self, features: Tensor) -> Tensor:
        return nearest_codes(nn.functional.normalize(features, dim=1), self.codebook, metric=self.metric, check=False)

    def _straight_through(self, features: Tensor, embeddings: Tensor) -> Tensor:
        return super()._straight_through(nn.functional.normalize(features, dim=1), embeddings)

    def _quantize(self, features: Tensor) -> QuantizerOutput:
        batch, _, height, _ = features.shape
        tokens = nn.functional.normalize(rearrange(features, "b d h w -> b (h w) d"), dim=2)
        started = self.ready or self.vq.freeze_codebook
        if not started:
            self._codes.collect(rearrange(tokens.detach(), "b n d -> (b n) d"))
            started = self.ready
        if not started:
            flat = torch.nan_to_num(rearrange(tokens.detach(), "b n d -> (b n) d"))
            codes = rearrange(self._search(flat), "(b n) -> b n", b=batch)
            # parameters take part in every step: DistributedDataParallel waits for their gradients
            quantized, loss = tokens, 0.0 * self.codebook.sum()
        else:
            quantized, codes, loss = self.vq(tokens)
        return QuantizerOutput(codes, rearrange(quantized, "b (h w) d -> b d h w", h=height), loss)


class CosineVQ(_LearnedCodebookVQ):
    """Cosine codes: features and codes have unit length, the codes follow their features by moving averages.

    The factorised, normalised codebook of ViT-VQGAN (arXiv 2110.04627, section 3.2) and LlamaGen (arXiv 2406.06525),
    which learns the codes by gradients; here by moving averages (arXiv 1711.00937, appendix A.1), through
    `vector_quantize_pytorch`. The loss is ``commitment_weight`` times the mean squared difference of the unit
    features and their codes.

    While the codebook collects features for its k-means start (see `EMACodebook`), training passes the unit
    features on unquantized with a loss of zero, and codes refer to random provisional codes.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 16384,
        code_dim: int = 8,
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        dead_share: float = 0.1,
        start_points: int | None = None,
        warmup_steps: int = 0,
        rotation_trick: bool = False,
        seed: int = 0,
    ) -> None:
        """Creates the quantizer.

        Args:
            vocab_size: V, number of codes.
            code_dim: d, channels of features and codes.
            decay: Of the moving averages, per step, in (0, 1).
            commitment_weight: Weight of the loss, >= 0.
            dead_share: A code whose average count is below this share of the mean is revived; 0 never revives.
            start_points: Features for the k-means start, at least V; None is 2 V, 0 starts at once from random codes.
            warmup_steps: Training steps that pass features on unquantized, at the least; a loaded codebook has none.
            rotation_trick: Send gradients by the rotation trick (arXiv 2410.06424) and not straight through.
            seed: Of all random choices.

        Raises:
            ValueError: On a value out of range.
        """
        super().__init__(
            metric="cosine",
            vocab_size=vocab_size,
            code_dim=code_dim,
            decay=decay,
            commitment_weight=commitment_weight,
            learnable=False,
            dead_share=dead_share,
            start_points=start_points,
            warmup_steps=warmup_steps,
            rotation_trick=rotation_trick,
            seed=seed,
        )


class EuclideanVQ(_LearnedCodebookVQ):
    """Euclidean codes for features of unit length, learned by gradients or by moving averages.

    With ``learnable`` the codes are parameters and the loss pulls codes to features and features to codes with the
    same weight (arXiv 1711.00937, equation 3); use it where the codebook shall take gradients, which the package
    forbids for cosine codes.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 16384,
        code_dim: int = 8,
        learnable: bool = True,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        dead_share: float = 0.1,
        start_points: int | None = None,
        warmup_steps: int = 0,
        rotation_trick: bool = False,
        seed: int = 0,
    ) -> None:
        """Creates the quantizer; arguments as in `CosineVQ`.

        Args:
            vocab_size: V, number of codes.
            code_dim: d, channels of features and codes.
            learnable: Codes are parameters; otherwise they follow by moving averages.
            decay: Of the moving averages, per step, in (0, 1); counts for the revival use it in both cases.
            commitment_weight: Weight of the loss, >= 0.
            dead_share: A code whose average count is below this share of the mean is revived; 0 never revives.
            start_points: Features for the k-means start, at least V; None is 2 V, 0 starts at once from random codes.
            warmup_steps: Training steps that pass features on unquantized, at the least.
            rotation_trick: Send gradients by the rotation trick (arXiv 2410.06424) and not straight through.
            seed: Of all random choices.

        Raises:
            ValueError: On a value out of range.
        """
        super().__init__(
            metric="euclidean",
            vocab_size=vocab_size,
            code_dim=code_dim,
            decay=decay,
            commitment_weight=commitment_weight,
            learnable=learnable,
            dead_share=dead_share,
            start_points=start_points,
            warmup_steps=warmup_steps,
            rotation_trick=rotation_trick,
            seed=seed,
        )
        self._settings["learnable"] = learnable
