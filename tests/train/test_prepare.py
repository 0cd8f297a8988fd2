"""What training computes with is what is written: parametrized values, and the RUN they become."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qexport.checkpoint import modules_to_json
from qexport.errors import CheckpointError, InputError, RefusedError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.grid import Scheme
from qexport.paretoq import WIDTHS
from qexport.runtime.loader import load_model
from qexport.source import open_source
from qexport.tiny import write_tiny_model
from qexport.training import TrainConfig, train
from qexport.training.prepare import prepare, run_tensors
from tests.conftest import WIDTHS as BITS
from tests.conftest import Runs
from tests.docs.world import write_paretoq
from tests.shard_writer import ShardWriter


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_what_is_trained_and_what_is_quantized(tiny_model: Path) -> None:
    model = dense(tiny_model)
    modules = prepare(model, lambda _: Scheme(WIDTHS["2"].grid, 32), "mse", torch.bfloat16)
    assert len(modules) == 14
    assert {name.rpartition(".")[2] for name in modules} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert modules["model.layers.0.mlp.down_proj"][1] == (64, 128)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    weight = model.model.layers[0].mlp.down_proj.weight
    groups = weight.view(64, 4, 32)
    assert all(group.unique().numel() <= 4 for row in groups for group in row)
    for value in (
        model.model.embed_tokens(torch.arange(256)),
        model.model.norm.weight,
        model.lm_head.weight,
    ):
        assert torch.equal(value.bfloat16().float(), value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_is_that_of_the_served_values(tmp_path: Path, tied: bool) -> None:
    """Loss and gradients under autocast are, bit for bit, those at the values that are stored."""
    folder = write_tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    model, plain = dense(folder), dense(folder)
    prepare(model, lambda _: Scheme(WIDTHS["4"].grid, 32), "mse", torch.bfloat16)
    served = dict(run_tensors(model, torch.bfloat16))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            module = name.removesuffix(".weight")
            quantized = f"{name}_scale" in served
            parameter.copy_(model.get_submodule(module).weight if quantized else served[name])
    ids = torch.randint(0, 250, (2, 16))
    losses = []
    for one in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(one(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        layer = model.get_submodule(name)
        master = (
            layer.parametrizations.weight.original if name != "model.embed_tokens" else layer.weight
        )
        assert torch.equal(master.grad, plain.get_submodule(name).weight.grad)


def test_gradients_reach_masters_scales_norms_and_embeddings(tiny_model: Path) -> None:
    model = dense(tiny_model)
    prepare(model, lambda _: Scheme(WIDTHS["3"].grid, 32), "mse", torch.bfloat16)
    ids = torch.randint(0, 250, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_biases_are_kept_and_trained(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", attention_bias=True, tie_word_embeddings=False)
    before = load_file(folder / "model.safetensors")
    config = TrainConfig(
        folder, "builtin", tmp_path / "run", "2", 32, max_steps=4, max_length=32, lr=1e-2
    )
    train(config, Console(quiet=True))
    after = load_file(tmp_path / "run" / "model.safetensors")
    names = [name for name in before if name.endswith("bias")]
    assert len(names) == 8
    for name in names:
        assert after[name].dtype == torch.bfloat16
        assert not torch.equal(after[name], before[name])
    assert set(before) == {name for name in after if not name.endswith("_scale")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_served_logits_are_the_fake_quant_models_bit_for_bit(
    tiny_model: Path, tmp_path: Path, bits: str, dtype: torch.dtype
) -> None:
    """The trained module tree itself, not its RUN, against the packed file loaded back."""
    model = dense(tiny_model)
    scheme = Scheme(WIDTHS[bits].grid, 32)
    modules = prepare(model, lambda _: scheme, "mse", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 250, (2, 24))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run = tmp_path / "run"
    run.mkdir()
    writer = ShardWriter(run)
    for name, tensor in run_tensors(model, torch.bfloat16):
        writer.add(name, tensor)
    writer.close()
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {
        **{"quant_method": "qexport", "format": "latent", "version": 1},
        "config_groups": modules_to_json(modules),
    }
    (run / "config.json").write_text(json.dumps(config))
    pack(open_checkpoint(run), FORMATS["native"], tmp_path / "packed")

    for module in model.modules():
        if hasattr(module, "parametrizations"):
            for name in list(module.parametrizations):
                torch.nn.utils.parametrize.remove_parametrizations(module, name)
    for parameter in model.parameters():  # and not the rotary buffers, which stay float32
        parameter.data = parameter.data.to(dtype)
    model.eval()
    served = load_model(open_checkpoint(tmp_path / "packed"), dtype, torch.device("cpu"))
    with torch.inference_mode():
        assert torch.equal(served(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_run_is_an_ordinary_folder(runs: Runs) -> None:
    run = runs("2")
    names = {path.name for path in run.iterdir()}
    assert {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("all_results.json", "eval_results.json", "trainer_state.json", "qexport.json", "logs"),
    } <= names
    assert not any(name.startswith((".", "checkpoint")) for name in names)
    assert any((run / "logs").iterdir())
    checkpoint = open_source(run)
    assert checkpoint is not None
    assert checkpoint.layout == "run"
    assert len(checkpoint.modules) == 14


def test_layers_with_widths_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    """Through the block-wise start and every format that can mix them."""
    config = TrainConfig(
        model=tiny_model,
        data="builtin",
        output=tmp_path / "run",
        bits="2",
        group_size=32,
        exclude=("model.layers.0.self_attn.o_proj",),
        module_bits=("*.down_proj=4:64", "*.layers.1.mlp.*=3"),
        max_steps=2,
        max_length=32,
        block_epochs=1,
        block_windows=4,
        block_compensated=4,
    )
    train(config, Console(quiet=True))
    run = open_checkpoint(config.output)
    found = {name: scheme.label for name, (scheme, _) in run.modules.items()}
    assert "model.layers.0.self_attn.o_proj" not in found and len(found) == 13
    assert found["model.layers.1.mlp.down_proj"] == "int4 g64"
    assert found["model.layers.1.mlp.up_proj"] == "int3 g32"
    assert found["model.layers.0.mlp.up_proj"] == "seq2 g32"
    taken = []
    for name, form in FORMATS.items():
        try:
            assert pack(run, form, tmp_path / name).exact, name
        except RefusedError:
            continue
        taken.append(name)
    assert {"native", "compressed-tensors", "gguf"} <= set(taken)
    for wrong in ({"exclude": ("*.lost",)}, {"module_bits": ("*.up_proj=5",)}):
        with pytest.raises(InputError, match=r"no name of a layer|give PATTERN=BITS"):
            train(replace(config, output=tmp_path / "no", **wrong), Console(quiet=True))  # type: ignore[arg-type]


def test_sixteen_bits_are_a_dense_run(tiny_model: Path, tmp_path: Path) -> None:
    """An ordinary checkpoint, trained like the others and quantized nowhere."""
    run = tmp_path / "run"
    common = {"model": tiny_model, "data": "builtin", "output": run, "max_steps": 3}
    train(TrainConfig(**common, bits="16", max_length=32, lr=1e-3), Console(quiet=True))  # type: ignore[arg-type]
    source = open_source(run)
    assert source is not None and source.layout == "dense" and source.modules == {}
    assert "quantization_config" not in source.config
    before, after = dense(tiny_model), AutoModelForCausalLM.from_pretrained(run)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before.state_dict()[name], after.float().state_dict()[name])
    with pytest.raises(InputError, match="no blocks to start with"):
        TrainConfig(**common, bits="16", block_epochs=1)  # type: ignore[arg-type]


def test_a_group_that_does_not_divide_names_the_module(tiny_model: Path) -> None:
    with pytest.raises(
        InputError, match=r"does not divide the 64 inputs of model\.layers\.0\.self"
    ):
        prepare(dense(tiny_model), lambda _: Scheme(WIDTHS["2"].grid, 48), "mse", torch.bfloat16)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="none of the layers"):
        prepare(torch.nn.Linear(4, 4), lambda _: Scheme(WIDTHS["2"].grid), "mse", torch.bfloat16)


@pytest.mark.parametrize("kind", ["Phi3", "Mixtral"])
def test_architectures_that_would_be_half_quantized_are_refused(tmp_path: Path, kind: str) -> None:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 260, "pad_token_id": 0}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with pytest.raises(CheckpointError, match=r"would be left unquantized|none of the layers"):
        prepare(model, lambda _: Scheme(WIDTHS["2"].grid), "mse", torch.bfloat16)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Mistral"])
def test_other_families_go_the_whole_road(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    import shutil

    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 260, "head_dim": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads)
    folder = tmp_path / "model"
    getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)
    settings = TrainConfig(folder, "builtin", tmp_path / "run", "3", max_steps=2, max_length=32)
    train(settings, Console(quiet=True))
    for form in ("native", "gptq"):
        assert pack(open_checkpoint(tmp_path / "run"), FORMATS[form], tmp_path / form).exact
    before, after = (set(load_file(d / "model.safetensors")) for d in (folder, tmp_path / "run"))
    assert before == {name for name in after if not name.endswith("_scale")}


def test_upstream_paretoq_checkpoint_is_a_finished_run(tiny_model: Path, tmp_path: Path) -> None:
    """Latent bf16 weights and weight_clip_val, as facebookresearch/ParetoQ saves them."""
    tensors = load_file(tiny_model / "model.safetensors")
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    linear = [n for n in tensors if n.endswith("_proj.weight")]
    for name in linear:
        clip = tensors[name].abs().amax(-1, keepdim=True)
        tensors[name.replace(".weight", ".weight_clip_val")] = clip
    writer = ShardWriter(upstream)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    config = json.loads((tiny_model / "config.json").read_text())
    (upstream / "config.json").write_text(json.dumps({**config, "w_bits": 2}))
    checkpoint = open_checkpoint(upstream)
    assert checkpoint.layout == "paretoq"
    assert len(checkpoint.modules) == len(linear) == 14
    for form in ("native", "gptq"):
        assert pack(checkpoint, FORMATS[form], tmp_path / form).exact
    name = linear[0]
    w, alpha = tensors[name], tensors[name.replace(".weight", ".weight_clip_val")]
    q = (torch.round((w / alpha).clamp(-0.99, 0.99) * 2 - 0.5) + 0.5) / 2
    packed = open_checkpoint(tmp_path / "native").quantized(name)
    assert torch.equal(packed.dequantize(torch.bfloat16), q * alpha)
    (upstream / "config.json").write_text(json.dumps({**config, "w_bits": 7}))
    with pytest.raises(CheckpointError, match="w_bits 7"):
        open_checkpoint(upstream)


@pytest.mark.parametrize("part", ["weight", "weight_clip_val"])
def test_an_upstream_checkpoint_that_diverged_is_refused(
    tiny_model: Path, tmp_path: Path, part: str
) -> None:
    """A NaN would become some code or other, and be packed exactly."""
    folder = tmp_path / "theirs"
    write_paretoq(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{part}"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    source = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"up_proj.{part} holds a NaN"):
        source["model.layers.0.mlp.up_proj.weight"]
    assert all(entry.stored_bytes for entry in source.entries.values())


def test_a_run_on_a_grid_that_is_not_trained_is_damaged(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs("4"), folder)
    text = (folder / "config.json").read_text()
    assert '"int4"' in text
    (folder / "config.json").write_text(text.replace('"int4"', '"uint4"').replace("8.0", "null"))
    with pytest.raises(CheckpointError, match="uint4, which is not trained"):
        open_checkpoint(folder)
