"""Our native format in a real vLLM on CPU, through the plugin that it finds by itself."""

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.decode import rounded
from qexport.checkpoint import Checkpoint, Entry
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.grid import GRIDS, Scheme
from qexport.modelling import load_tokenizer
from qexport.runtime.sampler import Sampling
from qexport.runtime.serving import Serving, open_generator
from qexport.tensor import QuantizedTensor, portable, quantize
from qexport.tiny import write_tiny_model
from tests.oracle.install import FOLDER
from tests.oracle.marks import REAL_MODELS
from tests.oracle.models import dense_twin, smollm2
from tests.oracle.test_vllm import PLACES
from tests.oracle.vllm_tokens import TOKENS

pytestmark = REAL_MODELS
SCRIPT = Path(__file__).parent / "vllm_tokens.py"


def vllm(
    checkpoint: Path, prompts: list[list[int]], scratch: Path, plugins: str = "", **engine: Any
) -> "subprocess.CompletedProcess[str]":
    """vLLM in processes of its own; tokens are in scratch/out.json."""
    scratch.mkdir()
    (scratch / "prompts.json").write_text(json.dumps(prompts))
    files = [str(checkpoint), str(scratch / "prompts.json"), str(scratch / "out.json")]
    env = {**os.environ, **({"VLLM_PLUGINS": plugins} if plugins else {})}
    return subprocess.run(
        [str(FOLDER / "bin" / "python"), str(SCRIPT), *files, json.dumps(engine)],
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
        env=env,
    )


def tokens(checkpoint: Path, prompts: list[list[int]], scratch: Path, **engine: Any) -> Any:
    result = vllm(checkpoint, prompts, scratch, **engine)
    said = result.stdout + result.stderr
    assert (scratch / "out.json").exists(), said[-4000:]
    assert "Attempted to load weight" not in said  # into another dtype, which would alarm a user
    return json.loads((scratch / "out.json").read_text())


def reference(checkpoint: Path, prompts: list[list[int]], scratch: Path) -> list[list[int]]:
    """Greedy tokens by our decoder in torch, of the weights dequantized to float32."""
    twin = dense_twin(open_checkpoint(checkpoint), scratch / "twin", torch.float32)
    serving = Serving(slots=len(prompts), context=256, kernel="reference", dtype="float32")
    sampling = Sampling(max_tokens=TOKENS, ignore_end=True)
    with open_generator(twin, serving) as generator:
        answers = [generator.stream(ids, sampling) for ids in prompts]
        return [[p.token for p in answer if p.token is not None] for answer in answers]


@pytest.fixture(scope="module")
def questions() -> list[list[int]]:
    """Twenty."""
    tokenizer = load_tokenizer(smollm2())
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is the capital of {place}?"}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for place in PLACES
    ]


@pytest.mark.parametrize("grid", ["seq2", "int3", "int4"])
def test_smollm2_is_served_as_it_was_packed(
    tmp_path: Path, questions: list[list[int]], grid: str
) -> None:
    """The same tokens as by our reference, with and without torch.compile; and without the plugin
    vLLM refuses."""
    assert pack(
        rounded(open_checkpoint(smollm2()), grid, 64), FORMATS["native"], tmp_path / "out"
    ).exact
    want = reference(tmp_path / "out", questions, tmp_path)
    assert tokens(tmp_path / "out", questions, tmp_path / "eager", enforce_eager=True) == want
    if grid == "seq2":
        assert tokens(tmp_path / "out", questions, tmp_path / "compiled") == want
        result = vllm(tmp_path / "out", questions, tmp_path / "stock", plugins="none")
        assert not (tmp_path / "stock" / "out.json").exists()
        assert "Unknown quantization method: qexport" in result.stdout + result.stderr


@pytest.mark.parametrize("grid", ["int2", "int3"])
def test_compressed_tensors_that_vllm_has_no_kernel_for(
    tmp_path: Path, questions: list[list[int]], grid: str
) -> None:
    """2 and 3 bits on a CPU: by our kernel, the same tokens as our reference."""
    source = rounded(open_checkpoint(smollm2()), grid, 64)
    assert pack(source, FORMATS["compressed-tensors"], tmp_path / "out").exact
    want = reference(tmp_path / "out", questions, tmp_path)
    assert tokens(tmp_path / "out", questions, tmp_path / "ours", enforce_eager=True) == want
    result = vllm(tmp_path / "out", questions, tmp_path / "stock", plugins="none")
    assert not (tmp_path / "stock" / "out.json").exists()
    assert "Failed to find a kernel" in result.stdout + result.stderr


def on_grid(source: Checkpoint, name: str, scheme: Scheme) -> QuantizedTensor:
    weight = source.dense(name).float()
    groups = weight.view(len(weight), scheme.groups(weight.shape[1]), -1)
    return quantize(weight, portable(groups.abs().amax(-1) / (scheme.grid.levels / 2)), scheme)


def mixed(folder: Path) -> Checkpoint:
    """Other grids in each part of what vLLM fuses, per channel and group-wise, and a dense part."""
    source = open_checkpoint(folder)
    chosen = {
        "q_proj": Scheme(GRIDS["seq2"], 32),
        "k_proj": Scheme(GRIDS["int4"], 64),
        "o_proj": Scheme(GRIDS["ternary"], 32),
        "gate_proj": Scheme(GRIDS["int3"], 64),
        "up_proj": Scheme(GRIDS["int3"], 64),
        "down_proj": Scheme(GRIDS["binary"], None),
    }
    entries = dict(source.entries)
    for name, entry in source.entries.items():
        scheme = chosen.get(name.split(".")[-2])
        if scheme is not None:
            load = partial(on_grid, source, name, scheme)
            entries[name] = Entry(entry.shape, entry.dtype, load, scheme)
    return Checkpoint(folder, "run", source.config, entries)


@pytest.mark.parametrize("ranks", [1, 2])
def test_mixed_widths_and_two_ranks(tmp_path: Path, ranks: int) -> None:
    """Queries at 2 bits beside keys at 4 and dense values, rows and columns shared out."""
    model = write_tiny_model(
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
        num_hidden_layers=3,
    )
    assert pack(mixed(model), FORMATS["native"], tmp_path / "out").exact
    prompts = [[5, 6, 7, 8], list(range(20, 80)), [100]]
    want = reference(tmp_path / "out", prompts, tmp_path)
    engine: dict[str, Any] = {"enforce_eager": True, "tensor_parallel_size": ranks}
    assert tokens(tmp_path / "out", prompts, tmp_path / "run", **engine) == want


def test_a_group_that_two_ranks_would_cut_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(
        tmp_path / "model",
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
    )
    assert pack(
        rounded(open_checkpoint(model), "seq2", 64), FORMATS["native"], tmp_path / "out"
    ).exact
    engine: dict[str, Any] = {"enforce_eager": True, "tensor_parallel_size": 2}
    result = vllm(tmp_path / "out", [[1, 2]], tmp_path / "run", **engine)
    text = result.stdout + result.stderr
    assert "down_proj: 2 ranks would each get 96 of its inputs" in text, text[-3000:]


def test_a_quantized_head_is_refused(tmp_path: Path) -> None:
    """vLLM would take it for a dense one."""
    model = write_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    source = open_checkpoint(model)
    head, scheme = "lm_head.weight", Scheme(GRIDS["seq2"], 64)
    entry = source.entries[head]
    packed = Entry(entry.shape, entry.dtype, partial(on_grid, source, head, scheme), scheme)
    run = Checkpoint(model, "run", source.config, {**source.entries, head: packed})
    assert pack(run, FORMATS["native"], tmp_path / "out").exact
    result = vllm(tmp_path / "out", [[1, 2]], tmp_path / "run", enforce_eager=True)
    assert "lm_head is quantized" in result.stdout + result.stderr


def test_a_file_that_is_not_whole_or_damaged_is_refused(tmp_path: Path) -> None:
    """vLLM itself counts no tensors of a quantized layer, and would serve memory as it comes."""
    model = write_tiny_model(tmp_path / "model")
    source = rounded(open_checkpoint(model), "ternary", 32)
    key = "model.layers.0.self_attn.k_proj"
    for name, said in (
        ("scales", "qkv_proj: the checkpoint lacks scales of its part 2"),
        ("qweight", "qkv_proj holds code 3, and ternary has 3 levels"),
    ):
        out = tmp_path / name
        assert pack(source, FORMATS["native"], out).exact
        tensors = load_file(out / "model.safetensors")
        if name == "scales":
            del tensors[f"{key}.scales"]
        else:
            tensors[f"{key}.qweight"][0, 0] = 0xFF
        save_file(tensors, out / "model.safetensors")
        result = vllm(out, [[1, 2]], tmp_path / f"run-{name}", enforce_eager=True)
        text = result.stdout + result.stderr
        assert said in text, text[-3000:]
