"""Callbacks for training: averages, pictures, safe checkpoints, early ends, progress."""

from layton.callbacks.checkpoint import SafeCheckpoint
from layton.callbacks.checkpoint_io import CheckpointError, SafeCheckpointIO, newest_good_checkpoint
from layton.callbacks.ema import EMA, averaged_weights
from layton.callbacks.export import ExportWeights, export_atomically
from layton.callbacks.gradient_norms import GradientNorms
from layton.callbacks.grid import PictureGrid
from layton.callbacks.progress import LineProgress
from layton.callbacks.spikes import LossSpikes
from layton.callbacks.stop import GracefulStop, TimeLimit

__all__ = [
    "EMA",
    "CheckpointError",
    "ExportWeights",
    "GracefulStop",
    "GradientNorms",
    "LineProgress",
    "LossSpikes",
    "PictureGrid",
    "SafeCheckpoint",
    "SafeCheckpointIO",
    "TimeLimit",
    "averaged_weights",
    "export_atomically",
    "newest_good_checkpoint",
]
