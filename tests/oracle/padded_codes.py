"""Run inside the oracle environment: 3-bit codes as compressed-tensors 0.17 packs them.

usage: padded_codes.py IN.safetensors OUT.safetensors   (signed int8 `codes` to int32 `packed`)
"""

import sys

from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file


def main() -> None:
    """Pack `codes` [out, in] along the inputs."""
    source, out = sys.argv[1:]
    save_file({"packed": pack_to_int32(load_file(source)["codes"], 3)}, out)


if __name__ == "__main__":
    main()
