"""transformers loads, runs and saves the native format once qexport.hf is imported."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qexport.hf
from qexport.errors import CheckpointError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.formats.verify import verify
from qexport.runtime.loader import open_model
from tests.conftest import WIDTHS, Runs
from tests.formats.models import decoder_layer

pytestmark = pytest.mark.filterwarnings("ignore:.*:ResourceWarning")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_it_computes_what_the_reference_computes(
    runs: Runs, tmp_path: Path, bits: str, dtype: str
) -> None:
    pack(open_checkpoint(runs(bits)), FORMATS["native"], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    layers = [m for m in model.modules() if isinstance(m, qexport.hf.PackedLinear)]
    assert len(layers) == 14
    reference, _, _ = open_model(tmp_path / "out", dtype)
    ids = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("grid", ["seq2", "int3", "uint4"])
def test_it_saves_the_same_bytes(tiny_model: Path, tmp_path: Path, grid: str) -> None:
    pack(decoder_layer(tiny_model, grid, 64, 32), FORMATS["native"], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "copy")
    first, second = (open_checkpoint(tmp_path / name) for name in ("out", "copy"))
    report = verify(first, second)
    assert report.values_exact
    assert not report.missing
    assert not report.extra
    assert not report.differing_dense
    assert first.modules == second.modules


def test_a_run_is_not_taken_for_a_model(runs: Runs) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match="holds latent weights; qexport pack"):
            AutoModelForCausalLM.from_pretrained(runs("2"))
