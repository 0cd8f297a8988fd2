"""Command lines of ParetoQ's scripts."""

import json
from pathlib import Path

import pytest

from qexport.cli.familiar import translated
from qexport.formats import open_checkpoint
from tests.conftest import Cli


def test_a_paretoq_command_line_works(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """As in 1_run_train.sh, with the fork's groups; a note for each option."""
    text = tmp_path / "train.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} " * 20}) + "\n" for i in range(60)))
    result = cli(
        *("train", "--local_dir", tmp_path, "--input_model_filename", tiny_model),
        *("--output_model_filename", "tiny-ternary", "--train_data_local_path", text),
        *("--do_train", "True", "--do_eval", "True", "--model_max_length", "32", "--fp16", "False"),
        *("--bf16", "False", "--log_on_each_node", "False", "--logging_dir", tmp_path / "logs"),
        *("--num_train_epochs", "1", "--per_device_train_batch_size", "2", "--max_steps", "2"),
        *("--per_device_eval_batch_size", "1", "--gradient_accumulation_steps", "1"),
        *("--save_strategy", "steps", "--save_steps", "2000", "--report_to", "tensorboard"),
        *("--learning_rate", "2e-5", "--weight_decay", "0.", "--warmup_ratio", "0."),
        *("--lr_scheduler_type", "cosine", "--logging_steps", "1", "--tf32", "False"),
        *("--gradient_checkpointing", "False", "--qat", "True", "--w_bits=0"),
        *("--contain_weight_clip_val", "False", "--enable_groupwise", "True", "--group_size", "32"),
    )
    assert result.returncode == 0, result.stderr
    for note in (
        *("--w_bits 0: --bits 1.58", "--qat True: not needed here", "--group-size 32"),
        "--bf16 False --fp16 False: --precision fp32",
    ):
        assert note in result.stderr
    run = open_checkpoint(tmp_path / "models" / "tiny-ternary")
    assert {scheme.label for scheme, _ in run.modules.values()} == {"ternary g32"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["--fp16", "True", "--bf16", "False"], ["--precision", "fp16"]),
        (["--bf16", "True"], ["--precision", "bf16"]),
        (["--fp16=False"], []),
        (["--do_train", "--w_bits", "2", "MODEL"], ["--bits", "2", "MODEL"]),
        (["--w_bits", "2", "--bf16"], ["--bits", "2", "--precision", "bf16"]),
        (["--bf16", "--num_train_epochs", "1.0"], ["--precision", "bf16"]),
        (["--gradient_checkpointing", "--w_bits=4"], ["--gradient-checkpointing", "--bits", "4"]),
    ],
)
def test_flags_and_what_they_come_to(theirs: list[str], ours: list[str]) -> None:
    """A switch may stand alone, as HfArgumentParser has it; two flags are one precision."""
    assert translated(theirs, lambda _: None) == ours


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("give it to qexport pack", ("--contain_weight_clip_val", "True")),
        ("give --max-steps for more", ("--num_train_epochs", "3")),
        ("give --max-steps for more", ("--num_train_epochs", "10")),
        ("without weight decay", ("--weight_decay", "0.1")),
        ("is neither True nor False", ("--bf16=maybe",)),
        ("No such option", ("--entropy_loss_weight", "1")),
    ],
)
def test_what_cannot_be_done_here(
    cli: Cli, tiny_model: Path, said: str, arguments: tuple[str, ...]
) -> None:
    result = cli("train", tiny_model, "--w_bits", "2", *arguments)
    assert result.returncode == 2 and said in result.stderr
