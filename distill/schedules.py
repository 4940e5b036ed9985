"""Noise schedules: how much of the clean latent and how much noise a state holds at each time.

Every state is ``x_t = alpha_t x_0 + sigma_t eps``. Two families are provided:

* ``VPSchedule``: variance preserving, ``alpha^2 + sigma^2 = 1``, tabulated at integer times 0..T-1 as in DDPM
  (arXiv 2006.11239) and extended to real times, so that every noise level between two table rows can be named.
* ``FlowSchedule``: rectified flow (arXiv 2209.03003), ``alpha + sigma = 1``, straight in time.

Both use the clock of the *network* (the number it is given), not a time in [0, 1]; larger always means noisier.
``lambda_t = sigma_t / alpha_t`` is the one quantity all schedules share: equal ``lambda`` means equal
signal-to-noise ratio, which is how times are carried from one schedule to another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill._config import read_bool, read_float, read_int, read_str
from distill._schedule import NoiseSchedule, as_times, checked_lambda, working_dtype
from distill.betas import BetaSchedule, alphas_cumprod_from_betas, make_betas, rescale_zero_terminal_snr
from distill.parameterization import Coefficients

__all__ = [
    "Coefficients",
    "FlowSchedule",
    "NoiseSchedule",
    "VPSchedule",
    "as_times",
    "dynamic_shift",
    "schedule_from_config",
    "working_dtype",
]


class VPSchedule(NoiseSchedule):
    """Variance-preserving schedule given by a table of betas, as every DDPM-like scheduler of diffusers uses it.

    Row t of the table is ``abar_t = prod_{i<=t} (1 - beta_i)``, ``alpha_t = sqrt(abar_t)``. Time -1 is the empty
    product, that is the clean latent itself. Between rows ``log lambda`` is interpolated linearly; in the first cell
    (-1, 0), where it is minus infinity at one end, ``lambda`` is, and in the last cell of a zero-terminal-SNR table
    ``1 / lambda`` is. All of it in float64.

    Args:
        num_train_timesteps: T, length of the table.
        beta_start: First beta (Stable Diffusion: 0.00085).
        beta_end: Last beta (Stable Diffusion: 0.012).
        beta_schedule: ``linear``, ``scaled_linear`` (linear in sqrt(beta); SD and SDXL) or ``squaredcos_cap_v2``.
        trained_betas: An explicit table that replaces the four arguments above.
        rescale_betas_zero_snr: Rescale so that the last row holds no signal (arXiv 2305.08891, Algorithm 1).
        set_alpha_to_one: Land on the clean latent after the last step; ``False`` lands on row 0 as SD's own
            scheduler files ask for. See ``final_t``.

    Raises:
        ValueError: Unknown schedule name, or betas outside (0, 1].
    """

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: BetaSchedule = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        set_alpha_to_one: bool = True,
    ) -> None:
        if trained_betas is not None:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64)
        else:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start=beta_start, beta_end=beta_end)
        abar = alphas_cumprod_from_betas(betas)
        if rescale_betas_zero_snr:
            abar = rescale_zero_terminal_snr(abar)
        self.num_train_timesteps = len(abar)
        self.alphas_cumprod = abar
        self._final_t = -1.0 if set_alpha_to_one else 0.0
        # Row i + 1 belongs to time i; row 0 is the clean end.
        ratios = ((1.0 - abar) / abar).sqrt()
        self._tables = {torch.device("cpu"): torch.cat([ratios.new_zeros(1), ratios])}

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> VPSchedule:
        """Schedule of a diffusers scheduler configuration (DDIM, DDPM, PNDM, Euler, DPM-Solver, LCM, TCD, ...).

        Args:
            config: ``scheduler.config`` or the parsed ``scheduler_config.json``. Missing keys take the default of
                diffusers (linear betas from 0.0001 to 0.02), not that of this class.

        Raises:
            ValueError: A value has the wrong type or is not supported.
        """
        betas = config.get("trained_betas")
        if betas is not None and not isinstance(betas, Tensor | Sequence) and not hasattr(betas, "tolist"):
            raise ValueError(f"trained_betas must be a sequence of numbers, got {type(betas).__name__}")
        return cls(
            num_train_timesteps=read_int(config, "num_train_timesteps", 1000),
            beta_start=read_float(config, "beta_start", 0.0001),
            beta_end=read_float(config, "beta_end", 0.02),
            beta_schedule=read_str(config, "beta_schedule", "linear"),  # type: ignore[arg-type]  # make_betas checks
            trained_betas=None if betas is None else torch.as_tensor(betas).tolist(),
            rescale_betas_zero_snr=read_bool(config, "rescale_betas_zero_snr", False),
            set_alpha_to_one=read_bool(config, "set_alpha_to_one", True),
        )

    @property
    def clean_t(self) -> float:
        """-1, the row before the first."""
        return -1.0

    @property
    def terminal_t(self) -> float:
        """T - 1, the last row."""
        return float(self.num_train_timesteps - 1)

    @property
    def final_t(self) -> float:
        """-1 (clean), or 0 when built with ``set_alpha_to_one=False``."""
        return self._final_t

    def lambda_t(self, t: Tensor | float) -> Tensor:
        """See ``NoiseSchedule.lambda_t``."""
        position = self._checked(t) + 1.0
        table = self._table(position.device)
        row = position.floor().clamp(0, self.num_train_timesteps - 1).long()
        part = position - row
        low, high = table[row], table[row + 1]
        between = torch.exp((1.0 - part) * low.log() + part * high.log())
        between = torch.where(high.isinf(), low / (1.0 - part), between)
        return torch.where(low == 0, part * high, between)

    def t_from_lambda(self, lam: Tensor | float) -> Tensor:
        """See ``NoiseSchedule.t_from_lambda``."""
        lam = checked_lambda(lam)
        table = self._table(lam.device)
        lam = lam.clamp(max=table[-1])
        row = (torch.searchsorted(table, lam.contiguous(), right=True) - 1).clamp(0, self.num_train_timesteps - 1)
        low, high = table[row], table[row + 1]
        part = (lam.log() - low.log()) / (high.log() - low.log())
        part = torch.where(high.isinf(), 1.0 - low / lam, part)
        part = torch.where(low == 0, lam / high, part)
        return row + part - 1.0

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See ``NoiseSchedule.coefficients``."""
        lam = self.lambda_t(t)
        # 1 / sqrt(1 + lambda^-2) rather than lambda * alpha: finite at both ends.
        return Coefficients(alpha=(1.0 + lam**2).rsqrt(), sigma=(1.0 + lam**-2).rsqrt())

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(working_dtype(device)).to(device)
        return self._tables[device]


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Rectified flow on the network's clock: ``sigma_t = t / T``, ``alpha_t = 1 - sigma_t``, t in [0, T].

    T = 1000 is pure noise, unlike the 999 of VP schedules. The flow time of the papers, ``s`` (0 noise, 1 image), is
    ``1 - t / T`` (arXiv 2309.06380).

    Attributes:
        num_train_timesteps: T, the scale of the clock.
        shift: Resolution shift of SD3 (arXiv 2403.03206, eq. 23). It moves the times that samplers and trainers
            *choose* (``shift_t``) and leaves the coefficients alone.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be >= 1, got {self.num_train_timesteps}")
        if not self.shift > 0:
            raise ValueError(f"shift must be > 0, got {self.shift}")

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, num_tokens: int | None = None) -> FlowSchedule:
        """Schedule of a ``FlowMatchEulerDiscreteScheduler`` configuration.

        Args:
            config: The configuration.
            num_tokens: Latent tokens of an image, on which the shift depends with ``use_dynamic_shifting`` (FLUX, see
                `dynamic_shift`); None leaves the shift at 1 there.

        Raises:
            ValueError: ``invert_sigmas`` is set (a clock that runs the other way).
        """
        if read_bool(config, "invert_sigmas", False):
            raise ValueError("invert_sigmas=True is not supported: the clock would run from noise to image")
        dynamic = read_bool(config, "use_dynamic_shifting", False)
        key = "shift" if "shift" in config else "flow_shift"
        if dynamic:
            shift = 1.0 if num_tokens is None else dynamic_shift(config, num_tokens)
        else:
            shift = read_float(config, key, 1.0)
        return cls(num_train_timesteps=read_int(config, "num_train_timesteps", 1000), shift=shift)

    @property
    def clean_t(self) -> float:
        """0."""
        return 0.0

    @property
    def terminal_t(self) -> float:
        """T, pure noise."""
        return float(self.num_train_timesteps)

    def shift_t(self, t: Tensor | float) -> Tensor:
        """Apply the shift to times: ``sigma -> shift sigma / (1 + (shift - 1) sigma)``; shape unchanged, float64."""
        sigma = self._checked(t) / self.num_train_timesteps
        shifted = self.num_train_timesteps * self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma)
        return shifted.clamp(max=self.num_train_timesteps)  # by rounding it can be a hair beyond

    def lambda_t(self, t: Tensor | float) -> Tensor:
        """See ``NoiseSchedule.lambda_t``."""
        t = self._checked(t)
        return t / (self.num_train_timesteps - t)

    def t_from_lambda(self, lam: Tensor | float) -> Tensor:
        """See ``NoiseSchedule.t_from_lambda``."""
        return self.num_train_timesteps / (1.0 + 1.0 / checked_lambda(lam))

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See ``NoiseSchedule.coefficients``."""
        sigma = self._checked(t) / self.num_train_timesteps
        return Coefficients(alpha=1.0 - sigma, sigma=sigma)


def dynamic_shift(config: Mapping[str, object], num_tokens: int) -> float:
    """Shift for a number of latent tokens: ``mu`` linear in it, then ``exp(mu)`` (or ``mu``), as FLUX's pipeline does.

    Args:
        config: Scheduler configuration with ``base_shift``, ``max_shift``, ``base_image_seq_len``,
            ``max_image_seq_len`` and ``time_shift_type``; missing keys take diffusers' defaults.
        num_tokens: Number of latent tokens.

    Returns:
        The ``shift`` of a ``FlowSchedule``.

    Raises:
        ValueError: An unknown ``time_shift_type``.
    """
    low, high = read_float(config, "base_shift", 0.5), read_float(config, "max_shift", 1.15)
    first, last = read_int(config, "base_image_seq_len", 256), read_int(config, "max_image_seq_len", 4096)
    mu = low + (high - low) * (num_tokens - first) / (last - first)
    kind = read_str(config, "time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type must be exponential or linear, got {kind!r}")
    return math.exp(mu) if kind == "exponential" else mu


def schedule_from_config(config: Mapping[str, object], *, num_tokens: int | None = None) -> NoiseSchedule:
    """The noise schedule a diffusers scheduler configuration describes.

    Args:
        config: ``pipe.scheduler.config`` or the parsed ``scheduler_config.json``.
        num_tokens: See `FlowSchedule.from_config`.

    Returns:
        ``FlowSchedule`` for flow-matching schedulers (and for multistep ones with ``use_flow_sigmas``), else
        ``VPSchedule``.

    Raises:
        ValueError: The configuration names neither betas nor a flow shift, or holds unsupported values.
    """
    name = read_str(config, "_class_name", "")
    if "FlowMatch" in name or read_bool(config, "use_flow_sigmas", False):
        return FlowSchedule.from_config(config, num_tokens=num_tokens)
    if "beta_schedule" in config or config.get("trained_betas") is not None:
        return VPSchedule.from_config(config)
    if "shift" in config:
        return FlowSchedule.from_config(config, num_tokens=num_tokens)
    raise ValueError(f"not a scheduler configuration this library knows (keys: {sorted(config)})")
