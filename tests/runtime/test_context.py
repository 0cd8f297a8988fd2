"""The cache is as large as memory allows, in containers and for any architecture."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qexport.errors import InputError, UnsupportedError
from qexport.formats import open_checkpoint
from qexport.runtime import context, serving
from qexport.runtime.any_model import AnyDecoder
from qexport.runtime.context import cache_context, free_memory, token_bytes
from qexport.runtime.serving import Serving, open_decoder
from qexport.tiny import write_tiny_model

CPU = torch.device("cpu")


def test_half_of_what_is_free() -> None:
    asked: dict[str, Any] = {"slots": 4, "token": 1000, "memory": lambda: 8_000_000}
    assert cache_context(None, 100_000, **asked) == 1000
    assert cache_context(None, 500, **asked) == 500
    assert cache_context(2000, 100_000, **asked) == 2000
    with pytest.raises(InputError, match="are free; take fewer slots"):
        cache_context(2001, 100_000, **asked)
    with pytest.raises(InputError, match="has a context of 500; 501 is more"):
        cache_context(501, 500, **asked)


def test_weights_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "memory_bytes", lambda: 1 << 30)
    assert free_memory(CPU, 1 << 29) == 1 << 29
    with pytest.raises(UnsupportedError, match=r"take 1\.5 GiB, and the memory is 1\.0"):
        free_memory(CPU, 3 << 29)


@pytest.mark.parametrize("any_model", [False, True])
def test_a_container_has_less_than_its_host(
    any_model: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the control group allows is what counts, for transformers' models too."""
    checkpoint = open_checkpoint(
        write_tiny_model(tmp_path / "model", max_position_embeddings=1 << 20)
    )
    config = checkpoint.config
    sizes = [config[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim")]
    token = token_bytes(sizes[0], sizes[1], sizes[2], torch.float32)
    weights = sum(
        tensor.nbytes for tensor in checkpoint.values() if isinstance(tensor, torch.Tensor)
    )
    limit = weights + 2 * 3 * 300 * token
    monkeypatch.setattr(context, "memory_bytes", lambda: limit)
    if any_model:
        monkeypatch.setattr(serving, "decoder_config", lambda _: "it is asked not to")
    made = open_decoder(checkpoint, Serving(slots=3, cache="float32"))
    assert isinstance(made, AnyDecoder) == any_model
    assert 200 <= made.context <= 300
