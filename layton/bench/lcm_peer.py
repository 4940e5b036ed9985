"""Latent consistency distillation of a LoRA as diffusers' example script computes it: the peer of `layton bench`.

The arithmetic of ``examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py``, in plain torch, diffusers and
peft: a second, frozen copy of the UNet as teacher; student, conditional teacher, unconditional teacher and target one
after another, each with a batch of its own, the student first; DDIM in the LCM papers' convention of guidance; no
target network. Text and latents are given, as with cached ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from distill.adapters import LoraSettings

GRID_STEP = 20
"""1000 training times over 50 steps of DDIM."""
SIGMA_DATA, TIMESTEP_SCALING, HUBER_C = 0.5, 10.0, 0.001


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """What a step draws."""

    t: Tensor  # (B,) int64 times of the student's states, of 19, 39, ..., 999
    noise: Tensor  # (B, C, h, w)
    weight: Tensor  # (B,) guidance in the LCM papers' convention, one less than diffusers'


class LCMPeer:
    """Student, teacher and optimizer of the script.

    Args:
        unet: The teacher; it is copied for the student.
        lora: Shape of the student's adapter.
        lr: Of AdamW.
    """

    def __init__(self, unet: UNet2DConditionModel, lora: LoraSettings, *, lr: float = 1e-4) -> None:
        self.teacher = unet.requires_grad_(False)
        self.student = copy.deepcopy(unet).requires_grad_(False)
        self.student.add_adapter(LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.targets)))
        # The betas are Stable Diffusion's.
        self.scheduler = DDPMScheduler(
            num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        self.learning = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=lr, weight_decay=0.0)

    def loss(self, x_0: Tensor, embeds: Tensor, null: Tensor, draws: Draws) -> Tensor:
        """The pseudo-Huber distance of student and target, ().

        Args:
            x_0: (B, C, h, w) clean latents.
            embeds: (B, L, D) text.
            null: (B, L, D) the empty text.
            draws: Times, noise and guidance.
        """
        t, s = draws.t, (draws.t - GRID_STEP).clamp(min=0)
        x_t = self.scheduler.add_noise(x_0, draws.noise, t)
        found = self._consistency(self.student(x_t, t, embeds).sample, x_t, t)
        with torch.no_grad():
            eps_text = self.teacher(x_t, t, embeds).sample
            eps_null = self.teacher(x_t, t, null).sample
            clean_text, clean_null = self._clean(eps_text, x_t, t), self._clean(eps_null, x_t, t)
            weight = draws.weight.reshape(-1, 1, 1, 1)
            clean = clean_text + weight * (clean_text - clean_null)
            eps = eps_text + weight * (eps_text - eps_null)
            alpha, sigma = self._levels(s)
            x_s = alpha * clean + sigma * eps
        with torch.no_grad():
            wanted = self._consistency(self.student(x_s, s, embeds).sample, x_s, s)
        return torch.mean(torch.sqrt(F.mse_loss(found, wanted, reduction="none") + HUBER_C**2) - HUBER_C)

    def step(self, x_0: Tensor, embeds: Tensor, null: Tensor, draws: Draws) -> None:
        """One optimizer step; arguments as in `loss`."""
        self.loss(x_0, embeds, null, draws).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return kept.sqrt(), (1.0 - kept).sqrt()

    def _clean(self, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._levels(t)
        return (x_t - sigma * eps) / alpha

    def _consistency(self, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        scaled = TIMESTEP_SCALING * t.reshape(-1, 1, 1, 1).to(x_t)
        total = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / total * x_t + scaled / total.sqrt() * self._clean(eps, x_t, t)
