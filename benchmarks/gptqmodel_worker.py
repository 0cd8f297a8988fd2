"""GPTQModel's quantization of a model, in the environment that has it (`make oracle`).

`python gptqmodel_worker.py MODEL WINDOWS BITS GROUP SYM OUT`: WINDOWS is a safetensors file with
tokens [n, length]. Prints JSON with the seconds that quantizing took, loading and saving apart.
"""

import json
import sys
import time

from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def main() -> None:
    """With GPTQModel's own defaults but for the scheme."""
    model_folder, windows, bits, group_size, sym, out = sys.argv[1:]
    config = QuantizeConfig(bits=int(bits), group_size=int(group_size), sym=sym == "sym")
    model = GPTQModel.load(model_folder, config, device="cpu")
    tokens = load_file(windows)["tokens"]
    calibration = [{"input_ids": row, "attention_mask": row.ne(-1).long()} for row in tokens]
    start = time.monotonic()
    model.quantize(calibration, batch_size=8)
    seconds = time.monotonic() - start
    model.save(out)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
