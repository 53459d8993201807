"""Which release a replica answers from, while it is swapped."""

import asyncio
import threading
from typing import Any

from serve.serving import ServedRelease


class Shared:
    """The shared choice; a look at it can be held up after it has seen what it will say."""

    def __init__(self) -> None:
        self.version, self.looked, self.go_on = "v1", threading.Event(), threading.Event()
        self.go_on.set()

    def get(self) -> str:
        version = self.version
        self.looked.set()
        assert self.go_on.wait(60)
        return version

    def set(self, version: str) -> None:
        self.version = version


class Encoder:
    """Loads everywhere at once."""

    async def load_everywhere(self, version: str, timeout_s: float) -> None:
        """Nothing to do."""


class Release(ServedRelease):
    """Without a release on disk: what is served is its version."""

    async def describe(self, version: str) -> Any:
        class Served:
            pass

        served: Any = Served()
        served.version = version
        return served


async def opened(version: str) -> None:
    """A sibling that has opened a version."""


async def nobody() -> None:
    """No sibling that would have to follow."""


def test_a_look_at_the_old_choice_does_not_undo_a_reload() -> None:
    async def scenario() -> list[str]:
        shared = Shared()
        release = Release("unused", shared, Encoder(), None)  # type: ignore[arg-type]
        seen = [(await release.current()).version]
        release._checked_at = -1e9  # a second later
        shared.looked.clear()
        shared.go_on.clear()
        slow = asyncio.create_task(release.current())
        await asyncio.to_thread(shared.looked.wait, 60)  # it has seen v1 and is on its way back
        reload = asyncio.create_task(release.reload("v2", opened, nobody))
        while shared.version != "v2":
            await asyncio.sleep(0)
        for _ in range(100):  # as far as the reload gets meanwhile
            await asyncio.sleep(0)
        shared.go_on.set()
        await asyncio.gather(slow, reload)
        return [*seen, (await release.current()).version]

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == ["v1", "v2"]


def test_when_a_reload_returns_every_replica_answers_from_the_new_release() -> None:
    async def lost() -> None:
        raise RuntimeError("a replica died")

    async def scenario() -> list[str]:
        shared = Shared()
        first, second = (Release("unused", shared, Encoder(), None) for _ in range(2))  # type: ignore[arg-type]
        seen = [(await release.current()).version for release in (first, second)]
        await first.reload("v2", opened, second.follow)
        seen += [(await release.current()).version for release in (first, second)]
        await second.reload("v3", opened, lost)  # who was not reached looks again by itself
        first._checked_at = -1e9
        return seen + [(await release.current()).version for release in (first, second)]

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == ["v1", "v1", "v2", "v2", "v3", "v3"]
