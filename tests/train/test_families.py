"""Every family that the decoder knows is trained, packed to every format, and verified."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from qexport.checkpoint import Checkpoint
from qexport.errors import RefusedError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.formats.verify import verify
from qexport.modelling import build_model
from qexport.runtime.model import Span
from qexport.runtime.serving import Serving, open_decoder
from qexport.training import TrainConfig, train
from tests.runtime.families import FAMILIES, make, minicpm

LLAMA_LIKE = ("minicpm", "minicpm4-longrope", "mobilellm")


def source(folder: Path, kind: str) -> Path:
    """A dense checkpoint of this family on the disk."""
    if kind not in LLAMA_LIKE:
        make(folder, kind)
        return folder
    made = make(folder, "longrope" if kind == "minicpm4-longrope" else "llama")
    config = dict(minicpm(made)[0].config)
    config["model_type"] = kind.partition("-")[0]
    if kind == "mobilellm":
        config |= {"layer_sharing": True, "share_embedding": True}
        tensors = {n: made.dense(n) for n in made if n != "lm_head.weight"}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_minicpm_is_a_llama_with_its_scales_folded_in(tmp_path: Path) -> None:
    """Logits of transformers' Llama, and gradients that reach all of it."""
    ours, folded = minicpm(make(tmp_path, "llama"))
    tokens = torch.randint(0, 250, (2, 30))
    first, second = (
        build_model(one, torch.float32, one.dense)(input_ids=tokens, labels=tokens)
        for one in (ours, folded)
    )
    assert torch.allclose(first.logits, second.logits, atol=2e-4)
    assert not torch.allclose(first.logits, build_plain(ours, tokens), atol=1e-2)


def build_plain(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    plain = Checkpoint(
        checkpoint.folder,
        "dense",
        {**checkpoint.config, "model_type": "llama"},
        dict(checkpoint.entries),
    )
    logits: torch.Tensor = build_model(plain, torch.float32, plain.dense)(input_ids=tokens).logits
    return logits


@pytest.mark.parametrize("start", ["end", "block"])
@pytest.mark.parametrize("kind", [*FAMILIES, *LLAMA_LIKE])
def test_the_whole_road(tmp_path: Path, kind: str, start: str) -> None:
    """Two steps, or a block-wise start with GPTQ; every format that takes it holds it exactly."""
    config = TrainConfig(
        model=source(tmp_path / "model", kind),
        data="builtin",
        output=tmp_path / "run",
        bits="3",
        group_size=16 if kind == "wide-heads" else 32,
        max_steps=2,
        max_length=32,
        lr=1e-3,
        precision="fp32",
        phase="all" if start == "block" else "end",
        block_epochs=1 if start == "block" else 0,
        block_windows=4,
        block_compensated=4,
    )
    results = train(config, Console(quiet=True))
    assert 0 < results["final_loss"] < 12
    run = open_checkpoint(config.output)
    taken = []
    for name, form in FORMATS.items():
        out = tmp_path / name
        try:
            pack(run, form, out)
        except RefusedError:
            continue
        assert verify(run, open_checkpoint(out)).exact, name
        taken.append(name)
    assert "native" in taken and len(taken) >= 3


@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_what_is_trained_is_what_is_served(tmp_path: Path, kind: str) -> None:
    """The training model's logits beside our decoder's, past longrope's original context too."""
    checkpoint = open_checkpoint(source(tmp_path / "model", kind))
    model = build_model(checkpoint, torch.float32, checkpoint.dense)
    decoder = open_decoder(checkpoint, Serving(slots=1, context=128, kernel="cpu-exact"))
    for length in (20, 60):
        tokens = torch.randint(0, 250, (1, length), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            wanted = model(input_ids=tokens).logits[0, -1]
        found = decoder.forward([Span(0, 0, tokens[0].tolist(), length)])[0].float().cpu()
        assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.999
