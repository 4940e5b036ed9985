"""Stage 2: distils the latent diffusion decoder to a few steps and supervises it in pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.denoiser import Condition
from distill.held import Held
from distill.method import DistillationMethod, DistillBatch, MethodOutput, Networks
from layton.assets import DIFFUSION, LDM, LIGHT, resolve
from layton.decoders.consistency import ConsistencyDecoder, sampling_at
from layton.decoders.difference import Adaptation, adapt, copy_sharing
from layton.decoders.latent import read_network
from layton.ldm.cache import load_code_parts, require_codes, require_latents
from layton.ldm.unet import use_fast_attention
from layton.losses.pixel_supervision import PixelExample, PixelSupervision
from layton.losses.reconstruction import psnr
from layton.pixel_decoder import CodeReader, PixelDecoder
from layton.tasks.base import LRSchedulerCallable, OptimizerCallable, required
from layton.tasks.critics import CriticSettings, attach_networks
from layton.tasks.manual import ManualTask
from layton.tasks.text_to_image import draw

_TARGET_KEY = "consistency_target"
PixelTargets = Literal["image", "decoded", "light"]


class ConsistencyDecoderTask(ManualTask):
    """``distillation + pixel supervision + diffusion``, each with its weight (Layton, arXiv 2503.08377, stage 2).

    A weight of 0 switches a phase off: the paper first distils (MLCM's TLCM for -L, Hyper-SD for -H), then supervises
    in pixels and keeps the diffusion loss. Batches are `layton.ldm.cache.CachedLatents`' with ``codes``, and with
    ``image`` (``images: read``) where pixels are compared with originals. The decoder knows no guidance: methods must
    be configured without.

    Args:
        ldm: Diffusers pipeline folder, or the name of an embedded one.
        tokenizer: Folder with ``encoder/`` and ``quantizer/``, or ``mini``, whose codes the batches hold.
        decoder: Stage 1's export, a `layton.ladd.LADD` folder, or a tokenizer with one: where the student starts, and
            the teacher.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
        critic_optimizer: Makes the optimizer of the method's own networks, if it has any.
        critic: What these networks are; by default heads on the features of the teacher. Distribution matching gets a
            copy of it.
        adaptation: Which weights are trained.
        reader: Folder of a light decoder, as stage 0 exports it, or of a tokenizer with one, whose transformer the
            student is to listen to (`layton.ladd.LADD.listen_to`); None trains as the paper does.
        start: A finished stage-2 export ``decoder/`` to go on from, of the same adaptation; one without a reader, too.
        method: How it is distilled; None without.
        pixels: How it is supervised in pixels; None without.
        pixel_targets: ``image``: the originals, as in the paper; ``decoded``: what the autoencoder makes of them;
            ``light``: the pictures that the reader's light decoder makes of the same codes. Codes leave open what an
            original looks like, which is noise to a student; the light decoder, trained in pixels throughout, has
            settled it, so that far fewer steps teach as much.
        distillation_weight: Factor of the method's terms.
        pixel_weight: Factor of the terms in pixels.
        diffusion_weight: Factor of stage 1's loss on the student.
        times: Times of the student's evaluations by number of steps: ``layton`` (999, 499, 124 and its beginnings),
            ``hyper`` (800), ``method`` (the method's own, up to 4 steps), or a table.
        default_steps: Steps of the finished decoder when none are asked for.
        latents_per_token: Latent positions per token along one side.
        gradient_clip: Largest gradient norm, with a critic (the trainer's option does not apply there).
        gradient_checkpointing: As for `layton.tasks.decoder.DecoderTask`.

    Raises:
        ValueError: If nothing is trained, a method wants guidance, or pixels are supervised at steps without times.
    """

    def __init__(
        self,
        ldm: str,
        tokenizer: str,
        decoder: str,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        critic_optimizer: OptimizerCallable | None = None,
        critic: CriticSettings | None = None,
        adaptation: Adaptation | None = None,
        reader: str | None = None,
        start: str | None = None,
        method: DistillationMethod | None = None,
        pixels: PixelSupervision | None = None,
        pixel_targets: PixelTargets = "image",
        distillation_weight: float = 1.0,
        pixel_weight: float = 1.0,
        diffusion_weight: float = 0.0,
        times: str | dict[int, list[float]] = "layton",
        default_steps: int | None = None,
        latents_per_token: float = 1,
        gradient_clip: float = 1.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if pixel_targets not in get_args(PixelTargets):
            raise ValueError(f"pixel_targets must be one of {get_args(PixelTargets)}, got {pixel_targets!r}")
        if pixel_targets == "light" and reader is None:
            raise ValueError("pixel_targets 'light' are a light decoder's pictures: give its folder as reader")
        reader = None if reader is None else str(resolve(reader, part=LIGHT))
        _, self.quantizer = load_code_parts(tokenizer)
        self.method = method if distillation_weight else None
        self.pixels = pixels if pixel_weight else None
        self.pixel_targets = pixel_targets
        self.distillation_weight = distillation_weight
        self.pixel_weight, self.diffusion_weight = pixel_weight, diffusion_weight
        self.default_steps, self.latents_per_token = default_steps, latents_per_token
        self.gradient_clip = gradient_clip
        # Heads on the teacher's features by default: these cost no second copy and need no checkpoint.
        self._autoencoder_folder = resolve(ldm, part=LDM) / "vae"
        self._take(resolve(ldm, part=LDM), resolve(decoder, part=DIFFUSION), adaptation or Adaptation(), reader)
        if gradient_checkpointing:
            self.ladd.enable_gradient_checkpointing()
        self._light: Held[PixelDecoder] | None = None
        if pixel_targets == "light" and reader is not None:
            self._light = Held(PixelDecoder.from_pretrained(reader), frozen=True)
        self._build(start, critic or CriticSettings(kind="heads"))
        self.sampling = sampling_at(_method_times(self.method) if times == "method" else times, self.ladd)
        self.times = {len(row): row for row in self.sampling.times}
        _check(self.method, self.pixels, self.times, diffusion=diffusion_weight)
        self._make_critic_optimizer = critic_optimizer
        self.automatic_optimization = not self.critic_parameters()

    def _take(self, ldm: Path, decoder: Path, adaptation: Adaptation, reader: str | None) -> None:
        """Student and teacher from stage 1; what is not trained exists once."""
        self.ladd, autoencoder = read_network(decoder, ldm, reader=reader)
        self._autoencoder = Held(autoencoder, frozen=True)
        # A LoRA of stage 1 is folded into the student's weights: a teacher that shared them would have it twice.
        parts = adaptation.parts().items() if self.ladd.lora is None else ()
        kept = [name for name, change in parts if change != "full"]
        shared = [p for n in kept for p in self.ladd.get_submodule(n).parameters()]
        self._teacher = Held(copy_sharing(self.ladd, shared))
        told = CodeReader.from_pretrained(reader) if reader is not None and self.ladd.reader is None else None
        self.difference = adapt(self.ladd, adaptation, reader=told)

    def _build(self, start: str | None, critic: CriticSettings) -> None:
        """What the student begins with, its averaged target, and what judges it."""
        if start is not None:
            self.difference.resume(self.ladd, Path(start))
        self._target = Held(self.ladd)
        if self.method is not None and self.method.target_decay is not None:
            frozen = [p for p in self.ladd.parameters() if not p.requires_grad]
            self._target = Held(copy_sharing(self.ladd, frozen))
        if self.method is not None:
            attach_networks(self.method, Networks(self.ladd, self._teacher.module, self._target.module), critic)
        # A judge's adaptors lie in the teacher, which is no part of this model, yet belong into checkpoints.
        known = {id(parameter) for parameter in self.parameters()}
        self.judge = nn.ParameterList(p for p in self.critic_parameters() if id(p) not in known)

    def critic_parameters(self) -> list[nn.Parameter]:
        """Of the method's own networks."""
        return [] if self.method is None else list(self.method.critic_parameters())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The chosen part of the LADD; the quantizer stays as it is, and the critic has an optimizer of its own."""
        return list(self.difference.tensors(self.ladd).values())  # type: ignore[arg-type]

    def setup(self, stage: str) -> None:
        """Refuse latents of another autoencoder, and codes of another tokenizer."""
        require_latents(self.sources(), self._autoencoder_folder)
        require_codes(self.sources(), self.quantizer.fingerprint())

    def on_fit_start(self) -> None:
        """Bring what is no part of this model to its device, and pick the attention that is quick there."""
        super().on_fit_start()
        self.on_validation_start()

    def on_validation_start(self) -> None:
        """As `on_fit_start`."""
        for held in (self._teacher, self._target, self._autoencoder, self._light):
            if held is not None:
                held.on(self.device)
        for network in (self.ladd, self._teacher.module, self._target.module):
            use_fast_attention(network.unet, network.controlnet)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Loss of one batch, (); None where a critic is trained in turn."""
        x_0, condition = self._inputs(batch)
        step = self.global_step
        terms: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        networks = Networks(student=self.ladd, teacher=self._teacher.module, target=self._target.module)
        noise = batch["noise"].float() if "noise" in batch else None  # of pairs: the latent is the teacher's
        distilled = DistillBatch(condition, Condition(), (x_0.shape[1], x_0.shape[2], x_0.shape[3]), x_0, noise)
        output: MethodOutput | None = None
        if self.method is not None:
            generator = self.step_generator("distillation", device="cpu")
            output = self.method.losses(networks, distilled, step=step, generator=generator)
            terms |= output.terms
            weights |= {n: self.distillation_weight * self.method.weights.get(n, 1.0) for n in output.terms}
        if self.pixels is not None:
            example = self._example(batch, x_0, condition)
            generator = self.step_generator("pixels", device="cpu")
            terms |= self.pixels(self.ladd, self._autoencoder.module, example, times=self.times, generator=generator)
            weights |= {n: self.pixel_weight * weight for n, weight in self.pixels.weights.items()}
        if self.diffusion_weight:
            terms["diffusion"] = self._diffusion(x_0, condition)
            weights["diffusion"] = self.diffusion_weight
        loss = self.log_losses(terms, weights=weights, batch_size=len(x_0))
        if self.automatic_optimization or self.method is None or output is None:
            return loss
        student, critic = self.all_optimizers()
        with self.turn_of(student):
            self.learn(student, loss)
        self._follow()
        generator = self.step_generator("critic", device="cpu")
        judged = self.method.critic_losses(networks, distilled, output, step=step, generator=generator)
        if judged:
            self.log_dict({f"train/{name}": term.detach() for name, term in judged.items()})
            with self.turn_of(critic):
                self.learn(critic, torch.stack([term.float() for term in judged.values()]).sum(), counted=False)
        return None

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """As in the base; the averaged target follows at once, before anybody saves. Not called in manual steps."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        """Let the averaged target follow the student, where that has made a step."""
        if self.method is None or self.method.target_decay is None:
            return
        if self.amid_step or self._guard.model_skipped:
            return
        student = self.difference.tensors(self.ladd)
        for name, value in self.difference.tensors(self._target.module).items():
            value.lerp_(student[name].to(value), 1.0 - self.method.target_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the averaged target."""
        super().on_save_checkpoint(checkpoint)
        if self._target.module is not self.ladd:
            averaged = self.difference.tensors(self._target.module)
            checkpoint[_TARGET_KEY] = {name: value.detach().clone() for name, value in averaged.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the averaged target back."""
        super().on_load_checkpoint(checkpoint)
        state, judge = checkpoint.get("state_dict", {}), dict(self.judge.named_parameters(prefix="judge"))
        if not judge.keys() <= state.keys():
            rank_zero_warn("the checkpoint is of a time when judges' adaptors were not in them: this one begins anew")
            state |= judge | {name: state[name] for name in judge.keys() & state.keys()}
        if _TARGET_KEY in checkpoint and self._target.module is not self.ladd:
            self.difference.load(
                self._target.module, checkpoint[_TARGET_KEY], source="the checkpoint's averaged target"
            )

    def _diffusion(self, x_0: Tensor, condition: Condition) -> Tensor:
        t, eps = draw(x_0, self.step_generator("diffusion", device="cpu"))
        prediction = self.ladd(self.ladd.schedule.add_noise(x_0, eps, t), t, condition)
        return F.mse_loss(prediction.float(), self.ladd.target(x_0, eps, t).float())

    def _inputs(self, batch: dict[str, Any]) -> tuple[Tensor, Condition]:
        """Latents (B, C, h, w) and code embeddings (B, d, h', w')."""
        latents, codes = required(batch, "latent", "codes")
        x_0, codes = latents.float(), codes.long()
        side = int(codes.shape[1] ** 0.5)
        if x_0.shape[-1] != round(side * self.latents_per_token):
            raise ValueError(
                f"latents {tuple(x_0.shape[-2:])} are not {self.latents_per_token} for each of {side}x{side} tokens: "
                "set latents_per_token"
            )
        return x_0, Condition(spatial=self.quantizer.codes_to_embeddings(codes, (side, side)))

    @torch.no_grad()
    def _decoded(self, x_0: Tensor) -> Tensor:
        """What the autoencoder makes of latents."""
        return self._autoencoder.module.decode(x_0).float().clamp(-1, 1)

    @torch.no_grad()
    def _example(self, batch: dict[str, Any], x_0: Tensor, condition: Condition) -> PixelExample:
        """What pictures are compared with, see ``pixel_targets``."""
        if self.pixel_targets == "decoded":
            return PixelExample(x_0, condition)
        if self._light is not None:
            images = self._light.module(condition.spatial).float().clamp(-1, 1)
            latents = self._autoencoder.module.encode(images).float()
            if latents.shape != x_0.shape:
                raise ValueError(
                    f"pixel_targets 'light': pictures of {images.shape[-1]} pixels, as the light decoder draws, have "
                    f"latents {tuple(latents.shape[-2:])}, and the data's are {tuple(x_0.shape[-2:])}"
                )
            return PixelExample(latents, condition, images)
        if "image" not in batch:
            raise ValueError("pixel_targets 'image' needs batches with images: set `images: read` in CachedLatents")
        return PixelExample(x_0, condition, batch["image"].float())

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean squared error at the default number of steps, (), and PSNR at all of them."""
        x_0, condition = self._inputs(batch)
        decoder = self.decoder()
        target = batch["image"].float() if "image" in batch else self._decoded(x_0)
        loss = x_0.new_zeros(())
        for steps in self.times:
            decoded = decoder.decode(cast(Tensor, condition.spatial), num_steps=steps)
            self.log_measure(f"psnr_{steps}", psnr(decoded, target))
            if steps == decoder.default_steps:
                loss = F.mse_loss(decoded, target)
        return self.log_losses({"pixels": loss}, batch_size=len(x_0))

    def decoder(self) -> ConsistencyDecoder:
        """The student as a decoder; it shares the weights in training."""
        return ConsistencyDecoder(
            self.ladd,
            self._autoencoder.module,
            sampling=self.sampling,
            default_steps=self.default_steps,
            latents_per_token=self.latents_per_token,
            difference=self.difference,
        )

    def picture_grid(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the autoencoder keeps, over what the codes keep in each number of steps."""
        x_0, condition = self._inputs({name: batch[name][:8] for name in ("latent", "codes")})
        decoder = self.decoder()
        rows = {"autoencoder": self._decoded(x_0)}
        for steps in self.times:
            name = f"{steps} step{'s' * (steps > 1)}"
            rows[name] = decoder.decode(cast(Tensor, condition.spatial), num_steps=steps)
        return rows

    def frozen_parts(self) -> list[nn.Module]:
        """What the student has of stage 1."""
        return [self.ladd]

    def export(self, folder: Path) -> None:
        """Write ``decoder/``: what differs from stage 1's."""
        self.decoder().save_pretrained(folder / "decoder")


def _method_times(method: DistillationMethod | None) -> dict[int, list[float]]:
    if method is None:
        raise ValueError("times 'method' need a distillation method")
    return {steps: method.inference_times(steps).tolist() for steps in method.step_counts if steps <= 4}


def _check(
    method: DistillationMethod | None,
    pixels: PixelSupervision | None,
    times: Mapping[int, tuple[float, ...]],
    *,
    diffusion: float,
) -> None:
    if method is None and pixels is None and not diffusion:
        raise ValueError("nothing to learn from: give a method, pixel supervision or a diffusion weight")
    if method is not None and method.needs_null:
        raise ValueError(
            f"{type(method).__name__} guides its teacher, but a code decoder knows no null codes: set its "
            "guidance_scale to 1 (or guidance_range to [1, 1])"
        )
    if pixels is not None and not set(pixels.steps) <= set(times):
        raise ValueError(f"pixels are supervised in {list(pixels.steps)} steps, but times are given for {list(times)}")
