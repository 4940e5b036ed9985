"""The decoder of stage 2: Layton's latent consistency decoder, a picture in one to three steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self, cast

import torch
from torch import Tensor

from distill.denoiser import Condition
from distill.few_step import FewStepSampling
from layton.decoders.difference import Difference, fingerprints, fold_adapters
from layton.decoders.latent import LatentDecoder, check_times, read_network, require_alike
from layton.folder import WEIGHTS_NAME, JsonValue, class_name, load_config, save_config, save_tensors
from layton.interface import CodeDecoder, Generators
from layton.ladd import LADD, READER, read_codes
from layton.ldm.autoencoder import Autoencoder

NETWORK_FOLDER = "network"
TimeTable = Mapping[int, tuple[float, ...]]

LAYTON_TIMES: TimeTable = MappingProxyType({1: (999.0,), 2: (999.0, 499.0), 3: (999.0, 499.0, 124.0)})
HYPER_TIMES: TimeTable = MappingProxyType({1: (800.0,)})
PRESETS: Mapping[str, TimeTable] = MappingProxyType({"layton": LAYTON_TIMES, "hyper": HYPER_TIMES})
"""``layton``: the released -L model's times (TLCM's) for 3 steps; ``hyper``: Hyper-SD's one step, for -H."""


class ConsistencyDecoder(LatentDecoder):
    """LADD after distillation: predict the clean latents, add fresh noise, predict again (arXiv 2503.08377, section 3).

    It is only as good as at the times it was trained at, so these are saved with it and no others can be asked for.

    Args:
        network: The distilled denoiser.
        autoencoder: Latents to pixels; frozen.
        sampling: For each number of steps the times of its evaluations, and what follows each; by default Layton's
            times with fresh noise between (see `sampling_at`).
        default_steps: Steps when none are asked for; the most there are by default.
        latents_per_token: As for `LatentDecoder`.
        difference: How the network came from a stage-1 decoder's; then only the difference is saved, and loading
            needs that decoder beside it. None saves the whole network.

    Raises:
        ValueError: If the sampling is of another kind of network, or has no such ``default_steps``.
    """

    __module__ = "layton.decoders"  # what files say

    def __init__(
        self,
        network: LADD,
        autoencoder: Autoencoder,
        *,
        sampling: FewStepSampling | None = None,
        default_steps: int | None = None,
        latents_per_token: float = 1,
        difference: Difference | None = None,
    ) -> None:
        super().__init__(network, autoencoder, latents_per_token=latents_per_token)
        self.sampling = sampling_at(LAYTON_TIMES, network) if sampling is None else sampling
        if self.sampling.prediction != network.prediction_type:
            raise ValueError(f"the network predicts {network.prediction_type}, not {self.sampling.prediction}")
        self.steps = tuple(sorted(self.sampling.step_counts))
        self.default_steps = self.check_steps(self.steps[-1] if default_steps is None else default_steps)
        self.difference = difference
        self.needs = (*self.needs, *(() if difference is None else (difference.base,)))

    def require_beside(self, decoders: Mapping[str, CodeDecoder]) -> None:
        """See `CodeDecoder.require_beside`."""
        super().require_beside(decoders)
        if self.difference is not None:
            base = getattr(decoders[self.difference.base], "network", None)
            for part, found in fingerprints(base).items() if isinstance(base, LADD) else ():
                require_alike(self.difference.fingerprints.get(part, ()), found, self.difference.base)

    def sample(self, x_T: Tensor, embeddings: Tensor, *, num_steps: int, generator: Generators) -> Tensor:
        """Multistep consistency sampling at the trained times."""
        condition = Condition(spatial=embeddings)
        return self.sampling.sample(self.network, x_T, condition, num_steps=num_steps, generator=generator)

    def sampling_record(self) -> dict[str, JsonValue]:
        """The times of every number of steps; see `CodeDecoder.sampling_record`."""
        return self.sampling.to_json()

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the times, and the difference from the base or, without one, the network as `LADD` does."""
        root = Path(folder)
        config: dict[str, JsonValue] = {
            "class": class_name(type(self)),
            "sampling": self.sampling_record(),
            "default_steps": self.default_steps,
            "latents_per_token": self.latents_per_token,
            "conditioning_scale": self.network.conditioning_scale,
            "difference": None if self.difference is None else self.difference.to_json(),
        }
        if self.difference is None:
            self.network.save_pretrained(root / NETWORK_FOLDER, dtype=dtype)
        else:
            save_tensors(root / WEIGHTS_NAME, self.difference.tensors(self.network), dtype=dtype)
        save_config(root, config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        ldm: str | Path | None = None,
        base: str | Path | None = None,
        reader: str | Path | None = None,
        fold: bool = True,
    ) -> Self:
        """Read what `save_pretrained` wrote.

        Args:
            folder: The decoder.
            ldm: Folder of the diffusers pipeline (``unet/``, ``vae/``) that it was trained on.
            base: Folder of the stage-1 decoder that it came from; by default the one beside it of the saved name.
            reader: Folder of the light decoder that it listens to, if it does; by default the one beside it.
            fold: Add adaptors to the weights, for speed; without it they can be trained further.

        Raises:
            ValueError: If ``ldm`` or the base is missing, or is not what the decoder was trained on.
        """
        root = Path(folder)
        config = load_config(root, expected_class=class_name(cls))
        saved = cast("dict[str, JsonValue] | None", config["difference"])
        difference = None if saved is None else Difference.from_json(saved)
        if difference is None:
            network, autoencoder = read_network(root / NETWORK_FOLDER, ldm, reader=reader or root.parent / READER)
        else:
            place = Path(base) if base is not None else root.parent / difference.base
            if not place.is_dir():
                raise ValueError(f"{root} holds what differs from the decoder {difference.base!r}: {place} is missing")
            network, autoencoder = read_network(place, ldm, reader=reader)
            told = None if difference.reader is None else read_codes(reader, beside=root, name=difference.reader)
            difference.apply(network, root / WEIGHTS_NAME, reader=told)
            network.requires_grad_(False)
            if fold:
                fold_adapters(network)
        network.conditioning_scale = float(cast(float, config["conditioning_scale"]))
        return cls(
            network,
            autoencoder,
            sampling=FewStepSampling.from_json(cast("dict[str, JsonValue]", config["sampling"])),
            default_steps=cast(int, config["default_steps"]),
            latents_per_token=cast(float, config["latents_per_token"]),
            difference=difference,
        ).eval()


def sampling_at(times: str | Mapping[int, Sequence[float]], network: LADD) -> FewStepSampling:
    """Multistep consistency sampling of a network at given times.

    Args:
        times: By number of steps, noisiest first; or the name of a preset.
        network: What is sampled: its schedule and kind of prediction count.

    Raises:
        ValueError: If there are none, there is no such preset, or those of a number of steps are not as many falling
            times of the network's.
    """
    table = time_table(times)
    last = float(cast(int, network.scheduler_config.get("num_train_timesteps", 1000)) - 1)
    rows = tuple(check_times(table[steps], num_steps=steps, last=last) for steps in sorted(table))
    return FewStepSampling(times=rows, prediction=network.prediction_type)


def time_table(given: str | Mapping[int, Sequence[float]]) -> dict[int, tuple[float, ...]]:
    """Times by number of steps, from the name of a preset or written out.

    Raises:
        ValueError: If there is no preset of the name.
    """
    if isinstance(given, str):
        if given not in PRESETS:
            raise ValueError(f"no preset {given!r} of times; there are {', '.join(PRESETS)}")
        return dict(PRESETS[given])
    return {int(steps): tuple(map(float, times)) for steps, times in given.items()}
