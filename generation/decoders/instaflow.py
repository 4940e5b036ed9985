"""InstaFlow as a code decoder: the stage-1 decoder, straightened by reflow and then distilled to one step."""

from __future__ import annotations

from distill.few_step import FewStepSampling
from layton.decoders.consistency import ConsistencyDecoder, sampling_at
from layton.decoders.difference import Difference
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder


class InstaFlowDecoder(ConsistencyDecoder):
    """From noise to latents in one evaluation, ``X_0 + v(X_0)`` (InstaFlow, arXiv 2309.06380, eq. 7).

    In one step it does as a consistency decoder of one step does; what differs is how it was trained, hence by default
    the one time, the noisiest. The 2-rectified flow that training passes through is saved as the same class, with the
    numbers of Euler steps that it is meant for.

    Args:
        network: The distilled denoiser.
        autoencoder: Latents to pixels; frozen.
        sampling: As for `layton.decoders.ConsistencyDecoder`; by default one step from pure noise.
        default_steps: As there.
        latents_per_token: As there.
        difference: As there.
    """

    __module__ = "generation.decoders"  # what files say

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
        super().__init__(
            network,
            autoencoder,
            sampling=one_step_sampling(network) if sampling is None else sampling,
            default_steps=default_steps,
            latents_per_token=latents_per_token,
            difference=difference,
        )


def one_step_sampling(network: LADD) -> FewStepSampling:
    """One step of a network, from pure noise at its noisiest time to the clean latents."""
    return sampling_at({1: (network.schedule.terminal_t,)}, network)
