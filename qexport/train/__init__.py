"""Quantization-aware training: `train(TrainConfig(...))` writes a RUN."""

from qexport.train.config import TrainConfig
from qexport.train.loop import train

__all__ = ["TrainConfig", "train"]
