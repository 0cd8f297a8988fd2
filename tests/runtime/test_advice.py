"""`plan --for`: what is recommended follows from the figures."""

import json
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks.gpu_decode import LLAMA
from qexport.cli.plan import command as plan_command
from qexport.errors import InputError
from qexport.runtime.advice import advise
from qexport.runtime.families import DecoderConfig, decoder_config
from qexport.runtime.hardware import CPUS, GPUS, Hardware
from qexport.runtime.plan import Model
from tests.conftest import Cli


def model(**changes: Any) -> Model:
    config = decoder_config({**LLAMA, **changes})
    assert isinstance(config, DecoderConfig)
    return Model(config)


SEVENTY = {
    **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    "num_attention_heads": 64,
}


def test_a_gpu_gets_the_widest_that_leaves_room() -> None:
    """8 billion weights fit an L4 at 4 bits; 70 billion fit an L40S at 3, an RTX 4090 at none."""
    small = advise("gpu-serving", model(), GPUS["l4"], 4096)
    assert (small.bits, small.format, small.group_size) == ("4", "gptq", 128)
    large = advise("gpu-serving", model(**SEVENTY), GPUS["l40s"], 4096)
    assert (large.bits, large.format) == ("3", "compressed-tensors")
    assert any("int4 leaves room for" in reason for reason in large.reasons)
    tight = advise("gpu-serving", model(**SEVENTY), GPUS["rtx4090"], 4096)
    assert (tight.bits, tight.format) == ("2", "native")
    assert any("take several" in reason for reason in tight.reasons)


def test_large_batches_keep_bfloat16_where_it_fits() -> None:
    """Steps wait for arithmetic then; where there is room for a few only, packing makes more."""
    wide = advise("offline-batch", model(), GPUS["h200"], 512)
    assert wide.bits is None and any("W8A8" in reason for reason in wide.reasons)
    tight = advise("offline-batch", model(), GPUS["l4"], 4096)
    assert tight.bits == "4"
    small = advise("offline-batch", model(**SEVENTY), GPUS["l4"], 4096)
    assert small.bits == "4" and small.reasons == [
        "int4 does not fit this device, with 4096 tokens; take several, or a larger one"
    ]


def test_a_cpu_gets_the_widest_that_one_can_read_along_with() -> None:
    fast = advise("cpu", model(), CPUS["epyc-9654"], 1024)
    assert (fast.bits, fast.format, fast.group_size) == ("4", "gguf", 32)
    slow = advise("cpu", model(**SEVENTY), CPUS["ryzen-7950x"], 1024)
    assert (slow.bits, slow.format) == ("2", "native")
    assert "no width makes 10 tokens a second" in slow.reasons[-1]
    small = Hardware("a small one", 16e9, 1e12, 1e12, 4e12, "cpu")  # fast, and full with int4
    fits = advise("cpu", model(**SEVENTY), small, 1024)
    assert fits.bits == "2" and all("does not fit" in reason for reason in fits.reasons[:3])


def test_training_says_how_many_devices_it_takes() -> None:
    """16 bytes a weight and activations: 8 billion take 160 GB."""
    found = advise("finetune", model(), GPUS["h200"], 4096)
    assert "161 GB" in found.reasons[0] and "2 of this device" in found.reasons[1]
    assert (found.format, found.group_size) == ("gptq", 64)
    on_cpu = advise("finetune", model(), CPUS["epyc-9654"], 4096)
    assert (on_cpu.format, on_cpu.group_size) == ("gguf", 32)  # what a CPU is advised to serve


def test_groups_divide_every_matrix() -> None:
    odd = model(hidden_size=4128, intermediate_size=4128, head_dim=128)
    assert advise("gpu-serving", odd, GPUS["h200"], 512).group_size == 32


def test_every_purpose_from_the_command(tmp_path: Path, cli: Cli) -> None:
    """Advice is of a device's kind; what it says is what the rest is reckoned with."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (option,) = (p for p in plan_command.params if p.name == "purpose")
    assert isinstance(option.type, click.Choice)
    for purpose in option.type.choices:
        device = ("--cpu", "xeon-8592") if purpose == "cpu" else ("--gpu", "h100")
        result = cli("plan", tmp_path, "--for", purpose, *device, "--json")
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        if found["advice"]["bits"] == "4":
            assert found["scheme"].startswith("int4")
    result = cli("plan", tmp_path, "--for", "cpu", "--gpu", "h100")
    assert result.returncode == 2 and "--for cpu goes with --cpu" in result.stderr
    result = cli("plan", tmp_path, "--for", "cpu", "--cpu", "xeon-8592", "--group-size", "64")
    assert result.returncode == 2 and "leave --group-size out" in result.stderr
    with pytest.raises(InputError):
        advise("gpu-serving", model(), CPUS["xeon-8592"], 512)
