"""A discriminator made of a diffusion UNet's own features (SCott, arXiv 2403.01505; the heads are PCM's, 2405.18407).

It judges noisy latents together with their time and text, because the network it is made of does. With LoRA it is a
second adapter on the very UNet that serves as teacher: no second copy of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import gcd
from typing import TYPE_CHECKING, Literal, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.denoiser import Condition, Denoiser
from distill.noise import gaussian_like
from distill.schedules import NoiseSchedule, as_times

if TYPE_CHECKING:
    from distill.adapters import LoraSettings

Stage = Literal["down", "mid", "up"]
STAGES: tuple[Stage, ...] = get_args(Stage)
DiscriminatorKind = Literal["lora", "full", "heads"]
ADAPTER = "discriminator"


class FeatureExtractor(Protocol):
    """What a discriminator needs of a network: maps of known width at several depths."""

    widths: tuple[int, ...]
    schedule: NoiseSchedule

    @property
    def is_checkpointed(self) -> bool:
        """Whether the backward pass repeats the forward pass, and so must find the parameters as they were."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        """Maps (B, width_i, h_i, w_i) for states (B, C, h, w) at times (B,)."""


class UNetFeatures:
    """Outputs of the stages of a diffusers UNet inside a denoiser, read by hooks during one evaluation.

    It is no module on purpose: whoever owns the network saves and moves it.

    Args:
        denoiser: Evaluated as it is: a view that turns an adapter on gives the adapted network's features.
        unet: The ``UNet2DConditionModel`` inside it; by default ``denoiser.unet`` (``UNetDenoiser``, Layton's LADD).
        stages: Which stages' outputs to read, in the order in which they are computed.

    Raises:
        ValueError: No UNet is found, or no stage or an unknown one is named.
    """

    def __init__(self, denoiser: Denoiser, *, unet: nn.Module | None = None, stages: Sequence[Stage] = STAGES) -> None:
        found = _find_unet(denoiser) if unet is None else unet
        if not stages or any(stage not in STAGES for stage in stages):
            raise ValueError(f"stages must be some of {STAGES}, got {tuple(stages)}")
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self._unet = found
        self._modules, self.widths = _stage_modules(found, stages)

    @property
    def is_checkpointed(self) -> bool:
        """Whether diffusers' gradient checkpointing is on."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self._unet.modules())

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        """One map (B, width, h', w') per stage."""
        maps: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, object]) -> None:
            # Down stages return their result together with the skip connections.
            maps.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_hook(keep).remove)
            self.denoiser(x_t, t, condition)
        return tuple(maps)


class DiscriminatorHead(nn.Module):
    """Two 3x3 convolutions (the second with a shortcut), each with group norm and LeakyReLU, then 1x1 to one score.

    Args:
        width: Channels of the feature map.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = self._layer(width)
        self.second = self._layer(width)
        self.score = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, width, h, w) -> scores (B, 1, h, w)."""
        x = self.first(features)
        return cast(Tensor, self.score(x + self.second(x)))

    @staticmethod
    def _layer(width: int) -> nn.Sequential:
        norm = nn.GroupNorm(gcd(32, width), width)
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), norm, nn.LeakyReLU(0.2))


class Discriminator(nn.Module):
    """Scores of noisy latents at every stage of a network.

    Args:
        features: Gives the feature maps; its network is not registered here.
        feature_parameters: Those of the network's parameters that learn with the heads: the discriminator's own
            adapter, all parameters of an own copy, or none (heads only). Asked anew each time: they are other objects
            once ranks share them out.
        conditional: Show the network text and time. If not, it sees the null condition and time 0 whatever the
            sample's (SCott's ablation; how the paper removes the condition is not stated).
        owned: A network that only the discriminator uses: registered here, so that it moves and is saved with it.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        feature_parameters: Callable[[], Iterable[nn.Parameter]] = tuple,
        *,
        conditional: bool = True,
        owned: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.owned = owned
        self.features = features
        self.conditional = conditional
        self.heads = nn.ModuleList(DiscriminatorHead(width) for width in features.widths)
        self._feature_parameters = feature_parameters

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The heads' parameters and the network's learning ones."""
        yield from self.heads.parameters()
        yield from self._feature_parameters()

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition, null: Condition | None = None
    ) -> tuple[Tensor, ...]:
        """Scores (B, 1, h_i, w_i), one map per stage, of states (B, C, h, w) at times (B,).

        Raises:
            ValueError: An unconditional discriminator is given no null condition.
        """
        if not self.conditional:
            if null is None or null.is_empty:
                raise ValueError("an unconditional discriminator needs a null condition")
            condition, t = null.filled_from(condition).expand(len(x_t)), torch.zeros_like(t)
        maps = self.features(x_t, t, condition)
        return tuple(head(one.to(_dtype(head))) for head, one in zip(self.heads, maps, strict=True))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it, evaluations give no gradient to the discriminator, only through it to its input.

        Under gradient checkpointing only the heads are frozen: the repeated forward pass, after this block, would not
        find the network as it was. So set the critic's gradients to zero before its own backward pass.
        """
        some = self.heads.parameters() if self.features.is_checkpointed else self.trainable_parameters()
        learning = [parameter for parameter in some if parameter.requires_grad]
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


def make_discriminator(
    teacher: Denoiser,
    kind: DiscriminatorKind = "lora",
    *,
    lora: LoraSettings | None = None,
    conditional: bool = True,
    stages: Sequence[Stage] = STAGES,
) -> Discriminator:
    """The discriminator of a run, made of its teacher.

    Args:
        teacher: ``Networks.teacher``: a denoiser with a UNet, or an ``AdapterView`` of one.
        kind: ``lora``: a second adapter, on the UNet's decoder only, beside the student's and off everywhere else
            (3.6 % of the parameters in the paper). ``full``: a copy of the denoiser whose whole UNet learns.
            ``heads``: only the heads learn.
        lora: Rank, alpha and targets of the adapter; of the targets those in the decoder are used. Default: rank 64.
        conditional: See `Discriminator`.
        stages: See `UNetFeatures`.

    Raises:
        ValueError: Unknown kind, no UNet, no layer matches a target, or the UNet has a discriminator's adapter already.
    """
    # Here, not above: peft is loaded only where adapters are used.
    from distill.adapters import AdapterView, LoraSettings, active_adapters, adapter_names, adapter_parameters, add_lora

    if kind not in get_args(DiscriminatorKind):
        raise ValueError(f"kind must be one of {get_args(DiscriminatorKind)}, got {kind!r}")
    inner = teacher.denoiser if isinstance(teacher, AdapterView) else teacher
    # a teacher may have adaptors of its own, such as a code decoder's: they are part of what judges, too
    names = teacher.names if isinstance(teacher, AdapterView) else active_adapters(inner)
    if kind == "full":
        inner = copy.deepcopy(inner).requires_grad_(False)
        unet = _find_unet(inner)
        unet.requires_grad_(True).float()  # a small type would round its steps away
        for name in adapter_names(inner):  # the student's, copied with the rest and switched off
            for parameter in adapter_parameters(inner, name):
                parameter.requires_grad_(False)
        learning = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}

        def own() -> Iterator[nn.Parameter]:
            return (parameter for name, parameter in unet.named_parameters() if name in learning)

        features = UNetFeatures(AdapterView(inner, names), unet=unet, stages=stages)
        return Discriminator(features, own, conditional=conditional, owned=inner)
    unet = _find_unet(inner)
    if kind == "heads":
        return Discriminator(UNetFeatures(teacher, unet=unet, stages=stages), conditional=conditional)
    settings = lora or LoraSettings()
    add_lora(unet, replace(settings, targets=tuple(decoder_modules(unet, settings.targets))), ADAPTER, active=False)
    features = UNetFeatures(AdapterView(inner, (*names, ADAPTER)), unet=unet, stages=stages)
    return Discriminator(features, partial(adapter_parameters, unet, ADAPTER), conditional=conditional)


def hinge_critic_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """``E relu(1 - D(real)) + E relu(1 + D(fake))``, averaged over the heads; ()."""
    losses = [F.relu(1.0 - r).mean() + F.relu(1.0 + f).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(losses).mean()


def hinge_generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """``-E D(fake)``, averaged over the heads; ()."""
    return -torch.stack([scores.mean() for scores in fake]).mean()


def draw_renoising(
    schedule: NoiseSchedule, x_0: Tensor, generator: torch.Generator, time_range: tuple[float, float] = (0.02, 0.98)
) -> tuple[Tensor, Tensor]:
    """Times and noise under which clean latents are shown to a discriminator.

    Args:
        schedule: The discriminator network's.
        x_0: (B, C, h, w) template.
        generator: The only randomness.
        time_range: Part of the clock to draw from uniformly; DMD2's (2405.14867) by default.

    Returns:
        Times (B,) and standard normal noise (B, C, h, w).
    """
    low, high = time_range
    part = torch.rand(len(x_0), generator=generator, device=generator.device, dtype=torch.float32)
    t = (low + (high - low) * part) * schedule.terminal_t
    return as_times(t, x_0.device).round(), gaussian_like(x_0, generator)


def decoder_modules(unet: nn.Module, suffixes: Sequence[str]) -> list[str]:
    """Full names of a UNet's decoder modules that end in one of the given names: the targets of SCott's LoRA.

    Args:
        unet: A ``UNet2DConditionModel``.
        suffixes: Module names as in a LoRA's target list (``to_q``, ``ff.net.2``, ``conv1``).

    Raises:
        ValueError: Nothing matches.
    """
    endings = tuple(f".{suffix}" for suffix in suffixes)
    names = [name for name, _ in unet.named_modules() if name.startswith("up_blocks.") and name.endswith(endings)]
    if not names:
        raise ValueError(f"no module of the UNet's decoder ends in one of {tuple(suffixes)}")
    return names


def _find_unet(denoiser: Denoiser) -> nn.Module:
    unet = getattr(denoiser, "unet", None)
    if not isinstance(unet, nn.Module) or not hasattr(unet, "up_blocks"):
        raise ValueError(
            f"{type(denoiser).__name__} has no UNet, whose stages a discriminator reads: "
            "train without one (SCott: --model.init_args.method.init_args.adversary.weight=0)"
        )
    return unet


def _stage_modules(unet: nn.Module, stages: Sequence[Stage]) -> tuple[tuple[nn.Module, ...], tuple[int, ...]]:
    """The modules whose outputs are read, in the order of computation, and the outputs' channels."""
    channels = tuple(int(width) for width in unet.config.block_out_channels)  # type: ignore[union-attr]
    modules: list[nn.Module] = []
    widths: list[int] = []
    if "down" in stages:
        modules += list(cast(nn.ModuleList, unet.down_blocks))
        widths += channels
    if "mid" in stages and unet.mid_block is not None:
        modules.append(cast(nn.Module, unet.mid_block))
        widths.append(channels[-1])
    if "up" in stages:
        modules += list(cast(nn.ModuleList, unet.up_blocks))
        widths += reversed(channels)
    return tuple(modules), tuple(widths)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
