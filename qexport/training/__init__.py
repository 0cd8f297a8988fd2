"""Quantization-aware training: `train(TrainConfig(...))` writes a RUN."""

from qexport.training.config import TrainConfig
from qexport.training.loop import train

__all__ = ["TrainConfig", "train"]
