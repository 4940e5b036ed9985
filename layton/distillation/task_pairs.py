"""Pairs of pictures for students that change one in a single step: editing, inpainting, super-resolution and others.

A student of these starts from the encoded picture itself, at the noisiest time of its schedule, where a student that
draws from text starts from noise: what is given must not be buried under noise (pix2pix-turbo, arXiv 2403.12036). To
the methods that learn from pairs, `distill.methods.hipa.HiPA` and `distill.methods.one_step.OneStepDistillation`, both
are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layton.data.sources import ImageSource, SampleSource
from layton.ldm.cache import CachedLatents


class TaskPairs(SampleSource):
    """A source of pairs of latents, encoded when first asked for and then read from disk.

    A sample holds ``noise`` (C, h, w), the latent of the given picture, which stands where a teacher's pairs have their
    noise, ``latent`` (C, h, w) of the wanted one, both float16, and the wanted one's ``caption`` and ``key``.

    Args:
        before: Pictures that are given (`layton.distillation.task_sources`).
        after: What shall become of them: as many, of the same sizes and names (keys without the folder or shard that
            they begin with). A few that are broken on one side are left out, and told.
        autoencoder: Folder of the AutoencoderKL.
        folder: Where the caches lie.
        num_samples: How many; more than there are pictures means that their augmentation is drawn anew each time round.
        batch_size: Images encoded at once.
        in_memory: See `layton.ldm.cache.CachedLatents`.
        fresh_captions: See there.

    Raises:
        ValueError: The sources do not belong together, or the folder holds caches made by something else.
    """

    def __init__(
        self,
        before: ImageSource,
        after: ImageSource,
        *,
        autoencoder: str,
        folder: str,
        num_samples: int | None = None,
        batch_size: int = 16,
        in_memory: bool = True,
        fresh_captions: bool = False,
    ) -> None:
        if len(before) != len(after):
            raise ValueError(f"{len(before)} pictures are given and {len(after)} are wanted: they are no pairs")
        self._before, self._after = (
            CachedLatents(
                source,
                autoencoder=autoencoder,
                folder=str(Path(folder) / name),
                num_samples=num_samples,
                batch_size=batch_size,
                in_memory=in_memory,
                fresh_captions=fresh_captions and name == "after",
            )
            for name, source in (("before", before), ("after", after))
        )
        keys = list(zip(self._before.keys, self._after.keys, strict=True))
        odd = [(given, wanted) for given, wanted in keys if _name(given) != _name(wanted)]
        if 2 * len(odd) > len(keys):
            raise ValueError(f"the picture {odd[0][0]} is given where {odd[0][1]} is wanted: they are no pairs")
        if odd:  # one of two is broken, and another stands in its place
            sys.stderr.write(
                f"layton: {folder}: {len(odd):,} of {len(keys):,} are no pairs, such as {odd[0]}: left out\n"
            )
        self._places = [place for place, (given, wanted) in enumerate(keys) if _name(given) == _name(wanted)]

    def inner(self) -> Sequence[SampleSource]:
        """The latents of both sides."""
        return (self._before, self._after)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._places)

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        """One pair; the seed has no influence but on a fresh caption."""
        place = self._places[index]
        return {**self._after.sample(place, seed=seed), "noise": self._before.sample(place, seed=seed)["latent"]}


def _name(key: str) -> str:
    """A key without the folder or shard that it begins with."""
    return key.partition("/")[2] or key
