"""Run inside the oracle environment: dequantized weights from transformers' own GPTQ, AWQ loaders.

usage: transformers_weights.py CHECKPOINT OUT.safetensors

The loaders are gptqmodel's. Its scales are float16; taken to float32 first, its dequantization is
the unrounded product.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

os.environ.update(TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")


def main() -> None:
    """Save the float32 weight [out, in] of every quantized layer by its name."""
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    checkpoint, out = sys.argv[1:]
    quantization = json.loads((Path(checkpoint) / "config.json").read_text())["quantization_config"]
    is_awq = quantization["quant_method"] == "awq"
    config = (
        AwqConfig(bits=4, backend="torch_awq")
        if is_awq
        else GPTQConfig(bits=4, backend="gptq_torch")
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()
            weights[name] = _dequantized(module, is_awq).t().float().contiguous()
    save_file(weights, out)


def _dequantized(module: Any, is_awq: bool) -> torch.Tensor:
    if not is_awq:
        found: torch.Tensor = module.dequantize_weight()
        return found
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    result: torch.Tensor = dequantize_gemm(
        module.qweight, module.qzeros, module.scales, module.bits, module.group_size
    )
    return result


if __name__ == "__main__":
    main()
