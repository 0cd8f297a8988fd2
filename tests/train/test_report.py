"""`report.html` of a run says what is in it."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from qexport.formats import open_checkpoint
from qexport.training import TrainConfig, train
from tests.conftest import Runs


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload"}


def test_it_says_what_the_run_holds(runs: Runs) -> None:
    run = runs("2")
    found = json.loads((run / "report.json").read_text())
    checkpoint = open_checkpoint(run)
    assert {layer["layer"] for layer in found["layers"]} == set(checkpoint.modules)
    for layer in found["layers"]:
        tensor = checkpoint.quantized(f"{layer['layer']}.weight")
        shares = [float((tensor.codes == code).float().mean()) for code in range(4)]
        assert layer["codes"] == pytest.approx(shares, abs=1e-6)
        assert layer["scales"][0] == pytest.approx(float(tensor.scales.min()))
        assert sum(layer["scale_histogram"]) == tensor.scales.numel()
        assert 0 <= layer["changed"] < 1 and 0 < layer["weight_error"] < 1
    assert len(found["block_errors"]) == 2 and all(0 < e < 2 for e in found["block_errors"])
    assert len(found["history"]) == found["results"]["steps"]
    tags = Tags((run / "report.html").read_text()).seen
    assert tags.count("svg") == 3 and tags.count("table") == 1 and "script" not in tags
    assert tags.count("tr") == 1 + len(found["layers"])


def test_a_dense_run_has_one_too(tiny_model: Path, tmp_path: Path) -> None:
    """Untrained, its blocks do exactly what the dense ones do."""
    config = TrainConfig(
        *(tiny_model, "builtin", tmp_path / "run", "16"), max_steps=0, max_length=32
    )
    train(config, Console(quiet=True))
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert found["layers"] == [] and found["block_errors"] == [0.0, 0.0]
    assert "Training" in (tmp_path / "run" / "report.html").read_text()
