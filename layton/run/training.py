"""``layton fit``, ``validate`` and ``test``: Lightning's command line over this library's tasks.

One run has one folder (``--run_dir``): ``config.yaml`` (what was run), ``checkpoints/``, ``grids/``, ``logs/`` and
``export/`` (the averaged weights in ``save_pretrained`` formats, written when training reaches its end).
"""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jsonargparse._deprecated import JsonargparseDeprecationWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy

from layton.callbacks import (
    CheckpointError,
    ExportWeights,
    GracefulStop,
    LineProgress,
    LossSpikes,
    SafeCheckpoint,
    SafeCheckpointIO,
    newest_good_checkpoint,
)
from layton.callbacks.checkpoint import CHECKPOINT_FOLDER
from layton.errors import UsageError
from layton.folder import write_text
from layton.lock import is_main_process, lock_folder
from layton.quiet import cut_captions_told_once, no_advertisements
from layton.run.config_folders import found_configs
from layton.run.files import allow_modules, check_run_files, nulls_as_files, refused_class_paths
from layton.run.short_options import MEANT, SHORT, said_in_full
from layton.sharding import FullySharded
from layton.tasks.base import LaytonTask
from layton.usage import innermost_reason, usage_error

RUN_CONFIG = "config.yaml"
"""What was run, in the run folder."""


class SaveRunConfig(SaveConfigCallback):
    """Writes the merged configuration to ``<run folder>/config.yaml`` and to loggers that keep hyperparameters.

    Only when training begins: settings with which a checkpoint cannot be continued do not replace those of the run.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: the checkpoint is not read so far."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything fits."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write atomically."""
        text = self.parser.dump(self.config, skip_unset=False)
        write_text(Path(trainer.default_root_dir) / RUN_CONFIG, text)
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams({"config": text})


class TrainingCLI(LightningCLI):
    """LightningCLI in subclass mode with this library's run folder, resume, checkpoints, logger and progress."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The three commands, and the arguments of Lightning's methods that are not offered."""
        common = {"model", "dataloaders", "datamodule", "weights_only"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only", "ckpt_path"},
            "validate": common,
            "test": common,
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Arguments of a run."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder of the run; default runs/<name of the first --config file>",
        )
        parser.add_argument(
            "--resume",
            type=str,
            default="never",
            help="'auto' continues from the newest good checkpoint of the run folder, or starts when there is none; "
            "'never' starts, and refuses a folder that has checkpoints; or a checkpoint file",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the given list, whatever sys.argv holds."""
        self.config = parser.parse_args(list(args) if args is not None else None)

    def _parse_ckpt_path(self) -> None:
        """The run file says what is built, never the checkpoint: its class paths are not trusted."""

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        given = self._get(self.config, "run_dir")
        if given:
            return Path(given).expanduser().absolute()
        files = self._get(self.config, "config") or []
        own = Path(str(files[0])) if files else Path()
        if own.name == RUN_CONFIG and (own.parent / CHECKPOINT_FOLDER).is_dir():  # of a run that is to go on
            return own.parent.absolute()
        return (Path("runs") / (Path(str(files[0])).stem if files else "run")).absolute()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "fit" or not is_main_process():
            super()._run_subcommand(subcommand)
            return
        with lock_folder(self.run_dir):
            super()._run_subcommand(subcommand)

    def before_instantiate_classes(self) -> None:
        """Find a run folder that is in use before data are made for it, which may take hours."""
        super().before_instantiate_classes()
        resume = self._get(self.config, "resume") if self.subcommand == "fit" else ""
        if resume == "never" and is_main_process():
            _resume_path(resume, self.run_dir / CHECKPOINT_FOLDER)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Trainer with the run folder, the CSV logger and the callbacks that were not configured."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        config["default_root_dir"] = str(self.run_dir)
        config["logger"] = self._loggers(config.get("logger"))
        config["strategy"] = _strategy_of(config)
        extra = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        configured = config.get("callbacks") or []
        configured = list(configured) if isinstance(configured, list) else [configured]
        checkpointing = config.get("enable_checkpointing") is not False
        if not checkpointing:
            configured = [c for c in configured if not isinstance(c, Checkpoint)]
        config["callbacks"] = configured
        added = _missing(configured, config, checkpointing=checkpointing)
        trainer = self._instantiate_trainer(config, [*extra, *added])
        if trainer.strategy.root_device.type == "cuda" and "mixed" in str(trainer.precision):
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        return trainer

    def _loggers(self, given: Any) -> list[Logger] | bool:
        if given is False:
            return False
        loggers = [] if given in (None, True) else list(given) if isinstance(given, Iterable) else [given]
        if not any(isinstance(logger, CSVLogger) for logger in loggers):
            loggers.append(CSVLogger(save_dir=self.run_dir, name="logs"))
        return loggers

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        checkpoints = self.run_dir / CHECKPOINT_FOLDER
        if subcommand == "fit":
            arguments["ckpt_path"] = _resume_path(self._get(self.config, "resume"), checkpoints)
            return arguments
        kind = "validation" if subcommand == "validate" else "test"
        if getattr(self.datamodule, kind, None) == []:
            raise UsageError(f"the data has no {kind} samples: name some under `{kind}:`")
        if arguments.get("ckpt_path") is None:
            sys.stderr.write("layton: figures of fresh weights: --ckpt_path auto takes the run's newest checkpoint\n")
        elif arguments["ckpt_path"] == "auto":
            found = newest_good_checkpoint(checkpoints)
            if found is None:
                raise CheckpointError(f"no good checkpoint in {checkpoints}")
            arguments["ckpt_path"] = str(found)
        return arguments


def run(subcommand: str, args: Sequence[str], *, allow: Iterable[str] = ()) -> int:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        subcommand: one of the three.
        args: the rest of the command line.
        allow: further modules that run files may name.

    Returns:
        0, or 128 + the number of the signal that ended training early.

    Raises:
        UsageError: the command line or a run file is wrong.
        FolderInUseError: another process trains in the run folder.
    """
    args = _settings_last(nulls_as_files(found_configs(said_in_full(found_configs(args)))))
    check_run_files(args, allowed=allow_modules(allow))
    cli = _make(TrainingCLI, [subcommand, *args], run=True)
    signals = [c.signal_number for c in _callbacks(cli.trainer) if isinstance(c, GracefulStop) and c.signal_number]
    return 128 + signals[0] if signals else 0


def _settings_last(words: Sequence[str]) -> list[str]:
    """The words with single settings (``--data.batch_size 2``) behind all files, which would undo them."""
    files: list[str] = []
    settings: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, _ = word.partition("=")
        found = settings if name.startswith("--") and "." in name else files
        found.append(word)
        if not equals and word.startswith("--") and waiting and not waiting[0].startswith("--"):
            found.append(waiting.pop(0))
    return files + settings


@dataclass(frozen=True, slots=True, eq=False)
class RunParts:
    """What a run is made of, without its trainer.

    Attributes:
        task: The task, in training mode, with fresh parts.
        data: The data module; None if none was asked for.
        steps: Optimizer steps of the whole run; None if they are not limited.
        batches_per_step: Batches of one rank that an optimizer step takes.
    """

    task: LaytonTask
    data: LightningDataModule | None
    steps: int | None
    batches_per_step: int


def build_run(
    config: Sequence[str], *, data: str | None = None, changes: Sequence[str] = (), allow: Iterable[str] = ()
) -> RunParts:
    """Build the parts of a run.

    Args:
        config: run files, later ones over earlier ones.
        data: data file; without one no data module is built, even if a run file names one.
        changes: settings as on the command line, without their dashes: ``model.init_args.pipeline=mini``.
        allow: further modules that run files may name.

    Raises:
        UsageError: a run file is wrong.
    """
    words = [*(word for path in config for word in ("--config", path)), "--data", "null" if data is None else data]
    words += [f"--{change}" for change in changes]
    args = found_configs(words)
    check_run_files(args, allowed=allow_modules(allow))
    cli = _make(_PartsOnly, args, run=False)
    trainer = cli.config["trainer"]
    steps = trainer["max_steps"]
    return RunParts(cli.model, cli.datamodule, steps if steps > 0 else None, trainer["accumulate_grad_batches"] or 1)


def load_task(
    path: Path | str, task: LaytonTask | None = None, *, averaged: bool = True, allow: Iterable[str] = ()
) -> LaytonTask:
    """Rebuild a task from a checkpoint, with all its parts and weights.

    Unlike Lightning's ``load_from_checkpoint`` it checks the file's digest, and the class names in it before importing.

    Args:
        path: the checkpoint.
        task: built as the run's was, for a checkpoint of a run that ``layton fit`` did not make; it is filled. By
            default one is made of what the checkpoint says.
        averaged: with the averaged weights if the run kept an EMA, else with those in training.
        allow: further modules that the checkpoint may name.

    Returns:
        The task, in evaluation mode; one that was made is on the CPU.

    Raises:
        CheckpointError: the file is damaged, not of this library, or names a class that is not allowed.
        RuntimeError: it does not fit the task that was given.
    """
    checkpoint = SafeCheckpointIO().load_checkpoint(path)
    if task is None:
        task = _task_of(checkpoint, path, allow)
    else:
        task.on_load_checkpoint(checkpoint)
        task.load_state_dict(checkpoint["state_dict"], strict=task.strict_loading)
    states = [state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith("EMA") and state]
    if averaged and states:
        named = dict(task.named_parameters())
        with torch.no_grad():
            for key, tensor in zip(states[0]["names"], states[0]["average"]["shadow_params"], strict=True):
                named[key].copy_(tensor)
    return task.eval()


def _task_of(checkpoint: dict[str, Any], path: Path | str, allow: Iterable[str]) -> LaytonTask:
    parameters = checkpoint.get("hyper_parameters", {})
    name = parameters.get("_class_path")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{path} was not written by `layton fit`: it does not say which task it holds; load_task(path, task) does "
            "with one that is built as the run's was"
        )
    refused = refused_class_paths(parameters, allowed=allow_modules(allow))
    if refused:
        raise CheckpointError(f"{path} names classes outside the allowed modules: {', '.join(refused)}")
    module, _, kind = name.rpartition(".")
    try:
        task_class = getattr(import_module(module), kind, None)
    except ImportError as error:
        raise CheckpointError(f"{path} names {name}, which this version does not have") from error
    if not (isinstance(task_class, type) and issubclass(task_class, LaytonTask)):
        raise CheckpointError(f"{path} names {name}, which is not a LaytonTask")
    try:
        with _quiet():
            return task_class.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except ArgumentError as error:
        raise CheckpointError(f"{path} cannot be built by this version: {innermost_reason(str(error))}") from error


class _PartsOnly(TrainingCLI):
    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate_classes(self.config.clone())
        self.model = self._get(self.config_init, "model")
        self.datamodule = self._get(self.config_init, "data")


def _make(kind: type[TrainingCLI], args: list[str], *, run: bool) -> TrainingCLI:
    exact: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}  # a misspelt option is never guessed
    each = {name: dict(exact) for name in TrainingCLI.subcommands()} if run else {}
    with _quiet(), _told_as_usage(f"layton {args[0]}" if run else "layton info"):
        return kind(
            LaytonTask,
            LightningDataModule if run else None,  # without it none need be named
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "layton", "description": "Train or evaluate a stage.", **exact, **each},
            args=args,
            run=run,
        )


def _resume_path(resume: str, checkpoints: Path) -> str | None:
    if resume == "auto":
        found = newest_good_checkpoint(checkpoints)
        if found is None and next(checkpoints.glob("*.ckpt"), None) is not None:
            raise UsageError(
                f"{checkpoints} holds checkpoints, and none that is whole with the note beside it (.ckpt.json): "
                "name one with --resume FILE, or take another --run_dir"
            )
        return None if found is None else str(found)
    if resume == "never":
        if next(checkpoints.glob("*.ckpt"), None) is not None:
            raise UsageError(f"{checkpoints} holds checkpoints: continue with --resume auto, or take another --run_dir")
        return None
    if not Path(resume).is_file():
        raise UsageError(f"--resume must be 'auto', 'never' or a checkpoint file, got {resume!r}")
    return str(Path(resume).absolute())


def _strategy_of(trainer: dict[str, Any]) -> Any:
    """The strategy that a trainer's options ask for, or that suits them."""
    asked = trainer.get("strategy") or "auto"
    if asked == "auto" and _several_devices(trainer):
        # what Lightning would take, but for methods with critics and terms that begin later
        return DDPStrategy(find_unused_parameters=True, gradient_as_bucket_view=True)
    return FullySharded() if asked == "fsdp" else asked


def _several_devices(trainer: dict[str, Any]) -> bool:
    """Whether a trainer's options ask for more than one device."""
    devices = trainer.get("devices")
    if devices in (None, "auto", -1, "-1"):
        alone = trainer.get("accelerator") == "cpu" or not torch.accelerator.is_available()
        count = 1 if alone else torch.accelerator.device_count()
    elif isinstance(devices, str):
        count = len(devices.split(",")) if "," in devices else int(devices)
    else:
        count = devices if isinstance(devices, int) else len(devices)
    return count * int(trainer.get("num_nodes") or 1) > 1


def _missing(configured: list[Callback], config: dict[str, Any], *, checkpointing: bool) -> list[Callback]:
    added: list[Callback] = [GracefulStop(), ExportWeights(), LossSpikes()]
    if checkpointing and not any(isinstance(c, Checkpoint) for c in configured):
        added.append(SafeCheckpoint(every_minutes=10.0))
    if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in configured):
        added.append(RichProgressBar() if sys.stdout.isatty() else LineProgress())
    return [callback for callback in added if not any(type(c) is type(callback) for c in configured)]


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


@contextmanager
def _told_as_usage(command: str) -> Iterator[None]:
    try:
        yield
    except ArgumentError as error:
        raise usage_error(error, command, run_options(), meant=MEANT) from error


def run_options() -> list[str]:
    """Options of ``layton fit`` that stand on the command line by themselves, and the trainer's."""
    own = ["config", "data", "model", "trainer", "seed_everything", "run_dir", "resume", "ckpt_path", "print_config"]
    return [f"--{name}" for name in own] + [*SHORT] + [f"--trainer.{name}" for name in signature(Trainer).parameters]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Lightning 2.6 calls jsonargparse as it was before 4.49.
        warnings.simplefilter("ignore", JsonargparseDeprecationWarning)
        # Advice of Lightning that does not apply: frozen parts are meant to be in eval mode, and a loader without
        # workers is right for small data.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
        # Means over ranks are made here, rightly also where these see different numbers (`LaytonTask.log_losses`).
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        # Lightning 2.6 asks torch for a name that torch 2.14 renames, and sums up a model in one precision alone.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*not supported by the model summary.*")
        with cut_captions_told_once(), no_advertisements():
            yield
