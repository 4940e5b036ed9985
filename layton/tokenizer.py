"""`LaytonTokenizer`: encoder, quantizer and code decoders in one, with images of any size at its border."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from PIL import Image
from torch import Tensor, nn

from layton import assets
from layton.data.geometry import FIT_POLICIES, FitPolicy, Geometry, fit_image
from layton.data.images import plain_rgb, to_image, to_tensor
from layton.data.values import require_values
from layton.encoder import ImageEncoder
from layton.folder import JsonValue, class_name, load_config, resolve_class, save_config
from layton.interface import CodeDecoder, Generators, ImageTokenizer
from layton.precision import dtype_of, exact_float32
from layton.quantizers import Quantizer

CLASS_NAME = "layton.tokenizer.LaytonTokenizer"
LDM_FOLDER = "ldm"
STAGE_0_DECODER = "light"
PREFERRED_DECODERS = ("consistency", "diffusion", "light")


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImages:
    """Codes of images and what is needed to give them back their sizes; ``encoded[2:4]`` are those of some.

    Attributes:
        codes: (B, N) int64.
        geometries: How each image was fitted to the square.
    """

    codes: Tensor
    geometries: tuple[Geometry, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.geometries)

    def __iter__(self) -> Iterator[EncodedImages]:
        """The images one by one."""
        return (self[place] for place in range(len(self)))

    def __getitem__(self, chosen: int | slice) -> EncodedImages:
        """Some of the images, or one.

        Raises:
            IndexError: There is no such image.
        """
        some = chosen if isinstance(chosen, slice) else slice((place := range(len(self))[chosen]), place + 1)
        return EncodedImages(self.codes[some], self.geometries[some])


class LaytonTokenizer(ImageTokenizer):
    """An image becomes 256 tokens and comes back (Layton, arXiv 2503.08377).

    Args:
        encoder: Images to features.
        quantizer: Features to codes.
        decoders: Code decoders by name; none are needed to encode.
        image_size: Side of the encoder's square input in pixels.
        default_decoder: Name of the decoder that is used when none is asked for; by default the best there is:
            ``consistency``, then ``diffusion``, then ``light``, then the first.

    Raises:
        ValueError: If parts do not fit each other.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        quantizer: Quantizer,
        decoders: Mapping[str, CodeDecoder],
        *,
        image_size: int = 256,
        default_decoder: str | None = None,
    ) -> None:
        super().__init__()
        if encoder.code_dim != quantizer.code_dim:
            raise ValueError(f"encoder gives {encoder.code_dim}-d features, quantizer takes {quantizer.code_dim}-d")
        if image_size < 1 or image_size % encoder.downsample_factor:
            raise ValueError(f"image_size {image_size} is not a multiple of {encoder.downsample_factor}")
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoders = nn.ModuleDict(decoders)
        self.default_decoder = default_decoder if default_decoder is not None else best_decoder(decoders)
        if decoders or default_decoder is not None:
            self.decoder(self.default_decoder)
        self.image_size = image_size
        self.ldm: Path | None = None  # where the decoders' latent diffusion model was read from
        side = image_size // encoder.downsample_factor
        self.grid = (side, side)
        self.num_tokens = side * side
        self.vocab_size = quantizer.vocab_size

    def __repr__(self) -> str:
        """What it is, in a line: all its layers are thousands."""
        names = ", ".join(self.decoders) or "none"
        return f"LaytonTokenizer({self.image_size} px, {self.num_tokens} of {self.vocab_size} codes, decoders: {names})"

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def decoder(self, name: str | None = None) -> CodeDecoder:
        """A code decoder by name.

        Raises:
            ValueError: If there is none of that name.
        """
        chosen = self.default_decoder if name is None else name
        if chosen not in self.decoders:
            raise ValueError(f"no decoder {chosen!r}; there are {', '.join(self.decoders) or 'none'}")
        return cast(CodeDecoder, self.decoders[chosen])

    @torch.no_grad()
    def encode(self, images: Tensor, *, policy: FitPolicy = "crop") -> Tensor:
        """Images to codes.

        Args:
            images: (B, 3, H, W) in [-1, 1], of any size; resized as tensors, by which some codes (up to 2 %) differ
                from those of `encode_images`, which resizes 8-bit pictures.
            policy: How images that are not square become square; see `encode_images` for a way back.

        Returns:
            Codes (B, N) int64 in row-major order.

        Raises:
            ValueError: If shape or values are not those of images, or values are not finite.
        """
        if not isinstance(images, Tensor):
            raise ValueError(f"encode takes a tensor, encode_images PIL images; got {type(images).__name__}")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if not len(images):
            raise ValueError("there must be at least one image, got none")
        require_values(images)
        if policy not in FIT_POLICIES:
            raise ValueError(f"policy must be one of {', '.join(FIT_POLICIES)}, got {policy!r}")
        if images.shape[2:] != (self.image_size, self.image_size):
            plan = Geometry.plan((images.shape[2], images.shape[3]), self.image_size, policy=policy)
            images = plan.apply(images.float())  # no type of two bytes is resized on every device
        images = images.to(self.device, dtype_of(self.encoder))
        with exact_float32():
            features = self.encoder(images)
        return self.quantizer.encode(features.float())

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        *,
        decoder: str | None = None,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """Codes to square images.

        Args:
            codes: (B, N) int64.
            decoder: Name of a code decoder.
            num_steps: Its network evaluations; its own number by default.
            conditioning_scale: Strength of the codes; the decoder's own by default.
            generator: Source of the noise, one for the batch or one for each image; seeded with 0 by default, so
                that the same codes give the same picture.

        Returns:
            (B, 3, S, S) float32 in [-1, 1]; S is the decoder's size.

        Raises:
            ValueError: For codes that are out of range or of wrong number, an unknown decoder, or steps that it was
                not trained for.
        """
        if not isinstance(codes, Tensor):
            raise ValueError(
                f"decode takes a tensor, decode_images what encode_images gave; got {type(codes).__name__}"
            )
        if not len(codes):
            raise ValueError("there must be codes of at least one image, got none")
        self.quantizer.check_codes(codes, grid=self.grid)
        embeddings = self.quantizer.codes_to_embeddings(codes.to(self.device), self.grid)
        return self.decoder(decoder).decode(
            embeddings, num_steps=num_steps, conditioning_scale=conditioning_scale, generator=generator
        )

    def encode_images(self, images: Iterable[Image.Image], *, policy: FitPolicy = "crop") -> EncodedImages:
        """PIL images of any sizes to codes, with the record that `decode_images` undoes.

        Args:
            images: Of any mode; turned upright and brought to sRGB on white, as `layton.data.images.load_image`, which
                reads files safely, does.
            policy: "crop" keeps the central square, "pad" everything, "resize" everything but the aspect ratio.

        Raises:
            ValueError: If there is no image, or the policy is unknown.
        """
        given = [] if isinstance(images, Image.Image) else list(images)
        if isinstance(images, Image.Image) or not all(isinstance(image, Image.Image) for image in given):
            raise TypeError("images must be a list of PIL images; `layton.data.images.load_image` reads files safely")
        if not given:
            raise ValueError("no images to encode")
        fitted = [fit_image(plain_rgb(image), self.image_size, policy=policy) for image in given]
        squares = torch.stack([to_tensor(square) for square, _ in fitted])
        return EncodedImages(self.encode(squares), tuple(geometry for _, geometry in fitted))

    def decode_images(
        self,
        encoded: EncodedImages | Tensor,
        *,
        decoder: str | None = None,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> list[Image.Image]:
        """Codes to PIL images of the original sizes (with "crop", of the part that was kept). See `decode`.

        Of codes (B, N) alone, such as a language model wrote, they are squares.
        """
        if not isinstance(encoded, Tensor | EncodedImages):
            raise TypeError(f"decode_images takes what encode_images gave, or codes; got {type(encoded).__name__}")
        codes = encoded if isinstance(encoded, Tensor) else encoded.codes
        squares = self.decode(
            codes,
            decoder=decoder,
            num_steps=num_steps,
            conditioning_scale=conditioning_scale,
            generator=generator,
        )
        if isinstance(encoded, Tensor):
            return [to_image(square.cpu()) for square in squares]
        return [to_image(g.undo(s.cpu())) for g, s in zip(encoded.geometries, squares, strict=True)]

    def reconstruct(
        self,
        images: Tensor,
        *,
        decoder: str | None = None,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] through their codes and back, at the same size. See `encode`, `decode`.

        Raises:
            ValueError: If they are no tensor, or not square (`encode_images` records what must be undone).
        """
        if not isinstance(images, Tensor):
            raise ValueError(f"reconstruct takes a tensor, encode_images PIL images; got {type(images).__name__}")
        if images.shape[-1] != images.shape[-2]:
            raise ValueError(f"reconstruct takes square images, got {tuple(images.shape)}")
        squares = self.decode(
            self.encode(images),
            decoder=decoder,
            num_steps=num_steps,
            conditioning_scale=conditioning_scale,
            generator=generator,
        )
        size = (images.shape[-2], images.shape[-1])
        return Geometry.plan(size, squares.shape[-1], policy="resize").undo(squares)

    def fingerprint(self) -> str:
        """Hash of the codebook: codes of tokenizers with different fingerprints mean different things."""
        return self.quantizer.fingerprint()

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write all parts, and beside them as ``ldm/`` a copy of the latent diffusion model that they were loaded with.

        Of a tokenizer made of parts, its diffusers folder has to be put there.

        Args:
            folder: Where to write.
            dtype: Floating-point type on disk (the codebook is always float32).

        Raises:
            ValueError: A decoder builds on another one that is not there, or was trained since; or a part is of a kind
                that cannot be loaded again. Nothing is written then.
        """
        decoders = {name: self.decoder(name) for name in self.decoders}
        classes: dict[str, JsonValue] = {name: _class_of(part, CodeDecoder) for name, part in decoders.items()}
        config: dict[str, JsonValue] = {
            "class": CLASS_NAME,
            "image_size": self.image_size,
            "encoder": _class_of(self.encoder, ImageEncoder),
            "quantizer": _class_of(self.quantizer, Quantizer),
            "decoders": classes,
            "default_decoder": self.default_decoder,
        }
        for name, decoder in decoders.items():
            try:
                decoder.require_beside(decoders)
            except ValueError as error:
                raise ValueError(f"the decoder {name!r} cannot be saved so: {error}; del it from decoders") from error
        root = Path(folder).expanduser()
        self.encoder.save_pretrained(root / "encoder", dtype=dtype)
        self.quantizer.save_pretrained(root / "quantizer")
        for name, decoder in decoders.items():
            decoder.save_pretrained(root / "decoders" / name, dtype=dtype)
        if self.ldm is not None and self.ldm.resolve() != (root / LDM_FOLDER).resolve():
            shutil.copytree(self.ldm, root / LDM_FOLDER, dirs_exist_ok=True)
        save_config(root, config)

    @staticmethod
    def write_index(
        folder: Path, encoder: ImageEncoder, quantizer: Quantizer, *, image_size: int, light: bool = True
    ) -> None:
        """Write the ``config.json`` by which the export of a training run is a tokenizer.

        Args:
            folder: With ``encoder/``, ``quantizer/`` and maybe ``decoder/``.
            encoder: Of which class is noted.
            quantizer: Likewise.
            image_size: Side of the squares that it was trained on.
            light: ``decoder/`` is stage 0's `layton.pixel_decoder.PixelDecoder`; otherwise the tokenizer only encodes.
        """
        config: dict[str, JsonValue] = {
            "class": CLASS_NAME,
            "image_size": image_size,
            "encoder": class_name(type(encoder)),
            "quantizer": class_name(type(quantizer)),
            "decoders": {STAGE_0_DECODER: "layton.decoders.LightDecoder"} if light else {},
            "folders": {STAGE_0_DECODER: "decoder"} if light else {},
            "default_decoder": STAGE_0_DECODER if light else "",
        }
        save_config(folder, config)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        decoders: Sequence[str] | None = None,
        ldm: str | Path | None = None,
        allow: Sequence[str] = (),
    ) -> Self:
        """Load a tokenizer: a folder, or an embedded one such as ``"mini"``, without network.

        Args:
            name: Folder that `save_pretrained` wrote, or the name of an embedded model.
            decoders: Names of the decoders to load; all by default.
            ldm: Folder of the latent diffusion model's diffusers pipeline; ``ldm/`` in the folder by default.
            allow: Prefixes of class names that may be loaded beside ``layton.`` and ``generation.``.

        Raises:
            ValueError: If something is missing, does not fit, or names a class that is not allowed.
        """
        root = assets.resolve(name)
        config = load_config(root, expected_class=CLASS_NAME)
        known = cast("dict[str, str]", config["decoders"])
        wanted = list(known) if decoders is None else list(decoders)
        for decoder in wanted:
            if decoder not in known:
                raise ValueError(f"no decoder {decoder!r} in {name}; there are {', '.join(known)}")
        place = Path(ldm) if ldm is not None else root / LDM_FOLDER
        folders = cast("dict[str, str]", config.get("folders", {}))
        loaded = {
            decoder: resolve_class(known[decoder], CodeDecoder, allow).from_pretrained(
                root / folders.get(decoder, f"decoders/{decoder}"), ldm=place
            )
            for decoder in wanted
        }
        default = str(config["default_decoder"])
        tokenizer = cls(
            resolve_class(str(config["encoder"]), ImageEncoder, allow).from_pretrained(root / "encoder"),
            resolve_class(str(config["quantizer"]), Quantizer, allow).from_pretrained(root / "quantizer").freeze(),
            loaded,
            image_size=int(cast(int, config["image_size"])),
            default_decoder=default if default in loaded else None,
        )
        tokenizer.ldm = place if any(decoder.needs_ldm for decoder in loaded.values()) else None
        return tokenizer.eval()


def _class_of(part: nn.Module, kind: type) -> str:
    if not isinstance(part, kind):
        raise ValueError(
            f"{type(part).__name__} is no {kind.__name__} and could not be loaded again (torch.compile(part) wraps it, "
            "part.compile() does not)"
        )
    return class_name(type(part))


def best_decoder(names: Collection[str]) -> str:
    """The decoder to take when none is asked for; the empty name if there is none."""
    return next((name for name in PREFERRED_DECODERS if name in names), next(iter(names), ""))
