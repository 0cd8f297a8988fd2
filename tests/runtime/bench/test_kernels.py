"""`qexport bench kernels` on this machine."""

import json
from pathlib import Path

import pytest

from qexport.runtime.bench.kernels import SCHEMA
from qexport.runtime.kernels.cpu_library import library
from tests.conftest import Cli

pytestmark = pytest.mark.skipif(library() is None, reason="qexport's CPU kernels are not compiled")


def test_every_kernel_that_takes_a_scheme(cli: Cli, tmp_path: Path) -> None:
    """Their products are right; those that refuse are named."""
    out = tmp_path / "report"
    result = cli(
        *("bench", "kernels", "--bits", "2,4", "--group-size", "64", "--shape", "192x128"),
        *("--batch", "1,5", "--repeats", "4", "-o", out, "--json"),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["schema"] == SCHEMA
    kernels = {row["kernel"] for row in found["rows"]}
    assert kernels == {"torch bfloat16", "cpu", "cpu-exact"}
    assert len(found["rows"]) == 3 * 2 * 2
    for row in found["rows"]:
        most = {"cpu-exact": 1e-5, "cpu": 0.02, "torch bfloat16": 0.02}[row["kernel"]]
        assert row["relative_error"] < most
        assert row["seconds"]["count"] == 4 and row["gbps"] > 0
        if row["kernel"] == "torch bfloat16":
            assert row["times_dense"] == 1.0
    assert found["refused"]["cuda, seq2 g64"] == "it runs on NVIDIA GPUs, not on cpu"
    assert (out / "report.html").read_text().count("<svg") == 2


def test_mistakes_in_a_sentence(cli: Cli) -> None:
    for said, *arguments in (
        ("give rows and inputs", "--shape", "12"),
        ("groups of 100 do not divide", "--group-size", "100"),
        ("--bits 7: there are", "--bits", "7"),
    ):
        result = cli("bench", "kernels", *arguments)
        assert result.returncode == 2 and said in result.stderr
        assert "Traceback" not in result.stderr
