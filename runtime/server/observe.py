"""What can be seen of the server: Prometheus metrics, and a line of JSON for each request."""

import json
import sys
import time
from pathlib import Path
from typing import IO, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qexport.runtime.engine import Engine
from qexport.runtime.scheduler import Piece, Sequence

__all__ = ["Metrics", "Record", "RequestLog"]

_LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Metrics:
    """Prometheus metrics under vLLM's names where they mean the same; a registry of their own.

    What the engine knows is read when it is asked for: idle, nothing is counted.
    """

    def __init__(self, model: str, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        slots = engine.decoder.slots
        self._gauge("num_requests_running", "Requests that have a slot.", lambda: engine.running)
        self._gauge("num_requests_waiting", "Requests that wait.", lambda: engine.waiting)
        self._gauge(
            "kv_cache_usage_perc",
            "Slots in use, 1 being all of them.",
            lambda: engine.running / slots,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter("prefix_cache_hits", "Prompt tokens found in a slot.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens made.")
        self.rejections = self._counter("admission_rejections", "Requests that got 429.")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _LATENCIES
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer.", _GAPS
        )
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Of an answer after its first token, for each further one.",
            _GAPS,
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _LATENCIES
        )
        self.queued = self._histogram(
            "request_queue_time_seconds", "From arrival to a slot.", _LATENCIES
        )
        self._success = Counter(
            "vllm:request_success",
            "Answers, by why they ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def success(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, about: str, read: Any) -> None:
        gauge = Gauge(f"vllm:{name}", about, ["model_name"], registry=self._registry)
        gauge.labels(self._model).set_function(read)

    def _counter(self, name: str, about: str) -> Counter:
        counter = Counter(f"vllm:{name}", about, ["model_name"], registry=self._registry)
        return counter.labels(self._model)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", about, ["model_name"], buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model)


class RequestLog:
    """A line of JSON for each request, to a file or to stderr (`-`); prompts only where asked."""

    def __init__(self, path: str, with_prompts: bool) -> None:
        self.with_prompts = with_prompts
        if path == "-":
            self._file: IO[str] = sys.stderr
        else:
            self._file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


class Record:
    """One request as it goes: times of its pieces, for the metrics and the log."""

    def __init__(self, metrics: Metrics, log: RequestLog | None, route: str, stream: bool) -> None:
        self._metrics, self._log = metrics, log
        self._began = time.monotonic()
        self._last: dict[int, float] = {}
        self._first: dict[int, float] = {}
        self._line: dict[str, Any] = {"route": route, "stream": stream}
        self._tokens: dict[int, int] = {}

    def about(self, **facts: Any) -> None:
        """Facts for the log."""
        self._line.update(facts)

    def prompt(self, text: Any) -> None:
        """What was asked, where the log is to have it."""
        if self._log is not None and self._log.with_prompts:
            self._line["prompt"] = text

    def piece(self, number: int, piece: Piece) -> None:
        now = time.monotonic()
        metrics = self._metrics
        if number not in self._first:
            self._first[number] = now
            metrics.first_token.observe(now - self._began)
        else:
            metrics.between_tokens.observe(now - self._last[number])
        self._last[number] = now
        self._tokens[number] = piece.tokens
        if piece.finish_reason is not None:
            metrics.success(piece.finish_reason)
            if piece.tokens > 1:
                spent = now - self._first[number]
                metrics.per_token.observe(spent / (piece.tokens - 1))

    def end(self, status: int, sequences: list[Sequence], error: str | None = None) -> None:
        """The request is over, one way or another."""
        now, metrics = time.monotonic(), self._metrics
        metrics.whole.observe(now - self._began)
        metrics.generation_tokens.inc(sum(self._tokens.values()))
        for sequence in sequences:
            metrics.prompt_tokens.inc(len(sequence.prompt))
            metrics.cached_tokens.inc(sequence.cached)
            if sequence.admitted is not None:
                metrics.queued.observe(sequence.admitted - sequence.arrived)
        if self._log is None:
            return
        first = min(self._first.values(), default=None)
        self._log.write(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **self._line,
                "status": status,
                "error": error,
                "prompt_tokens": sum(len(sequence.prompt) for sequence in sequences),
                "cached_tokens": sum(sequence.cached for sequence in sequences),
                "completion_tokens": sum(self._tokens.values()),
                "ttft_s": None if first is None else round(first - self._began, 6),
                "seconds": round(now - self._began, 6),
            }
        )
