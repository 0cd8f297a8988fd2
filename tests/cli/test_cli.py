import json
import subprocess
import sys
from pathlib import Path

import pytest

from qexport.cli import COMMANDS
from qexport.cli.serve import _called
from tests.conftest import Cli, Runs


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example(cli: Cli, name: str) -> None:
    result = cli(name, "--help")
    assert result.returncode == 0
    assert "Example" in result.stdout
    assert f"qexport {name}" in result.stdout.split("Example")[1]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from qexport.cli import group\n"
        "try: group.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'fastapi', 'safetensors', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == "[]"
    assert "doctor" in result.stdout


# 3 bits of codes, (16 + 3) / 32 of scales and zero points, and 32 bits of g_idx for each input,
# shared by 32, 64 or 128 outputs.
GPTQ_BITS = {3 + 19 / 32 + 32 / out for out in (32, 64, 128)}


def test_inspect(cli: Cli, runs: Runs, tiny_model: Path, tmp_path: Path) -> None:
    run = runs("2")
    assert cli("pack", run, "--format", "gptq", "-o", tmp_path / "gptq").returncode == 0
    for path, layout, bits in ((run, "run", {2.5}), (tmp_path / "gptq", "gptq", GPTQ_BITS)):
        result = json.loads(cli("inspect", path, "--json").stdout)
        assert result["layout"] == layout
        assert len(result["modules"]) == 14
        assert {m["bits_per_weight"] for m in result["modules"].values()} == bits
        assert result["file_bytes"] > 0
    assert "14 modules: int3 g32" in cli("inspect", tmp_path / "gptq").stdout
    assert "mlp.up_proj [128, 64]" in cli("inspect", tmp_path / "gptq", "--modules").stdout
    assert json.loads(cli("inspect", tiny_model, "--json").stdout)["modules"] == {}


def test_pack_reports_what_it_chose(cli: Cli, runs: Runs, tmp_path: Path) -> None:
    run = runs("2")
    dry = cli("pack", run, "--format", "gptq", "--dry-run", "-o", tmp_path / "out")
    assert dry.stdout == "seq2 as int3 codes at half the step, exact, 4.038 bits per weight\n"
    assert not (tmp_path / "out").exists()
    result = json.loads(
        cli("pack", run, "--format", "native", "--json", "-o", tmp_path / "out").stdout
    )
    assert result["exact"] is True
    assert result["bits_per_weight"] == 2.5
    marker = json.loads((tmp_path / "out" / "qexport.json").read_text())
    assert marker["verification"]["differing_bits"] == 0


def test_eval_is_equal_for_equal_models(cli: Cli, runs: Runs, tmp_path: Path) -> None:
    run = runs("2")
    assert cli("pack", run, "--format", "gptq", "-o", tmp_path / "gptq").returncode == 0
    common = ("--data", "builtin", "--window", 128, "--max-tokens", 500, "--json")
    mine = json.loads(cli("eval", run, *common).stdout)
    packed = json.loads(cli("eval", tmp_path / "gptq", *common, "--reference", run).stdout)
    assert mine["perplexity"] == packed["perplexity"]
    assert mine["tokens_sha256"] == packed["tokens_sha256"]
    assert mine["tokens"] == 500
    assert packed["kl_divergence"] == 0
    assert packed["top1_agreement"] == 1


def test_generate_and_chat(cli: Cli, runs: Runs) -> None:
    run = runs("4")
    first = cli("generate", run, "-p", "The", "--max-tokens", 8)
    assert first.returncode == 0
    assert cli("generate", run, "-p", "The", "--max-tokens", 8).stdout == first.stdout
    result = cli("chat", run, "--max-tokens", 4, stdin="hello\n\n")
    assert result.returncode == 0, result.stderr


def test_doctor(cli: Cli) -> None:
    result = json.loads(cli("doctor", "--json").stdout)
    assert result["packages"]["torch"]
    assert result["cpu"]["cores"]
    assert "reference" in result["kernels"]


def test_kernels_and_caches_may_be_named(cli: Cli, runs: Runs) -> None:
    """Every way of running a model gives text; what there is not is named in one sentence."""
    run = runs("2")
    arguments = ("generate", run, "-p", "hello", "--max-tokens", 4)
    exact = cli(*arguments, "--kernel", "cpu-exact", "--kv-cache", "float32")
    assert exact.returncode == 0, exact.stderr
    reference = cli(*arguments, "--kernel", "reference")
    assert reference.stdout == exact.stdout
    quick = cli(*arguments, "--head-bits", "8", "--kv-cache", "int8", "--threads", 1)
    assert quick.returncode == 0, quick.stderr
    wrong = cli(*arguments, "--kernel", "fast")
    assert wrong.returncode == 2
    assert (
        "there is no kernel 'fast'; there are cpu, cpu-exact, cuda, triton, humming, reference"
        in wrong.stderr
    )
    elsewhere = cli(*arguments, "--kernel", "triton")
    assert elsewhere.returncode == 4
    assert "it runs on GPUs, not on cpu" in elsewhere.stderr
    short = cli(*arguments[:-1], 40, "--context", 32)
    assert short.returncode == 2
    assert "does not fit the context of 32" in short.stderr


def test_a_prompt_may_come_from_standard_input(cli: Cli, runs: Runs) -> None:
    arguments = ("generate", runs("2"), "--max-tokens", 4, "-p")
    given = cli(*arguments, "hello")
    assert cli(*arguments, "-", stdin="hello").stdout == given.stdout != "\n"


def test_what_the_context_leaves(cli: Cli, runs: Runs) -> None:
    """Without --max-tokens an answer takes what is there; a context the model lacks is refused."""
    short = cli("generate", runs("2"), "-p", "hello", "--context", 20)
    assert short.returncode == 0, short.stderr
    large = cli("generate", runs("2"), "-p", "hello", "--context", 100000)
    assert large.returncode == 2
    assert "the model has a context of" in large.stderr


def test_chat_goes_on_after_what_it_cannot_answer(cli: Cli, runs: Runs) -> None:
    said = f"{'long ' * 200}\nhello\n\n"
    result = cli("chat", runs("2"), "--max-tokens", 4, "--context", 256, stdin=said)
    assert result.returncode == 0, result.stderr
    assert "does not fit the context of 256" in " ".join(result.stderr.split())
    assert "/reset" in result.stderr
    assert "cut here" in result.stderr  # after four tokens
    alone = cli("chat", runs("2"), "--max-tokens", 4, stdin="hello\n\n")
    assert result.stdout == alone.stdout


def test_chat_forgets(cli: Cli, runs: Runs) -> None:
    said = "hello\n/reset\nhello\n\n"
    result = cli("chat", runs("2"), "--max-tokens", 4, stdin=said)
    assert result.returncode == 0, result.stderr
    first, second, *rest = result.stdout.split("\n")
    assert (first, rest) == (second, [""])


def test_a_model_is_called_as_its_folder_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "native" / "deep").mkdir(parents=True)
    (tmp_path / "packed").symlink_to(tmp_path / "native")
    monkeypatch.chdir(tmp_path / "native")
    for typed in ("../packed", "../packed/", tmp_path / "packed"):
        assert _called(Path(typed)) == "packed"
    for typed in (".", "deep/..", "../native"):
        assert _called(Path(typed)) == "native"
