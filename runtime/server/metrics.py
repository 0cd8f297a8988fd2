"""Prometheus metrics of the server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qexport.runtime.engine import Engine

__all__ = ["Metrics"]

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
        self.gauge(
            "vllm:num_requests_running", "Requests that have a slot.", lambda: engine.running
        )
        self.gauge("vllm:num_requests_waiting", "Requests that wait.", lambda: engine.waiting)
        self.gauge(
            "vllm:kv_cache_usage_perc",
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
            "e2e_request_latency_seconds",
            "From arrival to the last token of an answer that came to its end.",
            _LATENCIES,
        )
        self.queued = self._histogram(
            "request_queue_time_seconds", "From arrival to a slot.", _LATENCIES
        )
        self._requests = Counter(
            "http_requests",
            "Requests, by route, method and status.",
            ["handler", "method", "status"],
            registry=self._registry,
        )
        self._success = Counter(
            "vllm:request_success",
            "Answers, by why they ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def success(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def answered(self, handler: str, method: str, status: int) -> None:
        """One request is over."""
        self._requests.labels(handler, method, str(status)).inc()
        if status == 429:
            self.rejections.inc()

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Something that is read when it is asked for."""
        gauge = Gauge(name, about, ["model_name"], registry=self._registry)
        gauge.labels(self._model).set_function(read)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str) -> Counter:
        counter = Counter(f"vllm:{name}", about, ["model_name"], registry=self._registry)
        return counter.labels(self._model)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", about, ["model_name"], buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model)
