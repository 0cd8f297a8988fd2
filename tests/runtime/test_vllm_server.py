"""`serve --backend vllm` as far as it goes without a vLLM: what is asked, refused and explained."""

import sys
from pathlib import Path

import pytest

from qexport.errors import InputError, QexportError, UnsupportedError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.runtime.vllm_server import VllmOptions, preflight, run_vllm, vllm_command
from tests.conftest import Cli, Runs


def test_the_command() -> None:
    options = VllmOptions(
        "127.0.0.1", 8000, "m", context=512, tensor_parallel=2, arguments=("--enforce-eager",)
    )
    command = vllm_command(Path("/m"), options)
    text = " ".join(command)
    assert command[0] == sys.executable
    for part in (
        "--model /m",
        "--served-model-name m",
        "--max-model-len 512",
        "--tensor-parallel-size 2",
        "--enforce-eager",
    ):
        assert part in text
    assert "--max-num-seqs" not in text and "key" not in text


def test_what_vllm_will_make_of_a_checkpoint(runs: Runs, tiny_model: Path, tmp_path: Path) -> None:
    source = open_checkpoint(runs("2"))
    pack(source, FORMATS["native"], tmp_path / "native")
    pack(source, FORMATS["gguf"], tmp_path / "gguf")
    pack(source, FORMATS["gptq"], tmp_path / "gptq")
    assert "by cpu" in preflight(tmp_path / "native", "auto")[0]
    assert preflight(tiny_model, "auto") == ["dense weights, by vLLM"]
    for refused in ("gguf", "gptq"):
        with pytest.raises(UnsupportedError, match="vLLM does not read it"):
            preflight(tmp_path / refused, "auto")
    with pytest.raises(InputError, match="is not packed"):
        preflight(runs("2"), "auto")


def test_options_of_the_other_backend(runs: Runs, cli: Cli, tmp_path: Path) -> None:
    pack(open_checkpoint(runs("2")), FORMATS["native"], tmp_path / "native")
    for wrong, said in (
        (("--backend", "vllm", "--limit", "queue=3"), "--limit is of the native backend"),
        (("--backend", "vllm", "--kernel", "cpu"), "--kernel is of the native backend"),
        (("--tensor-parallel", "2"), "--tensor-parallel is vLLM's; add --backend vllm"),
        (("--backend", "vllm", "--api-key", "a", "--api-key", "b"), "takes one API key"),
    ):
        result = cli("serve", tmp_path / "native", "--port", "0", *wrong)
        assert result.returncode == 2, result.stderr
        assert said in " ".join(result.stderr.split())
    result = cli("serve", tmp_path / "native", "--port", "0", "--backend", "vllm")
    assert result.returncode == 4
    assert "vLLM is not installed here" in result.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise MemoryError('CUDA out of memory. Tried')", "does not hold the model"),
        ("raise ValueError('the third thing')", "ended: the third thing."),
        ("print('WARNING like `OSError: x`'); raise SystemExit(3)", "exit 3; its log is above"),
        ("import os; os.kill(os.getpid(), 9)", "it was killed (SIGKILL)"),
        ("raise RuntimeError('World size (4) is larger than the number of available GPUs')", "few"),
        ("raise ValueError('x.down_proj: 2 ranks would each get 96')", "2 ranks would each get"),
    ],
)
def test_an_end_is_explained_in_a_sentence(code: str, said: str) -> None:
    with pytest.raises(QexportError) as caught:
        run_vllm([sys.executable, "-c", code], None, "http://127.0.0.1:9", lambda: None)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("theirs", "given"), [(None, "0"), ("1", "1")])
def test_activations_are_not_rounded_unless_asked(
    monkeypatch: pytest.MonkeyPatch, theirs: str | None, given: str
) -> None:
    """vLLM's kernel of 4 bits for CPUs with AMX would round them to int8."""
    monkeypatch.delenv("VLLM_CPU_INT4_W4A8", raising=False)
    if theirs is not None:
        monkeypatch.setenv("VLLM_CPU_INT4_W4A8", theirs)
    code = "import os; raise ValueError('got ' + os.environ['VLLM_CPU_INT4_W4A8'])"
    with pytest.raises(QexportError, match=f"got {given}"):
        run_vllm([sys.executable, "-c", code], None, "http://127.0.0.1:9", lambda: None)
