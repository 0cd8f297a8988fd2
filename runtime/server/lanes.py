"""Work that would hold the event loop up, each kind in threads of its own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qexport.runtime.scheduler import QueueFullError

__all__ = ["Lane"]

Result = TypeVar("Result")


class Lane:
    """One kind of work: so many threads, and so much that waits for them.

    What is slow, or was made slow by somebody, holds up its own kind alone. Work whose asker has
    left before its turn is not begun; what has begun keeps its thread until it ends.
    """

    def __init__(self, name: str, threads: int, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"qexport-{name}")
        self._most = threads + waiting
        self._open = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`. Raises QueueFullError where too much waits already."""
        if self._open >= self._most:
            raise QueueFullError(f"{self._most} requests are being prepared; try again later.")
        loop = asyncio.get_running_loop()
        future = self._pool.submit(work)
        self._open += 1
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._closed))
        return await asyncio.wrap_future(future)

    def _closed(self) -> None:
        self._open -= 1
