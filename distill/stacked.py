"""InstaFlow's Stacked U-Net: two U-Nets in series with weights of their own (arXiv 2309.06380, section 4 and appendix).

"Structure 3", the 1.7B student: the output layers of the first U-Net and the input convolution of the second are left
out, and the first one's features go straight into the second. Both get the same time and text.
"""

from __future__ import annotations

import functools
from typing import Any

from diffusers import ModelMixin as ModelMixin  # pipelines that hold the class below look for it in this module
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill.models import UNetDenoiser


class StackedUNet2DConditionModel(UNet2DConditionModel):
    """Two U-Nets as one network of diffusers: it stands wherever a ``UNet2DConditionModel`` does.

    Its configuration is that of either half. ``save_pretrained`` and ``from_pretrained`` are diffusers'; the names of
    the second half's weights are a plain U-Net's, those of the first one's begin with ``first.``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = UNet2DConditionModel.from_config(self.config)
        # diffusers skips a normalisation that is None, and passes through whatever stands for the convolutions
        self.first.conv_norm_out = None
        self.first.conv_out = nn.Identity()
        self.conv_in = nn.Identity()

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel) -> StackedUNet2DConditionModel:
        """Both halves start as copies of one network, which is left as it is.

        Raises:
            ValueError: It is stacked already.
        """
        if isinstance(unet, cls):
            raise ValueError("the network is stacked already")
        stacked: StackedUNet2DConditionModel = cls.from_config(unet.config)
        weights = unet.state_dict()
        for half in (stacked, stacked.first):
            wanted = [name for name in half.state_dict() if not name.startswith("first.")]
            half.load_state_dict({name: weights[name] for name in wanted}, strict=half is not stacked)
        parameter = next(unet.parameters())
        return stacked.to(parameter.device, parameter.dtype).train(unet.training)

    def forward(self, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """As ``UNet2DConditionModel.forward``; what is given beside the sample goes to both halves."""
        own = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
        features = self.first(sample, *args, return_dict=False, **own)[0]  # diffusers empties lists of residuals
        return super().forward(features, *args, return_dict=return_dict, **kwargs)


# diffusers reads the names of a configuration off the constructor's signature
functools.update_wrapper(StackedUNet2DConditionModel.__init__, UNet2DConditionModel.__init__)


def stack(denoiser: UNetDenoiser) -> UNetDenoiser:
    """A denoiser whose network is two copies of a denoiser's in series; to be trained, as it does not fit together yet.

    Raises:
        ValueError: Its network is stacked already.
    """
    stacked = StackedUNet2DConditionModel.from_unet(denoiser.unet)
    return UNetDenoiser(stacked, denoiser.schedule, denoiser.prediction_type)
