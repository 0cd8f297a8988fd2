"""Safetensors folders: round trips, and every way in which one can be damaged or hostile."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qexport.errors import CheckpointError
from qexport.shards import ShardReader
from tests.shard_writer import ShardWriter


def write(folder: Path, shard_bytes: int = 1 << 30) -> dict[str, torch.Tensor]:
    tensors = {f"t{i}": torch.randn(8, 16) for i in range(5)} | {"codes": torch.arange(9).byte()}
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return tensors


@pytest.mark.parametrize("shard_bytes", [1 << 30, 1200, 1])
def test_round_trip(tmp_path: Path, shard_bytes: int) -> None:
    tensors = write(tmp_path, shard_bytes)
    reader = ShardReader(tmp_path)
    assert set(reader) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    expected = {1 << 30: 1, 1200: 3, 1: 6}[shard_bytes]
    assert len(files) == expected
    assert (tmp_path / "model.safetensors.index.json").exists() == (expected > 1)


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor = torch.randn(3, 5).t()
    writer = ShardWriter(tmp_path)
    writer.add("t", tensor)
    writer.close()
    assert torch.equal(ShardReader(tmp_path).tensor("t"), tensor)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        ShardReader(tmp_path)


def test_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="only pickle weights"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        ShardReader(tmp_path)


def test_header_of_2_to_the_60(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="claims 1152921504606846976 bytes in a file of 10"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b'{"t":{"dtype":"F32","shape":[4],"data_offsets":[0,99999]}}',
        b'{"t":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,16]}}',
        b'{"t":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
    ],
)
def test_headers_that_lie(tmp_path: Path, header: bytes) -> None:
    data = struct.pack("<Q", len(header)) + header + bytes(16)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "x.bin", 7])
def test_an_index_stays_in_its_folder(tmp_path: Path, file: object) -> None:
    index = {"weight_map": {"t": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        ShardReader(tmp_path)


def test_an_index_keeps_its_promises(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match="which lacks it"):
        ShardReader(tmp_path)
    index.write_text(json.dumps({"weight_map": {"b": "two.safetensors"}}))
    with pytest.raises(CheckpointError, match="is missing"):
        ShardReader(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        ShardReader(tmp_path)


def test_an_index_beside_a_single_file_is_ambiguous(tmp_path: Path) -> None:
    write(tmp_path, 1200)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="readers differ in which they take"):
        ShardReader(tmp_path)


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor nowhere"):
        ShardReader(tmp_path).tensor("nowhere")
