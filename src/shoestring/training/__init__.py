"""Training: `train` runs transformers' Trainer with a chunked loss and checkpoints that survive a kill."""

from shoestring.training.interrupt import Interrupted
from shoestring.training.options import TrainOptions, TrainResult
from shoestring.training.trainer import train

__all__ = ["Interrupted", "TrainOptions", "TrainResult", "train"]
