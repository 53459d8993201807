"""Who may work now, who waits, and who is told at once to come back: lanes with a bounded wait.

Work is measured in costs (windows to encode, hits to find) and goes through a lane with so many places. A lane learns
how many seconds a unit of cost takes. A request that would wait longer than `max_wait_s`, or past its own deadline, is
refused at once with 503 and a `Retry-After`: under overload those who are let in keep their latency, and the rest know
soon. Whoever gives up waiting, or leaves, frees the place.

A burst may wait longer than that, as its clients would only come again. From the first refusal on answers say
(`PACE_HEADER`) how far apart requests may come so that a few more are let in than get done; `serve.proxy` keeps to it
and refuses the rest before they cost this process anything. When refusals, the proxy's too, outnumber answers it is no
burst but a storm: half as many work at a time and the queue is cut to a twelfth, the last to come first, until nobody
has been refused for a second.

Lanes are of one event loop; nothing here locks. Health, readiness, metrics and administration go through none of them.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.problems import Problem
from serve.proxy import PACE_HEADER, PACED_HEADER, STORM_S, UPLOAD_PATHS

SMOOTHING = 0.1  # weight of the newest measurement of a unit's seconds
MAX_RETRY_S = 60
MAX_DIGITS = 10  # of how many the proxy says that it has refused
MEMORY_S = 1.0  # how long refusals and answers are remembered
STORM_PLACES, STORM_QUEUE, STORM_WAIT = 2, 12, 8  # so many times fewer work and wait in a storm, and so much shorter
PACE = 1.1  # so many requests are let in for each that gets done, so that there may be more


class Recent:
    """How many events there were lately: each counts exp(-age / `MEMORY_S`)."""

    def __init__(self) -> None:
        self._value, self._at = 0.0, time.monotonic()

    def count(self, events: int = 0) -> float:
        """Note so many events; the count now."""
        now = time.monotonic()
        self._value = self._value * math.exp((self._at - now) / MEMORY_S) + events
        self._at = now
        return self._value


class Lane:
    """A queue of its own for work of one kind.

    Args:
        name: as metrics and problems say it.
        places: how many requests work at the same time.
        max_wait_s: the longest wait that is worth taking on.
        min_queue: so many may wait however slow the lane is (a burst of patient clients).
        unit_s: first guess of the seconds that one unit of cost takes.
        replicas: how many processes share the requests, each with a lane of its own.
    """

    def __init__(
        self,
        name: str,
        places: int,
        max_wait_s: float,
        min_queue: int = 0,
        unit_s: float = 0.01,
        replicas: int = 1,
    ) -> None:
        self.name, self.places, self.max_wait_s, self.min_queue = name, places, max_wait_s, min_queue
        self.working, self._replicas = 0, replicas
        self._unit_s = unit_s
        self._waiting: deque[tuple[asyncio.Future[None], float]] = deque()
        self._queued_cost = self._working_cost = 0.0
        self._busy_since: float | None = None
        self._done_cost = 0.0
        self._refused, self._answered = Recent(), Recent()
        self._storm_end = -math.inf

    @property
    def waiting(self) -> int:
        """How many are queued."""
        return len(self._waiting)

    def expected_wait_s(self) -> float:
        """How long the next one to come would wait for a place."""
        if self.working < self._may_work():
            return 0.0
        return (self._queued_cost + self._working_cost / 2) * self._unit_s

    @property
    def storm(self) -> bool:
        """Whether more were refused than answered, and more than a full queue of them; it lasts while refusals do."""
        return time.monotonic() < self._storm_end

    def refuse_early(self, paced: int = 0) -> None:
        """Raise the problem that `place` would, before a body is read for nothing.

        Args:
            paced: so many others the proxy has refused meanwhile.
        """
        if paced:
            self._note_refused(paced)
        wait = self.expected_wait_s()
        if self._is_full(wait):
            raise self._refusal(wait)

    @asynccontextmanager
    async def place(self, cost: float, deadline: float = math.inf) -> AsyncIterator[None]:
        """Work in this lane, after waiting for a place.

        Args:
            cost: how much work it is.
            deadline: `time.monotonic()` after which nobody wants the answer.

        Raises:
            Problem: 503 `overloaded`, at once when the wait would be too long.
        """
        if self.working < self._may_work() and not self._waiting:
            self._enter(cost)
        else:
            wait = self.expected_wait_s()
            if self._is_full(wait) or time.monotonic() + wait > deadline:
                raise self._refusal(wait)
            await self._wait(cost, deadline)
        try:
            yield
        finally:
            self._leave(cost)

    def _is_full(self, wait_s: float) -> bool:
        return self.waiting >= self._may_wait() and wait_s > self._longest_wait_s()

    def _may_work(self) -> int:
        return max(1, self.places // STORM_PLACES) if self.storm else self.places

    def _may_wait(self) -> int:
        return self.min_queue // STORM_QUEUE if self.storm else self.min_queue

    def _longest_wait_s(self) -> float:
        return self.max_wait_s / STORM_WAIT if self.storm else self.max_wait_s

    def _refusal(self, wait_s: float) -> Problem:
        self._note_refused(1)
        return overloaded(self.name, wait_s)

    def _note_refused(self, count: int) -> None:
        """Begin a storm, or go on with it, where that is due; who came last then leaves a queue that is too long."""
        refused = self._refused.count(count)
        if self.storm or refused > max(self.places + self.min_queue, self._answered.count()):
            self._storm_end = time.monotonic() + STORM_S
        while self.waiting > self._may_wait():
            turn, cost = self._waiting[-1]
            if self.expected_wait_s() - cost * self._unit_s <= self._longest_wait_s():
                break
            self._waiting.pop()
            self._queued_cost -= cost
            if not turn.done():
                turn.set_exception(overloaded(self.name, self.expected_wait_s()))

    def pace_us(self) -> int:
        """How far apart requests of cost 1 may come so that a few more come than get done, in microseconds.

        What gets done is what was answered lately, or what the lane does when busy: it may have had nothing to do.
        """
        per_s = max(self._answered.count() / MEMORY_S, 1 / self._unit_s)
        return round(1e6 / (PACE * self._replicas * per_s))

    async def _wait(self, cost: float, deadline: float) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, cost))
        self._queued_cost += cost
        try:
            timeout = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
            await asyncio.wait_for(turn, timeout)
        except (TimeoutError, asyncio.CancelledError) as error:
            if (turn, cost) in self._waiting:
                self._waiting.remove((turn, cost))
                self._queued_cost -= cost
            elif not turn.cancelled() and turn.exception() is None:  # its turn came in the same moment
                self._leave(cost)
            if isinstance(error, TimeoutError):
                raise overloaded(self.name, self.expected_wait_s()) from None
            raise

    def _enter(self, cost: float) -> None:
        if self.working == 0:
            self._busy_since, self._done_cost = time.monotonic(), 0.0
        self.working += 1
        self._working_cost += cost

    def _leave(self, cost: float) -> None:
        self.working -= 1
        self._working_cost -= cost
        self._answered.count(1)
        self._learn(cost)
        while self._waiting and self.working < self._may_work():
            turn, next_cost = self._waiting.popleft()
            self._queued_cost -= next_cost
            if not turn.done():
                self._enter(next_cost)
                turn.set_result(None)

    def _learn(self, cost: float) -> None:
        """Seconds a unit, by what the busy lane gets done; several at once or batched, the rate counts."""
        now = time.monotonic()
        self._done_cost += cost
        if self._busy_since is not None and (now > self._busy_since):
            elapsed = now - self._busy_since
            if elapsed >= 0.05 or self.working == 0:
                measured = elapsed / max(self._done_cost, 1e-9)
                self._unit_s += SMOOTHING * (measured - self._unit_s)
                self._busy_since, self._done_cost = now, 0.0
        if self.working == 0:
            self._busy_since = None


class Shedding:
    """ASGI middleware: uploads that would find no place are refused before their bodies are read.

    Under overload most requests end here, and must cost next to nothing; the server drops what still comes of them. A
    refusal, and any answer while the proxy refuses or a storm lasts, says how far apart uploads may come. `note` is
    told of those that the proxy refused, where there is one (`proxied`), as otherwise anybody could say so.
    """

    def __init__(self, app: ASGIApp, lane: Lane, note: Callable[[int], None], proxied: bool) -> None:
        self._app, self._lane, self._note, self._proxied = app, lane, note, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in UPLOAD_PATHS:
            await self._app(scope, receive, send)
            return
        refused = dict(scope["headers"]).get(PACED_HEADER.encode(), b"") if self._proxied else b""
        paced = int(refused) if refused.isdigit() and len(refused) < MAX_DIGITS else 0
        if paced:
            self._note(paced)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start" and (paced or self._lane.storm or message["status"] == 503):
                pace = (PACE_HEADER.encode(), str(self._lane.pace_us()).encode())
                message = {**message, "headers": [*message["headers"], pace]}
            await send(message)

        try:
            self._lane.refuse_early(paced)
        except Problem as problem:
            await problem.response()(scope, receive, told)
            return
        await self._app(scope, receive, told)


def overloaded(lane: str, wait_s: float) -> Problem:
    """503: come back when what is queued now is done."""
    seconds = min(MAX_RETRY_S, max(1, math.ceil(wait_s)))
    return Problem(
        503,
        "overloaded",
        f"too much {lane} work is waiting (about {wait_s:.1f} s of it); try again in {seconds} s",
        headers={"Retry-After": str(seconds)},
        retry_after_s=seconds,
    )
