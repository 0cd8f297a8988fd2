"""Options of ParetoQ's and the MiniCPM4 fork's scripts, as `qexport train` understands them.

A command line that worked there works here, and a note says what each of its options is called.
"""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import click

__all__ = ["translated"]

Translate = Callable[[str], list[str]]


def translated(args: list[str], tell: Callable[[str], None]) -> list[str]:
    """Arguments with our names for theirs. Raises click.UsageError for what cannot be done here."""
    together = {name for names in _TOGETHER.values() for name in names}
    theirs = {_name(arg) for arg in args} & ({*_OPTIONS} | together)
    if not theirs:
        return args
    found: list[str] = []
    given: dict[str, str] = {}
    rest = deque(args)
    while rest:
        arg = rest.popleft()
        name = _name(arg)
        if name not in theirs:
            found.append(arg)
            continue
        value = arg.partition("=")[2] if "=" in arg else _value(name, rest)
        if name in together:
            given[name] = value
            continue
        ours = _OPTIONS[name](value)
        tell(f"{name} {value}: {' '.join(ours) or 'not needed here'}")
        found += ours
    for meant, names in _TOGETHER.items():
        said = {name: given[name] for name in names if name in given}
        if said:
            words = " ".join(f"{name} {value}" for name, value in said.items())
            ours = meant(said)
            tell(f"{words}: {' '.join(ours) or 'not needed here'}")
            found += ours
    return found


def _name(arg: str) -> str:
    return arg.partition("=")[0]


def _value(name: str, rest: deque[str]) -> str:
    """What comes after an option; a switch may stand alone, and is then on."""
    if name in _SWITCHES and (not rest or rest[0].lower() not in _TRUE + _FALSE):
        return "true"
    return rest.popleft() if rest else ""


def _output(given: dict[str, str]) -> list[str]:
    """Their scripts write {local_dir}/models/{output_model_filename}."""
    folder, name = given.get("--local_dir"), given.get("--output_model_filename")
    if folder is None and name is None:
        return []
    return ["-o", str(Path(folder or ".") / "models" / (name or "run"))]


def _groups(given: dict[str, str]) -> list[str]:
    """Off unless they are switched on, or a size is given and they are not switched off."""
    asked = given.get("--enable_groupwise", str("--group_size" in given))
    if not _is_true(asked):
        return []
    return ["--group-size", given.get("--group_size", "128")]


def _precision(given: dict[str, str]) -> list[str]:
    """Theirs is float32 where neither is true; where nothing is said of bf16, ours stays."""
    if _is_true(given.get("--fp16", "false")):
        return ["--precision", "fp16"]
    if "--bf16" not in given:
        return []
    return ["--precision", "bf16" if _is_true(given["--bf16"]) else "fp32"]


_TOGETHER: dict[Callable[[dict[str, str]], list[str]], tuple[str, ...]] = {
    _output: ("--local_dir", "--output_model_filename"),
    _groups: ("--group_size", "--enable_groupwise"),
    _precision: ("--bf16", "--fp16"),
}


_TRUE, _FALSE = ("true", "1", "yes", "t", "y"), ("false", "0", "no", "f", "n")
_SWITCHES = (
    *("--bf16", "--fp16", "--tf32", "--qat", "--do_train", "--do_eval", "--log_on_each_node"),
    *("--enable_groupwise", "--contain_weight_clip_val", "--gradient_checkpointing"),
    "--ddp_find_unused_parameters",
)


def _is_true(value: str) -> bool:
    if value.lower() not in _TRUE + _FALSE:
        raise click.UsageError(f"{value} is neither True nor False.")
    return value.lower() in _TRUE


def _as(option: str) -> Translate:
    return lambda value: [option, value]


def _flag(*option: str) -> Translate:
    return lambda value: list(option) if _is_true(value) else []


def _only(expected: str, why: str) -> Translate:
    """An option that is taken at the one value that is meant here."""

    def check(value: str) -> list[str]:
        if value.lower() != expected.lower():
            raise click.UsageError(why)
        return []

    return check


def _nothing(_: str) -> list[str]:
    return []


def _bits(value: str) -> list[str]:
    """Theirs say 0 for ternary and 32 for none."""
    return ["--bits", {"0": "1.58", "32": "16"}.get(value, value)]


def _epochs(value: str) -> list[str]:
    if value not in ("1", "1.0"):
        raise click.UsageError("one pass is the default; give --max-steps for more.")
    return []


def _zero(value: str) -> list[str]:
    if value.strip("0.") != "":
        raise click.UsageError("ParetoQ trains without weight decay, and so does this.")
    return []


_OPTIONS: dict[str, Translate] = {
    "--w_bits": _bits,
    "--input_model_filename": lambda value: [value],
    "--train_data_local_path": _as("--data"),
    "--eval_data_local_path": _as("--eval-data"),
    "--model_max_length": _as("--max-length"),
    "--per_device_train_batch_size": _as("--batch-size"),
    "--gradient_accumulation_steps": _as("--gradient-accumulation"),
    "--learning_rate": _as("--lr"),
    "--warmup_ratio": _as("--warmup"),
    "--max_steps": _as("--max-steps"),
    "--save_steps": _as("--save-steps"),
    "--logging_steps": _as("--log-steps"),
    "--gradient_checkpointing": _flag("--gradient-checkpointing"),
    "--contain_weight_clip_val": _only(
        "false", "a checkpoint that is trained already needs no training: give it to qexport pack."
    ),
    "--num_train_epochs": _epochs,
    "--weight_decay": _zero,
    "--lr_scheduler_type": _only("cosine", "rates fall along a cosine here."),
    **dict.fromkeys(
        (
            *("--qat", "--do_train", "--do_eval", "--cache_dir", "--output_dir", "--report_to"),
            *("--tf32", "--optim", "--save_strategy", "--evaluation_strategy", "--eval_strategy"),
            *(
                "--max_train_samples",
                "--max_eval_samples",
                "--save_total_limit",
                "--log_on_each_node",
            ),
            *("--per_device_eval_batch_size", "--ddp_find_unused_parameters", "--logging_dir"),
        ),
        _nothing,
    ),
}
