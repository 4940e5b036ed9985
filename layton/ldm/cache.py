"""Latents (and codes) of images computed once: diffusion training then never touches a pixel."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from layton.assets import find_autoencoder, resolve
from layton.data.cache import CachedTensors
from layton.data.geometry import Geometry
from layton.data.loader import collate
from layton.data.randomness import mix
from layton.data.sources import ImageSource, SampleSource, StoredSource, walk
from layton.devices import choose_device
from layton.folder import CONFIG_NAME, JsonValue, read_class, read_json, resolve_class, weights_hashes
from layton.ldm.autoencoder import Autoencoder, load_autoencoder
from layton.precision import exact_float32, quick_dtype

Images = Literal["none", "read", "stored"]
_CAPTIONS = 64  # of so many a cache's fingerprint knows the captions
_PIECE = 2**24
_READING = ("num_attention_heads", "num_heads", "hidden_act", "num_hidden_layers", "num_layers")
_VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "added_tokens.json")
_USUAL_SCALE = 0.18215  # diffusers', of configurations that do not say it


class CachedLatents(SampleSource):
    """A source of latents, made from an image source when first asked for and then read from disk.

    A sample holds ``latent`` (C, h, w) float16, ``caption`` and ``key``, and with a tokenizer ``codes`` (N,), int16 or,
    of a codebook with more than 32,768, int32.

    Args:
        source: Images of equal size. Latents are of this size, codes of the tokenizer's, to which images are resized.
        autoencoder: Folder of the AutoencoderKL, or of a pipeline or tokenizer that holds it, or ``mini``.
        folder: Where the cache lies.
        tokenizer: Folder with ``encoder/`` and ``quantizer/`` (an export of stage 0 or a tokenizer), or ``mini``; None
            caches no codes.
        num_samples: How many; more than the source has means that its augmentation is drawn anew each time round.
        batch_size: Images encoded at once.
        images: Samples also hold ``image`` (3, H, W) in [-1, 1], the very one that the latent was made of. ``"read"``
            takes it from the source once more, which costs no space; ``"stored"`` keeps it in the cache as uint8.
        in_memory: All of it in memory, in every process; otherwise samples are read from disk one by one.
        fresh_captions: Captions are said anew by the source with each sample's own seed (other wordings, languages and
            relations every epoch, where the source knows them); otherwise they are those of the cache.

    Raises:
        ValueError: If the folder holds a cache made by something else, or images are to come from elsewhere.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        autoencoder: str,
        folder: str,
        tokenizer: str | None = None,
        num_samples: int | None = None,
        batch_size: int = 16,
        images: Images = "none",
        in_memory: bool = True,
        fresh_captions: bool = False,
    ) -> None:
        if images not in get_args(Images):
            raise ValueError(f"images must be one of {get_args(Images)}, got {images!r}")
        autoencoder = str(find_autoencoder(autoencoder))
        tokenizer = None if tokenizer is None else str(resolve(tokenizer))
        self._source, self._images, self._fresh_captions = source, images, fresh_captions
        self._tokenizer, self.encoded_by = tokenizer, Path(autoencoder)
        count = len(source) if num_samples is None else num_samples
        fingerprint: dict[str, str | int | float | bool] = {
            "autoencoder": autoencoder_digest(Path(autoencoder)),
            "tokenizer": "" if tokenizer is None else codes_digest(Path(tokenizer)),
            "source": type(source).__name__,
            "num_samples": count,
            **_looks(source, count),
        }
        side = None if tokenizer is None else code_size(tokenizer)
        if side is not None and str(fingerprint["image_shape"]) != f"3 {side} {side}":
            fingerprint["code_size"] = side
        if images == "stored":
            fingerprint["images"] = True
        self._cache = CachedTensors.open_or_build(
            partial(_batches, source, count, batch_size),
            _Encode(autoencoder, tokenizer, keep_images=images == "stored"),
            folder,
            fingerprint=fingerprint,
            in_memory=in_memory,
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._cache)

    @property
    def keys(self) -> Sequence[str]:
        """Keys of all samples, in order."""
        return self._cache.keys

    @property
    def autoencoder(self) -> str:
        """What tells the autoencoder from others (`autoencoder_digest`)."""
        return str(self._cache.fingerprint["autoencoder"])

    def codebook(self) -> str | None:
        """Fingerprint of the codebook that the codes are of; None if there are no codes."""
        if self._tokenizer is None:
            return None
        found = json.loads((Path(self._tokenizer) / "quantizer" / CONFIG_NAME).read_text(encoding="utf-8"))
        return str(found.get("fingerprint"))

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        """One cached sample; the seed has no influence but on a fresh caption."""
        sample = self._cache.sample(index, seed=seed)
        if self._fresh_captions:
            sample["caption"] = self._source.caption(index % len(self._source), seed=seed)
        if self._images == "read":
            sample["image"] = _original(self._source, index)["image"]
        elif self._images == "stored":
            sample["image"] = sample["image"].float() / 127.5 - 1.0
        return sample


def require_codes(sources: Iterable[SampleSource], fingerprint: str) -> None:
    """Refuse caches, among sources and what they are made of, whose codes are not those of a codebook.

    Raises:
        ValueError: With both fingerprints.
    """
    for source in walk(sources):
        if isinstance(source, CachedLatents) and source.codebook() not in (None, fingerprint):
            raise ValueError(
                f"the cache holds codes of another tokenizer (codebook {source.codebook()}, wanted {fingerprint})"
            )


def require_latents(sources: Iterable[SampleSource], autoencoder: Path) -> None:
    """Refuse caches, among sources and what they are made of, whose latents another autoencoder made.

    One that differs in its decoder only is no other.

    Args:
        sources: What a run reads.
        autoencoder: Folder of the one that it decodes by.

    Raises:
        ValueError: With both folders.
    """
    cached = [source for source in walk(sources) if isinstance(source, CachedLatents)]
    if not cached:
        return
    own = autoencoder_digest(autoencoder)
    for folder in {source.encoded_by for source in cached if source.autoencoder != own}:
        if not encoder_hashes(folder) & encoder_hashes(autoencoder):
            raise ValueError(
                f"the data's latents were made by the autoencoder in {folder}, and the run decodes by the one in "
                f"{autoencoder}, whose encoder is another: nothing that it learns would fit"
            )


def name_for(source: ImageSource) -> str:
    """8 hex digits that tell these images and captions from others, for the name of a cache."""
    return hashlib.sha256(json.dumps(_looks(source, len(source))).encode()).hexdigest()[:8]


def _looks(source: ImageSource, count: int) -> dict[str, str]:
    """What tells a cache's images from others of the same source: size, keys and brightness of three of them.

    And what was said of some, or of files how these look.
    """
    seen = [_original(source, index) for index in sorted({0, count // 2, count - 1})]
    stored = [part for part in walk([source]) if isinstance(part, StoredSource)]
    parts = (part for part in walk([source]) if isinstance(part, ImageSource))
    said = source.settings() or " ".join(found for part in parts if (found := part.settings()))
    settings = {"settings": said} if said else {}
    if stored:
        content = "".join(part.stamp() for part in stored)
        content = content if len(stored) == 1 else hashlib.sha256(content.encode()).hexdigest()
    else:
        some = range(0, count, max(1, count // _CAPTIONS))
        captions = "\n".join(source.caption(index % len(source), seed=mix(index)) for index in some)
        content = hashlib.sha256(captions.encode("utf-8", "replace")).hexdigest()
    keys = "\n".join(sample["key"] for sample in seen)
    return settings | {
        "content": content[:16],
        "image_shape": " ".join(map(str, seen[0]["image"].shape)),
        "keys": hashlib.sha256(keys.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        # to a hundredth, so that another machine's rounding makes no difference
        "brightness": " ".join(f"{float(sample['image'].mean()):.2f}" for sample in seen),
    }


class _Encode:
    """Batch of images to latents and codes; loads its networks only when a cache must be built."""

    def __init__(self, autoencoder: str, tokenizer: str | None, *, keep_images: bool = False) -> None:
        self.folders = (autoencoder, tokenizer)
        self.code_size = None if tokenizer is None else code_size(tokenizer)
        self.keep_images = keep_images
        self.parts: tuple[Autoencoder, Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        device = choose_device(None)
        if self.parts is None:
            autoencoder = Autoencoder.from_pretrained(self.folders[0]).eval().to(memory_format=torch.channels_last)
            codes_of = None if self.folders[1] is None else load_code_parts(self.folders[1])
            self.parts = (autoencoder.to(device), codes_of and tuple(part.to(device) for part in codes_of))
        autoencoder, codes_of = self.parts
        images = batch["image"].to(device)
        # What bfloat16 rounds away is less than the autoencoder's own noise, and latents are kept in half precision
        # anyway: caches made in either are one.
        dtype = quick_dtype(images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            tensors = {"latent": autoencoder.encode(images.to(memory_format=torch.channels_last)).half().contiguous()}
        if codes_of is not None:
            encoder, quantizer = codes_of
            with exact_float32():  # as `LaytonTokenizer.encode`: rounded ones give other codes
                features = encoder(at_code_size(images, self.code_size))
            codes = quantizer.encode(features.float())
            tensors["codes"] = codes.to(torch.int16 if quantizer.vocab_size <= 2**15 else torch.int32)
        if self.keep_images:
            tensors["image"] = ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return tensors


def code_size(tokenizer: str | Path) -> int | None:
    """Side in pixels of the squares that a tokenizer encodes; None if the folder does not say it.

    Codes are always of such squares, whatever the size of the images that are decoded from them (arXiv 2503.08377,
    section 3: 256 tokens for an image of 1024 pixels).
    """
    place = resolve(tokenizer) / CONFIG_NAME
    if not place.is_file():
        return None
    found = json.loads(place.read_text(encoding="utf-8")).get("image_size")
    return None if found is None else int(found)


def at_code_size(images: Tensor, size: int | None) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as an encoder of ``size`` pixels takes them; as they are for None.

    As `LaytonTokenizer.encode` makes them.
    """
    height, width = images.shape[-2:]
    if size is None or (height, width) == (size, size):
        return images
    return Geometry.plan((height, width), size, policy="resize").apply(images)


def load_code_parts(folder: str | Path, *, frozen: bool = True) -> tuple[Any, Any]:
    """Encoder and quantizer of an export of stage 0 or of a tokenizer folder.

    Args:
        folder: The export or the tokenizer, or the name of an embedded one.
        frozen: Both in evaluation mode and as they are; else both in training mode and learning.

    Raises:
        ValueError: If a part is missing or names a class that is not allowed.
    """
    from layton.encoder import ImageEncoder
    from layton.quantizers import Quantizer

    root = resolve(folder)
    encoder = resolve_class(read_class(root / "encoder"), ImageEncoder).from_pretrained(root / "encoder")
    quantizer = Quantizer.from_pretrained(root / "quantizer")
    if not frozen:
        return encoder.requires_grad_(True).train(), quantizer.train()
    return encoder.requires_grad_(False).eval(), quantizer.freeze().eval()


def _batches(source: ImageSource, count: int, batch_size: int, start: int = 0) -> Iterator[dict[str, Any]]:
    """The images from number ``start`` on, read by processes of their own where an accelerator waits for them."""
    workers = 0 if choose_device(None).type == "cpu" else min(8, os.cpu_count() or 1)
    originals = _Originals(source, range(start, count))
    for batch in DataLoader(
        originals, batch_size, num_workers=workers, collate_fn=collate, generator=torch.Generator()
    ):
        if isinstance(source, StoredSource):
            source.bad.record_all(batch.get("bad", ()))  # each worker knows of its own only
        yield dict(batch)


class _Originals(Dataset[Any]):
    def __init__(self, source: ImageSource, indices: range) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Any:
        return _original(self.source, self.indices[place])


def _original(source: ImageSource, index: int) -> Any:
    """The image that a cached sample is made of; its augmentation depends on the index alone."""
    return source.sample(index % len(source), seed=mix(index))


def codes_digest(tokenizer: Path) -> str:
    """16 hex digits over what decides codes: encoder and quantizer. Decoders may be trained anew meanwhile.

    Raises:
        ValueError: If one of them is missing.
    """
    parts = [digest(tokenizer / part) for part in ("encoder", "quantizer")]
    levels = _config_in(tokenizer / "quantizer").get("levels")  # of FSQ, which no weight tells
    parts += [] if levels is None else [str(levels)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def _config_in(folder: Path) -> dict[str, JsonValue]:
    path = folder / CONFIG_NAME
    return read_json(path) if path.is_file() else {}


def digest(folder: Path) -> str:
    """16 hex digits over the weights in a folder and below.

    Raises:
        ValueError: If there are none.
    """
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise ValueError(f"no safetensors weights in {folder}")
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(_PIECE):
                total.update(piece)
    return total.hexdigest()[:16]


def words_digest(root: Path) -> str:
    """16 hex digits over what decides, beside weights, how a pipeline reads captions: tokenizers and configurations."""
    total = hashlib.sha256()
    for file in sorted(
        path for part in root.glob("tokenizer*") for path in part.iterdir() if path.name in _VOCABULARIES
    ):
        total.update(file.read_bytes())
    for file in sorted(root.glob(f"text_encoder*/{CONFIG_NAME}")):
        config = read_json(file)
        total.update(json.dumps([config.get(name) for name in _READING]).encode())
    return total.hexdigest()[:16]


def encoder_hashes(folder: Path) -> frozenset[str]:
    """What tells the half of an autoencoder that makes latents, and how these are scaled, from others.

    Copies stored in other types have one in common (`layton.folder.weights_hashes`).

    Raises:
        ValueError: There are no weights.
    """
    model = load_autoencoder(folder)
    parts = {n: value for n, value in model.state_dict().items() if n.startswith(("encoder.", "quant_conv."))}
    scaled = f"{float(model.config.scaling_factor)} {float(model.config.shift_factor or 0)}"
    return frozenset(f"{found} {scaled}" for found in weights_hashes(parts))


def autoencoder_digest(folder: Path) -> str:
    """16 hex digits over an autoencoder's weights, and over what its latents are scaled and shifted by, if they are.

    Raises:
        ValueError: There are no weights.
    """
    weights, config = digest(folder), _config_in(folder)
    scale = config.get("scaling_factor", _USUAL_SCALE if config else None)
    shift = config.get("shift_factor")
    if scale in (None, 1) and shift in (None, 0):
        return weights
    return hashlib.sha256(f"{weights} {scale} {shift}".encode()).hexdigest()[:16]
