"""Recipes that other tools' users have, as our options: msModelSlim's, GPTQ's and AWQ's names."""

from collections.abc import Callable, Mapping
from typing import Any

from qexport.errors import InputError

__all__ = ["options_of"]

_NAMES = {  # of AutoGPTQ, GPTQModel, AutoAWQ, LLaMA-Factory and GPTQ's own script
    **{"w_bit": "bits", "wbits": "bits", "quantization_bit": "bits", "w_bits": "bits"},
    **{"q_group_size": "group_size", "groupsize": "group_size"},
    **{"damp_percent": "percdamp", "desc_act": "act_order", "blocksize": "block_size"},
    **{"symmetric": "sym", "dataset": "calibration", "nsamples": "samples", "seqlen": "length"},
    **{"quant_method": "method", "seq_len": "length", "n_samples": "samples"},
}
_NOTHING = ("version", "static_groups", "model_seqlen", "tokenizer")
_SCOPES = ("per_channel", "per_group", "per_tensor")
_MS_GROUP = 256  # msModelSlim's group where a recipe names none
_OF_A_RULE = ("bits", "group_size", "method")
_EXTRA = ("percdamp", "block_size", "group_size")
_BESIDE_SPEC = ("spec", "apiversion", "metadata")


def options_of(recipe: Mapping[Any, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Options by their long names; `tell` is given a sentence for each name that is another's.

    Raises InputError for a msModelSlim recipe that says what cannot be done.
    """
    if "spec" in recipe:
        for key in recipe:
            if key not in _BESIDE_SPEC:
                raise InputError(f"the recipe has {key} beside its spec; give it as an option.")
        return _of_spec(recipe["spec"])
    found: dict[str, Any] = {}
    for key, given in recipe.items():
        name = str(key).replace("-", "_")
        if name in _NOTHING:
            tell(f"{key} has no meaning here and is left out.")
            continue
        ours, value = _translated(name, given)
        if ours in found:
            raise InputError(f"the recipe says --{ours.replace('_', '-')} twice; give it once.")
        found[ours] = value
        if name == "zero_point":
            tell(f"zero_point: {str(given).lower()} is --{'asym' if given else 'sym'} here.")
        elif ours != name:
            tell(f"{key} is --{ours.replace('_', '-')} here.")
    if "desc_act" in recipe:
        tell(
            "the order of columns needs no g_idx here: scales are those of the groups as they are."
        )
    return found


def _translated(name: str, value: Any) -> tuple[str, Any]:
    """An option and its value, by the name that another tool has for it."""
    if name == "zero_point":
        return "sym", not _truth(name, value)
    if name == "modules_to_not_convert":  # parts of names
        return "exclude", [f"*{part}*" for part in _texts(value)]
    return _NAMES.get(name, name), value


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"the recipe's {name} is {value!r}; give true or false.")
    return value


def _texts(value: Any) -> list[str]:
    """Of a list, or of one text."""
    return [value] if isinstance(value, str) else [str(one) for one in value or ()]


def _of_spec(spec: Any) -> dict[str, Any]:
    """The `linear_quant` processes: the first for all layers, others for those they include."""
    processes = spec.get("process") if isinstance(spec, dict) else None
    if not isinstance(processes, list) or not processes:
        raise InputError("the recipe's spec has no list of processes.")
    found: dict[str, Any] = {}
    rules: list[str] = []
    others: list[dict[str, Any]] = []
    for process in processes:
        if not isinstance(process, dict) or process.get("type") != "linear_quant":
            kind = process.get("type") if isinstance(process, dict) else process
            raise InputError(f"the recipe's process {kind!r} is not done here; linear_quant is.")
        own = _of_process(process)
        include = _texts(process.get("include")) or ["*"]
        exclude = _texts(process.get("exclude"))
        if include == ["*"] and "bits" not in found:
            found |= own | {"exclude": exclude}
            continue
        if exclude:
            raise InputError(
                "the recipe excludes layers from a process that is not for all; name its layers "
                "by include alone."
            )
        others.append(own)
        rule = f"{own['bits']}:{own['group_size']}:{own['method']}"
        rules += [f"{pattern}={rule}" for pattern in include]
    if "bits" not in found:
        raise InputError("the recipe has no process for all layers; give one that includes '*'.")
    for own in others:  # a rule has bits, a group and a method alone
        odd = [name for name in own if name not in _OF_A_RULE and own[name] != found.get(name)]
        if odd:
            raise InputError(
                f"the recipe's processes differ in {odd[0]}, which is one for all here."
            )
    return {**found, "module_bits": rules}


def _of_process(process: Mapping[str, Any]) -> dict[str, Any]:
    """A process' scheme and method."""
    qconfig = process.get("qconfig")
    weight = qconfig.get("weight") if isinstance(qconfig, dict) else None
    if not isinstance(qconfig, dict) or not isinstance(weight, dict):
        raise InputError("the recipe's linear_quant has no qconfig.weight.")
    if qconfig.get("act"):
        raise InputError(
            "the recipe quantizes activations (act); of that --method w8a8 alone is done here."
        )
    scope, dtype = weight.get("scope", "per_channel"), str(weight.get("dtype", "int8"))
    if scope not in _SCOPES:
        raise InputError(f"the recipe's scope {scope!r} is none of {', '.join(_SCOPES)}.")
    if not dtype.startswith("int") or not dtype[3:].isdigit():
        raise InputError(f"the recipe's dtype {dtype!r} is not one like int4.")
    extra = weight.get("ext") or {}
    if not isinstance(extra, dict):
        raise InputError(f"the recipe's ext is {extra!r}; give names and values.")
    odd = sorted(set(extra) - set(_EXTRA))
    if odd:
        raise InputError(f"the recipe's ext has {odd[0]}; it may have {', '.join(_EXTRA)}.")
    group = extra.get("group_size", _MS_GROUP) if scope == "per_group" else -1
    own = {name: extra[name] for name in ("percdamp", "block_size") if name in extra}
    return {
        "bits": dtype[3:],
        "sym": _truth("symmetric", weight.get("symmetric", True)),
        "method": str(weight.get("method", "rtn")).replace("minmax", "rtn"),
        "group_size": group,
        "per_tensor": scope == "per_tensor",
        **own,
    }
