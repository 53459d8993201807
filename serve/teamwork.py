"""How many threads a batch gets that has the cores to itself: one, or a team, whichever is faster here and now."""

import itertools
from collections import deque
from statistics import median

MOST = 4  # threads of a team: a few windows are not worth more
REMEMBERED = 15  # measurements of each way; the middle one counts, as a team now and then takes twice as long
TRIED, EVERY = 9, 256  # of so many choices the last few go to the way that was slower; the first finds cold caches


class Teamwork:
    """Times both and takes the faster one.

    On cores of its own a team of two takes 0.64 of the time of one thread. On the two threads of one core it gains
    nothing, and beside a busy neighbour it takes twice as long, because its threads wait for each other. Which of these
    a machine is changes with what else it does, so the slower way is tried again now and then.

    Args:
        cores: how many there are for it.
    """

    def __init__(self, cores: int) -> None:
        self._seconds = {threads: deque[float](maxlen=REMEMBERED) for threads in {1, min(cores, MOST)}}
        self._choices = itertools.count()

    def choose(self) -> int:
        """Threads for the next batch."""
        faster, *slower = sorted(self._seconds, key=self._usual)
        return slower[0] if slower and next(self._choices) % EVERY >= EVERY - TRIED else faster

    def learn(self, threads: int, seconds: float) -> None:
        """Note what a window took with so many threads."""
        self._seconds[threads].append(seconds)

    def _usual(self, threads: int) -> float:
        known = self._seconds[threads]
        return median(known) if len(known) == REMEMBERED else 0.0  # each is tried a few times first
