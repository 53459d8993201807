"""How many threads a batch gets that has the cores to itself: one, or a team, whichever is faster here and now."""

from collections import deque
from statistics import median

MOST = 4  # threads of a team: a few windows are not worth more
EVERY, TRIED = 64, 5  # of so many batches the last few go to the way that was slower
COMPARISONS = 5  # that are remembered; the middle one counts, as either way now and then takes twice as long


class Teamwork:
    """Compares both, batches of one beside batches of the other, and takes the faster one.

    On cores of its own a team of two takes 0.64 of the time of one thread. On the two threads of one core it gains
    nothing, and beside a busy neighbour it takes twice as long, because its threads wait for each other. Which of these
    a machine is changes with what else it does, and how fast it is changes too: what took how long a while ago says
    little, and what took longer just now says a lot.

    Args:
        cores: how many there are for it.
    """

    def __init__(self, cores: int) -> None:
        self._team = min(cores, MOST)
        self._faster = 1
        self._ratios = deque[float](maxlen=COMPARISONS)  # a team's seconds over those of one thread
        self._begin()

    def choose(self) -> int:
        """Threads for the next batch."""
        if self._left == 0:
            self._compare()
        self._left -= 1
        slower = self._team + 1 - self._faster
        return slower if self._left < TRIED else self._faster

    def learn(self, threads: int, seconds: float) -> None:
        """Note what a window took with so many threads."""
        self._seconds[threads].append(seconds)

    def _compare(self) -> None:
        team, one = self._seconds[self._team], self._seconds[1]
        if len(team) == len(one) == TRIED - 1:
            self._ratios.append(median(team) / median(one))
            self._faster = self._team if median(self._ratios) < 1 else 1
        self._begin()

    def _begin(self) -> None:
        self._left = EVERY if len(self._ratios) == COMPARISONS else 2 * TRIED
        # the first batch of a few finds cold caches
        self._seconds = {threads: deque[float](maxlen=TRIED - 1) for threads in (1, self._team)}
