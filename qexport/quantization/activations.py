"""What the layers of a block see of the calibration text, and errors of their outputs by it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexport.blocks import Blocks, Stream
from qexport.errors import QexportError
from qexport.experts import expert_of
from qexport.precision import autocast
from qexport.ranks import largest, rank, summed

__all__ = ["STAGES", "Passage", "Seen", "importance", "output_error", "stages"]

STAGES: tuple[
    tuple[str, ...], ...
] = (  # layers that have the same inputs, in the order in which they run
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


_TILE = 384  # columns


def stages(layers: Iterable[str]) -> list[list[tuple[str, ...]]]:
    """Of a block with these layers: what runs at a time, in groups that have the same inputs.

    Experts run side by side, each with the tokens that are sent to it.
    """
    experts = list(dict.fromkeys(filter(None, map(expert_of, layers))))
    if not experts:
        return [[group] for group in STAGES]
    attention = [[group] for group in STAGES if group[0].startswith("self_attn.")]
    apart = (
        [tuple(f"{expert}.{name.removeprefix('mlp.')}" for name in group) for expert in experts]
        for group in STAGES
        if group[0].startswith("mlp.")
    )
    return [*attention, *apart]


@dataclass(frozen=True)
class Seen:
    """Of a layer's inputs X [tokens, in], float32.

    hessian   X^T X [in, in]
    largest   max |X| of each input [in]
    tokens    how many there were; `share` of all the text's
    """

    hessian: Tensor
    largest: Tensor
    tokens: int = 0
    share: float = 1.0


class _Enough(Exception):  # noqa: N818  # not an error: the rest of a forward pass is not needed
    pass


class Passage:
    """A decoder block and the text that passes through it.

    inputs   of the block
    rows     batches of windows, in order
    kept     a folder for inputs of layers that are settled, see `look`
    shared   whether other processes have other parts of the text
    """

    def __init__(
        self,
        blocks: Blocks,
        index: int,
        block: nn.Module,
        inputs: Stream,
        rows: Sequence[slice],
        precision: str,
        kept: Path | None = None,
        *,
        shared: bool = True,
    ) -> None:
        self.block = block
        self.name = blocks.name(index)
        self.count = rows[-1].stop
        self.device = next(block.parameters()).device
        self.index = index
        self._blocks, self._shared = blocks, shared
        self._inputs, self._rows, self._precision = inputs, rows, precision
        self._kept = kept
        self._settled: dict[str, Stream] = {}  # by a layer's name
        self._twice = bool(block._forward_hooks)  # by which MobileLLM's blocks run again

    def run(self, rows: slice | Tensor) -> Tensor:
        """The block's output for some windows: [rows, length, hidden]."""
        with autocast(self._precision, self.device):
            hidden = self._inputs.read(rows, self.device)
            return self._blocks.run(self.index, self.block, hidden)

    def outputs(self) -> Iterator[tuple[slice, Tensor]]:
        """Of all windows, a batch at a time."""
        for rows in self._rows:
            with self._shortened(rows):
                yield rows, self.run(rows)

    @torch.no_grad()
    def added(self) -> Tensor:
        """What the block adds to the first windows, in float32."""
        hidden = self._inputs.read(self._rows[0], self.device)[:1].float()
        return self._blocks.run(self.index, self.block, hidden).float() - hidden

    @torch.no_grad()
    def write(self, outputs: Stream) -> None:
        """Put what comes out of the block into another stream."""
        for rows, made in self.outputs():
            outputs.write(rows, made)

    @torch.no_grad()
    def look(self, names: Sequence[str], *, settled: bool = False) -> dict[str, Seen]:
        """What each layer named sees.

        No more of the block is run than its last layer needs; experts need all. Of several
        processes each has text of its own, and all are told of the whole. Where all that comes
        before the layer named is `settled`, its inputs are kept, and later passes begin with them
        if it ends a part of the block. Raises QexportError for inputs that are not finite.
        """
        watches = {name: _Watch(self.block.get_submodule(name)) for name in names}
        last = names[-1]
        stops = expert_of(last) is None and not self._twice
        keeps = settled and self._kept is not None and last in _ENDS and not self._twice
        kept: Stream | None = None
        for rows in self._rows:
            with contextlib.ExitStack() as stack:
                for name, watch in watches.items():
                    stack.enter_context(watch.on(stops and name == last))
                stack.enter_context(contextlib.suppress(_Enough))
                stack.enter_context(self._shortened(rows))
                self.run(rows)
            if keeps:
                inputs = watches[last].latest
                kept = kept or self._stream(last, inputs)
                kept.write(rows, inputs)
        if kept is not None:
            self._settled[last] = kept  # not before: this pass had to be made whole
        return self._told(watches)

    def forget(self) -> None:
        """Begin passes with the block's inputs again: layers are about to change, or done with."""
        for stream in self._settled.values():
            stream.remove()
        self._settled.clear()

    def _told(self, watches: "Mapping[str, _Watch]") -> dict[str, Seen]:
        """What was seen, by all processes."""
        counts = [watch.tokens for watch in watches.values()]
        counts.append(self.count * self._inputs.length)
        told = torch.tensor(counts, dtype=torch.float64, device=self.device)
        *tokens, total = (summed(told) if self._shared else told).tolist()
        found = {}
        for (name, watch), own in zip(watches.items(), tokens, strict=True):
            hessian = watch.hessian.triu() + watch.hessian.triu(1).T
            if self._shared:
                summed(hessian)
                largest(watch.largest)
            if not bool(hessian.diagonal().isfinite().all()):
                raise QexportError(
                    f"the inputs of {self.name}{name} are not finite (NaN or infinite); check the "
                    "model, or choose --precision fp32."
                )
            found[name] = Seen(hessian, watch.largest, int(own), own / total)
        return found

    def _stream(self, name: str, inputs: Tensor) -> Stream:
        """For a layer's inputs, of which these [n, length, in] are some."""
        assert self._kept is not None
        shape = (self.count, inputs.shape[1], inputs.shape[2])
        return Stream(self._kept / f"{name}-{rank()}.bin", shape, inputs.dtype)

    @contextlib.contextmanager
    def _shortened(self, rows: slice) -> Iterator[None]:
        """Let attention and MLP be no more than their last layers, where their inputs are kept."""
        with contextlib.ExitStack() as stack:
            for name, stream in self._settled.items():
                parent, last = _ENDS[name]
                module: Any = self.block.get_submodule(parent)
                layer = self.block.get_submodule(name)
                module.forward = partial(last, layer, partial(stream.stored, rows), self.device)
                stack.callback(delattr, module, "forward")
            yield


class _Watch:
    """Gathers what a linear layer sees."""

    def __init__(self, layer: Any) -> None:
        device = layer.weight.device
        self._layer = layer
        self.hessian = torch.zeros(layer.in_features, layer.in_features, device=device)
        self.largest = torch.zeros(layer.in_features, device=device)
        self.tokens = 0
        self.latest = torch.empty(0)

    @contextlib.contextmanager
    def on(self, stops: bool) -> Iterator[None]:
        """While a batch passes; it need go no further if `stops`."""

        def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            self.latest = given[0]
            seen = given[0].flatten(0, -2).float()
            self.tokens += len(seen)
            _add_outer(self.hessian, seen)
            self.largest = torch.maximum(self.largest, seen.abs().amax(0))
            if stops:
                raise _Enough

        hook = self._layer.register_forward_pre_hook(add)
        try:
            yield
        finally:
            hook.remove()


def _end_of_attention(
    layer: nn.Module, inputs: Callable[[], Tensor], device: torch.device, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """What attention gives back in transformers: its output, and no weights."""
    return layer(inputs().to(device)), None


def _end_of_mlp(
    layer: nn.Module, inputs: Callable[[], Tensor], device: torch.device, *_: Any, **__: Any
) -> Tensor:
    made: Tensor = layer(inputs().to(device))
    return made


# the last layer of each half of a block: nothing else reads its inputs
_ENDS: dict[str, tuple[str, Callable[..., Any]]] = {
    "self_attn.o_proj": ("self_attn", _end_of_attention),
    "mlp.down_proj": ("mlp", _end_of_mlp),
}


def _add_outer(hessian: Tensor, seen: Tensor) -> None:
    """X^T X onto `hessian` [in, in], above its diagonal and in tiles upon it: it is symmetric."""
    for start in range(0, len(hessian), _TILE):
        rows = slice(start, min(start + _TILE, len(hessian)))
        hessian[rows, start:].addmm_(seen[:, rows].T, seen[:, start:])


def importance(hessian: Tensor) -> Tensor:
    """[in] how much each input matters, about 1; inputs never active count a little."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not bool(mean > 0):
        return torch.ones_like(diagonal)
    return (diagonal / mean).clamp(min=1e-6)


def output_error(weight: Tensor, made: Tensor, hessian: Tensor) -> float:
    """The squared error of a layer's output, relative to that output's square."""
    whole = float(((weight @ hessian) * weight).sum())
    lost = made - weight
    error = float(((lost @ hessian) * lost).sum())
    return error / whole if whole > 0 else float(error > 0)
