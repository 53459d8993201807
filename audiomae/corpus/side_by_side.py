"""Several sources read at once, their pages handed on in order, with a bounded number of them waiting."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

READERS, PAGES_AHEAD = 16, 4

Unit = TypeVar("Unit")
Page = TypeVar("Page")


def read_side_by_side(units: Iterable[Unit], read: Callable[[Unit], Iterator[Page]]) -> Iterator[Page]:
    """`read(unit)` of each unit in turn, while those of the next few are read in threads, some pages ahead."""
    stop = threading.Event()

    def fill(unit: Unit, waiting: "queue.Queue[Page | Exception | None]") -> None:
        last: Exception | None = None
        try:
            for page in read(unit):
                if not _put(waiting, page, stop):
                    return
        except Exception as error:  # raised again where the pages are taken
            last = error
        _put(waiting, last, stop)

    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque[queue.Queue[Page | Exception | None]] = deque()
        source = iter(units)
        try:
            while True:
                for unit in islice(source, READERS - len(ahead)):
                    ahead.append(queue.Queue(PAGES_AHEAD))
                    pool.submit(fill, unit, ahead[-1])
                if not ahead:
                    return
                while (page := ahead[0].get()) is not None:
                    if isinstance(page, Exception):
                        raise page
                    yield page
                ahead.popleft()
        finally:
            stop.set()


def _put(waiting: "queue.Queue[Any]", value: Any, stop: threading.Event) -> bool:
    """Put a value as soon as there is room; False when nobody will take it any more."""
    while not stop.is_set():
        try:
            waiting.put(value, timeout=0.2)
        except queue.Full:
            continue
        return True
    return False
