"""Recipes in the words of other tools."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from qexport.errors import InputError
from qexport.formats import open_checkpoint
from qexport.quantization.recipe import options_of
from tests.conftest import Cli

SPEC = """
spec:
  process:
    - type: "linear_quant"
      qconfig:
        weight:
          scope: "per_group"
          dtype: "int4"
          symmetric: true
          method: "gptq"
          ext: {percdamp: 0.02, block_size: 64, group_size: 32}
      exclude: ["*.v_proj"]
    - type: "linear_quant"
      qconfig: {weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}}
      include: ["*.down_proj", "*.0.*.o_proj"]
"""


def told() -> tuple[list[str], Any]:
    sentences: list[str] = []
    return sentences, sentences.append


def test_msmodelslim() -> None:
    sentences, tell = told()
    assert options_of(yaml.safe_load(SPEC), tell) == {
        **{"bits": "4", "sym": True, "method": "gptq", "group_size": 32, "per_tensor": False},
        **{"percdamp": 0.02, "block_size": 64, "exclude": ["*.v_proj"]},
        "module_bits": ["*.down_proj=8:-1:rtn", "*.0.*.o_proj=8:-1:rtn"],
    }
    assert not sentences


def test_gptq_and_awq() -> None:
    sentences, tell = told()
    gptq = {"bits": 4, "group_size": 64, "damp_percent": 0.05, "desc_act": False, "sym": True}
    assert options_of(gptq, tell) == {
        **{"bits": 4, "group_size": 64, "percdamp": 0.05, "act_order": False, "sym": True}
    }
    assert "damp_percent is --percdamp here." in sentences
    awq = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    assert options_of(awq, tell) == {"sym": False, "group_size": 64, "bits": 4}
    assert "version has no meaning here and is left out." in sentences


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"spec": {}}, "no list of processes"),
        ({"spec": {"process": [{"type": "iter_smooth"}]}}, "'iter_smooth' is not done here"),
        ({"spec": {"process": [{"type": "linear_quant"}]}}, "no qconfig.weight"),
        ({"scope": "per_block"}, "scope 'per_block' is none of"),
        ({"dtype": "fp8"}, "dtype 'fp8' is not one like int4"),
        ({"ext": {"damp": 1}}, "ext has damp; it may have percdamp"),
        ({"include": ["*.q_proj"]}, "no process for all layers"),
    ],
)
def test_recipes_that_cannot_be(recipe: dict[str, Any], message: str) -> None:
    include = recipe.pop("include", None)
    if "spec" not in recipe:
        process = {"type": "linear_quant", "qconfig": {"weight": recipe}, "include": include}
        recipe = {"spec": {"process": [process]}}
    with pytest.raises(InputError, match=message):
        options_of(recipe, print)


@pytest.mark.parametrize("change", ["scope: per_tensor", "symmetric: false"])
def test_what_a_rule_cannot_say_is_refused(change: str) -> None:
    key, value = change.split(": ")
    spec = yaml.safe_load(SPEC)
    spec["spec"]["process"][1]["qconfig"]["weight"][key] = yaml.safe_load(value)
    with pytest.raises(InputError, match="the recipe's processes differ in"):
        options_of(spec, print)


def test_from_the_command_line(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Flags go before the recipe."""
    (tmp_path / "recipe.yaml").write_text(SPEC)
    text = ("--calibration", "builtin", "--samples", 8, "--length", 32)
    arguments = ("quantize", tiny_model, "--config", "recipe.yaml", *text)
    assert cli(*arguments, "-o", "run", cwd=tmp_path).returncode == 0
    modules = open_checkpoint(tmp_path / "run").modules
    labels = {name.removeprefix("model.layers."): s.label for name, (s, _) in modules.items()}
    assert labels["0.mlp.down_proj"] == "int8 per channel"
    assert labels["0.self_attn.o_proj"] == "int8 per channel"
    assert labels["1.self_attn.o_proj"] == "int4 g32"
    assert "0.self_attn.v_proj" not in labels
    assert cli(*arguments, "--bits", 3, "-o", "other", cwd=tmp_path).returncode == 0
    other = open_checkpoint(tmp_path / "other").modules
    assert other["model.layers.1.self_attn.o_proj"][0].label == "int3 g32"
    (tmp_path / "odd.yaml").write_text("w_bit: 4\nmethod: rtn\nnonsense: 1\n")
    wrong = cli("quantize", tiny_model, "--config", "odd.yaml", "-o", "x", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "nonsense is not an option of quantize" in wrong.stderr


def test_one_scale_for_a_layer(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    for grid in ("--sym", "--asym"):
        arguments = ("quantize", tiny_model, "--method", "rtn", "--bits", 8, grid, "--per-tensor")
        out = tmp_path / grid
        done = cli(*arguments, "--group-size", -1, "-o", out, cwd=tmp_path)
        assert done.returncode == 0
        assert "int8 per tensor" in done.stderr
        run = open_checkpoint(out)
        for module in run.modules:
            tensor = run.quantized(f"{module}.weight")
            assert bool((tensor.scales == tensor.scales[0]).all())
            assert tensor.zeros is None or bool((tensor.zeros == tensor.zeros[0]).all())
            dense = open_checkpoint(tiny_model).dense(f"{module}.weight").float()
            assert float((tensor.dequantize() - dense).norm()) < 0.015 * float(dense.norm())


def spec(**process: Any) -> dict[str, Any]:
    """A recipe with one process, changed."""
    weight = {"scope": "per_channel", "dtype": "int4"}
    first = {"type": "linear_quant", "qconfig": {"weight": weight}}
    return {"spec": {"process": [{**first, **process}]}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({**spec(), "bits": 3}, "has bits beside its spec"),
        (spec(qconfig={"weight": {}, "act": {"dtype": "int8"}}), "quantizes activations"),
        (spec(qconfig={"weight": {"ext": 3}}), "ext is 3; give names and values"),
        (spec(qconfig={"weight": {"symmetric": "false"}}), "symmetric is 'false'; give true"),
        ({"zero_point": "false"}, "zero_point is 'false'; give true or false"),
        ({"bits": 4, "w_bit": 3}, "--bits twice"),
        ({"zero_point": True, "sym": True}, "--sym twice"),
        ({"group-size": 64, "group_size": 32}, "--group-size twice"),
    ],
)
def test_what_recipes_may_not_say(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options_of(recipe, lambda _: None)


def test_layers_that_a_later_process_excludes_are_refused() -> None:
    recipe = yaml.safe_load(SPEC)
    recipe["spec"]["process"][1]["exclude"] = "*.layers.0.*"
    with pytest.raises(InputError, match="excludes layers from a process that is not for all"):
        options_of(recipe, lambda _: None)


def test_layers_that_are_not_to_be_converted_stay_dense() -> None:
    found = options_of({"modules_to_not_convert": ["v_proj"]}, lambda _: None)
    assert found == {"exclude": ["*v_proj*"]}


@pytest.mark.parametrize("line", ["sym: null", "act_order: 'no'", "true_sequential: 1"])
def test_switches_are_true_or_false(cli: Cli, tiny_model: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "r.yaml").write_text(f"method: rtn\nbits: 4\n{line}\n")
    asked = cli("quantize", tiny_model, "--config", "r.yaml", "-o", "run", cwd=tmp_path)
    assert asked.returncode == 2
    assert "give true or false" in asked.stderr


def test_rules_may_be_a_mapping(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: rtn\nbits: 4\nmodule_bits: {'*.v_proj': 8}\n")
    asked = cli("quantize", tiny_model, "--config", "r.yaml", "-o", "run", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    modules = open_checkpoint(tmp_path / "run").modules
    assert modules["model.layers.0.self_attn.v_proj"][0].grid.name == "int8"
