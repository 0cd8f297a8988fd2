"""Training that begins with a quantized model: its codes and scales, where RTN's would be."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexport.blocks import Blocks
from qexport.checkpoint import Checkpoint, module_of
from qexport.errors import InputError
from qexport.output import write_json
from qexport.paretoq import TRAINED_GRIDS, effective_scale, width_of
from qexport.run_folder import DONE
from qexport.source import open_source
from qexport.training.block import within
from qexport.training.config import TrainConfig
from qexport.training.prepare import FakeQuantize, prepare

__all__ = ["check_init", "start_from"]


def check_init(config: TrainConfig, source: Checkpoint, modules: Any) -> None:
    """Raise InputError where `config.init` is no RUN of this model on these grids."""
    assert config.init is not None
    init = open_source(config.init)
    if init is None or init.layout != "run":
        raise InputError(f"--init {config.init} is no RUN; make one with qexport quantize.")
    if set(init) != set(source):
        raise InputError(f"--init {config.init} is of another model than {config.model}.")
    theirs = init.modules
    for module in {**modules, **theirs}:
        wanted, found = modules.get(module), theirs.get(module)
        if found is not None and found[0].grid not in TRAINED_GRIDS:
            raise InputError(
                f"--init {config.init}: {module} is {found[0]}, a grid that is not trained; "
                "quantize it without --grid and --asym."
            )
        if wanted != found:
            names = [None if entry is None else str(entry[0]) for entry in (found, wanted)]
            raise InputError(
                f"--init {config.init}: {module} is {names[0] or 'dense'} there, and would be "
                f"{names[1] or 'dense'}; give the same --bits, --group-size and patterns to both."
            )
    for name in source:
        if not name.startswith("model.layers.") and module_of(name) not in theirs:
            same = torch.equal(init.dense(name).float(), source.dense(name).float())
            if not same:
                raise InputError(
                    f"--init {config.init}: {name} is not that of {config.model}; it takes what "
                    "qexport quantize has made of it."
                )


def start_from(init: Path, config: TrainConfig, stored: torch.dtype, folder: Path) -> None:
    """Leave the blocks of a RUN in `folder`, as the block-wise start leaves those it has trained.

    Weights begin in the middle of their codes' steps. Raises InputError for scales that training
    could not have.
    """
    source = open_source(init)
    assert source is not None
    folder.mkdir(parents=True, exist_ok=True)
    blocks = Blocks(source, stored, torch.device("cpu"))
    for index in range(len(blocks)):
        prefix = blocks.name(index)
        block = blocks.make(index)
        prepare(block, within(config.scheme_of, prefix), "paper", stored)
        for name, layer in block.named_modules():
            if parametrize.is_parametrized(layer, "weight"):
                _set_scales(layer, source, prefix + name)
        tensors: dict[str, Tensor] = {
            prefix + name: parameter.detach() for name, parameter in block.named_parameters()
        }
        save_file(tensors, folder / f"block-{index}.safetensors")
        blocks.release(index)
    write_json(folder / DONE, {"done": len(blocks)})


@torch.no_grad()
def _set_scales(layer: nn.Module, source: Checkpoint, module: str) -> None:
    reader: Any = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
    if not isinstance(reader, FakeQuantize):
        return
    tensor = source.quantized(f"{module}.weight")
    wanted = tensor.scales.float()
    reader.alpha.copy_(wanted / width_of(reader.scheme).step)
    made: Any = layer.weight
    if not torch.equal(effective_scale(reader.alpha, reader.scheme), wanted) or not torch.equal(
        made, tensor.dequantize()
    ):
        raise InputError(
            f"--init: {module} has scales from {float(wanted.min()):g} on, which training cannot "
            "hold; quantize it with more calibration text."
        )
