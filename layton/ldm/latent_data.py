"""Pictures as cached latents of one pipeline: the data of the methods that learn from data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layton.assets import find_autoencoder
from layton.data.loader import OrderedLoader, ResumableLoader
from layton.data.module import ImageDataModule
from layton.data.sources import ImageSource
from layton.ldm.cache import CachedLatents, autoencoder_digest, name_for

_ROLES = ("train", "validation", "test")


class LatentDataModule(ImageDataModule):
    """`ImageDataModule` whose pictures are encoded once, by the autoencoder of the pipeline that is distilled.

    Batches hold "latent" (B, C, h, w) float16, "caption" and "key". Each autoencoder has caches of its own, so that
    another pipeline never meets the latents of this one.

    Args:
        train: Pictures to train on.
        autoencoder: Folder of the AutoencoderKL, or of the pipeline that holds it.
        cache: Folder of the caches.
        in_memory: All latents in memory, in every process; otherwise they are read from disk one by one (131 kB for an
            image of 1024 pixels).
        validation: Pictures to validate on.
        test: Pictures to test on.
        weights: As in `ImageDataModule`.
        epoch_length: As in `ImageDataModule`.
        batch_size: As in `ImageDataModule`.
        eval_batch_size: As in `ImageDataModule`.
        num_workers: As in `ImageDataModule`.
        seed: As in `ImageDataModule`.
    """

    def __init__(
        self,
        train: list[ImageSource] | ImageSource | None = None,
        *,
        autoencoder: str,
        cache: str = "runs/cache",
        in_memory: bool = True,
        validation: list[ImageSource] | ImageSource | None = None,
        test: list[ImageSource] | ImageSource | None = None,
        weights: list[float] | None = None,
        epoch_length: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            list(train) if isinstance(train, list) else train,
            validation=list(validation) if isinstance(validation, list) else validation,
            test=list(test) if isinstance(test, list) else test,
            weights=weights,
            epoch_length=epoch_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.autoencoder, self.cache, self.in_memory = find_autoencoder(autoencoder), Path(cache), in_memory

    def prepare_data(self) -> None:
        """Encode what is not in the cache yet, in one process."""
        for role in _ROLES:
            self._encode(role)

    def train_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """As in `ImageDataModule`, over latents."""
        self._encode("train")
        return super().train_dataloader()

    def val_dataloader(self) -> OrderedLoader | list[OrderedLoader]:
        """As in `ImageDataModule`, over latents."""
        self._encode("validation")
        return super().val_dataloader()

    def test_dataloader(self) -> OrderedLoader | list[OrderedLoader]:
        """As in `ImageDataModule`, over latents."""
        self._encode("test")
        return super().test_dataloader()

    def _encode(self, role: str) -> None:
        """Put caches in the place of the pictures of a role."""
        sources: list[Any] = getattr(self, role)
        for index, source in enumerate(sources):
            if not isinstance(source, CachedLatents):
                # Two pipelines may have one autoencoder and other sizes, or a folder of images may have grown.
                folder = self.cache / f"latents-{autoencoder_digest(self.autoencoder)}" / f"{role}-{name_for(source)}"
                sources[index] = CachedLatents(
                    source, autoencoder=str(self.autoencoder), folder=str(folder), in_memory=self.in_memory
                )
