"""HiPA as a code decoder: the stage-1 decoder with low-rank adaptors on its attention, for one step."""

from __future__ import annotations

from distill.adapters import ATTENTION_LORA_TARGETS
from distill.few_step import FewStepSampling
from generation.decoders.instaflow import one_step_sampling
from layton.decoders.consistency import ConsistencyDecoder
from layton.decoders.difference import Adaptation, Difference
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder


class HiPADecoder(ConsistencyDecoder):
    """From noise to latents in one evaluation with attention adaptors (HiPA, arXiv 2311.18158).

    Everything but the adaptors is the stage-1 decoder's and stays frozen, as in the paper; they are trained to restore
    the high frequencies that one step loses.

    Args:
        network: The adapted denoiser.
        autoencoder: Latents to pixels; frozen.
        sampling: One step; by default from pure noise at the noisiest time.
        default_steps: One.
        latents_per_token: As for `layton.decoders.ConsistencyDecoder`.
        difference: How the network came from the stage-1 decoder's.

    Raises:
        ValueError: More than one step, or anything but adaptors on attention layers was trained.
    """

    __module__ = "generation.decoders"  # what files say

    def __init__(
        self,
        network: LADD,
        autoencoder: Autoencoder,
        *,
        difference: Difference,
        sampling: FewStepSampling | None = None,
        default_steps: int | None = None,
        latents_per_token: float = 1,
    ) -> None:
        super().__init__(
            network,
            autoencoder,
            sampling=one_step_sampling(network) if sampling is None else sampling,
            default_steps=default_steps,
            latents_per_token=latents_per_token,
            difference=difference,
        )
        if self.sampling.step_counts != (1,):
            raise ValueError(f"HiPA decodes in one step, got times for {list(self.sampling.step_counts)}")
        require_attention(difference.adaptation, reader=difference.reader)


def require_attention(adaptation: Adaptation, *, reader: str | None = None) -> None:
    """Refuse to call HiPA what trains more than adaptors on attention.

    Raises:
        ValueError: A part is trained as a whole, a layer outside attention is adapted, or the student has a reader.
    """
    outside = sorted(set(adaptation.adapters.targets) - set(ATTENTION_LORA_TARGETS))
    if "full" in adaptation.parts().values() or outside:
        raise ValueError(
            f"HiPA trains adaptors on attention ({', '.join(ATTENTION_LORA_TARGETS)}) and nothing else, got unet "
            f"{adaptation.unet!r}, branch {adaptation.branch!r}, other layers {outside}"
        )
    if reader is not None:
        raise ValueError(f"HiPA trains nothing but adaptors on attention: stage 1 has to listen to {reader!r} itself")
