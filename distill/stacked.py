"""InstaFlow's Stacked U-Net: two U-Nets in series with weights of their own (arXiv 2309.06380, section 4 and appendix).

"Structure 3", the 1.7B student: the output layers of the first U-Net and the input convolution of the second are left
out, and the first one's features go straight into the second. Both get the same time and text.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.models import UNetDenoiser


class StackedUNetDenoiser(Denoiser):
    """Two U-Nets as one denoiser, with the second one's schedule and kind of prediction.

    Args:
        first: Loses ``conv_norm_out``, ``conv_act`` and ``conv_out``; changed in place.
        second: Loses ``conv_in``; changed in place.

    Raises:
        ValueError: They are one network, or their first levels differ in width.
    """

    def __init__(self, first: UNetDenoiser, second: UNetDenoiser) -> None:
        super().__init__(second.schedule, second.prediction_type)
        if first.unet is second.unet:
            raise ValueError("the two networks must have weights of their own")
        widths = first.unet.config.block_out_channels[0], second.unet.config.block_out_channels[0]
        if widths[0] != widths[1]:
            raise ValueError(f"the first levels must be equally wide, got {widths[0]} and {widths[1]}")
        # diffusers skips a normalisation that is None, and passes through whatever stands for the convolutions
        first.unet.conv_norm_out = None
        first.unet.conv_out = nn.Identity()
        second.unet.conv_in = nn.Identity()
        self.first = first
        self.second = second

    @classmethod
    def from_unet(cls, denoiser: UNetDenoiser) -> StackedUNetDenoiser:
        """Both networks start as copies of one, which is left as it is."""
        return cls(copy.deepcopy(denoiser), copy.deepcopy(denoiser))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction; see ``Denoiser.forward`` and `distill.models.UNetDenoiser.forward`."""
        features = self.first(x_t, t, condition)
        output: Tensor = self.second(features, t, condition)
        return output
