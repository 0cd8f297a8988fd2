"""How long a model's steps take on this machine, by running one of its sizes with random weights.

A model that is too large to be made up whole is run with some of its layers, twice: steps grow by
the same time for each layer more.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from qexport.grid import Scheme
from qexport.runtime.bench.noise import Noise
from qexport.runtime.device_sampler import Draw
from qexport.runtime.families import DecoderConfig, decoder_config
from qexport.runtime.model import Decoder, Span
from qexport.runtime.plan import Model
from qexport.runtime.random_model import random_model
from qexport.runtime.scheduler import CHUNK
from qexport.runtime.serving import Serving, open_decoder

__all__ = ["Measured", "measure_times"]

_DEEP_BYTES = 256 << 20  # of weights that are made up: more than caches hold
_ROUNDS = 4
_SECONDS = 0.1  # for each batch in a round, at least
_FEWEST, _MOST = 2, 30  # steps of each
_LISTS = ("layer_types", "no_rope_layers")  # of config.json, an entry for each layer


@dataclass(frozen=True)
class Measured:
    """Times of one model by one scheme: {batch: seconds} of a step, and of a prompt alone."""

    steps: dict[int, float]
    prompt: float

    def decode_seconds(self, batch: int, context: int) -> float:
        """Between the batches that were measured, on a line; the context is the measured one."""
        known = sorted(self.steps)
        if len(known) == 1 or batch <= known[0]:
            return self.steps[known[0]]
        low, high = next(
            (pair for pair in pairwise(known) if batch <= pair[1]), (known[-2], known[-1])
        )
        slope = (self.steps[high] - self.steps[low]) / (high - low)
        return self.steps[low] + slope * (batch - low)

    def prompt_seconds(self, tokens: int) -> float:
        """The measured prompt's."""
        return self.prompt


def measure_times(
    config: dict[str, Any],
    scheme: Scheme | None,
    batches: Sequence[int],
    context: int,
    prompt: int,
    noise: Noise,
) -> Measured:
    """Run it. `config` is of config.json; the scheme None is bfloat16."""
    sizes = decoder_config(config)
    assert isinstance(sizes, DecoderConfig)
    stored = len(set(sizes.weights))
    layer = Model(sizes).linear_bytes(scheme) / stored
    deep = min(stored, max(4, int(_DEEP_BYTES // layer)))
    serving = Serving(slots=max(batches), context=max(context, prompt))

    def run(layers: int) -> list[float]:
        return _run(_shortened(config, layers), scheme, serving, batches, context, prompt, noise)

    times = run(deep)
    if deep < stored:
        shallow = max(1, deep // 4)
        more = (stored - deep) / (deep - shallow)
        times = [
            long + (long - short) * more for long, short in zip(times, run(shallow), strict=True)
        ]
    *steps, first = times
    return Measured(dict(zip(batches, steps, strict=True)), first)


def _shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same model with its first layers alone."""
    cut = {name: config[name][:layers] for name in _LISTS if isinstance(config.get(name), list)}
    return {**config, **cut, "num_hidden_layers": layers}


def _run(
    config: dict[str, Any],
    scheme: Scheme | None,
    serving: Serving,
    batches: Sequence[int],
    context: int,
    prompt: int,
    noise: Noise,
) -> list[float]:
    """Seconds of a step at each batch, and of the prompt."""
    sizes = decoder_config(config)
    assert isinstance(sizes, DecoderConfig)
    decoder = open_decoder(random_model(config, sizes, scheme), serving)
    decoder.reserve()
    works = [partial(_step, decoder, batch, context) for batch in batches]
    works.append(partial(_prompt, decoder, prompt))
    rounds = []
    for _ in range(_ROUNDS):
        noise.begin(time.process_time())
        rounds.append([_typical(work) for work in works])
        noise.end(time.process_time())
    found = list(zip(*rounds, strict=True))
    what = "bfloat16" if scheme is None else scheme.label
    for part, taken in zip(
        [*(f"batch {batch}" for batch in batches), "prompt"], found, strict=True
    ):
        noise.spread(f"{what}, {sizes.layers} layers, {part}", list(taken))
    return [statistics.median(taken) for taken in found]


def _typical(work: Callable[[], None]) -> float:
    """The median of some calls. Rounds lie apart, so that what disturbs one spares the others."""
    work()  # threads, graphs and caches
    taken: list[float] = []
    while len(taken) < _FEWEST or (sum(taken) < _SECONDS and len(taken) < _MOST):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _step(decoder: Decoder, batch: int, context: int) -> None:
    """One token of each sequence, after context - 1 others."""
    _forward(decoder, [Span(slot, context - 1, [slot % 7], context) for slot in range(batch)])


def _prompt(decoder: Decoder, tokens: int) -> None:
    """A prompt in chunks, to its first token."""
    for start in range(0, tokens, CHUNK):
        end = min(tokens, start + CHUNK)
        span = Span(0, start, [1] * (end - start), tokens, logits=end == tokens)
        _forward(decoder, [span])
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forward(decoder: Decoder, spans: list[Span]) -> None:
    if decoder.draws and all(span.logits for span in spans):
        decoder.choose(spans, [Draw()] * len(spans))
    else:
        decoder.forward(spans).numpy().argmax(-1)
