"""Kernels, and the choice among them."""

from qexport.runtime.kernels.base import Kernel, Linear
from qexport.runtime.kernels.dispatch import KERNELS, Choice, choose

__all__ = ["KERNELS", "Choice", "Kernel", "Linear", "choose"]
