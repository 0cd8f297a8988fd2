"""Training that begins with a quantized model."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from qexport.errors import InputError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.quantization import QuantizeConfig, quantize_model
from qexport.training import TrainConfig, train

QUIET = Console(quiet=True)


def quantized(model: Path, output: Path, **changes: object) -> Path:
    settings: dict[str, object] = {
        **{"method": "gptq", "bits": "2", "group_size": 32, "calibration": "builtin"},
        **{"samples": 24, "length": 32, "precision": "fp32"},
    }
    config = QuantizeConfig(model=model, output=output, **{**settings, **changes})  # type: ignore[arg-type]
    quantize_model(config, QUIET)
    return output


def config(model: Path, output: Path, init: Path, **changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        **{"data": "builtin", "bits": "2", "group_size": 32, "max_steps": 2, "max_length": 32},
        "precision": "fp32",
    }
    return TrainConfig(model=model, output=output, init=init, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["gptq", "awq", "signround"])
@pytest.mark.parametrize("bits", ["1.58", "2", "3", "4"])
def test_it_begins_with_the_codes(bits: str, method: str, tiny_model: Path, tmp_path: Path) -> None:
    """Without a step the RUN is, bit for bit, the one that it began with."""
    init = quantized(tiny_model, tmp_path / "init", bits=bits, method=method)
    train(config(tiny_model, tmp_path / "run", init, bits=bits, max_steps=0), QUIET)
    before, after = open_checkpoint(init), open_checkpoint(tmp_path / "run")
    for module in before.modules:
        one, other = (found.quantized(f"{module}.weight") for found in (before, after))
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)
    for name in set(before) - {f"{module}.weight" for module in before.modules}:
        assert torch.equal(before.dense(name), after.dense(name))


def test_it_trains_and_packs(tiny_model: Path, tmp_path: Path) -> None:
    init = quantized(tiny_model, tmp_path / "init")
    fast = {"recipe": "fast", "max_steps": 20, "block_windows": 32}
    results = train(config(tiny_model, tmp_path / "run", init, **fast), QUIET)
    from_nothing = train(config(tiny_model, tmp_path / "end", init, max_steps=0), QUIET)
    assert results["eval_loss"] < from_nothing["eval_loss"]
    assert pack(open_checkpoint(tmp_path / "run"), FORMATS["native"], tmp_path / "out").exact


def test_what_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asym = quantized(tiny_model, tmp_path / "asym", sym=False)
    with pytest.raises(InputError, match=r"is uint2 g32, .*a grid that is not trained"):
        train(config(tiny_model, run, asym), QUIET)
    init = quantized(tiny_model, tmp_path / "init")
    with pytest.raises(InputError, match="give the same --bits"):
        train(config(tiny_model, run, init, exclude=("*.down_proj",)), QUIET)
    with pytest.raises(InputError, match="is no RUN"):
        train(config(tiny_model, run, tiny_model), QUIET)
    with pytest.raises(InputError, match="a start of its own"):
        config(tiny_model, run, init, phase="block", recipe="fast")
    trained = tmp_path / "trained"
    train(config(tiny_model, trained, init, lr=1e-2), QUIET)
    with pytest.raises(InputError, match="is not that of"):
        train(config(tiny_model, run, trained), QUIET)
    assert not run.exists()
