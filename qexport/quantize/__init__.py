"""Post-training quantization: what a model loses least by, without training it."""

from qexport.quantize.config import QuantizeConfig
from qexport.quantize.driver import quantize_model
from qexport.quantize.gptq import GptqOptions

__all__ = ["GptqOptions", "QuantizeConfig", "quantize_model"]
