"""What a quantizer is to the rest of the library: features in, codes and embeddings out."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn

from layton.quantizers.health import CodebookHealth, HealthMonitor
from layton.quantizers.pretrained import copy_weights, load_quantizer, save_quantizer

ConfigValue = int | float | bool | str | list[int] | None

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.uint16, torch.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizerOutput:
    """Result of one quantization.

    Attributes:
        codes: (B, N) int64 in [0, V), row-major over the h x w grid, N = h * w.
        embeddings: (B, d, h, w) code embeddings; the gradient passes to the features: straight through, or in
            training by the rotation trick, too.
        loss: () auxiliary loss, already weighted; zero in evaluation.
    """

    codes: Tensor
    embeddings: Tensor
    loss: Tensor


def off_meta() -> torch.device:
    """Context that builds on the CPU where torch would build on the meta device, and elsewhere changes nothing.

    Quantizers hold tables that no state dict restores, and little memory: inside a model that is built on the meta
    device they are real from the start.
    """
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


class Quantizer(nn.Module, ABC):
    """Maps features (B, d, h, w) to discrete codes (B, N) and codes to embeddings (B, d, h, w).

    Everything inside is fp32: autocast is switched off and `half()` or `bfloat16()` only move the module, because
    near ties between 16,384 codes flip in lower precision. Embeddings come back in the type of the features.

    In training, features that are not finite never reach the codebook: their embeddings are NaN, so the loss is too
    and a guard can skip the step with the codebook unharmed. In evaluation they raise ``ValueError``.
    """

    health_monitor: HealthMonitor

    def __init__(self, *, vocab_size: int, code_dim: int) -> None:
        """Creates the shared parts.

        Args:
            vocab_size: V, number of codes, >= 2.
            code_dim: d, channels of features and embeddings, >= 1.

        Raises:
            ValueError: On a value out of range.
        """
        super().__init__()
        if vocab_size < 2 or code_dim < 1:
            raise ValueError(f"vocab_size must be >= 2 and code_dim >= 1, got {vocab_size} and {code_dim}")
        self.vocab_size = vocab_size
        self.code_dim = code_dim
        with off_meta():
            self.health_monitor = HealthMonitor(vocab_size)

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """(V, d) float32, the embedding of every code."""

    @abstractmethod
    def config(self) -> dict[str, ConfigValue]:
        """Constructor arguments that rebuild this quantizer; plain JSON values."""

    @abstractmethod
    def _weights(self) -> dict[str, Tensor]:
        """Tensors that give the codes their meaning; what a saved folder holds."""

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes tensors with the names and shapes of `_weights`."""
        copy_weights(self._weights(), weights)

    @abstractmethod
    def _quantize(self, features: Tensor) -> QuantizerOutput:
        """Training and evaluation step on fp32 features (B, d, h, w) outside autocast, possibly not finite."""

    @abstractmethod
    def _search(self, features: Tensor) -> Tensor:
        """Codes (n,) int64 of finite fp32 features (n, d), outside autocast, in memory that does not grow with n V."""

    def _straight_through(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Embeddings (B, d, h, w) whose gradient reaches the features, too, in evaluation as in training."""
        return embeddings + (features - features.detach())

    def _embed(self, codes: Tensor) -> Tensor:
        """Embeddings (B, N, d) of valid codes (B, N)."""
        return nn.functional.embedding(codes, self.codebook)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features; in training mode also updates the codebook and its health.

        Args:
            features: (B, d, h, w), any range.

        Returns:
            Codes, embeddings in the type of ``features``, and loss (see `QuantizerOutput`).

        Raises:
            ValueError: On a wrong shape, or in evaluation on features that are not finite.
        """
        self._check_features(features)
        if not self.training:
            codes = self.encode(features)
            embeddings = self.codes_to_embeddings(codes, (features.shape[2], features.shape[3]))
            if torch.is_grad_enabled() and features.requires_grad:
                with torch.autocast(device_type=features.device.type, enabled=False):
                    embeddings = self._straight_through(features.float(), embeddings)
            return QuantizerOutput(codes, embeddings.to(features.dtype), features.new_zeros((), dtype=torch.float32))
        with torch.autocast(device_type=features.device.type, enabled=False):
            output = self._quantize(features.float())
        self.health_monitor.update(output.codes)
        return QuantizerOutput(output.codes, output.embeddings.to(features.dtype), output.loss)

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        """Codes of features, in memory that does not grow with n x V.

        Args:
            features: (B, d, h, w).

        Returns:
            (B, N) int64, row-major.

        Raises:
            ValueError: On a wrong shape or on features that are not finite.
        """
        self._check_features(features)
        with torch.autocast(device_type=features.device.type, enabled=False):
            flat = rearrange(features.float(), "b d h w -> (b h w) d")
            bad = int((~torch.isfinite(flat)).any(dim=1).sum())
            if bad:
                raise ValueError(f"{bad} of {len(flat)} features are NaN or infinite")
            return rearrange(self._search(flat), "(b n) -> b n", b=len(features))

    def codes_to_embeddings(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embeddings of codes, as the decoder takes them.

        Args:
            codes: (B, N) integers in [0, V), row-major.
            grid: (h, w) with h * w = N.

        Returns:
            (B, d, h, w) float32.

        Raises:
            ValueError: On codes that `check_codes` refuses.
        """
        height, width = grid
        self.check_codes(codes, grid=grid)
        with torch.autocast(device_type=codes.device.type, enabled=False):
            return rearrange(self._embed(codes.long()), "b (h w) d -> b d h w", h=height, w=width)

    def check_codes(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> None:
        """Refuses what is not a batch of codes of this quantizer.

        Args:
            codes: What should be (B, N) integers in [0, V).
            grid: (h, w) that N must fill; None accepts every N >= 1.

        Raises:
            ValueError: On another rank, a type that is not an integer, a wrong N, or a value outside [0, V).
        """
        if codes.dtype not in _INTEGERS:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        if codes.ndim != 2:
            raise ValueError(f"codes must be (B, N), got shape {tuple(codes.shape)}")
        if grid is not None and (min(grid) < 1 or codes.shape[1] != grid[0] * grid[1]):
            raise ValueError(f"{codes.shape[1]} codes per image do not fill a grid of {grid[0]} x {grid[1]}")
        if codes.shape[1] == 0:
            raise ValueError("codes must hold at least one token per image, got 0")
        codes = codes.long()  # torch finds no extremes of uint16, in which token datasets are stored
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
            raise ValueError(
                f"codes must be in [0, {self.vocab_size - 1}], got {int(codes.min())} to {int(codes.max())}"
            )

    def freeze(self) -> Self:
        """Stops all learning of the codes for good, in training mode too; features still get gradients and loss."""
        return self.requires_grad_(False)

    def health(self) -> CodebookHealth:
        """Usage, perplexity and alarm over the recent training tokens; for a logger, once in some 20 steps."""
        return self.health_monitor.report()

    @torch.no_grad()
    def fingerprint(self) -> str:
        """16 hex digits that differ when any code has another meaning: a hash of kind, sizes and weights."""
        settings = self.config()
        facts = [type(self).__name__, self.vocab_size, self.code_dim, settings.get("levels")]
        facts += ["spherical"] if settings.get("spherical") else []
        digest = hashlib.sha256(json.dumps(facts).encode())
        for name, tensor in sorted(self._weights().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (fp32) into a folder, each atomically.

        Holds what encoding and decoding need; the moving averages of the training are in its checkpoints.

        Args:
            folder: Made if it does not exist.
        """
        save_quantizer(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Rebuilds a quantizer, of the class the folder names, in evaluation mode.

        Args:
            folder: As written by `save_pretrained`.

        Returns:
            The quantizer; further training starts with equal counts for all codes.

        Raises:
            ValueError: If files are missing, damaged or changed, tensors are unknown, missing, mis-shaped or not
                finite, or the folder holds a quantizer that is not a ``cls``.
        """
        from layton.quantizers import QUANTIZERS  # the list of all subclasses cannot be known up here

        own = {} if inspect.isabstract(cls) else {cls.__name__: cls}  # of a user, who asks for it by its class
        quantizer = load_quantizer(folder, {**QUANTIZERS, **own}, Quantizer)
        if not isinstance(quantizer, cls):
            raise ValueError(f"{os.fspath(folder)} holds a {type(quantizer).__name__}, not a {cls.__name__}")
        return quantizer

    def _check_features(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.code_dim or not features.is_floating_point():
            raise ValueError(
                f"features must be floating (B, {self.code_dim}, h, w), got {features.dtype} {tuple(features.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the module but never lowers its precision (see the class docstring)."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lowered = tensor.is_floating_point() and moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if lowered else moved

        return super()._apply(move, recurse)
