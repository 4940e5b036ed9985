"""The package's learned codebook without its n x V matrices, with a start and a revival that are reproducible.

`vector_quantize_pytorch`'s ``Codebook`` makes the full score matrix and a one-hot matrix of n x V at every training
step (573 ms for 2,048 features and 16,384 codes on one core). `EMACodebook` keeps its state and its formulas
(exponential moving averages of counts and sums, Laplace smoothing) and replaces three things: the search
(`layton.nearest`), the sums (index additions, equal to the one-hot product), and all that draws random numbers.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from layton.nearest import Metric, nearest_codes
from layton.ranks import all_gather_rows, all_reduce_sum, broadcast_from_first

_START, _REVIVE = 0, 1  # purposes of random numbers, so that no two draws share a seed


class EMACodebook(Codebook):
    """V codes of d dimensions, learned by moving averages (or by gradients) from assigned features.

    **Start.** k-means on the first batch cannot work with fewer features than codes, so the codebook collects
    features (and passes nothing on to learning) until it holds ``start_points`` of them and ``warmup_steps`` steps
    are over; then k-means starts all codes from the latest ``start_points`` features, as many as V or more.

    **Revival.** A code is dead when its average count falls below ``dead_share`` of the mean, n / V; it is then put
    on a random feature of the current batch, with the mean count, so it has time to be found. With n much smaller than
    V no absolute threshold on counts would work.

    Under `torch.distributed` counts and sums are added over the ranks and features gathered before anything is drawn
    from them, and random numbers depend on (seed, step) only: all ranks stay bit-equal. Whether there are ranks is
    asked at every step, since Lightning builds models before it starts the process group.
    """

    steps: Tensor
    pool: Tensor
    pool_seen: Tensor
    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        code_dim: int,
        metric: Metric,
        decay: float,
        learnable: bool,
        dead_share: float,
        start_points: int,
        warmup_steps: int,
        kmeans_iters: int,
        seed: int,
    ) -> None:
        """Creates random unit codes; see the class and `CosineVQ` for the arguments."""
        super().__init__(
            dim=code_dim,
            codebook_size=vocab_size,
            decay=decay,
            threshold_ema_dead_code=0,  # judged here, in units of the mean count
            learnable_codebook=learnable,
            ema_update=not learnable,
            use_cosine_sim=metric == "cosine",
            kmeans_iters=kmeans_iters,
        )
        self.metric: Metric = metric
        self.dead_share, self.warmup_steps, self.seed = dead_share, warmup_steps, seed
        provisional = torch.randn(vocab_size, code_dim, generator=torch.Generator().manual_seed(seed), device="cpu")
        self.reset_to(nn.functional.normalize(provisional, dim=1))
        self.initted.fill_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pool", torch.zeros(start_points, code_dim))
        self.register_buffer("pool_seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def reset_to(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Sets all codes (V, d) and their average counts (V,), and ends the collecting.

        Without counts all codes are taken to be used alike: each has the mean count of the first batch that comes. What
        that is nobody knows before, and from counts far below it codes would be dead at once.
        """
        counts = torch.zeros(len(codes), device=codes.device) if counts is None else counts
        self.embed.data[0].copy_(codes)
        self.cluster_size[0].copy_(counts)
        self.embed_avg[0].copy_(codes * counts[:, None])
        self.initted.fill_(True)

    @property
    def ready(self) -> bool:
        """Whether the codes are started."""
        return bool(self.initted)

    @torch.no_grad()
    def collect(self, features: Tensor) -> None:
        """Keeps features (n, d) for the start, and starts the codes once there are enough."""
        gathered = all_gather_rows(features[torch.isfinite(features).all(dim=1)])
        latest = gathered[-len(self.pool) :]
        slots = (self.pool_seen + torch.arange(len(latest), device=latest.device)) % len(self.pool)
        self.pool[slots] = latest
        self.pool_seen += len(latest)
        self.steps += 1
        if int(self.pool_seen) >= len(self.pool) and int(self.steps) >= self.warmup_steps:
            self._start(num_per_step=len(gathered))

    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: None = None,
        ema_update_weight: None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: None = None,
        update_usage: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The package's call, for what `VectorQuantize` sends it here: x (B, N, d) -> embeddings, codes, no scores."""
        if mask is not None or codebook_transform_fn is not None or topk is not None or accum_ema_update:
            raise NotImplementedError("EMACodebook takes no masks, transforms, top-k search or accumulated updates")
        flat = rearrange(x, "b n d -> (b n) d")
        finite = torch.isfinite(flat).all(dim=1)
        clean = torch.where(finite[:, None], flat, 0.0).detach()
        embed = self.embed[0] if self.learnable_codebook else self.embed[0].detach()
        codes = nearest_codes(clean, embed, metric=self.metric, check=False)
        quantized = torch.where(finite[:, None], nn.functional.embedding(codes, embed), torch.nan)
        if self.training and not freeze_codebook and update_usage:
            self._learn(clean, codes, finite)
        batch = len(x)
        return (
            rearrange(quantized, "(b n) d -> b n d", b=batch),
            rearrange(codes, "(b n) -> b n", b=batch),
            quantized.new_zeros(batch, 0, 0),
        )

    @torch.no_grad()
    def _learn(self, features: Tensor, codes: Tensor, finite: Tensor) -> None:
        """Moves averages and codes towards features (n, d) assigned to codes (n,), where finite (n,)."""
        self.steps += 1
        counts = torch.zeros_like(self.cluster_size[0]).index_add_(0, codes, finite.to(features.dtype))
        sums = torch.zeros_like(self.embed_avg[0]).index_add_(0, codes, features)  # zero where not finite
        counts, sums = all_reduce_sum(counts), all_reduce_sum(sums)
        self._count_from(counts)
        self.cluster_size[0].lerp_(counts, 1.0 - self.decay)
        self.embed_avg[0].lerp_(sums, 1.0 - self.decay)
        if self.ema_update:
            self.update_ema()
        if self.dead_share > 0:
            self._revive(features[finite], mean_count=counts.sum() / len(counts))

    def _count_from(self, counts: Tensor) -> None:
        """Begins the averages of codes that came without counts, by those of the first batch (V,)."""
        mean = counts.sum() / len(counts)
        missing = torch.where((self.cluster_size[0].sum() == 0) & (mean > 0), mean, torch.zeros_like(mean))
        self.cluster_size[0] += missing
        self.embed_avg[0] += missing * self.embed[0]

    @property
    def changes_in_forward(self) -> list[nn.Parameter]:
        """Codes that learn by gradients, and of which dead ones are moved besides: a skipped step has to undo that."""
        return [self.embed] if isinstance(self.embed, nn.Parameter) else []

    def _revive(self, features: Tensor, *, mean_count: Tensor) -> None:
        """Puts dead codes on random features (n, d); those that find none wait for the next step."""
        dead = (self.cluster_size[0] < self.dead_share * mean_count).nonzero()[:, 0]
        if not len(dead):  # the same on all ranks, since the counts are
            return
        features = all_gather_rows(features)
        generator = self._generator(_REVIVE)
        # CPU draws, so that the choice is the same on every device
        num_revived = min(len(dead), len(features))
        chosen = torch.randperm(len(features), generator=generator, device="cpu")[:num_revived].to(features.device)
        dead = dead[torch.randperm(len(dead), generator=generator, device="cpu")[:num_revived].to(dead.device)]
        self.embed.data[0, dead] = features[chosen]
        self.cluster_size[0, dead] = mean_count
        self.embed_avg[0, dead] = features[chosen] * mean_count

    def _start(self, *, num_per_step: int) -> None:
        """Starts the codes by k-means over the pool."""
        codes, counts = kmeans(
            self.pool,
            self.codebook_size,
            metric=self.metric,
            num_iters=self.kmeans_iters,
            generator=self._generator(_START),
        )
        codes, counts = broadcast_from_first(codes), broadcast_from_first(counts)
        self.reset_to(codes, counts * (num_per_step / len(self.pool)))

    def _generator(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + int(self.steps)) * 2 + purpose)


@torch.no_grad()
def kmeans(
    points: Tensor, num_clusters: int, *, metric: Metric, num_iters: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from random points; spherical (centres of unit length) for the cosine metric.

    The package's k-means holds a points x clusters matrix (2 GB for 32,768 points); this one takes O(points).

    Args:
        points: (P, d), P >= num_clusters; unit length for ``"cosine"``.
        num_clusters: Centres to find.
        metric: Of the assignment.
        num_iters: Rounds of assignment and averaging.
        generator: On the CPU; chooses the first centres.

    Returns:
        Centres (num_clusters, d) and how many points each had in the last assignment (num_clusters,), float32.

    Raises:
        ValueError: If there are fewer points than clusters.
    """
    if len(points) < num_clusters:
        raise ValueError(f"k-means needs at least {num_clusters} points, got {len(points)}")
    chosen = torch.randperm(len(points), generator=generator, device="cpu")[:num_clusters].to(points.device)
    centres = points[chosen].clone()
    counts = points.new_zeros(num_clusters)
    ones = points.new_ones(len(points))
    for _ in range(num_iters):
        nearest = nearest_codes(points, centres, metric=metric, check=False)
        counts = torch.zeros_like(counts).index_add_(0, nearest, ones)
        means = torch.zeros_like(centres).index_add_(0, nearest, points) / counts.clamp(min=1)[:, None]
        if metric == "cosine":
            means = nn.functional.normalize(means, dim=1)
        centres = torch.where(counts[:, None] > 0, means, centres)
    return centres, counts
