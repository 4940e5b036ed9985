"""Distils a text-to-image model of diffusers: any method of `distill`, LoRA or full fine-tuning, one trainer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from distill.adapters import (
    FLOW_LORA_TARGETS,
    TLCM_LORA_TARGETS,
    AdapterView,
    LoraSettings,
    networks_for,
    update_target,
)
from distill.budget import Budget
from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.few_step import FewStepSampling, Start
from distill.held import Held
from distill.method import DistillationMethod, DistillBatch, MethodOutput, Networks
from distill.methods.consistency import ConsistencyMethod
from distill.methods.hipa import rank_for_share
from distill.methods.pairs import TeacherSolver
from distill.methods.reflow import Reading, read_as
from distill.models import FlowTransformerDenoiser, UNetDenoiser, denoiser_from_pipeline, hear_guidance
from distill.recompute import Recompute, set_recompute
from distill.schedules import NoiseSchedule
from distill.stacked import StackedUNet2DConditionModel, stack
from layton.assets import find_pipeline
from layton.data.sources import walk
from layton.distillation.distilled import begin_with, network_of, save_distilled, student_pipeline
from layton.distillation.pair_data import TeacherPairs, teacher_told
from layton.distillation.task_pairs import TaskPairs
from layton.ldm.autoencoder import Autoencoder
from layton.ldm.cache import require_latents
from layton.ldm.conditions import NETWORK_GUIDANCE, PromptEncoder, latent_shape_of
from layton.ldm.prompt_cache import condition_of_batch
from layton.ldm.teacher import open_pipeline
from layton.ldm.unet import use_fast_attention
from layton.ranks import all_reduce_counts, all_reduce_sum, num_ranks, own_rank
from layton.tasks.base import LRSchedulerCallable, OptimizerCallable
from layton.tasks.critics import CriticSettings, attach_networks
from layton.tasks.manual import ManualTask
from layton.tasks.previews import Previews

PREVIEW_IMAGES = 8
RECOMPUTE: dict[bool | Literal["cheap"], Recompute] = {False: "nothing", "cheap": "cheap", True: "blocks"}
_FORWARDS, _START = "distill_forwards", "distill_start"


class DistillTask(ManualTask):
    """Trains a student of few steps from a diffusers pipeline folder.

    With an adapter there is one copy of the network: the teacher is the student with its adapter off, and the averaged
    target, a discriminator and a fake score network are further adapters. Checkpoints hold what is trained, no more.

    Batches hold ``caption``, a list of B texts, or the fields of their conditions (`layton.ldm.prompt_cache`); for
    methods that learn from data also ``latent`` (B, C, h, w), scaled, or ``image`` (B, 3, H, W) in [-1, 1]; for those
    that learn from pairs also ``noise`` (B, C, h, w). In pairs of pictures (`layton.distillation.task_pairs`) that is
    the latent that the student is to change; what comes out is recorded as starting from images.

    Optimization is manual, since methods may train networks of their own: set ``gradient_clip`` here, not in the
    trainer. ``trainer.max_steps`` and checkpoints count steps of the student, of ``trainer.accumulate_grad_batches``
    batches each.

    Args:
        pipeline: Folder of the teacher: Stable Diffusion 1.x, 2.x, XL, 3 or FLUX.
        method: What to do with it.
        optimizer: Makes the student's optimizer.
        lr_scheduler: Makes its learning-rate schedule.
        critic_optimizer: Makes the optimizer of the method's own networks; by default as the student's.
        adapter: Shape of the student's LoRA; None trains all weights, as a student that is told the guidance scale
            (``condition_on_guidance`` of LCM and SCott) must.
        adapter_share: Of the network's parameters that the adaptors are to have; decides their rank, with an alpha as
            large (`distill.methods.hipa.rank_for_share`). None takes the adapter's own rank.
        initial: Folder of a student of the same kind that this one begins with, such as an export of an earlier run;
            its LoRA may be of a smaller rank. A run's ``forwards`` do not count what made it.
        critic: What discriminators and fake score networks are made of; LoRAs of rank 64 when None.
        negative_prompt: What the teacher is guided away from; None is the pipeline's own default.
        network_guidance: What a network with guidance for an input is told while it learns (FLUX dev); recorded, since
            the student holds for this value. Of no effect on others.
        latent_size: h = w; by default what the pipeline makes by default.
        gradient_clip: Largest gradient norm of either optimizer; 0 does not clip.
        frozen_dtype: Of weights that do not learn: text encoders, and the network beside adaptors or the teacher beside
            a student of all weights; bfloat16 halves their memory. What learns, and averages of it, stay float32.
        gradient_checkpointing: What backward passes of the network compute again instead of keeping
            (`distill.recompute`): ``cheap`` all but products and convolutions, which takes little time; true whole
            blocks, for the price of a forward pass; false nothing.
        preview_steps: Numbers of steps of grids and score, as far as the method trains for them.
        reference_steps: Steps of the teacher's pictures that students are compared with.
        reference_guidance: Guidance scale of those.
        stacked: The student is two copies of the network in series, with all weights trained (InstaFlow's larger
            student, `distill.stacked`).
        export_pipeline: Beside the student, which must train all weights, also export ``pipeline/``: the teacher's
            folder with the student in it, as the teacher of a next run.
        export_half: Export weights in fp16.
        max_bad_steps: The run stops after this many steps in a row with a loss or gradient that is not finite.

    Raises:
        UsageError: No such folder.
        ValueError: The folder or a number is wrong, or no layer matches the adapter's targets.
    """

    def __init__(
        self,
        pipeline: str,
        method: DistillationMethod,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        critic_optimizer: OptimizerCallable | None = None,
        adapter: LoraSettings | None = None,
        adapter_share: float | None = None,
        initial: str | None = None,
        critic: CriticSettings | None = None,
        negative_prompt: str | None = None,
        network_guidance: float = NETWORK_GUIDANCE,
        latent_size: int | None = None,
        gradient_clip: float = 1.0,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool | Literal["cheap"] = False,
        preview_steps: tuple[int, ...] = (1, 2, 4, 8),
        reference_steps: int = 25,
        reference_guidance: float = 5.0,
        stacked: bool = False,
        export_pipeline: bool = False,
        export_half: bool = False,
        max_bad_steps: int = 10,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, max_bad_steps=max_bad_steps)
        if gradient_clip < 0:
            raise ValueError(f"gradient_clip must be >= 0, got {gradient_clip}")
        if export_pipeline and (stacked or adapter is not None):
            raise ValueError("export_pipeline needs a student of the teacher's shape with all weights: adapter=null")
        self.automatic_optimization = False
        self._export_half, self._network_guidance = export_half, network_guidance
        self._teacher_folder = find_pipeline(pipeline)
        self._export_pipeline = export_pipeline
        frozen = getattr(torch, frozen_dtype)
        # a student of all weights begins with what the folder holds, not with its halves
        pipe = open_pipeline(pipeline, dtype=torch.float32 if adapter is None else frozen)
        self.latent_shape = latent_shape_of(pipe, latent_size)
        self.prompts = PromptEncoder(pipe, latent_size=self.latent_shape[1:], guidance_scale=network_guidance)
        self._autoencoder = Held(Autoencoder(pipe.vae))
        denoiser = denoiser_from_pipeline(pipe, latent_size=self.latent_shape[1:])
        _require_learnable(denoiser)
        reading = _reading_of(method)
        settings = method.settings if isinstance(method, ConsistencyMethod) else None
        heard = network_guidance if self.prompts.has_guidance else None
        told = settings is not None and settings.condition_on_guidance
        if settings is not None and told:
            heard = sum(settings.guidance_range) / 2
        student = _another_shape(denoiser, told=told, stacked=stacked)
        adapter = fitted_adapter(adapter, denoiser, share=adapter_share)
        networks = networks_for(denoiser, adapter, target_decay=method.target_decay, student=student)
        if initial is not None:
            begin_with(networks.student, initial)
            update_target(networks, 0.0)
        for network in (networks.student, networks.teacher):  # of which critics are made
            set_recompute(network_of(network), RECOMPUTE[gradient_checkpointing])
        if self.prompts.has_guidance and method.needs_null:
            rank_zero_warn(
                "the network hears its guidance, and the run file asks for classifier-free guidance on top of it: set "
                "every guidance_scale and guidance_range of the method, and of its extras, to 1"
            )
        self._take(networks, method, critic or CriticSettings())
        if adapter is None:
            for part in (self.teacher, *self.prompts.encoders):
                _cast_frozen(part, frozen)
        sampled = read_as(self.student, reading, toward_image=False)
        self.sampling = FewStepSampling.from_method(
            method,
            sampled.prediction_type,
            # diffusers' flow schedulers know no boundary; from t = 1 on c_out is within 0.2 % of 1
            boundary="none" if settings is None or sampled.prediction_type == "flow" else settings.boundary,
            guidance=heard,
        )
        self.budget = Budget()
        self.negative_prompt, self.gradient_clip = negative_prompt, gradient_clip
        self.previews = Previews(
            replace(self.networks, student=sampled),
            self.sampling,
            steps=preview_steps,
            reference_steps=reference_steps,
            reference_guidance=reference_guidance,
        )
        self._make_critic_optimizer = critic_optimizer or optimizer
        self._null: Condition | None = None
        self._learned = self._learned_names()

    def _take(self, networks: Networks, method: DistillationMethod, critic: CriticSettings) -> None:
        """Register networks and method with one another; of views only the student's shows parameters."""
        self.networks = networks
        self.student, self.teacher = networks.student, networks.teacher
        if networks.target is not networks.student:
            self.target = networks.target
        if isinstance(getattr(method, "schedule", None), NoiseSchedule):
            cast(Any, method).schedule = networks.student.schedule
        attach_networks(method, networks, critic)
        method.prepare(networks)
        self.method = method
        # Copies of weights, the same on all ranks: DDP would send them around before every forward pass.
        self._ddp_params_and_buffers_to_ignore = [f"method.{name}" for name, _ in method.named_buffers()]

    def setup(self, stage: str) -> None:
        """Refuse pairs that a teacher made otherwise than is asked for, and pick the attention that is quick.

        Raises:
            ValueError: Says what differs.
        """
        sources = list(walk(self.sources()))
        for source in sources:
            if isinstance(source, TeacherPairs):
                self._require_pairs(source)
        if any(isinstance(source, TaskPairs) for source in sources):
            if any(isinstance(source, TeacherPairs) for source in sources):
                raise ValueError("a student starts from pictures or from noise: train on TaskPairs or on TeacherPairs")
            if not isinstance(getattr(self.method, "solver", None), TeacherSolver):
                raise ValueError(f"{type(self.method).__name__} does not learn from pairs, and TaskPairs are such")
            self._start_from("image")
        require_latents(sources, self._teacher_folder / "vae")
        # Checkpoints are meant to hold the weights after the step.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        for network in (self.student, self.teacher, self.networks.target):
            inner = network.denoiser if isinstance(network, AdapterView) else network
            if isinstance(inner, UNetDenoiser):
                use_fast_attention(inner.unet)

    def _start_from(self, start: Start) -> None:
        self.sampling = self.previews.sampling = replace(self.sampling, start=start)

    def _require_pairs(self, source: TeacherPairs) -> None:
        solver = getattr(self.method, "solver", None)  # of LCM a rule for one step, which pairs know nothing of
        asked = {
            "teacher": teacher_told(self._teacher_folder, self._network_guidance),
            "solver": solver if isinstance(solver, TeacherSolver) else source.solver,
            "negative_prompt": self.negative_prompt,
        }
        for name, wanted in asked.items():
            stored = getattr(source, name)
            guided = name != "negative_prompt" or source.solver.is_guided
            if guided and stored != wanted:
                raise ValueError(
                    f"the data are pairs made with {name} {stored}, and the run says {wanted}: what it says of the "
                    "teacher has to stand in the data's init_args, too (`layton distill` puts it there)"
                )

    def on_fit_start(self) -> None:
        """Tell which parts of the method a run of so few steps never comes to."""
        super().on_fit_start()
        limit = int(self.trainer.max_steps)
        missed = {name: start for name, start in self.method.parts.items() if 0 < limit <= start}
        if missed:
            told = ", ".join(f"{name}, from step {start}" for name, start in missed.items())
            where = "--model.init_args.method.init_args..."
            rank_zero_warn(f"the run ends after {limit} steps and never comes to {told}; {where} sets these")

    gathering_methods = ("student_loss", "critic_loss")

    def why_not_sharded(self) -> str | None:
        """Not with methods that evaluate a network with weights of their own keeping."""
        return f"{type(self.method).__name__} keeps whole weights" if self.method.keeps_weights else None

    def critic_parameters(self) -> list[nn.Parameter]:
        """Parameters of the method's own networks."""
        return [parameter for parameter in self.method.critic_parameters() if parameter.requires_grad]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The student's: its adapter, or all of it."""
        critic = {id(parameter) for parameter in self.method.critic_parameters()}
        return [p for p in self.student.parameters() if p.requires_grad and id(p) not in critic]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One step of the student, of the averaged target and of the critic."""
        with self.budget.watching(self._watched()):
            self._train(batch)
        self.log("train/forwards", float(all_reduce_sum(torch.tensor(self.budget.total, dtype=torch.float64))))

    def _train(self, batch: dict[str, Any]) -> None:
        student, *critics = self.all_optimizers()
        if "caption" in batch:
            self.look_at_captions(batch["caption"], self.prompts.unread)
        inputs, step = self.distill_batch(batch), self.global_step
        with self.turn_of(student):
            loss, output = self.student_loss(inputs, step)
            self.learn(student, loss)
        if self.method.target_decay is not None and not self.amid_step and not self._guard.model_skipped:
            update_target(self.networks, self.method.target_decay)
        for critic in critics:
            if self._guard.skipped_now:
                critic.zero_grad()  # it would be shown, or was before in this step, the same bad numbers
                continue
            with self.turn_of(critic):
                critic_loss = self.critic_loss(inputs, output, step)
                if critic_loss is not None:
                    self.learn(critic, critic_loss, counted=False)

    def student_loss(self, inputs: DistillBatch, step: int) -> tuple[Tensor, MethodOutput]:
        """The student's loss, (), and the terms that it is made of."""
        output = self.method.losses(self.networks, inputs, step=step, generator=self._generator("student"))
        return self._log_terms(output, inputs.batch_size), output

    def critic_loss(self, inputs: DistillBatch, output: MethodOutput, step: int) -> Tensor | None:
        """The loss of the method's own networks, (), on what the student's step left; None if they do not learn now."""
        terms = self.method.critic_losses(self.networks, inputs, output, step=step, generator=self._generator("critic"))
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        return torch.stack([term.float() for term in terms.values()]).sum() if terms else None

    def _watched(self) -> dict[str, tuple[nn.Module, float]]:
        """Every network of the denoiser's size: one with adapters, copies without."""
        kinds = (UNetDenoiser, FlowTransformerDenoiser)
        return {name: (module, _cost(module)) for name, module in self.named_modules() if isinstance(module, kinds)}

    def _generator(self, stream: str) -> torch.Generator:
        return self.step_generator(stream, device="cpu")  # the same numbers on every device

    def _log_terms(self, output: MethodOutput, batch_size: int) -> Tensor:
        weights = {name: weight for name, weight in self.method.weights.items() if name in output.terms}
        return self.log_losses(output.terms, weights=weights, batch_size=batch_size)

    def distill_batch(self, batch: dict[str, Any]) -> DistillBatch:
        """Conditions, and latents for methods that learn from data.

        Raises:
            ValueError: The method needs latents and the batch has neither latents nor images.
        """
        # Text and latents are made as the pipeline makes them, whatever the precision of training.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            condition = condition_of_batch(batch)
            encoded = condition is not None
            if condition is None:
                condition = self.prompts(batch["caption"], device=self.device)
            elif self.prompts.has_guidance:  # of a cache, whatever it was made with
                condition = self.prompts.told(condition)
            if self._null is None or self._null.embeds is None or self._null.embeds.device != self.device:
                # Kept for training, which cannot differentiate what is made in validation's inference mode.
                with torch.inference_mode(False), torch.no_grad():
                    self._null = self.prompts.null(self.negative_prompt, device=self.device)
                if encoded:
                    self.prompts.leave(self.device)  # prompts come encoded: the encoders are not needed again
            x_0 = batch["latent"].float() if "latent" in batch else None
            if x_0 is None and "image" in batch and self.method.needs_latents:
                x_0 = self.autoencoder.encode(batch["image"].float())
        if x_0 is None and self.method.needs_latents:
            raise ValueError(f"{type(self.method).__name__} learns from pictures: batches need 'latent' or 'image'")
        noise = batch["noise"].float() if "noise" in batch else None
        return DistillBatch(condition.to(device=self.device), self._null, self.latent_shape, x_0, noise)

    @property
    def autoencoder(self) -> Autoencoder:
        """The pipeline's, on this task's device."""
        return self._autoencoder.on(self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The method's loss at numbers that depend on the batch's position only, and samples for the score."""
        inputs = self.distill_batch(batch)
        place = batch_idx * num_ranks() + own_rank()
        drawn = torch.Generator().manual_seed(place)
        output = self.method.losses(self.networks, inputs, step=self.global_step, generator=drawn)
        if self._trainer is not None and self.trainer.sanity_checking:  # that it works, and no score
            self.previews.generate(inputs, min(self.previews.steps), list(range(inputs.batch_size)))
        else:
            self.previews.collect(inputs, place)
        return self._log_terms(output, inputs.batch_size)

    def on_test_start(self) -> None:
        """Test students against what the teacher makes of the test's captions."""
        super().on_test_start()
        self.previews.forget()

    def on_test_end(self) -> None:
        """And validate as before."""
        super().on_test_end()
        self.previews.forget()

    def on_validation_epoch_end(self) -> None:
        """Log ``score_N`` for N steps and their mean ``score``, smaller is better (`sliced_wasserstein`)."""
        super().on_validation_epoch_end()
        for name, score in self.previews.scores().items():
            self.log(f"{self.stage}/{name}", score, prog_bar=name == "score", sync_dist=True)

    def picture_grid(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The teacher's pictures over the student's in 1, 2, 4 and 8 steps, from the same noise."""
        inputs = self.distill_batch({name: values[:PREVIEW_IMAGES] for name, values in batch.items()})
        rows = self.previews.rows(inputs, list(range(inputs.batch_size)))
        return {name: self.autoencoder.decode(latents).float().clamp(-1, 1) for name, latents in rows.items()}

    def export(self, folder: Path) -> None:
        """Write the LoRA, or the whole network, in diffusers' format, ``few_step.json``, and ``pipeline/`` if asked."""
        learnt = tuple(tuple(self.method.inference_times(count).tolist()) for count in self.method.trained_counts)
        dtype = torch.float16 if self._export_half else None
        save_distilled(self.student, folder, replace(self.sampling, times=learnt), dtype=dtype)
        if self._export_pipeline:
            student_pipeline(self._teacher_folder, folder, folder / "pipeline")

    def left_out(self) -> frozenset[str]:
        """All but what is learnt."""
        return frozenset(self.state_dict()) - self._learned

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is learnt: the pipeline folder has the rest."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in self._learned}
        checkpoint[_FORWARDS] = all_reduce_counts(self.budget.state_dict())
        checkpoint[_START] = self.sampling.start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the pipeline folder has; refuse a checkpoint of another shape of run.

        Raises:
            ValueError: It holds other weights than this task learns.
        """
        super().on_load_checkpoint(checkpoint)
        odd = sorted(self._learned ^ checkpoint["state_dict"].keys())
        if odd:
            raise ValueError(f"the checkpoint holds other weights than this run trains; {len(odd)} differ: {odd[:4]}")
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]
        self.budget.load_state_dict({} if own_rank() else checkpoint.get(_FORWARDS, {}))
        if not self.sources():  # outside a run; in one the data say it
            self._start_from(checkpoint.get(_START, "noise"))

    def _learned_names(self) -> frozenset[str]:
        target = self.networks.target
        averages = target.parameters_of_view() if isinstance(target, AdapterView) else target.parameters()
        kept = {id(parameter) for parameter in averages}
        names = {name for name, p in self.named_parameters() if p.requires_grad or id(p) in kept}
        return frozenset(
            names | {f"method.{name}" for name, _ in self.method.named_buffers()} & self.state_dict().keys()
        )


def fitted_adapter(
    adapter: LoraSettings | None, denoiser: Denoiser, *, share: float | None = None
) -> LoraSettings | None:
    """An adapter's shape for the network at hand: a flow transformer has other layers than the default list names.

    Raises:
        ValueError: A share without an adapter, or no layer matches.
    """
    if adapter is None:
        if share is not None:
            raise ValueError(f"adapter_share {share} needs an adapter")
        return None
    if isinstance(denoiser, FlowTransformerDenoiser) and adapter.targets == TLCM_LORA_TARGETS:
        adapter = replace(adapter, targets=FLOW_LORA_TARGETS)
    if share is not None:
        rank = rank_for_share(denoiser, share, adapter.targets)
        adapter = replace(adapter, rank=rank, alpha=float(rank))
    return adapter


def _another_shape(denoiser: Denoiser, *, told: bool, stacked: bool) -> Denoiser | None:
    """The student where it is of another shape than its teacher: told the guidance scale, or two networks in series."""
    if stacked:
        if told or not isinstance(denoiser, UNetDenoiser):
            raise ValueError("only a UNet that is not told the guidance scale can be stacked")
        return stack(denoiser)
    return hear_guidance(denoiser) if told else None


def _cast_frozen(part: nn.Module, dtype: torch.dtype) -> None:
    """Of what does not learn; a judge's adaptors in a teacher do."""
    for parameter in part.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _require_learnable(denoiser: Denoiser) -> None:
    """Refuse teachers whose predictions no method here can read.

    Raises:
        ValueError: Says why.
    """
    if isinstance(denoiser, UNetDenoiser) and denoiser.unet.config.time_cond_proj_dim is not None:
        raise ValueError(
            "the teacher is a UNet that is told its guidance scale (time_cond_proj_dim), as distilled ones are: give "
            "the model that it was distilled from"
        )
    last = denoiser.schedule.lambda_t(denoiser.schedule.terminal_t)
    if denoiser.prediction_type == "eps" and bool(last.isinf()):
        raise ValueError(
            "the teacher predicts noise, which says nothing of the image at the last time of its schedule (zero "
            "terminal signal-to-noise ratio): its scheduler should say v_prediction, or rescale_betas_zero_snr false"
        )


def _reading_of(method: DistillationMethod) -> Reading:
    """How the method reads a student that is no flow; diffusers' flow schedulers decide the sign of a velocity."""
    reading = cast(Reading, getattr(method, "reading", "exact"))
    if reading == "reinterpret" and getattr(method, "toward_image", False):
        raise ValueError(
            "reading 'reinterpret' needs toward_image false here: diffusers' schedulers integrate eps - x_0 "
            "(InstaFlowPipeline reads either sign)"
        )
    return reading


def _cost(network: nn.Module) -> float:
    return 2.0 if isinstance(getattr(network, "unet", None), StackedUNet2DConditionModel) else 1.0
