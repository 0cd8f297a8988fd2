"""`qexport formats`, the options of pack, and what is written beside the weights."""

import json
from pathlib import Path

import pytest

from qexport.formats import FORMATS
from tests.conftest import Cli, Runs


def test_the_table(cli: Cli) -> None:
    result = cli("formats")
    assert result.returncode == 0
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["grid", "group", *FORMATS]
    row = next(line for line in lines if line.startswith("seq2     g64"))
    assert row.split()[:4] == ["seq2", "g64", "seq2", "2.25"]
    assert "Q4_0 4.5*" in row
    result = cli("formats", "--in-features", "576", "--json")
    rows = json.loads(result.stdout)["rows"]
    assert {row["group_size"] for row in rows} == {None, 32, 64}
    assert all(set(row["formats"]) == set(FORMATS) for row in rows)
    refused = [r["formats"]["awq"] for r in rows if r["grid"] == "int8"]
    assert {cell["verdict"] for cell in refused} == {"refused"}
    assert all(cell["reason"] for cell in refused)
    reasons = cli("formats", "--reasons").stdout
    assert "int8 channel, awq: awq has no grid that holds int8." in reasons
    assert cli("formats", "--in-features", "0").returncode == 2


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"int-quantized", "bitsandbytes"}))
def test_a_card_and_the_verdicts_stand_beside_the_weights(
    cli: Cli, runs: Runs, tmp_path: Path, form: str
) -> None:
    result = cli("pack", runs("2"), "--format", form, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Exact: 0 differing codes" in card
    assert f"as `{form}`" in card
    assert "Perplexity on the run's held-out text" in card
    assert "qexport serve" in card
    report = json.loads((tmp_path / "out" / "qexport.json").read_text())
    (verdict,) = {v["verdict"] for v in report["verdicts"]}
    assert verdict == ("exact" if form in ("native", "humming") else "embedded")
    assert sum(v["modules"] for v in report["verdicts"]) == 14
    assert all(len(digest) == 64 for digest in report["source_sha256"].values())
    generated = cli("generate", tmp_path / "out", "-p", "Hello", "--max-tokens", "3")
    assert generated.returncode == 0, generated.stderr


def test_options_of_other_formats_are_refused(cli: Cli, runs: Runs, tmp_path: Path) -> None:
    for option, said in (
        (("--type", "Q4_0"), "only gguf has them"),
        (("--embeddings", "q8_0"), "--embeddings is for gguf"),
    ):
        result = cli("pack", runs("2"), "--format", "gptq", *option, "-o", tmp_path / "out")
        assert result.returncode == 2
        assert said in result.stderr
    result = cli("pack", runs("2"), "--format", "gguf", "--type", "q2_k", "-o", tmp_path / "out")
    assert result.returncode == 1
    assert "Q2_K wants groups of a multiple of 256 inputs" in result.stderr
    assert not any(tmp_path.iterdir())
