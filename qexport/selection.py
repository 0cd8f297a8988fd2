"""Which scheme a layer gets, by patterns of names."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qexport.errors import InputError
from qexport.grid import SUPER_BLOCKS

__all__ = [
    "DENSE",
    "TARGETS",
    "Rule",
    "check_patterns",
    "is_selected",
    "parse_rule",
    "rule_of",
    "target_bits",
]

DENSE = "16"  # the width that leaves a layer as it is
# blocks of GGUF that are to hold layers exactly
TARGETS = {f"gguf:{name}": block for name, block in SUPER_BLOCKS.items()}


@dataclass(frozen=True)
class Rule:
    """Layers whose names fit `pattern` have a width of their own.

    group_size   None is per channel, 0 is that of the others
    method       None is that of the others
    """

    pattern: str
    bits: str
    group_size: int | None
    method: str | None = None


def parse_rule(text: str, widths: Collection[str], methods: Collection[str] = ()) -> Rule:
    """`PATTERN=BITS[:GROUP[:METHOD]]`, with one of `widths` and of `methods`.

    Raises InputError for anything else.
    """
    pattern, sign, value = text.rpartition("=")
    bits, *rest = value.split(":")
    if not pattern or not sign or bits not in widths:
        *most, last = widths
        raise InputError(
            f"--module-bits {text}: give PATTERN=BITS, with {', '.join(most)} or {last}."
        )
    if (len(rest) > 1 and rest[1] not in methods) or len(rest) > 2:
        known = f"; a method is one of {', '.join(methods)}" if methods else ""
        raise InputError(f"--module-bits {text}: {':'.join(rest[1:])} is too much{known}.")
    group, method = rest[0] if rest else "", rest[1] if len(rest) > 1 else None
    if group == "":
        return Rule(pattern, bits, 0, method)
    if group != "-1" and not (group.isdecimal() and int(group) > 0):
        raise InputError(f"--module-bits {text}: {group} is not a group size.")
    return Rule(pattern, bits, None if group == "-1" else int(group), method)


def rule_of(layer: str, rules: Iterable[Rule]) -> Rule | None:
    """The first that fits."""
    return next((rule for rule in rules if fnmatchcase(layer, rule.pattern)), None)


def is_selected(layer: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    """Whether a name is included (all are where nothing is said) and not excluded."""
    if any(fnmatchcase(layer, pattern) for pattern in exclude):
        return False
    return not include or any(fnmatchcase(layer, pattern) for pattern in include)


def check_patterns(patterns: Iterable[str], layers: Iterable[str]) -> None:
    """Raise InputError for a pattern that fits no layer."""
    names = list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"no name of a layer that may be quantized fits {pattern}; they are like "
                "model.layers.0.self_attn.q_proj."
            )


def target_bits(target: str) -> str:
    """The width that a target is of. Raises InputError where there is no such target."""
    if target not in TARGETS:
        raise InputError(f"there is no --target {target}; there are {', '.join(TARGETS)}.")
    return str(TARGETS[target].grid.bits)
