"""Post-training quantization: what a model loses least by, without training it."""

from qexport.quantization.config import QuantizeConfig
from qexport.quantization.driver import quantize_model
from qexport.quantization.gptq import GptqOptions
from qexport.quantization.signround import SignRoundOptions

__all__ = ["GptqOptions", "QuantizeConfig", "SignRoundOptions", "quantize_model"]
