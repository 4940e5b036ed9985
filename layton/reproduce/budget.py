"""Ends a run when it has spent its forward-equivalents: what makes arms comparable, whatever their steps cost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from distill.budget import BACKWARD, Budget, Handle, count_flops, tensors_in
from distill.denoiser import Denoiser
from distill.held import held_modules
from distill.methods.discriminator import Discriminator
from distill.methods.preference import PreferenceTerm
from layton.folder import write_text
from layton.losses.pixel_supervision import PixelSupervision
from layton.ranks import all_reduce_counts, all_reduce_sum, own_rank

SPENT_FILE = "spent.json"
IMAGES = "images and heads"
DATA = "data"


class BudgetStop(Callback):
    """Stops training at the first step with which the spent forward-equivalents reach the budget.

    Counted are every evaluation of the denoiser while training (student, teacher, averaged target, discriminator and
    fake score network are all of its size), a backward pass as two; what was spent before the run (``prepaid``); and,
    where losses are taken in images, autoencoder and perceptual network by their operations relative to the denoiser's.
    Validation and pictures are not. `layton.tasks.distill.DistillTask` keeps the count itself, in its checkpoints; for
    other tasks this callback does.

    At the end ``<run folder>/spent.json`` says what was spent.

    Args:
        forwards: The budget.
        prepaid: Part of it that was spent on data before the run.

    Raises:
        ValueError: Nothing is left to train with.
    """

    def __init__(self, forwards: float, prepaid: float = 0.0) -> None:
        if not 0 <= prepaid < forwards < float("inf"):
            raise ValueError(f"need 0 <= prepaid < forwards, got {prepaid} and {forwards}")
        self.forwards, self.prepaid = float(forwards), float(prepaid)
        self._own = Budget()
        self._seconds, self._since = 0.0, 0.0
        self._handles: list[Handle] = []
        self._meter: ImageMeter | None = None
        self._spent, self._last_step = 0.0, 0.0

    def spent(self, task: LightningModule) -> float:
        """Forward-equivalents so far of all ranks, who ask together; data included."""
        own = torch.tensor(_budget(task, self._own).total, dtype=torch.float64)
        return self.prepaid + float(all_reduce_sum(own))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that has spent everything already ends before its first step."""
        self._since = time.monotonic()
        self._meter = ImageMeter(_budget(pl_module, self._own), _denoisers(pl_module))
        self._spent = self.spent(pl_module)
        if self._spent >= self.forwards:
            trainer.should_stop = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to count."""
        if self._meter is None:
            raise RuntimeError("training began without on_train_start")
        self._release()
        self._handles = list(self._meter.watch(image_parts(pl_module)))
        if not isinstance(getattr(pl_module, "budget", None), Budget):
            self._handles += [self._own.watch(network) for network in _denoisers(pl_module)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop when everything is spent."""
        self._release()
        before, self._spent = self._spent, self.spent(pl_module)
        self._last_step = self._spent - before
        if self._spent >= self.forwards and not trainer.fit_loop._should_accumulate():
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down what was spent, if the budget is: not when a signal ended the run."""
        self._release()
        accounts = all_reduce_counts(_budget(pl_module, self._own).accounts)
        if self.prepaid + sum(accounts.values()) < self.forwards or not trainer.is_global_zero:
            return
        if self.prepaid:
            accounts[DATA] = accounts.get(DATA, 0.0) + self.prepaid
        learning = {id(parameter): parameter for parameter in _trainable(pl_module)}
        found = {
            "budget": self.forwards,
            "forwards": sum(accounts.values()),
            "accounts": accounts,
            "last_step": self._last_step,
            "steps": int(trainer.global_step),
            "trained_parameters": sum(parameter.numel() for parameter in learning.values()),
            "seconds": round(self._elapsed(), 1),
        }
        write_text(Path(trainer.default_root_dir) / SPENT_FILE, json.dumps(found, indent=1) + "\n")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep: the own count and the time."""
        return {
            "accounts": all_reduce_counts(self._own.state_dict()),
            "seconds": self._elapsed(),
            "last_step": self._last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._own.load_state_dict({} if own_rank() else state_dict["accounts"])
        self._seconds, self._last_step = float(state_dict["seconds"]), float(state_dict["last_step"])

    def _elapsed(self) -> float:
        return self._seconds + (time.monotonic() - self._since if self._since else 0.0)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class ImageMeter:
    """Counts networks that work on images, in units of one denoiser evaluation, by operations.

    Their cost depends on the size of what they are shown, so it is measured once for each shape.

    Args:
        budget: Counts under the account ``images``.
        denoisers: Give the unit: the operations of their first evaluation, for each sample.
    """

    def __init__(self, budget: Budget, denoisers: list[nn.Module]) -> None:
        self.budget, self.denoisers = budget, denoisers
        self._unit = 0.0
        self._costs: dict[tuple[int, tuple[int, ...]], float] = {}

    def watch(self, parts: list[nn.Module]) -> Iterator[RemovableHandle]:
        """Count every call of the parts until the handles are removed."""
        if not parts:
            return
        if not self._unit:
            for denoiser in self.denoisers:
                yield denoiser.register_forward_hook(self._take_unit, with_kwargs=True)
        for part in parts:
            yield part.register_forward_hook(self._count, with_kwargs=True)

    def _take_unit(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if not self._unit:
            self._unit = count_flops(lambda: module.forward(*args, **kwargs)) / _samples(args, kwargs)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if not self._unit:
            raise RuntimeError("images were compared before the denoiser was evaluated: there is no unit to count in")
        key = (id(module), _shape(args, kwargs))
        if key not in self._costs:
            self._costs[key] = count_flops(lambda: module.forward(*args, **kwargs)) / self._unit
        cost = self._costs[key]
        self.budget.add(cost, IMAGES)
        differentiable = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        if torch.is_grad_enabled() and differentiable:
            register_multi_grad_hook(differentiable, lambda _: self.budget.add(BACKWARD * cost, IMAGES), mode="any")


def image_parts(task: nn.Module) -> list[nn.Module]:
    """What else costs operations: autoencoder halves, perceptual networks, and the heads of discriminators.

    Those that are not registered in the task are included, and whatever else it holds that is no denoiser, such as a
    light decoder whose pictures are targets.
    """
    supervised = [module.perceptual for module in task.modules() if isinstance(module, PixelSupervision)]
    roots: list[nn.Module] = [part for part in supervised if part is not None]
    within = {id(part) for root in roots for part in held_modules(root)}
    roots += [part for part in held_modules(task) if id(part) not in within and not _denoisers(part)]
    roots += [net for module in task.modules() if isinstance(module, PreferenceTerm) for net in module.networks]
    roots += [head for module in task.modules() if isinstance(module, Discriminator) for head in module.heads]
    parts: dict[int, nn.Module] = {}
    for root in roots:
        coders = [module for module in root.modules() if isinstance(module, AutoencoderKL)]
        halves = [half for coder in coders for half in (coder.encoder, coder.decoder)]
        for part in halves or [root]:
            parts[id(part)] = part
    return list(parts.values())


def _budget(task: LightningModule, own: Budget) -> Budget:
    found = getattr(task, "budget", None)
    return found if isinstance(found, Budget) else own


def _denoisers(task: nn.Module) -> list[nn.Module]:
    """The networks whose evaluations are counted, each once: those that are not inside another one."""
    plain = [module for root in (task, *held_modules(task)) for module in root.modules() if _is_network(module)]
    return list({id(module): module for module in plain}.values())


def _is_network(module: nn.Module) -> bool:
    """Denoisers that own a network; wrappers around another denoiser would count it twice."""
    inner = [child for child in module.modules() if isinstance(child, Denoiser) and child is not module]
    return isinstance(module, Denoiser) and not inner


def _trainable(task: LightningModule) -> Iterator[nn.Parameter]:
    find = getattr(task, "trainable_parameters", None)
    if find is not None:
        yield from find()


def _samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return _shape(args, kwargs)[0]


def _shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(next(tensors_in((args, kwargs))).shape)
