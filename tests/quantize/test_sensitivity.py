"""Widths where they count: what is reckoned is what the loss does, and the target is kept."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from qexport.data import documents, tokenize, windows
from qexport.errors import InputError
from qexport.formats import open_checkpoint
from qexport.grid import GRIDS, Scheme
from qexport.modelling import build_model, load_tokenizer
from qexport.quantization import QuantizeConfig, quantize_model
from qexport.quantization.fit import fit
from qexport.quantization.sensitivity import measure, widths_for
from qexport.tensor import quantize
from qexport.training import TrainConfig, train

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says something, or losses would not grow."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(
        TrainConfig(
            **{"model": tiny_model, "data": "builtin", "bits": "16", "output": run},  # type: ignore[arg-type]
            **{"max_steps": 150, "max_length": 64, "batch_size": 8, "lr": 5e-3},  # type: ignore[arg-type]
        ),
        QUIET,
    )
    return run


def test_it_foretells_the_divergence(trained: Path) -> None:
    """Of one layer after the other, rounded to three bits: in order, and about in size.

    The divergence from the dense model is what the second order is of; the loss has a first one.
    """
    source, tokenizer = open_checkpoint(trained), load_tokenizer(trained)
    model = build_model(source, torch.float32, lambda name: source.dense(name).float())
    text = tokenize(list(documents("builtin", "calibration", tokenizer)), tokenizer)
    rows = windows(text, 64, "--length")[:48]
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "proj" in n]
    scheme = Scheme(GRIDS["int3"], 32)
    told = measure(model, rows, {name: [("3", scheme)] for name in names}, lambda _: None)

    @torch.no_grad()
    def says() -> torch.Tensor:
        return torch.log_softmax(model(input_ids=rows).logits[:, :-1].double(), -1).flatten(0, 1)

    dense, found = says(), []
    for name in names:
        layer = model.get_submodule(name)
        kept = layer.weight.data.clone()
        best = fit(kept, scheme, coarse=True)
        layer.weight.data = quantize(kept, best.scale, scheme, best.zeros).dequantize()
        found.append((dense.exp() * (dense - says())).sum(-1).mean())
        layer.weight.data = kept
    reckoned = torch.tensor([told[name]["3"] for name in names])
    real = torch.stack(found)
    ranks = torch.stack([reckoned.argsort().argsort(), real.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.7
    assert 0.3 < float(reckoned.sum() / real.sum()) < 3


def test_widths_are_bought_where_they_pay() -> None:
    losses = {
        "a": {"2": 10.0, "4": 1.0, "8": 0.9},
        "b": {"2": 1.0, "4": 0.1, "8": 0.0},
        "c": {"2": 0.5, "4": 0.4, "8": 0.3},
    }
    sizes = {name: {"2": 2.0, "4": 4.0, "8": 8.0} for name in losses}
    weights = {"a": 100, "b": 100, "c": 100}
    apart = [["a"], ["b"], ["c"]]
    assert widths_for(losses, sizes, weights, apart, 2.7) == {"a": "4", "b": "2", "c": "2"}
    assert widths_for(losses, sizes, weights, apart, 3.4) == {"a": "4", "b": "4", "c": "2"}
    assert widths_for(losses, sizes, weights, [["a", "c"], ["b"]], 3.4) == {
        **{"a": "4", "c": "4", "b": "2"}
    }
    assert set(widths_for(losses, sizes, weights, apart, 8).values()) == {"8"}
    with pytest.raises(InputError, match=r"--target-bpw 1 is not to be had: .* come to 2.000"):
        widths_for(losses, sizes, weights, apart, 1)


def mixed(model: Path, output: Path, **changes: object) -> QuantizeConfig:
    settings: dict[str, object] = {
        **{"method": "gptq", "bits": "4", "target_bpw": 3.5, "group_size": 32},
        **{"calibration": "builtin", "samples": 24, "length": 32, "precision": "fp32"},
    }
    return QuantizeConfig(model=model, output=output, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_target_is_kept(method: str, trained: Path, tmp_path: Path) -> None:
    """And layers that engines fuse have the same width, those with rules of their own theirs."""
    rules = ("*.0.*.down_proj=8",)
    asked = mixed(trained, tmp_path / "run", method=method, module_bits=rules)
    results = quantize_model(asked, QUIET)
    assert 3.2 < results["bits_per_weight"] <= 3.5
    modules = open_checkpoint(tmp_path / "run").modules
    grids = {name.removeprefix("model.layers."): s.grid.name for name, (s, _) in modules.items()}
    assert len(set(grids.values())) > 1
    assert grids["0.mlp.down_proj"] == "int8"
    for block in ("0", "1"):
        for fused in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            assert len({grids[f"{block}.{name}"] for name in fused}) == 1


def test_mistakes(tiny_model: Path, tmp_path: Path) -> None:
    for changes in ({"target_bpw": 1.0}, {"calibration": None, "method": "rtn"}, {"grid": "int4"}):
        with pytest.raises(InputError, match="--target-bpw"):
            mixed(tiny_model, tmp_path / "run", **changes)


def test_what_is_left_of_the_bits_is_spent() -> None:
    """Where the best step is too wide, the next best one is taken."""
    sizes = {"2": 2.5, "3": 3.5, "4": 4.5, "8": 8.5}
    losses = {"2": 10.0, "3": 7.0, "4": 1.0, "8": 0.0}
    asked = ({"a": losses}, {"a": sizes}, {"a": 100}, [["a"]])
    for target, width in ((2.6, "2"), (3.9, "3"), (4.6, "4"), (9.0, "8")):
        assert widths_for(*asked, target) == {"a": width}


def test_inputs_that_are_never_active_cost_nothing(trained: Path) -> None:
    source = open_checkpoint(trained)
    model = build_model(source, torch.float32, lambda name: source.dense(name).float())
    name = "model.layers.0.self_attn.o_proj"
    model.model.layers[0].self_attn.v_proj.weight.data.zero_()
    rows = torch.randint(0, 250, (2, 16))
    told = measure(model, rows, {name: [("3", Scheme(GRIDS["int3"], 32))]}, lambda _: None)
    assert told[name]["3"] == 0
