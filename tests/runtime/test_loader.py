import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qexport.errors import CheckpointError, InputError
from qexport.formats import open_checkpoint
from qexport.runtime.loader import load_model
from qexport.runtime.serving import Serving, open_decoder
from qexport.tiny import write_tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_checkpoint_gives_transformers_own_logits(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    folder = write_tiny_model(tmp_path / "m", tie_word_embeddings=tied, attention_bias=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    mine = load_model(open_checkpoint(folder), dtype, CPU)
    ids = torch.randint(0, 250, (2, 20))
    with torch.inference_mode():
        assert torch.equal(mine(input_ids=ids).logits, theirs(input_ids=ids).logits)
    if tied:
        assert mine.lm_head.weight is mine.model.embed_tokens.weight


def test_a_missing_tensor_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        load_model(open_checkpoint(folder), torch.float32, CPU)


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_a_head_is_the_embeddings_only_where_the_config_ties_them(
    tmp_path: Path, kernel: str | None
) -> None:
    folder = write_tiny_model(tmp_path / "m", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        open_decoder(open_checkpoint(folder), Serving(kernel=kernel))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_size": 128}, CheckpointError, "do not fit its config"),
        ({"model_type": "no-such-model"}, InputError, "does not know model type"),
        ({"model_type": None}, CheckpointError, "names no model_type"),
    ],
)
def test_configs_that_do_not_fit(
    tiny_model: Path,
    tmp_path: Path,
    change: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=message):
        load_model(open_checkpoint(folder), torch.float32, CPU)
