"""Post-training quantization: what a model loses least by, without training it."""

from qexport.quantize.config import QuantizeConfig
from qexport.quantize.driver import quantize_model
from qexport.quantize.gptq import GptqOptions
from qexport.quantize.signround import SignRoundOptions

__all__ = ["GptqOptions", "QuantizeConfig", "SignRoundOptions", "quantize_model"]
