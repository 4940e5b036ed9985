"""LPIPS, DISTS, Inception FID and CLIP score: the published measures, run only where their weights are on disk.

Nothing is downloaded, ever. A measure whose weights or packages are missing is reported as absent, with the reason and
the place where its weights were looked for. Weights are looked for in torch.hub's cache (``TORCH_HOME``) or where
`ExternalSources` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torchmetrics import Metric
    from torchmetrics.image.fid import FrechetInceptionDistance

PairMeasure = Callable[[Tensor, Tensor], Tensor]
"""(B, 3, H, W) in [-1, 1], twice -> (B,)."""
LpipsNet = Literal["alex", "vgg", "squeeze"]

# names under which torchvision and torch-fidelity keep these files in torch.hub's cache
_BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class AbsentError(RuntimeError):
    """A measure cannot be taken here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalSources:
    """Where to look for weights.

    Attributes:
        hub_dir: Folder with ``checkpoints/`` as torch.hub keeps it; None for torch.hub's own.
        lpips_net: Backbone of LPIPS.
        inception: File of torch-fidelity's Inception; None for the one in ``hub_dir``.
        clip: Folder of a CLIP model in transformers' format, or a name in the local cache; None for no CLIP score.
    """

    hub_dir: Path | None = None
    lpips_net: LpipsNet = "alex"
    inception: Path | None = None
    clip: str | None = None


@dataclass(frozen=True, slots=True)
class ExternalMeasures:
    """What can be measured here.

    Attributes:
        pairs: Measures of pairs of images, by name (``lpips_alex``, ``dists``).
        inception_fid: Makes an empty FID metric that takes uint8 images, or None.
        absent: Reasons of what cannot be measured, by name.
    """

    pairs: Mapping[str, PairMeasure] = field(default_factory=dict)
    inception_fid: Callable[[], FrechetInceptionDistance] | None = None
    absent: Mapping[str, str] = field(default_factory=dict)


def load_external(sources: ExternalSources | None = None) -> ExternalMeasures:
    """Loads every measure of pairs and sets of images whose weights are on disk.

    Args:
        sources: Where to look; by default torch.hub's cache.

    Returns:
        The measures, and the reasons of the absent ones.
    """
    sources = sources or ExternalSources()
    pairs: dict[str, PairMeasure] = {}
    absent: dict[str, str] = {}
    loaders: dict[str, Callable[[ExternalSources], PairMeasure]] = {
        f"lpips_{sources.lpips_net}": load_lpips,
        "dists": load_dists,
    }
    for name, load in loaders.items():
        try:
            pairs[name] = load(sources)
        except AbsentError as reason:
            absent[name] = str(reason)
    inception: Callable[[], FrechetInceptionDistance] | None = None
    try:
        inception = load_inception_fid(sources)
    except AbsentError as reason:
        absent["fid_inception"] = str(reason)
    return ExternalMeasures(pairs, inception, absent)


def load_lpips(sources: ExternalSources) -> PairMeasure:
    """LPIPS (arXiv 1801.03924) through torchmetrics, which ships the linear weights; the backbone is torchvision's.

    Raises:
        AbsentError: The backbone's weights are not on disk, or damaged.
    """
    backbone = _checkpoint(sources, _BACKBONES[sources.lpips_net])
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    with _hub_dir(sources), _readable(backbone):
        metric = LearnedPerceptualImagePatchSimilarity(net_type=sources.lpips_net, normalize=False)
    return _OneByOne(metric, lambda images: images)


def load_dists(sources: ExternalSources) -> PairMeasure:
    """DISTS (arXiv 2004.07728) through torchmetrics, which ships its weights; the backbone is torchvision's VGG16.

    Raises:
        AbsentError: The backbone's weights are not on disk, or damaged.
    """
    backbone = _checkpoint(sources, _BACKBONES["vgg"])
    from torchmetrics.image.dists import DeepImageStructureAndTextureSimilarity

    with _hub_dir(sources), _readable(backbone):
        metric = DeepImageStructureAndTextureSimilarity()
    return _OneByOne(metric, lambda images: (images + 1) / 2)


def lpips_network(sources: ExternalSources) -> nn.Module:
    """LPIPS with gradients: two batches (B, 3, H, W) in [-1, 1] to distances (B, 1, 1, 1), for losses.

    Raises:
        AbsentError: The backbone's weights are not on disk, or damaged.
    """
    backbone = _checkpoint(sources, _BACKBONES[sources.lpips_net])
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    with _hub_dir(sources), _readable(backbone):
        metric = LearnedPerceptualImagePatchSimilarity(net_type=sources.lpips_net, normalize=False)
    network: nn.Module = metric.net
    return network


def dists_network(sources: ExternalSources) -> nn.Module:
    """DISTS with gradients on request: two batches (B, 3, H, W) in [0, 1] to distances (B,), for losses.

    Raises:
        AbsentError: The backbone's weights are not on disk, or damaged.
    """
    backbone = _checkpoint(sources, _BACKBONES["vgg"])
    from torchmetrics.functional.image.dists import DISTSNetwork

    with _hub_dir(sources), _readable(backbone):
        network: nn.Module = DISTSNetwork()
    return network


def load_inception_fid(sources: ExternalSources) -> Callable[[], FrechetInceptionDistance]:
    """FID (arXiv 1706.08500) with torch-fidelity's Inception through torchmetrics; takes uint8 images (B, 3, H, W).

    Raises:
        AbsentError: torch-fidelity is not installed, or the weights are not on disk, or damaged.
    """
    if find_spec("torch_fidelity") is None:
        raise AbsentError("the package torch-fidelity is not installed (extra 'eval')")
    path = sources.inception or _checkpoint(sources, INCEPTION_FILE)
    if not path.is_file():
        raise AbsentError(f"no weights at {path}")
    from torchmetrics.image.fid import FrechetInceptionDistance

    with _readable(path):
        empty = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(path))
    return lambda: deepcopy(empty)


class ClipScore(nn.Module):
    """Cosine of CLIP's image and text embeddings, times 100, of each pair (arXiv 2104.08718, without its factor 2.5).

    Args:
        metric_model: A ``CLIPModel`` of transformers.
        processor: Its ``CLIPProcessor``.
        name: For the protocol.
    """

    def __init__(self, metric_model: nn.Module, processor: Callable[..., Mapping[str, Tensor]], *, name: str) -> None:
        super().__init__()
        self.model = metric_model.requires_grad_(False).eval()
        self.processor = processor
        self.name = name

    @torch.no_grad()
    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score of each image and its caption.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            captions: B texts; longer ones than the model reads are cut.

        Returns:
            (B,) in [-100, 100].

        Raises:
            ValueError: The numbers of images and captions differ.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images but {len(captions)} captions")
        pixels = [(image.float().clamp(-1, 1) + 1) * 127.5 for image in images.cpu()]
        inputs = self.processor(
            text=list(captions),
            images=[p.round().to(torch.uint8) for p in pixels],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        device = next(self.model.parameters()).device
        outputs = self.model(**{name: value.to(device) for name, value in inputs.items()})
        return 100 * torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds, dim=-1)


def load_clip_score(sources: ExternalSources) -> ClipScore:
    """CLIP score with the model that ``sources.clip`` names, from disk only.

    Raises:
        AbsentError: No model is named, or it is not on disk.
    """
    if sources.clip is None:
        raise AbsentError("no CLIP model was named")
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(sources.clip, local_files_only=True, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(sources.clip, local_files_only=True)
    except OSError as error:  # what transformers raises for a file that is neither there nor cached
        raise AbsentError(f"no CLIP model {sources.clip!r} on disk: {str(error).splitlines()[0]}") from error
    return ClipScore(model, processor, name=sources.clip)


class _OneByOne:
    """Turns a metric that averages over a batch into one that gives a figure per image."""

    def __init__(self, metric: Metric, prepare: Callable[[Tensor], Tensor]) -> None:
        self.metric = metric.requires_grad_(False)
        self.prepare = prepare

    @torch.no_grad()
    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], twice -> (B,)."""
        metric = self.metric.to(images.device)
        scores: list[Tensor] = []
        for a, b in zip(self.prepare(images).split(1), self.prepare(originals).split(1), strict=True):
            metric.reset()
            scores.append(metric(a, b).reshape(()))
        return torch.stack(scores)


def _checkpoint(sources: ExternalSources, name: str) -> Path:
    """The file ``name`` in the cache, or `AbsentError`: the libraries would download it otherwise."""
    path = (sources.hub_dir or Path(torch.hub.get_dir())) / "checkpoints" / name
    if not path.is_file():
        raise AbsentError(f"no weights at {path}")
    return path


@contextmanager
def _readable(weights: Path) -> Iterator[None]:
    """Turns what readers of a damaged file raise, which is not one type, into `AbsentError`."""
    try:
        yield
    except Exception as error:
        raise AbsentError(f"{weights} cannot be read, and may be damaged ({type(error).__name__})") from error


@contextmanager
def _hub_dir(sources: ExternalSources) -> Iterator[None]:
    """Lets torchvision read its weights from ``sources.hub_dir``."""
    before = torch.hub.get_dir()
    try:
        if sources.hub_dir is not None:
            torch.hub.set_dir(str(sources.hub_dir))
        yield
    finally:
        torch.hub.set_dir(before)
