"""`verify` must find every kind of difference, however small."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.formats.verify import Verification, verify
from qexport.runtime.loader import load_model
from qexport.tiny import write_tiny_model
from tests.conftest import Runs

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def packed(runs: Runs, tmp_path: Path) -> tuple[Path, Path]:
    run = runs("2")
    pack(open_checkpoint(run), FORMATS["native"], tmp_path / "out")
    return run, tmp_path / "out"


def changed(folder: Path, name: str, change: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change
    save_file(tensors, path)


def check(run: Path, out: Path) -> Verification:
    return verify(open_checkpoint(run), open_checkpoint(out))


def test_what_was_packed_is_exact(packed: tuple[Path, Path]) -> None:
    report = check(*packed)
    assert report.exact
    assert report.describe().startswith("exact: 0 differing codes, 0 differing bits in 14 matrices")


def test_one_code_is_found(packed: tuple[Path, Path]) -> None:
    run, out = packed
    qweight = load_file(out / "model.safetensors")[f"{LAYER}.qweight"]
    qweight[5, 3] ^= 0b100  # the lowest bit of one 2-bit code
    changed(out, f"{LAYER}.qweight", qweight)
    report = check(run, out)
    assert report.differing_codes == 1
    assert report.differing_bits > 0
    assert report.offenders == [f"{LAYER}.weight"]
    assert not report.exact


def test_one_ulp_of_one_scale_is_found(packed: tuple[Path, Path]) -> None:
    run, out = packed
    scales = load_file(out / "model.safetensors")[f"{LAYER}.scales"]
    scales.view(torch.int16)[7, 1] += 1
    changed(out, f"{LAYER}.scales", scales)
    report = check(run, out)
    assert report.differing_codes == 0
    assert report.differing_bits >= 32
    assert not report.exact


def test_dense_tensors_are_compared_by_bits(packed: tuple[Path, Path]) -> None:
    run, out = packed
    norm = load_file(out / "model.safetensors")["model.norm.weight"]
    norm[0] = -0.0 if norm[0] == 0 else -norm[0]
    changed(out, "model.norm.weight", norm)
    assert check(run, out).differing_dense == ["model.norm.weight"]
    changed(out, "model.norm.weight", norm.float())
    assert check(run, out).differing_dense == ["model.norm.weight"]


def test_matrices_of_other_shapes_are_not_counted(runs: Runs, tmp_path: Path) -> None:
    """Neither as equal nor by bits: there is nothing to compare."""
    other = write_tiny_model(tmp_path / "other", hidden_size=32, head_dim=16)
    for artefact in (other, runs("2")):
        source = runs("2") if artefact == other else other
        report = check(source, artefact)
        assert not report.exact and report.modules == report.weights == 0
        assert report.differing_bits == 0 and "model.norm.weight" in report.differing_dense
    assert f"{LAYER}.weight" in check(runs("2"), other).differing_dense


def test_a_dense_artefact_has_no_codes(runs: Runs, tmp_path: Path) -> None:
    source = open_checkpoint(runs("2"))
    model = load_model(source, torch.float32, torch.device("cpu"))
    model.save_pretrained(tmp_path / "dense")
    source.copy_files(tmp_path / "dense")
    report = verify(source, open_checkpoint(tmp_path / "dense"))
    assert report.values_exact and report.decoded == report.modules == 14
    assert "codes" not in report.describe()
    assert f"({report.weights:,} weights, 14 of them dense there)" in report.describe()


def test_missing_and_extra_tensors(packed: tuple[Path, Path]) -> None:
    run, out = packed
    changed(out, "model.norm.weight", None)
    changed(out, "backdoor", torch.ones(2))
    report = check(run, out)
    assert report.missing == ["model.norm.weight"]
    assert report.extra == ["backdoor"]
    assert "missing: model.norm.weight" in report.describe()


def test_config_and_tokenizer_count(packed: tuple[Path, Path]) -> None:
    run, out = packed
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = 12345.0
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer.json").write_text("{}")
    assert check(run, out).differing_files == ["config.json", "tokenizer.json"]


def test_a_side_file_that_only_the_artefact_has(packed: tuple[Path, Path]) -> None:
    run, out = packed
    (out / "chat_template.jinja").write_text("{{ 'HACKED' }}")
    assert check(run, out).differing_files == ["chat_template.jinja"]


def test_another_run_is_not_this_one(runs: Runs, packed: tuple[Path, Path]) -> None:
    _, out = packed
    report = check(runs("3"), out)
    assert report.differing_codes == report.weights


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("gptq", {"desc_act": True}),
        ("gptq", {"dynamic": {"-:.*q_proj.*": {}}}),
        ("gptq", {"lm_head": True}),
        ("awq", {"modules_to_not_convert": ["q_proj"]}),
        ("compressed-tensors", {"ignore": ["lm_head", "re:.*q_proj"]}),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}),
        ("humming", {"ignore": ["q_proj"]}),
    ],
)
def test_words_that_engines_act_on_are_compared(
    runs: Runs, tmp_path: Path, form: str, change: dict[str, object]
) -> None:
    """Codes may all be right, and an engine still be told to leave out a layer."""
    source = open_checkpoint(runs("4"))
    pack(source, FORMATS[form], tmp_path / "out")
    assert verify(source, open_checkpoint(tmp_path / "out")).exact
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))
    report = verify(source, open_checkpoint(tmp_path / "out"))
    assert not report.exact
    (key,) = change
    assert any(f"({key})" in name for name in report.differing_files)


def test_a_side_file_is_compared(runs: Runs, tmp_path: Path) -> None:
    source = open_checkpoint(runs("4"))
    pack(source, FORMATS["gptq"], tmp_path / "out")
    path = tmp_path / "out" / "quantize_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bits": 8}))
    report = verify(source, open_checkpoint(tmp_path / "out"))
    assert report.differing_files == ["quantize_config.json (bits)"]


def test_a_lone_gguf_file_is_verified(runs: Runs, tmp_path: Path) -> None:
    source = open_checkpoint(runs("4"))
    pack(source, FORMATS["gguf"], tmp_path / "out")
    lone = tmp_path / "lone.gguf"
    (tmp_path / "out" / "model.gguf").rename(lone)
    assert verify(source, open_checkpoint(lone)).exact
    assert not verify(open_checkpoint(runs("4", 64)), open_checkpoint(lone)).exact


def test_gguf_files_that_compute_otherwise_differ(runs: Runs, tmp_path: Path) -> None:
    """Metadata and tokenizer are compared between two files as between a run and a file."""
    pack(open_checkpoint(runs("4")), FORMATS["gguf"], tmp_path / "out")
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    (tmp_path / "out" / "model.gguf").rename(one)
    shutil.copy(one, other)
    assert verify(open_checkpoint(one), open_checkpoint(other)).exact
    for key, value in (("llama.rope.freq_base", 5e5), ("tokenizer.ggml.eos_token_id", 3)):
        raw = one.read_bytes()
        at = raw.index(key.encode()) + len(key) + 4
        new = struct.pack("<f" if isinstance(value, float) else "<I", value)
        other.write_bytes(raw[:at] + new + raw[at + 4 :])
        report = verify(open_checkpoint(one), open_checkpoint(other))
        assert report.differing_files == [key]


def test_a_tokenizer_that_came_from_a_gguf_file_is_compared(runs: Runs, tmp_path: Path) -> None:
    pack(open_checkpoint(runs("4")), FORMATS["gguf"], tmp_path / "out")
    source = open_checkpoint(tmp_path / "out" / "model.gguf")
    pack(source, FORMATS["native"], tmp_path / "native")
    assert verify(source, open_checkpoint(tmp_path / "native")).exact
    path = tmp_path / "native" / "tokenizer.json"
    path.write_text(path.read_text().replace('"merges"', '"Merges"', 1))
    assert verify(source, open_checkpoint(tmp_path / "native")).differing_files == [
        "tokenizer.json"
    ]
