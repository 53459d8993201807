"""The lanes of an API replica, each with its threads: where all work that blocks is done."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from serve.admission import Lane
from serve.arguments import ServeArgs
from serve.failures import timed_out

T = TypeVar("T")
BURST = 64  # requests that are let in even where the last waits long: a burst of patient clients is no overload
FEWEST = 4  # at work on short uploads in a replica
UNEVEN = 8  # more of them than its share may come to one of several replicas


class Lanes:
    """Runs blocking work off the event loop, in its lane and within the time that a request has.

    A lane of short work has room for a burst, at work and waiting together, and no more: under overload an answer
    takes as long as that many do, which is what it takes at the service's capacity.
    """

    def __init__(self, args: ServeArgs) -> None:
        self._timeout_s, wait_s = args.request_timeout_s, args.max_wait_s
        replicas = args.processes
        short = max(FEWEST, args.max_batch_size // replicas)  # while one batch is encoded the next is decoded
        mine = BURST if replicas == 1 else BURST // replicas + UNEVEN
        self.all = {
            "short": Lane("short upload", short, wait_s, max(0, mine - short), 0.02, replicas),
            "long": Lane("long upload", 8, 20 * wait_s, min_queue=8, unit_s=0.05),
            "light": Lane("search", 8, wait_s, min_queue=BURST - 8, unit_s=0.001),
            "heavy": Lane("large search", 1, 10 * wait_s, min_queue=2, unit_s=0.0001),
            "media": Lane("item", 2, 5 * wait_s, min_queue=BURST - 2, unit_s=0.02),
        }
        self._threads = {
            name: ThreadPoolExecutor(lane.places, thread_name_prefix=name) for name, lane in self.all.items()
        }

    def is_free(self, lane: str) -> bool:
        """Whether nobody works in a lane."""
        return self.all[lane].working == 0

    async def run(
        self, lane: str, cost: float, function: Callable[..., T], *args: Any, by: Executor | None = None
    ) -> T:
        """The result of `function(*args)`, run by a thread of the lane, or of `by`.

        Raises:
            Problem: 503 `overloaded` without a place; 504 `timeout`.
        """
        deadline = time.monotonic() + self._timeout_s
        async with self.all[lane].place(cost, deadline):
            work = asyncio.get_running_loop().run_in_executor(by or self._threads[lane], function, *args)
            return await bounded(work, deadline - time.monotonic(), lane)

    @asynccontextmanager
    async def place(self, lane: str, cost: float, seconds: float) -> AsyncIterator[None]:
        """A place for work that another process does; raises as `run`."""
        async with self.all[lane].place(cost, time.monotonic() + seconds):
            yield


async def bounded(work: Awaitable[T], seconds: float, what: str) -> T:
    """The result of `work`; 504 `timeout` when it does not come within so many seconds."""
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise timed_out(what, seconds) from None
