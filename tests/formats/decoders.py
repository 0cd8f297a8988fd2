"""Second decoders, from layouts alone: numpy, one weight at a time where bits are packed.

None of them shares a line with the packages under test. Each returns float32 [out, in].
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def load_file(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file, but those of bfloat16, which numpy lacks."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    dtypes = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "I8": "i1", "U8": "u1"}
    return {
        name: np.frombuffer(data[start + first : start + last], dtypes[info["dtype"]]).reshape(
            info["shape"]
        )
        for name, info in json.loads(data[8:start]).items()
        if info.get("dtype") in dtypes
        for first, last in [info["data_offsets"]]
    }


def stream(words: NDArray[Any], width: int, count: int) -> NDArray[np.int64]:
    """`count` fields of a row of words read as one little-endian number, bit 0 first."""
    number = int.from_bytes(np.ascontiguousarray(words).tobytes(), "little")
    return np.array([(number >> (width * j)) & ((1 << width) - 1) for j in range(count)])


def scaled(codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any], group: int) -> Matrix:
    """(code - zero) * scale in float32; scales and zeros [out, groups]."""
    of = np.arange(codes.shape[1]) // group
    offset = codes.astype(np.float32) - zeros.astype(np.float32)[:, of]
    result: Matrix = offset * scales.astype(np.float32)[:, of]
    return result


def gptq(folder: Path, module: str) -> Matrix:
    config = config_of(folder)
    file = load_file(folder / "model.safetensors")
    bits, offset = config["bits"], {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    qweight, qzeros = file[f"{module}.qweight"], file[f"{module}.qzeros"]
    scales, inputs = file[f"{module}.scales"], len(file[f"{module}.g_idx"])
    codes = np.stack([stream(column, bits, inputs) for column in qweight.T])
    zeros = np.stack([stream(row, bits, scales.shape[1]) for row in qzeros])
    zeros = (zeros + offset) % (1 << bits)
    assert file[f"{module}.g_idx"].tolist() == [i * len(scales) // inputs for i in range(inputs)]
    return scaled(codes, zeros.T, scales.T, inputs // len(scales))


def awq(folder: Path, module: str) -> Matrix:
    file = load_file(folder / "model.safetensors")
    place = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble in which output j of eight stands

    def unpack(words: NDArray[Any]) -> NDArray[np.int64]:
        rows = [
            [(int(np.uint32(word)) >> (4 * place[j])) & 15 for word in row for j in range(8)]
            for row in words
        ]
        return np.array(rows)

    scales = file[f"{module}.scales"]
    codes, zeros = unpack(file[f"{module}.qweight"]), unpack(file[f"{module}.qzeros"])
    return scaled(codes.T, zeros.T, scales.T, len(codes) // len(scales))


def compressed_tensors(folder: Path, module: str) -> Matrix:
    (group,) = config_of(folder)["config_groups"].values()
    weights = group["weights"]
    bits = weights["num_bits"]
    file = load_file(folder / "model.safetensors")
    out, inputs = file[f"{module}.weight_shape"].tolist()
    scales = file[f"{module}.weight_scale"]
    codes = np.stack([stream(row, bits, inputs) for row in file[f"{module}.weight_packed"]])
    zeros = np.full(scales.shape, 1 << (bits - 1))
    if not weights["symmetric"]:
        packed = file[f"{module}.weight_zero_point"]
        zeros = np.stack([stream(column, bits, out) for column in packed.T]).T
    assert weights["strategy"] == ("channel" if scales.shape[1] == 1 else "group")
    return scaled(codes, zeros, scales, inputs // scales.shape[1])


def int_quantized(folder: Path, module: str) -> Matrix:
    file = load_file(folder / "model.safetensors")
    result: Matrix = file[f"{module}.weight"].astype(np.float32) * file[
        f"{module}.weight_scale"
    ].astype(np.float32)
    return result


def humming(folder: Path, module: str) -> Matrix:
    config = config_of(folder)
    bits = int(config["b_dtype"].removeprefix("uint"))
    file = load_file(folder / "model.safetensors")
    words, scales = file[f"{module}.weight"], file[f"{module}.weight_scale"]
    inputs = words.shape[1] * 32 // bits
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if config["has_zero_point"]:
        assert config["is_fp_zero_point"]
        zeros = file[f"{module}.zero_point"]
    size = config["weight_scale_group_size"] or inputs
    codes = np.stack([stream(row, bits, inputs) for row in words])
    return scaled(codes, zeros, scales, size)


def ggml_q1_0(blocks: NDArray[np.uint8]) -> Matrix:
    """uint8 [n, 18] as [n, 128]: a float16, then a bit each, 1 for +d and 0 for -d."""
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return np.where(bits == 1, d, -d)


def ggml_q2_0(blocks: NDArray[np.uint8]) -> Matrix:
    """uint8 [n, 18] as [n, 64]: a float16, then two bits each, -1 to 2 times d."""
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    pairs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(len(blocks), 64, 2)
    codes = pairs[..., 0].astype(np.float32) + 2 * pairs[..., 1]
    result: Matrix = (codes - 1) * d
    return result


def bitsandbytes(folder: Path, module: str) -> Matrix:
    file = load_file(folder / "model.safetensors")
    weight = f"{module}.weight"
    state = json.loads(file[f"{weight}.quant_state.bitsandbytes__nf4"].tobytes())
    assert state["quant_type"] == config_of(folder)["bnb_4bit_quant_type"] == "nf4"
    packed = file[weight].ravel()
    codes = np.stack((packed >> 4, packed & 15), axis=1).ravel()
    values = file[f"{weight}.quant_map"][codes].reshape(-1, state["blocksize"])
    made: Matrix = (values * file[f"{weight}.absmax"][:, None]).reshape(state["shape"])
    return made


DECODERS = {
    "bitsandbytes": bitsandbytes,
    "gptq": gptq,
    "gptq_v2": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "int-quantized": int_quantized,
    "humming": humming,
}
