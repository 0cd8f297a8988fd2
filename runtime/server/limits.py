"""What one client may ask of the server."""

from dataclasses import dataclass

from qexport.errors import InputError
from qexport.runtime.sampler import MOST_LOGPROBS, MOST_STOPS

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Safe defaults, each an option of `qexport serve`.

    queue            answers that may wait for a slot, or be in preparation; more get 429
    body             bytes of a request; more get 413
    choices          answers to one request: prompts times `n`
    stops, stop_length   stop strings (16 at most), and characters of each
    logprobs         most probable tokens beside each token (20 at most)
    headers          header lines; more get 431
    connections      at a time; more get 503
    receive_seconds  for all of a request to come, headers and body each; then 408
    send_seconds     without a byte taken by the client; then the connection is closed
    idle_seconds     between requests of a connection
    stall_seconds    that a step may take before /health says 503
    drain_seconds    for answers to end after SIGTERM
    """

    queue: int = 256
    body: int = 4 << 20
    choices: int = 16
    stops: int = 16
    stop_length: int = 256
    logprobs: int = 20
    headers: int = 64
    connections: int = 2048
    receive_seconds: float = 30.0
    send_seconds: float = 60.0
    idle_seconds: float = 15.0
    stall_seconds: float = 120.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, most in (("stops", MOST_STOPS), ("logprobs", MOST_LOGPROBS)):
            if getattr(self, name) > most:
                raise InputError(f"--limit {name} is {most} at most.")
