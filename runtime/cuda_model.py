"""The decoder on a GPU: a decoding step is one CUDA graph, tokens are chosen where logits are.

Prompts run through `TorchDecoder`. Sequences that take one token each are batched: a step's numbers
go to the device in one copy, and its tokens come back in one. A graph is captured for each size of
batch and each way of choosing when it is first wanted; batches are filled up to such a size with
rows that have no slot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from qexport.checkpoint import Checkpoint
from qexport.runtime.device_sampler import Draw, choose, effort
from qexport.runtime.families import DecoderConfig
from qexport.runtime.model import Span, TorchDecoder

__all__ = ["BATCHES", "CudaDecoder"]

BATCHES = (1, 2, 4, 8, 16, 32, 64)
_NO_SLOT = -1  # of rows that fill a batch up
_NUMBERS = 10  # that a row has
_LOGITS = -1  # no way of choosing: logits come back
_KEYS_OF_A_PART = 128  # fewer keys than that are not divided further
_MOST_SPLITS = 32


@dataclass(frozen=True)
class _Row:
    """What a step takes for one token of one sequence."""

    token: int
    position: int
    slot: int
    table: int  # of rope's frequencies: 1 for the long one
    draw: Draw

    def numbers(self, vocabulary: int) -> tuple[float, ...]:
        return (self.token, self.position, self.slot, self.table, *self.draw.row(vocabulary))


class CudaDecoder(TorchDecoder):
    """`TorchDecoder` whose steps of one token a sequence are graphs.

    On a CPU, where Triton's interpreter is on, steps run without graphs: for tests.
    """

    draws = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        *,
        slots: int,
        context: int,
        device: torch.device,
        dtype: torch.dtype,
        kernel: str | None = None,
        head_bits: int | None = None,
    ) -> None:
        super().__init__(
            checkpoint,
            config,
            slots=slots,
            context=context,
            device=device,
            dtype=dtype,
            kernel=kernel,
            head_bits=head_bits,
        )
        self._tables = torch.stack(self._rope)
        self._steps: dict[tuple[int, int], _Step] = {}
        self._captures = _Captures(device) if device.type == "cuda" else None
        self._idle = _Row(0, 0, _NO_SLOT, 0, Draw())
        if self._captures is not None:
            self._warm_up()

    def _warm_up(self) -> None:
        """Record graphs of greedy steps: no request is to wait for kernels to be compiled."""
        most = next((size for size in BATCHES if size >= self.slots), BATCHES[-1])
        with torch.inference_mode():
            for size in BATCHES[: BATCHES.index(most) + 1]:
                self._steps[size, 0] = _Step(self, size, 0)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Tensor:
        wanted = [span for span in spans if span.logits]
        one, rest = _parted(spans)
        found = {}
        if rest:
            logits = self._logits(rest).cpu()
            found = dict(zip((s.slot for s in rest if s.logits), logits, strict=True))
        for batch in _batches(one):
            # a copy: the next batch of this size is written to the same place
            logits = self._step(batch, [Draw()] * len(batch), _LOGITS).clone()
            found.update(zip((span.slot for span in batch), logits, strict=True))
        if not wanted:
            return torch.empty(0, self.vocabulary)
        return torch.stack([found[span.slot] for span in wanted])

    @torch.inference_mode()
    def choose(self, spans: Sequence[Span], draws: Sequence[Draw]) -> list[int]:
        wanted = [span.slot for span in spans if span.logits]
        draw_of = dict(zip(wanted, draws, strict=True))
        one, rest = _parted(spans)
        found: dict[int, int] = {}
        if rest:
            logits = self._logits(rest)
            slots = [span.slot for span in rest if span.logits]
            if slots:
                chosen = [draw_of[slot] for slot in slots]
                rows = torch.tensor(
                    [draw.row(self.vocabulary) for draw in chosen], dtype=torch.float64
                )
                tokens = choose(logits, rows.T.to(self._device), effort(chosen)).tolist()
                found.update(zip(slots, tokens, strict=True))
        for batch in _batches(one):
            chosen = [draw_of[span.slot] for span in batch]
            tokens = self._step(batch, chosen, effort(chosen)).tolist()
            found.update(zip((span.slot for span in batch), tokens, strict=True))
        return [found[slot] for slot in wanted]

    def _step(self, spans: Sequence[Span], draws: Sequence[Draw], how: int) -> Tensor:
        """Logits or tokens of a batch."""
        rope = self._config.rope
        rows = [
            _Row(
                *(span.tokens[0], span.start, span.slot),
                int(bool(rope.original and span.length > rope.original)),
                draw,
            )
            for span, draw in zip(spans, draws, strict=True)
        ]
        batch = next(size for size in BATCHES if size >= len(rows))
        rows += [self._idle] * (batch - len(rows))
        step = self._steps.get((batch, how))
        if step is None:
            step = self._steps[batch, how] = _Step(self, batch, how)
        result: Tensor = step.run(rows)
        return result[: len(spans)]

    def compute(self, numbers: Tensor, how: int) -> Tensor:
        """A step on the device, for numbers float64 [_NUMBERS, batch] of rows: logits or tokens."""
        from qexport.runtime.kernels.step import add_norm, attend, gate, rotate_and_store

        config = self._config
        tokens, positions, slots, table = numbers[:4].long()
        splits = self._splits(len(tokens))
        x = embedding(tokens, self._embedding).to(self._dtype) * config.embedding_scale
        angles = positions.float()[:, None] * self._tables[table]
        rotation = angles.cos() * config.rope.factor, angles.sin() * config.rope.factor
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            cache, window = self._cache[index], config.windows[index]
            normed = add_norm(x, delta, config.residual_scale, layer.norm1, config.eps)
            heads = layer.qkv.matmul(normed).view(len(x), -1, config.head_dim)
            norms = None
            if layer.q_norm is not None and layer.k_norm is not None:
                norms = layer.q_norm, layer.k_norm
            turned = rotation if config.rotated[index] else None
            queries = rotate_and_store(heads, norms, turned, slots, positions, cache, config.eps)
            scale = config.attention_scale
            mixed = attend(queries, cache, slots, positions, scale, window, splits)
            delta = layer.o.matmul(mixed)
            normed = add_norm(x, delta, config.residual_scale, layer.norm2, config.eps)
            delta = layer.down.matmul(gate(layer.up.matmul(normed)))
        last = add_norm(x, delta, config.residual_scale, self._norm, config.eps)
        logits = self._head.matmul(last).float() * config.logit_scale
        return logits if how == _LOGITS else choose(logits, numbers[4:], how)

    def _splits(self, batch: int) -> int:
        """Parts of the keys, so that a small batch keeps every multiprocessor busy."""
        if self._device.type == "cpu":
            return 2
        processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        wanted = -(-2 * processors // (batch * self._config.kv_heads))
        return max(1, min(wanted, _MOST_SPLITS, -(-self.context // _KEYS_OF_A_PART)))


class _Step:
    """One size of batch and way of choosing: its numbers on both sides, and its graph."""

    def __init__(self, decoder: CudaDecoder, batch: int, how: int) -> None:
        self._vocabulary = decoder.vocabulary
        device, on_gpu = decoder._device, decoder._device.type == "cuda"
        self._numbers = torch.zeros(_NUMBERS, batch, dtype=torch.float64, pin_memory=on_gpu)
        self._there = torch.zeros(_NUMBERS, batch, dtype=torch.float64, device=device)
        self._result = torch.empty(0)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._compute: Callable[[], Tensor] = lambda: decoder.compute(self._there, how)
        self._fill([decoder._idle] * batch)
        if on_gpu:
            assert decoder._captures is not None
            self._capture(device, decoder._captures)

    def run(self, rows: Sequence[_Row]) -> Tensor:
        """The result on the host, for as many rows as the batch has."""
        self._fill(rows)
        if self._graph is None:
            self._there.copy_(self._numbers)
            return self._compute()
        self._graph.replay()
        torch.cuda.current_stream(self._there.device).synchronize()
        return self._result

    def _fill(self, rows: Sequence[_Row]) -> None:
        table = [row.numbers(self._vocabulary) for row in rows]
        self._numbers.numpy()[:] = np.array(table).T

    def _capture(self, device: torch.device, captures: "_Captures") -> None:
        """Run it once, so that kernels are compiled and loaded, and record it with its copies."""
        stream = captures.stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._there.copy_(self._numbers, non_blocking=True)
            made = self._compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._result = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            self._graph, pool=captures.pool, stream=stream, capture_error_mode="thread_local"
        ):
            self._there.copy_(self._numbers, non_blocking=True)
            self._result.copy_(self._compute(), non_blocking=True)


class _Captures:
    """What the graphs of one decoder share: only captures on one stream share their memory."""

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool: Any = torch.cuda.graph_pool_handle()


def _parted(spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """Those of one token whose logits are wanted, and the rest."""
    one = [span for span in spans if len(span.tokens) == 1 and span.logits]
    return one, [span for span in spans if len(span.tokens) != 1 or not span.logits]


def _batches(spans: list[Span]) -> list[list[Span]]:
    most = BATCHES[-1]
    return [spans[at : at + most] for at in range(0, len(spans), most)]
