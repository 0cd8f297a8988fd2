"""`qexport formats`, the options of pack, and what is written beside the weights."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qexport.formats import FORMATS
from qexport.grid import SEQ2
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
    own = form != "gguf" and SEQ2 in FORMATS[form].grids  # gguf's SEQ-2 is for groups of 256
    assert verdict == ("exact" if own else "embedded")
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


def test_a_dry_run_refuses_what_pack_does(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Zero points of 0, say, which stand in the tensors alone."""
    model = load_file(tiny_model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    model[name] = model[name].abs()  # so that the lowest code is the zero point
    dense = tmp_path / "dense"
    shutil.copytree(tiny_model, dense)
    save_file(model, dense / "model.safetensors", {"format": "pt"})
    run = tmp_path / "run"
    asked = ("--method", "rtn", "--bits", "4", "--asym", "--group-size", "32")
    assert cli("quantize", dense, *asked, "-o", run).returncode == 0
    for extra in ((), ("--dry-run",)):
        result = cli("pack", run, "--format", "gptq", *extra, "-o", tmp_path / "out")
        assert result.returncode == 1 and "gptq_v2 and awq hold them" in result.stderr
    assert cli("pack", run, "--format", "gptq_v2", "--dry-run", "-o", "out").returncode == 0
    assert not (tmp_path / "out").exists()


def test_formats_that_are_named_hold_the_whole_model(
    cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    """Two group sizes: one scheme is all that gptq, awq and humming have words for."""
    run = tmp_path / "run"
    mixed = ("--group-size", "32", "--module-bits", "*.mlp.*=4:64")
    result = cli("quantize", tiny_model, "--method", "rtn", "--bits", "4", *mixed, "-o", run)
    assert result.returncode == 0, result.stderr
    result = cli("pack", run, "--format", "bitsandbytes", "-o", tmp_path / "out")
    named = result.stderr.partition("hold it exactly: ")[2]
    assert "native" in named and "compressed-tensors" in named, result.stderr
    assert not any(form in named for form in ("gptq", "awq", "humming"))


def test_what_a_refusal_names_can_be_packed(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Two widths: gptq holds both at 8 bits, and not as it chooses by itself."""
    run = tmp_path / "run"
    mixed = ("--group-size", "32", "--module-bits", "*.down_proj=8:32")
    result = cli("quantize", tiny_model, "--method", "rtn", "--bits", "4", *mixed, "-o", run)
    assert result.returncode == 0, result.stderr
    result = cli("pack", run, "--format", "awq", "-o", tmp_path / "out")
    named = result.stderr.partition("hold it exactly: ")[2].strip().rstrip(".").split(", ")
    assert "gptq --bits 8" in named and "compressed-tensors" in named, result.stderr
    for asked in named:
        packed = cli("pack", run, "--format", *asked.split(), "--dry-run", "-o", tmp_path / "out")
        assert packed.returncode == 0, (asked, packed.stderr)


def test_json_has_no_infinity(cli: Cli, runs: Runs, tmp_path: Path) -> None:
    run = runs("2")
    assert cli("pack", run, "--format", "native", "-o", tmp_path / "out").returncode == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    result = cli("verify", run, tmp_path / "out", "--json")
    assert result.returncode == 3
    assert json.loads(result.stdout, parse_constant=None)["largest_dense_error"] is None


def test_a_grid_that_no_block_holds_is_not_blamed_on_its_scales(
    cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli("quantize", tiny_model, "--method", "nf4", "-o", run).returncode == 0
    result = cli("pack", run, "--format", "gguf", "-o", tmp_path / "out")
    assert "gguf has no block type that holds nf4" in result.stderr
    assert "--allow-lossy" not in result.stderr
    assert "None" not in cli("formats", "--reasons").stdout
