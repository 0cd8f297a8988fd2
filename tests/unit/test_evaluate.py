"""A figure is of what was asked, or an error says whose fault it is that there is none."""

import math
from pathlib import Path

import pytest
import torch

from qexport.errors import QexportError
from qexport.evaluate import evaluate
from qexport.formats import open_checkpoint
from qexport.runtime.loader import load_model

CPU = torch.device("cpu")


def test_whoever_gives_nan_is_named(tiny_model: Path) -> None:
    tokens = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(0))
    fine, broken = (load_model(open_checkpoint(tiny_model), torch.float32, CPU) for _ in range(2))
    same = evaluate(fine, tokens, 16, reference=fine)
    assert same.kl_divergence == 0 and math.isfinite(same.perplexity)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(QexportError, match="the model gives NaN"):
        evaluate(broken, tokens, 16)
    with pytest.raises(QexportError, match="the reference gives NaN"):
        evaluate(fine, tokens, 16, reference=broken)
