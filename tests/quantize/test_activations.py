"""What layers see: short cuts change nothing."""

from pathlib import Path

import pytest
import torch

from qexport.blocks import Blocks, Stream
from qexport.errors import QexportError
from qexport.formats import open_checkpoint
from qexport.quantization.activations import STAGES, Passage, Seen
from tests.runtime.families import FAMILIES
from tests.train.test_families import source

ROWS = [slice(0, 2), slice(2, 4), slice(4, 5)]


def passage(model: Path, folder: Path, precision: str, kept: Path | None) -> Passage:
    """Five windows of noise before the first block, in batches of two."""
    blocks = Blocks(open_checkpoint(model), torch.bfloat16, torch.device("cpu"))
    torch.manual_seed(0)
    inputs = Stream(folder / "inputs.bin", (5, 12, blocks.width), torch.bfloat16)
    for rows in ROWS:
        noise = torch.randn(5, 12, blocks.width)[rows]
        inputs.write(rows, noise)
    torch.manual_seed(1)
    return Passage(blocks, 0, blocks.make(0), inputs, ROWS, precision, kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", [*FAMILIES, "mobilellm"])
def test_passes_that_begin_with_what_is_settled(
    family: str, precision: str, tmp_path: Path
) -> None:
    """Layers are changed after each look, as quantization does; all is as without short cuts.

    MobileLLM's blocks run twice.
    """
    model = source(tmp_path / "model", family)
    seen, outputs = [], []
    for kept in (None, tmp_path):
        through = passage(model, tmp_path, precision, kept)
        found: dict[str, Seen] = {}
        for names in STAGES:
            found |= through.look(names[:1], settled=True)
            with torch.no_grad():
                for name in names:
                    layer = through.block.get_submodule(name)
                    layer.weight.mul_(0.9)  # type: ignore[operator]
        seen.append(found)
        outputs.append(torch.cat([made.detach() for _, made in through.outputs()]))
    for name, mine in seen[0].items():
        assert torch.equal(mine.hessian, seen[1][name].hessian), name
        assert torch.equal(mine.largest, seen[1][name].largest), name
        assert torch.equal(mine.hessian, mine.hessian.T)
    assert torch.equal(*outputs)


def test_sums_of_products(tiny_model: Path, tmp_path: Path) -> None:
    through = passage(tiny_model, tmp_path, "fp32", None)
    layer = "mlp.down_proj"
    hessian = through.look([layer])[layer].hessian
    rows = []
    hook = through.block.get_submodule(layer).register_forward_pre_hook(
        lambda _, given: rows.append(given[0].detach().flatten(0, 1))
    )
    list(through.outputs())
    hook.remove()
    x = torch.cat(rows).double()
    assert torch.allclose(hessian.double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_a_stream_that_was_cut(tmp_path: Path) -> None:
    stream = Stream(tmp_path / "a.bin", (4, 2, 8), torch.bfloat16)
    values = torch.randn(4, 2, 8).bfloat16()
    stream.write(slice(1, 4), values[1:])
    picked = stream.read(torch.tensor([3, 1]), torch.device("cpu"))
    assert torch.equal(picked, values[[3, 1]].float())
    (tmp_path / "a.bin").write_bytes(b"short")
    with pytest.raises(QexportError, match="gone or cut short"):
        stream.read(slice(0, 4), torch.device("cpu"))
