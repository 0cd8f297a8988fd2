"""`qexport bench latency` beside real engines, on the same tokens of a real model."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.decode import LLAMA, rounded
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.base import Options
from qexport.formats.pack import pack
from tests.conftest import Cli
from tests.oracle.install import FOLDER
from tests.oracle.marks import REAL_MODELS
from tests.oracle.models import smollm2

pytestmark = REAL_MODELS
COMMON = ("--batch", "1,2", "--prompt", "16", "--tokens", "8", "--repeats", "2", "--json")


def compare(cli: Cli, *arguments: object) -> list[dict[str, Any]]:
    result = cli("bench", "latency", *arguments, *COMMON)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert [cell for cell in found["cells"] if "failure" in cell] == []
    for cell in found["cells"]:
        assert cell["tpot"]["count"] == 2 * cell["batch"]
        assert cell["itl"]["count"] == 7 * cell["tpot"]["count"]
    return list(found["contenders"])


def test_vllm_through_the_plugin(cli: Cli, tmp_path: Path) -> None:
    """vLLM's engine in its own environment; its step is our kernel's."""
    packed = tmp_path / "packed"
    assert pack(rounded(open_checkpoint(smollm2()), "int4", 64), FORMATS["native"], packed).exact
    python = FOLDER / "bin" / "python"
    ours, vllm = compare(cli, packed, "--peer", "vllm", "--vllm-python", python)
    assert vllm["version"].startswith("0.") and "int4 g64" in vllm["kernel"]
    assert ours["fingerprint"] == vllm["fingerprint"]


@pytest.mark.skipif(
    not (LLAMA / "llama-server").exists(), reason="no llama-server here; `make peers` makes it"
)
def test_llama_cpp_by_its_server(cli: Cli, tmp_path: Path) -> None:
    packed, gguf = tmp_path / "packed", tmp_path / "gguf"
    source = rounded(open_checkpoint(smollm2()), "int4", 32)
    assert pack(source, FORMATS["native"], packed).exact
    assert pack(source, FORMATS["gguf"], gguf, Options()).exact
    server = ("--llama-server", LLAMA / "llama-server")
    _, llama = compare(cli, packed, "--peer", f"llama.cpp={gguf}", *server)
    assert llama["kernel"] == "llama.cpp, Q4_0" and llama["peak_memory_bytes"] > 50 << 20
