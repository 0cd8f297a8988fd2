"""`Checkpoint`: nothing is read before it is asked for."""

from pathlib import Path

import pytest
import torch

from qexport.checkpoint import Checkpoint, Entry


def test_asking_for_names_reads_nothing() -> None:
    entry = Entry((2, 2), torch.float32, lambda: pytest.fail("read"))
    checkpoint = Checkpoint(Path(), "dense", {}, {"a.weight": entry})
    assert "a.weight" in checkpoint
    assert "b.weight" not in checkpoint
    assert list(checkpoint) == ["a.weight"]
    assert len(checkpoint) == 1
