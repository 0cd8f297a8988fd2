"""Settings that are made in Python are checked as those of the command line are."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import qexport
from qexport.errors import CheckpointError, InputError, QexportError
from qexport.runtime.serving import Serving

TRAIN = {"model": "m", "data": "builtin", "output": "run", "bits": "2"}
QUANTIZE = {"model": "m", "output": "run", "method": "rtn", "bits": "4"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gradient", "zzz"),
        ("precision", "bf8"),
        ("phase", "mid"),
        ("teacher", "t"),
        ("scale_dtype", "x"),
        ("group_size", "64"),
        ("group_size", 64.0),
        ("max_steps", "1"),
        ("max_steps", True),
        ("lr", "high"),
        ("data", 5),
        ("data", None),
        ("output", None),
        ("model", 5),
        ("seed", -1),
        ("seed", "a"),
        ("warmup", None),
        ("log_steps", 0),
        ("save_steps", 2.5),
        ("include", (1,)),
    ],
)
def test_train(field: str, value: Any) -> None:
    settings: dict[str, Any] = {**TRAIN, field: value}
    with pytest.raises(InputError, match=f"--{field.replace('_', '-')} .*\\.$"):
        qexport.TrainConfig(**settings)


@pytest.mark.parametrize(("steps", "saved"), [(50, 20), (600, 60), (9000, 200)])
def test_a_run_is_saved_ten_times(steps: int, saved: int) -> None:
    settings: dict[str, Any] = dict(TRAIN)
    assert qexport.TrainConfig(**settings).steps_between_saves(steps) == saved
    assert qexport.TrainConfig(**settings, save_steps=7).steps_between_saves(steps) == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [("group_size", "x"), ("samples", "4"), ("gptq", {"percdamp": 0.1}), ("sym", "yes")],
)
def test_quantize(field: str, value: Any) -> None:
    settings: dict[str, Any] = {**QUANTIZE, field: value}
    with pytest.raises(InputError, match=f"--{field.replace('_', '-')} .*\\.$"):
        qexport.QuantizeConfig(**settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": 0},
        {"slots": "2"},
        {"context": -1},
        {"threads": 0},
        {"head_bits": 5},
        {"cache": "int4"},
        {"dtype": "half"},
    ],
)
def test_serving(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^--(slots|context|threads|head-bits|cache|dtype) "):
        Serving(**wrong)


def test_what_is_taken_as_it_is_meant() -> None:
    given: dict[str, Any] = {**TRAIN, "include": "*.q_proj", "module_bits": ["*=4"], "bits": 2}
    config = qexport.TrainConfig(**{**given, "group_size": -1, "lr": 1e-4})
    assert config.include == ("*.q_proj",) and config.module_bits == ("*=4",)
    assert config.model == Path("m") and config.bits == "2" and config.group_size is None


def test_a_width_of_another_type(tmp_path: Path) -> None:
    wrong: Any = "4"
    with pytest.raises(QexportError, match="--bits '4' should be a valid integer"):
        qexport.pack(tmp_path, tmp_path / "out", "gptq", bits=wrong)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", -64), ("num_attention_heads", 0)])
def test_sizes_of_a_model(tiny_model: Path, tmp_path: Path, field: str, value: int) -> None:
    """Named before transformers makes a tensor, or a tokenizer, of them."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    train = qexport.TrainConfig(folder, "builtin", tmp_path / "run", "2")
    quantize = qexport.QuantizeConfig(folder, tmp_path / "run", "rtn", "4")
    for call in (
        lambda: qexport.train(train),
        lambda: qexport.quantize(quantize),
        lambda: qexport.generate(folder, "hi"),
    ):
        with pytest.raises(CheckpointError, match=f"config.json's {field} is {value}, not a num"):
            call()
    assert not (tmp_path / "run").exists()
