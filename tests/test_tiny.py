"""The whole pipeline in seconds: what to run before every commit."""

import json

from tests.conftest import Cli


def test_smoke(cli: Cli) -> None:
    assert cli("train", "--smoke", "--dry-run").returncode == 2
    refused = cli("train", "--smoke", "--bits", "2")
    assert refused.returncode == 2 and "options of its own" in refused.stderr
    result = cli("train", "--smoke", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["train"]["steps"] == 20
    assert report["train"]["final_loss"] < 5.5
    for form in ("native", "gptq"):
        verification = report["pack"][form]["verification"]
        assert verification["exact"]
        assert verification["modules"] == 14
        assert verification["differing_codes"] == verification["differing_bits"] == 0
    assert "trainable parameters" in result.stderr
    assert "tokens at a peak rate" in result.stderr
