"""What a dataset of tokens is made of and how, as a user says it: options that commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from layton.data.geometry import FitPolicy
from layton.data.shards import absolute_pattern
from layton.data.stored import Columns
from layton.data.types import Split, check_split
from layton.errors import UsageError
from layton.options import require_least, require_shares
from layton.scenes import Texture

if TYPE_CHECKING:
    from generation.data.tokenizing import TokenizeJob
    from layton.data.sources import ImageSource

SCENES = "scenes"
SplitOrAll = Literal["train", "validation", "test", "all"]
_SCENES_COUNT = 16384


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """Which images of a source.

    Attributes:
        split: train, validation, test, or all (of scenes: train).
        count: scenes to render; 16384 by default. For stored images: all.
        offset: scenes to pass over at the beginning of the split.
        chinese: share of scene captions in Chinese.
        reworded: share of scene captions said in another way than the canonical one.
        textures: only scenes with one of these backgrounds; all by default.
        repeated_keys: accept shards that use the same keys; images are told apart by the shard's name as well.
        class_folders: captions are the names of the folders in which the images lie, such as ImageNet's.
        image_column: of a table; "image" by default.
        caption_column: of a table; by default caption, text, prompt or label, the first that there is.
        id_column: of a table, with unique names; keys are row numbers by default.
    """

    split: SplitOrAll = "all"
    count: int | None = None
    offset: int = 0
    chinese: float = 0.0
    reworded: float = 0.0
    textures: list[Texture] | None = None
    repeated_keys: bool = False
    class_folders: bool = False
    image_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None

    def check(self) -> None:
        """Find what is wrong before anything is loaded.

        Raises:
            UsageError: A value is out of range.
        """
        require_least(1, {"count": self.count})
        require_least(0, {"offset": self.offset})
        require_shares({"chinese": self.chinese, "reworded": self.reworded})

    def open(self, sources: Sequence[str], *, size: int) -> tuple[ImageSource, str]:
        """The images, and a name for them.

        Args:
            sources: Tar shards (files or patterns), one folder, a table, or the word scenes.
            size: Of rendered scenes, in pixels.

        Raises:
            UsageError: If the options contradict the source.
            ValueError: If there are no such images.
        """
        from layton.data.stored import open_stored

        if not sources:
            raise UsageError("nothing to tokenize: name shards, a folder of images, or scenes")
        columns = Columns(self.image_column, self.caption_column, self.id_column)
        if list(sources) == [SCENES]:
            if self.class_folders or columns != Columns():
                raise UsageError("scenes have neither --class-folders nor columns")
            return self._scenes(size)
        if self.count is not None or self.offset or self.chinese or self.reworded or self.textures:
            raise UsageError("--count, --offset, --chinese, --reworded and --textures are for scenes alone")
        known = self._split()
        name = " ".join([Path(item).name for item in sources] + ([] if known is None else [known]))
        images = open_stored(
            sources, split=known, classes=self.class_folders, repeated_keys=self.repeated_keys, columns=columns
        )
        return images, name + " by classes" * self.class_folders

    def _scenes(self, size: int) -> tuple[ImageSource, str]:
        from layton.data.sources import ScenesSource

        split = self._split() or "train"
        scenes = ScenesSource(
            split=split,
            length=_SCENES_COUNT if self.count is None else self.count,
            size=size,
            offset=self.offset,
            chinese=self.chinese,
            reworded=self.reworded,
            textures=self.textures,
        )
        told = f"scenes {split} {self.offset} {len(scenes)} {self.chinese:g} {self.reworded:g}"
        return scenes, " ".join([told, *(self.textures or [])])

    def _split(self) -> Split | None:
        return None if self.split == "all" else check_split(self.split)


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How images become tokens.

    Attributes:
        tokenizer: embedded tokenizer or folder.
        policy: how images become square: crop (the central square), pad (white borders) or resize.
        shard_size: images in a shard.
        batch_size: images encoded at once.
        precision: of the encoder; bf16 is quicker on GPUs, changes about 3 % of the codes, and is recorded with them.
        text_encoder: also cache its features of the captions: a transformers folder or a diffusers pipeline.
        text_length: tokens of a caption that it reads.
        text_cleaning: what is done to captions before it reads them; deepfloyd as for released models (needs
            pip install 'layton[clean]'). A run file's text encoder must say the same.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
    """

    tokenizer: str = "mini"
    policy: FitPolicy = "crop"
    shard_size: int = 4096
    batch_size: int = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    text_encoder: str | None = None
    text_length: int | None = None
    text_cleaning: Literal["none", "deepfloyd"] = "none"
    device: str | None = None
    allow: list[str] | None = None

    def check(self) -> None:
        """Find what is wrong before anything is loaded.

        Raises:
            UsageError: A value is out of range, or is of something that is not asked for.
            ValueError: Packages that it takes are missing.
        """
        sizes = {"shard_size": self.shard_size, "batch_size": self.batch_size, "text_length": self.text_length}
        require_least(1, sizes)
        given = {"--text-length": self.text_length is not None, "--text-cleaning": self.text_cleaning != "none"}
        for option in (option for option, is_given in given.items() if is_given):
            if self.text_encoder is None:
                raise UsageError(f"{option} is of --text-encoder, which is not given")
        if self.text_cleaning == "deepfloyd":
            from generation.text.loading import require_cleaning

            require_cleaning()


def make_job(
    sources: Sequence[str], images: ImageOptions, options: JobOptions, *, device: str | None = None
) -> TokenizeJob:
    """The job that is meant; each worker makes its own from the same words.

    Args:
        sources: As for `ImageOptions.open`.
        images: Which of them.
        options: How they become tokens.
        device: In place of the options'.

    Raises:
        UsageError: If the options contradict the source.
        ValueError: If there are no such images, or a model is missing or damaged.
    """
    from generation.data.tokenizing import TokenizeJob
    from generation.text.encoders import text_encoder
    from layton.devices import choose_device
    from layton.tokenizer import LaytonTokenizer

    where = choose_device(device or options.device)
    model = LaytonTokenizer.from_pretrained(options.tokenizer, decoders=[], allow=tuple(options.allow or ())).to(where)
    source, name = images.open(sources, size=model.image_size)
    encoder = None
    if options.text_encoder is not None:
        cleaning = None if options.text_cleaning == "none" else options.text_cleaning
        encoder = text_encoder(options.text_encoder, max_length=options.text_length, cleaning=cleaning).to(where)
    return TokenizeJob(
        source,
        model,
        name,
        options.policy,
        options.shard_size,
        options.batch_size,
        encoder,
        precision=options.precision,
    )


def absolute(sources: Sequence[str], options: JobOptions) -> tuple[list[str], JobOptions]:
    """The same places as workers with another working folder find them; names of embedded models stay."""
    places = list(sources) if list(sources) == [SCENES] else [absolute_pattern(source) for source in sources]
    text = options.text_encoder
    return places, replace(
        options, tokenizer=_absolute(options.tokenizer), text_encoder=None if text is None else _absolute(text)
    )


def _absolute(name: str) -> str:
    return os.path.abspath(name) if Path(name).is_dir() else name
