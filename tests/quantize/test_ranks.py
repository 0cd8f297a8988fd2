"""Several processes quantize what one does, each by a part of the text."""

import json
import subprocess
from pathlib import Path

import pytest

from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from tests.conftest import Cli
from tests.train.test_ranks import ENVIRONMENT, torchrun

TEXT = ("--calibration", "builtin", "--samples", "48", "--length", "32", "--precision", "fp32")


@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_two_processes(method: str, cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """GPTQ's sums of products are those of all the text; what is learned is as good."""
    arguments = ("quantize", tiny_model, "--method", method, "--bits", "3", "--group-size", "32")
    own = ("--iterations", "10") if method == "signround" else ()
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert cli(*arguments, *TEXT, *own, "-o", alone).returncode == 0
    command = torchrun(2, *arguments, *TEXT, *own, "-o", shared)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("14 layers") == 1
    assert "holds another run" in cli(*arguments, *TEXT, *own, "-o", shared).stderr
    first, second = (
        json.loads((run / "all_results.json").read_text())["layers"] for run in (alone, shared)
    )
    # a code that falls on the other side of a boundary changes all that come after it
    errors = [sum(layer["error"] for layer in run.values()) for run in (first, second)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    one, other = open_checkpoint(alone), open_checkpoint(shared)
    layer = "model.layers.0.self_attn.q_proj.weight"
    if method == "gptq":
        differing = one.quantized(layer).codes != other.quantized(layer).codes
        assert float(differing.float().mean()) < 0.01
    assert pack(other, FORMATS["native"], tmp_path / "out").exact
