"""Quantizers whose codes follow from a rule or from a small map: SimVQ, FSQ and LFQ."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, SimVQ
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from layton.nearest import nearest_codes
from layton.quantizers.base import ConfigValue, Quantizer, QuantizerOutput, off_meta
from layton.ranks import mean_over_ranks

_SHARPNESS = 100.0  # the package's inverse temperature of how sure LFQ's features are of their codes


def _finite_tokens(features: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, d) with zeros for those that are not finite, and which ones are: (B, N, 1)."""
    tokens = rearrange(features, "b d h w -> b (h w) d")
    finite = torch.isfinite(tokens).all(dim=2, keepdim=True)
    return torch.where(finite, tokens, 0.0), finite


def _output(tokens: Tensor, codes: Tensor, loss: Tensor, finite: Tensor, *, height: int) -> QuantizerOutput:
    embeddings = torch.where(finite, tokens, torch.nan)  # a guard on the loss must see what came in
    return QuantizerOutput(codes.long(), rearrange(embeddings, "b (h w) d -> b d h w", h=height), loss)


class _ChunkedSimVQ(SimVQ):
    """The package's SimVQ with `nearest_codes` for its n x V distance matrix; for tokens (B, N, d)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codebook = self.codebook
        flat = rearrange(x.detach(), "b n d -> (b n) d")
        codes = rearrange(nearest_codes(flat, codebook, metric="euclidean", check=False), "(b n) -> b n", b=len(x))
        quantized = nn.functional.embedding(codes, codebook)
        to_features = nn.functional.mse_loss(quantized, x.detach())
        to_codes = nn.functional.mse_loss(x, quantized.detach())
        loss = self.commitment_weight * (to_features + self.input_to_quantize_commit_loss_weight * to_codes)
        passed = rotate_to(x, quantized) if self.rotation_trick else x + (quantized - x).detach()
        return passed, codes, loss


class SimVQQuantizer(Quantizer):
    """A frozen random codebook seen through one learned linear map (SimVQ, arXiv 2411.02038, equation 7).

    The map moves all codes together, so none is left behind and no revival is needed.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 16384,
        code_dim: int = 8,
        commitment_weight: float = 1.0,
        feature_weight: float = 0.25,
        rotation_trick: bool = True,
        seed: int = 0,
    ) -> None:
        """Creates the quantizer.

        Args:
            vocab_size: V, number of codes.
            code_dim: d, channels of features and codes.
            commitment_weight: Weight of the whole loss, >= 0.
            feature_weight: Weight, inside the loss, of pulling features to codes against codes to features, >= 0.
            rotation_trick: Send gradients by the rotation trick (arXiv 2410.06424) and not straight through.
            seed: Of the frozen codebook.

        Raises:
            ValueError: On a value out of range.
        """
        super().__init__(vocab_size=vocab_size, code_dim=code_dim)
        if commitment_weight < 0 or feature_weight < 0:
            raise ValueError(f"weights must be >= 0, got {commitment_weight} and {feature_weight}")
        self._settings: dict[str, ConfigValue] = {
            "vocab_size": vocab_size,
            "code_dim": code_dim,
            "commitment_weight": commitment_weight,
            "feature_weight": feature_weight,
            "rotation_trick": rotation_trick,
            "seed": seed,
        }
        frozen = torch.randn(vocab_size, code_dim, generator=torch.Generator().manual_seed(seed), device="cpu")
        with off_meta():
            self.vq = _ChunkedSimVQ(
                dim=code_dim,
                codebook_size=vocab_size,
                init_fn=lambda drawn: (frozen * code_dim**-0.5).to(drawn.device),
                commitment_weight=commitment_weight,
                input_to_quantize_commit_loss_weight=feature_weight,
                rotation_trick=rotation_trick,
            )

    @property
    def codebook(self) -> Tensor:
        """(V, d) float32: the frozen codes through the learned map, with its gradient."""
        return self.vq.codebook

    def config(self) -> dict[str, ConfigValue]:
        """Constructor arguments."""
        return dict(self._settings)

    def _weights(self) -> dict[str, Tensor]:
        return {"frozen_codebook": self.vq.frozen_codebook, "code_transform": self.vq.code_transform.weight}

    def _search(self, features: Tensor) -> Tensor:
        return nearest_codes(features, self.codebook, metric="euclidean", check=False)

    def _quantize(self, features: Tensor) -> QuantizerOutput:
        tokens, finite = _finite_tokens(features)
        quantized, codes, loss = self.vq(tokens)
        return _output(quantized, codes, loss, finite, height=features.shape[2])


class FSQQuantizer(Quantizer):
    """Finite scalar quantization (arXiv 2309.15505): every channel is rounded to a few levels.

    No codebook, no loss, nothing to collapse. The paper's levels for about 2^14 codes are (8, 8, 8, 6, 5).
    """

    def __init__(self, *, levels: Sequence[int] = (8, 8, 8, 6, 5), code_dim: int | None = None) -> None:
        """Creates the quantizer.

        Args:
            levels: Levels of every channel, each >= 3; V is their product.
            code_dim: d; if it is not the number of levels, learned linear maps lead in and out. None means equal.

        Raises:
            ValueError: On a value out of range.
        """
        if not levels or min(levels) < 3:
            raise ValueError(f"levels must be a list of integers >= 3, got {list(levels)}")
        super().__init__(vocab_size=math.prod(levels), code_dim=len(levels) if code_dim is None else code_dim)
        self._levels = [int(level) for level in levels]
        with off_meta():
            self.vq = FSQ(levels=self._levels, dim=self.code_dim)

    @property
    def codebook(self) -> Tensor:
        """(V, d) float32, through the outward map if there is one."""
        return self._embed(torch.arange(self.vocab_size, device=self.vq.implicit_codebook.device)[None])[0]

    def config(self) -> dict[str, ConfigValue]:
        """Constructor arguments."""
        return {"levels": list(self._levels), "code_dim": self.code_dim}

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.vq.named_parameters())

    def _embed(self, codes: Tensor) -> Tensor:
        return self.vq.indices_to_codes(codes)

    def _search(self, features: Tensor) -> Tensor:
        _, codes = self.vq(features[None])
        return codes[0].long()

    def _straight_through(self, features: Tensor, embeddings: Tensor) -> Tensor:
        return self._quantize(features).embeddings

    def _quantize(self, features: Tensor) -> QuantizerOutput:
        tokens, finite = _finite_tokens(features)
        quantized, codes = self.vq(tokens)
        return _output(quantized, codes, tokens.new_zeros(()), finite, height=features.shape[2])


class LFQQuantizer(Quantizer):
    """Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737): one bit per channel, V = 2^bits.

    In training the entropy loss compares a random share of the features with all V codes, in O(n V) time and memory
    times ``entropy_share``.
    """

    steps: Tensor

    def __init__(
        self,
        *,
        vocab_size: int = 16384,
        code_dim: int | None = None,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        commitment_weight: float = 0.25,
        entropy_share: float = 0.05,
        spherical: bool = False,
        seed: int = 0,
    ) -> None:
        """Creates the quantizer.

        Args:
            vocab_size: V, a power of two.
            code_dim: d; if it is not log2 V, learned linear maps lead in and out. None means equal.
            entropy_weight: Weight of (entropy per token - ``diversity`` times entropy of the batch).
            diversity: See there.
            commitment_weight: Weight of the squared distance of features and codes, >= 0.
            entropy_share: Share of the tokens in the entropy loss, in (0, 1], at least one token.
            spherical: Unit length, binary spherical quantization (arXiv 2406.07548).
            seed: Of the choice of those tokens.

        Raises:
            ValueError: On a value out of range.
        """
        bits = vocab_size.bit_length() - 1
        if vocab_size < 2 or vocab_size != 1 << bits:
            raise ValueError(f"vocab_size must be a power of two, got {vocab_size}")
        if not 0 < entropy_share <= 1 or commitment_weight < 0:
            raise ValueError(
                f"entropy_share must be in (0, 1], commitment_weight >= 0, got {entropy_share}, {commitment_weight}"
            )
        super().__init__(vocab_size=vocab_size, code_dim=bits if code_dim is None else code_dim)
        self._settings: dict[str, ConfigValue] = {
            "vocab_size": vocab_size,
            "code_dim": self.code_dim,
            "entropy_weight": entropy_weight,
            "diversity": diversity,
            "commitment_weight": commitment_weight,
            "entropy_share": entropy_share,
            "spherical": spherical,
            "seed": seed,
        }
        self.entropy_share, self.seed = entropy_share, seed
        self.diversity_weight = entropy_weight * diversity
        with off_meta():
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self.vq = LFQ(
                dim=self.code_dim,
                codebook_size=vocab_size,
                entropy_loss_weight=entropy_weight,
                diversity_gamma=0.0,  # see `_diversity`
                commitment_loss_weight=commitment_weight,
                frac_per_sample_entropy=entropy_share,
                spherical=spherical,
            )

    @property
    def codebook(self) -> Tensor:
        """(V, d) float32, through the outward map if there is one."""
        return self._embed(torch.arange(self.vocab_size, device=self.vq.codebook.device)[None])[0]

    def config(self) -> dict[str, ConfigValue]:
        """Constructor arguments."""
        return dict(self._settings)

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.vq.named_parameters())

    def _embed(self, codes: Tensor) -> Tensor:
        return self.vq.indices_to_codes(codes)

    def _search(self, features: Tensor) -> Tensor:
        training = self.vq.training
        self.vq.eval()  # without the entropy loss and its n x V matrix
        _, codes, _ = self.vq(features[None])
        self.vq.train(training)
        return codes[0].long()

    def _straight_through(self, features: Tensor, embeddings: Tensor) -> Tensor:
        bits = self.vq.maybe_l2norm(self.vq.project_in(rearrange(features, "b d h w -> b h w d")))
        if isinstance(self.vq.project_out, nn.Linear):  # whose own gradient is that of the embeddings
            bits = nn.functional.linear(bits, self.vq.project_out.weight.detach())
        return super()._straight_through(rearrange(bits, "b h w d -> b d h w"), embeddings)

    def _quantize(self, features: Tensor) -> QuantizerOutput:
        tokens, finite = _finite_tokens(features)
        # the package counts by truncation: a share of 1.5 tokens is one token
        self.vq.frac_per_sample_entropy = min(1.0, max(self.entropy_share, 1.5 / (tokens.shape[0] * tokens.shape[1])))
        self.steps += 1
        with torch.random.fork_rng(devices=[]):  # the package draws on the CPU, from the global generator
            torch.default_generator.manual_seed(self._draws())
            quantized, codes, loss = self.vq(tokens)
        if self.vq.training and self.diversity_weight:
            loss = loss - self.diversity_weight * self._diversity(tokens)
        return _output(quantized, codes, loss, finite, height=features.shape[2])

    def _draws(self) -> int:
        return self.seed * 1_000_003 + int(self.steps)

    def _diversity(self, tokens: Tensor) -> Tensor:
        """Entropy of how all codes are used by a share of the tokens (B, N, d), of all ranks together, ().

        The package has the term, but loses the sum over the ranks, and so divides it by their number (1.32).
        """
        features = rearrange(self.vq.maybe_l2norm(self.vq.project_in(tokens)), "b n d -> (b n) d")
        count = int(self.vq.frac_per_sample_entropy * len(features))
        generator = torch.Generator().manual_seed(self._draws())  # the same tokens as the package's
        chosen = (torch.randn(len(features), generator=generator, device="cpu").argsort() < count).to(features.device)
        codes = self.vq.maybe_l2norm(self.vq.codebook)
        used = mean_over_ranks((2.0 * _SHARPNESS * features[chosen] @ codes.t()).softmax(dim=1).mean(dim=0))
        return -(used * used.clamp(min=1e-5).log()).sum()
