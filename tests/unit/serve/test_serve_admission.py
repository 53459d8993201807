"""Who works, who waits and who is told to come back."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serve.admission import PACE, STORM_QUEUE, Lane, Recent, Shedding
from serve.arguments import ServeArgs
from serve.lanes import BURST, UNEVEN, Lanes
from serve.problems import Problem
from serve.proxy import PACE_HEADER, PACED_HEADER


def lane(**options: Any) -> Lane:
    return Lane("test", **{"places": 1, "max_wait_s": 1.0, "unit_s": 1.0, **options})


async def occupy(lane: Lane, cost: float, until: asyncio.Event, log: list[str] | None = None, name: str = "") -> None:
    async with lane.place(cost):
        if log is not None:
            log.append(name)
        await until.wait()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(main())


def test_those_who_wait_come_in_their_order() -> None:
    async def scenario() -> None:
        busy, log, gate = lane(max_wait_s=100), [], asyncio.Event()
        tasks = [asyncio.create_task(occupy(busy, 1, gate, log, name)) for name in "abc"]
        await asyncio.sleep(0)
        assert (busy.working, busy.waiting, log) == (1, 2, ["a"])
        gate.set()
        await asyncio.gather(*tasks)
        assert (busy.working, busy.waiting, log) == (0, 0, ["a", "b", "c"])

    run(scenario)


@pytest.mark.parametrize("early", [True, False])
def test_a_wait_that_would_be_too_long_is_refused_at_once_with_when_to_come_back(early: bool) -> None:
    async def scenario() -> None:
        busy, gate = lane(max_wait_s=2.0), asyncio.Event()
        tasks = [asyncio.create_task(occupy(busy, 4, gate)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Problem) as caught:
            if early:
                busy.refuse_early()
            await busy.place(1).__aenter__()
        assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
        assert caught.value.headers == {"Retry-After": "6"}  # 4 queued, 2 of the 4 at work left
        gate.set()
        await asyncio.gather(*tasks)
        busy.refuse_early()

    run(scenario)


def test_a_burst_of_so_many_may_wait_however_slow_it_is() -> None:
    async def scenario() -> None:
        busy, gate = lane(max_wait_s=0.001, min_queue=2), asyncio.Event()
        tasks = [asyncio.create_task(occupy(busy, 9, gate)) for _ in range(4)]
        await asyncio.sleep(0)
        assert busy.waiting == 2
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, Problem) for result in results] == [False, False, False, True]

    run(scenario)


def test_a_storm_cuts_the_queue_and_its_end_restores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        clock = [100.0]
        monkeypatch.setattr("serve.admission.time.monotonic", lambda: clock[0])
        busy, gate = lane(max_wait_s=0.001, min_queue=2 * STORM_QUEUE, replicas=2), asyncio.Event()
        tasks = [asyncio.create_task(occupy(busy, 1, gate)) for _ in range(1 + 2 * STORM_QUEUE)]
        await asyncio.sleep(0)
        for _ in range(2 * STORM_QUEUE):  # as many as a burst may have
            with pytest.raises(Problem):
                busy.refuse_early()
        assert (busy.storm, busy.waiting) == (False, 2 * STORM_QUEUE)
        for _ in range(2):
            with pytest.raises(Problem):
                busy.refuse_early()
        assert (busy.storm, busy.waiting) == (True, 2)
        assert busy.pace_us() == round(1e6 / PACE / 2)  # two replicas, none answered
        await asyncio.sleep(0)
        shed = [task.exception() for task in tasks if task.done()]
        assert len(shed) == 2 * STORM_QUEUE - 2 and all(isinstance(error, Problem) for error in shed)
        assert not tasks[1].done() and not tasks[2].done()  # who came first stays
        clock[0] += 0.9
        with pytest.raises(Problem):
            busy.refuse_early()
        clock[0] += 0.9
        assert busy.storm  # as long as there are refusals
        clock[0] += 0.2
        assert not busy.storm
        more = [asyncio.create_task(occupy(busy, 1, gate)) for _ in range(2 * STORM_QUEUE - 2)]
        await asyncio.sleep(0)
        assert busy.waiting == 2 * STORM_QUEUE
        gate.set()
        await asyncio.gather(*tasks[:3], *more)
        assert (busy.working, busy.waiting) == (0, 0)

    run(scenario)


def test_in_a_storm_half_as_many_work(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        busy, gate = lane(places=4, min_queue=STORM_QUEUE), asyncio.Event()
        tasks = [asyncio.create_task(occupy(busy, 1, gate)) for _ in range(4)]
        await asyncio.sleep(0)
        monkeypatch.setattr(Lane, "storm", True)
        assert busy.expected_wait_s() > 0
        last = asyncio.create_task(occupy(busy, 1, asyncio.Event()))
        await asyncio.sleep(0)
        for left in (3, 2):
            tasks.pop().cancel()
            await asyncio.sleep(0)
            assert (busy.working, busy.waiting) == (left, 1)
        tasks.pop().cancel()
        await asyncio.sleep(0)
        assert (busy.working, busy.waiting) == (2, 0)
        for task in (last, *tasks):
            task.cancel()
        await asyncio.gather(last, *tasks, return_exceptions=True)

    run(scenario)


def test_the_pace_is_that_of_the_busy_lane_or_of_the_last_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paced by its answers alone, a lane that had nothing to do would be given nothing to do."""

    async def scenario() -> None:
        clock = [100.0]
        monkeypatch.setattr("serve.admission.time.monotonic", lambda: clock[0])
        idle = lane(unit_s=0.01, replicas=2)
        assert idle.pace_us() == round(1e6 / PACE / 2 / 100)
        for _ in range(200):  # 50 a second
            async with idle.place(1):
                clock[0] += 0.02
            assert idle.pace_us() <= round(1e6 / PACE / 2 / 50)
            clock[0] += 1.0
        assert idle.pace_us() == pytest.approx(1e6 / PACE / 2 / 50, rel=0.01)

    run(scenario)


def test_an_upload_is_refused_before_its_body_and_refusals_say_the_pace() -> None:
    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        await Response("fine")(scope, receive, send)

    async def scenario() -> None:
        busy, gate, noted = lane(max_wait_s=0.001, min_queue=STORM_QUEUE), asyncio.Event(), []
        proxied = Shedding(inside, busy, noted.append, proxied=True)

        async def ask(path: str, *headers: tuple[bytes, bytes], app: Shedding = proxied) -> tuple[int, bytes | None]:
            found: list[tuple[int, bytes | None]] = []

            async def send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    found.append((message["status"], dict(message["headers"]).get(PACE_HEADER.encode())))

            async def receive() -> Message:
                raise AssertionError("a body was asked for")

            await app({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
            return found[0]

        paced, pace = (PACED_HEADER.encode(), b"7"), str(round(1e6 / PACE)).encode()
        assert [await ask("/search"), await ask("/search", paced), noted] == [(200, None), (200, pace), [7]]
        assert await ask("/search", paced, app=Shedding(inside, busy, noted.append, proxied=False)) == (200, None)
        for claim in (b"9" * 5000, b"-1", b"x", b""):
            assert await ask("/search", (PACED_HEADER.encode(), claim)) == (200, None)
        assert noted == [7] and not busy.storm
        busy._refused = Recent()
        tasks = [asyncio.create_task(occupy(busy, 1, gate)) for _ in range(1 + STORM_QUEUE)]
        await asyncio.sleep(0)
        assert {await ask("/embed") for _ in range(STORM_QUEUE)} == {(503, pace)} and not busy.storm
        assert await ask("/search", paced) == (503, pace) and busy.storm  # what the proxy refuses counts
        assert await ask("/search/vector") == (200, None)
        end = busy._storm_end
        busy._refused = Recent()
        assert await ask("/search", paced) == (503, pace) and busy._storm_end > end
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


def test_who_is_shed_and_leaves_in_the_same_moment_frees_no_place_it_never_had(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        busy, gate = lane(max_wait_s=0.001, min_queue=STORM_QUEUE), asyncio.Event()
        tasks = [asyncio.create_task(occupy(busy, 1, gate)) for _ in range(1 + STORM_QUEUE)]
        await asyncio.sleep(0)
        for _ in range(2 + STORM_QUEUE):
            with pytest.raises(Problem):
                busy.refuse_early()
        assert (busy.storm, busy.working, busy.waiting) == (True, 1, 1)
        for task in tasks[2:]:
            task.cancel()
        assert all(isinstance(end, BaseException) for end in await asyncio.gather(*tasks[2:], return_exceptions=True))
        assert (busy.working, busy.waiting) == (1, 1)
        gate.set()
        await asyncio.gather(*tasks[:2])
        assert (busy.working, busy.waiting) == (0, 0)

    run(scenario)


def test_who_cannot_be_served_before_the_deadline_is_refused_and_who_waits_past_it_leaves() -> None:
    async def scenario() -> None:
        busy, gate = lane(max_wait_s=100.0), asyncio.Event()
        first = asyncio.create_task(occupy(busy, 10, gate))
        await asyncio.sleep(0)
        with pytest.raises(Problem):
            await busy.place(1, deadline=time.monotonic() + 1).__aenter__()
        patient = lane(max_wait_s=100.0, unit_s=0.0)
        second = asyncio.create_task(occupy(patient, 1, gate))
        await asyncio.sleep(0)
        with pytest.raises(Problem):
            await patient.place(1, deadline=time.monotonic() + 0.01).__aenter__()
        assert patient.waiting == 0
        gate.set()
        await asyncio.gather(first, second)
        assert patient.working == 0

    run(scenario)


def test_a_client_that_leaves_the_queue_frees_its_place() -> None:
    async def scenario() -> None:
        busy, gate = lane(max_wait_s=100), asyncio.Event()
        first, second, third = (asyncio.create_task(occupy(busy, 1, gate)) for _ in range(3))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0.01)
        assert (busy.working, busy.waiting) == (1, 1)
        gate.set()
        await asyncio.gather(first, third)
        assert busy.expected_wait_s() == 0

    run(scenario)


def test_it_learns_how_fast_it_is() -> None:
    async def scenario() -> None:
        busy, done = lane(unit_s=100.0, places=4), asyncio.Event()
        done.set()
        for _ in range(200):
            await occupy(busy, 1, done)
        gate = asyncio.Event()
        tasks = [asyncio.create_task(occupy(busy, 1, gate)) for _ in range(6)]
        await asyncio.sleep(0)
        assert busy.waiting == 2  # at the first guess the wait would have been minutes
        gate.set()
        await asyncio.gather(*tasks)

    run(scenario)


def test_a_burst_is_let_in_and_no_more_than_that() -> None:
    """What is at work and waiting together bounds how long an accepted request takes; in a storm fewer wait."""

    async def run(lane: str, clients: int, replicas: int = 1) -> int:
        lanes = Lanes(ServeArgs(index="unused", max_wait_s=0.1, api_replicas=replicas))
        end = asyncio.Event()

        async def work() -> bool:
            try:
                async with lanes.place(lane, 20.0, 60.0):
                    await end.wait()
            except Problem as problem:
                assert problem.code == "overloaded"
                return False
            return True

        asked = [asyncio.create_task(work()) for _ in range(clients)]
        await asyncio.sleep(0)
        end.set()
        return sum(await asyncio.gather(*asked))

    names = ("short", "light", "media")
    assert [asyncio.run(run(name, BURST + BURST // 2)) for name in names] == [BURST] * 3
    assert asyncio.run(run("short", BURST, replicas=2)) == BURST // 2 + UNEVEN
    places = [Lanes(ServeArgs(index="unused")).all[name].places for name in names]
    storm = [count + (BURST - count) // STORM_QUEUE for count in places]  # those at work stay
    assert [asyncio.run(run(name, 10 * BURST)) for name in names] == storm
