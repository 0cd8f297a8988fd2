"""The files in examples/ are ones that the program takes."""

from pathlib import Path

from tests.conftest import Cli

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_finetune(tiny_model: Path, tmp_path: Path, cli: Cli) -> None:
    """As its first line says, on a model whose layers want smaller groups."""
    example = EXAMPLES / "finetune.yaml"
    result = cli(
        *("train", tiny_model, "--config", example, "--group-size", "32"),
        *("-o", tmp_path / "run", "--dry-run"),
    )
    assert result.returncode == 0, result.stderr
    assert "120 steps of 2,048 tokens" in result.stderr
