"""Checkpoints of a test's own making."""

from pathlib import Path

from torch import Tensor

from qexport.output import write_json
from qexport.shards import SHARD_BYTES, plan_shards
from qexport.stream import FileWriter

__all__ = ["ShardWriter"]


class ShardWriter:
    """Collects a model's tensors, which are in memory anyway, and writes them as shards."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self._shard_bytes = shard_bytes
        self._tensors: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor.detach()

    def close(self) -> None:
        """Write everything, then the index."""
        parts = {name: (t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}
        files, index = plan_shards(parts, self._shard_bytes)
        with FileWriter(self.folder, files) as writer:
            for name, tensor in self._tensors.items():
                writer.write(name, tensor)
        for name, content in index.items():
            write_json(self.folder / name, content)
