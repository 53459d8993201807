"""Filtered search by inverted lists: which lists to look at, which of their rows to compare exactly, when to stop.

Only lists that hold matches are looked at, the most promising first, until those left are not expected to hold one of
the k best: how similar a list's rows may be to a query follows from its centroid and its shape (`Promise`). What that
costs at most is known beforehand, so a search that is cheaper by comparing all matches exactly does that instead.
"""

import math
from dataclasses import dataclass

import numpy as np

from audiomae.search.index import Quantiser, Ranked
from audiomae.search.scanning import Allowed, Probe, Scans, Sieve, padded
from audiomae.search.spec import IndexSpec

# costs, in the time that one scanned code takes (16 ns where they were measured; their ratios are what matters)
LIST_COST = 200  # preparing the tables of a list for a query
GATHER_COST = 18  # reading a row's vector from the row store, once for all queries
COMPARE_COST = 7  # comparing it with one query
EXACT_MAX_COST = 500_000  # more is never spent on exactness alone
FEW_ROWS = 20_000  # so many matches are compared exactly without further thought
MISSED = 0.01  # of k: hits that may be expected in lists that are not looked at
REFINE = 32  # candidates per hit at the first glimpse
MAX_REFINE = 640  # and at the look, where up to so many rows match; fewer of larger crowds, whose best stand out:
CROWD_ROWS, CROWD_POWER = 50_000, 0.2  # FAISS takes as long to rank a candidate as to compare it exactly
MARGIN = 2.0  # standard deviations of the codes' noise by which a hit may look worse than it is (1 in 44 looks worse)
CODE_NOISE = 1.0  # of one-bit codes, in units of |x - c| |q - c| / sqrt(D) for a row x and a query q by a centroid c


@dataclass(frozen=True)
class Promise:
    """How similar the rows of lists may be to queries, as normal distributions.

    A row x of a list with centroid c has x = a c + r, a with the mean and variance of the list. For a query q with
    q c = t, q x has mean t a and variance t^2 var(a) + (1 - t^2) |r|^2 / D, as r points anywhere across c. `caution`
    widens it for what is not normal; a build measures how much is needed.
    """

    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, similar: np.ndarray, shape: np.ndarray, dim: int, caution: float) -> "Promise":
        """For similarities float32[Q, n] to the centroids of n lists of this `shape` float32[2, n]."""
        mean, variance = shape
        across = np.maximum(1 - mean**2 - variance, 0.02)
        spread = np.sqrt(similar**2 * variance + (1 - similar**2).clip(0) * (across / dim))
        return cls(similar * mean, caution * spread)

    def reach(self, counts: np.ndarray) -> np.ndarray:
        """The score that the best of `counts` rows of each list may have."""
        return self.mean + self.spread * np.sqrt(2 * np.log(counts + 1))

    def sorted(self, order: np.ndarray) -> "Promise":
        """The same lists in another order for each query."""
        return Promise(*(np.take_along_axis(values, order, axis=1) for values in (self.mean, self.spread)))

    def expected(self, counts: np.ndarray, score: np.ndarray) -> np.ndarray:
        """How many of `counts` rows in each list are expected above `score` float32[Q, 1]."""
        return counts * upper_tail((score - self.mean) / self.spread)


def upper_tail(z: np.ndarray) -> np.ndarray:
    """The share of a normal distribution above z, to 1e-3 of itself (Abramowitz and Stegun 26.2.17)."""
    t = 1 / (1 + 0.2316419 * np.abs(z))
    series = t * (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * series
    return np.where(z >= 0, tail, 1 - tail)


def is_exact_cheaper(count: int, k: int, queries: int, matches: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether comparing all `count` matches exactly costs no more than scanning every list that holds any.

    Args:
        count: how many rows match.
        k: hits wanted.
        queries: for how many queries at once.
        matches, sizes: int64[nlist], rows of every list that match, and all of them.
    """
    if count <= max(FEW_ROWS, 8 * k):
        return True
    exact = count * (GATHER_COST / queries + COMPARE_COST)
    if exact > EXACT_MAX_COST:
        return False
    touched = matches > 0
    return exact <= LIST_COST * int(np.count_nonzero(touched)) + int(sizes[touched].sum())


class Probing:
    """One filtered search: a glimpse at the most promising lists, then a look at all that may hold a hit.

    Args:
        quantiser: of the release, with the shape of its lists.
        matches: int64[nlist], how many rows that may be found every list holds.
        scanner: what scans lists.
        allowed: which rows may be found.
        spec: search settings.
    """

    def __init__(
        self, quantiser: Quantiser, matches: np.ndarray, scanner: Scans, allowed: Allowed, spec: IndexSpec
    ) -> None:
        assert quantiser.shape is not None
        self._quantiser, self._scanner, self._allowed, self._spec = quantiser, scanner, allowed, spec
        self._numbers = np.flatnonzero(matches)
        self._matches = matches[self._numbers]
        self._shape = quantiser.shape[:, self._numbers]

    def search(self, queries: np.ndarray, k: int) -> Ranked:
        """The k best rows of each query that were found: scores float32[Q, k] and rows int64[Q, k]."""
        similar = self._quantiser.similarities(queries)[:, self._numbers]
        promise = Promise.of(similar, self._shape, queries.shape[1], self._spec.caution)
        order = np.argsort(-promise.reach(self._matches), axis=1)
        promise, held = promise.sorted(order), np.cumsum(self._matches[order], axis=1)
        probe = Probe(self._numbers[order], np.take_along_axis(similar, order, axis=1))
        enough = np.minimum(8 * k, held[:, -1:])  # first as many lists as hold several times k matches
        first = np.maximum(1 + np.argmax(held >= enough, axis=1), min(self._spec.nprobe, held.shape[1]))
        last = np.full((len(queries), 1), -np.inf, np.float32)
        glimpse = self._look(queries, k, _first(probe, held, first), last, REFINE)
        # now that there is a k-th score to beat: all that is needed, the first lists again
        until = np.maximum(self._until(promise, held, glimpse[0]), first)
        refine = MAX_REFINE * min(1.0, CROWD_ROWS / int(held.max())) ** CROWD_POWER
        return self._look(queries, k, _first(probe, held, until), glimpse[0][:, -1:], refine)

    def _look(self, queries: np.ndarray, k: int, lists: tuple[Probe, int], last: np.ndarray, refine: float) -> Ranked:
        """The k best rows in some lists, where they beat the k-th score found before."""
        probe, crowd = lists
        sieve = Sieve(last, self._margin(probe, queries.shape[1]), min(round(k * refine), crowd))
        return padded(*self._scanner.sift(queries, k, probe, sieve, self._allowed), k)

    @staticmethod
    def _until(promise: Promise, held: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """How many lists have to be looked at, given the k-th score found so far."""
        expected = promise.expected(np.diff(held, axis=1, prepend=0), scores[:, -1:])
        remaining = np.cumsum(expected[:, ::-1], axis=1)[:, ::-1]  # in this list and those after it
        until: np.ndarray = np.count_nonzero(remaining > MISSED * scores.shape[1], axis=1)
        return until

    def _margin(self, probe: Probe, dim: int) -> np.ndarray:
        """How much worse than it is a row of these lists may look by its codes, float32[Q, 1]."""
        assert self._quantiser.shape is not None
        within = 2 - 2 * self._quantiser.shape[0][probe.lists]
        squares = np.where(probe.lists >= 0, within.clip(0) * (2 - 2 * probe.similar).clip(0), 0).sum(axis=1)
        count = np.count_nonzero(probe.lists >= 0, axis=1)
        margin: np.ndarray = MARGIN * CODE_NOISE * np.sqrt(squares / np.maximum(count, 1) / dim)
        return margin[:, None].astype(np.float32)


def _first(probe: Probe, held: np.ndarray, count: np.ndarray) -> tuple[Probe, int]:
    """The first lists of each query, `count` int64[Q] of them, and how many matches they hold at most."""
    inside = np.arange(int(count.max())) < count[:, None]
    lists, similar = (values[:, : inside.shape[1]] for values in probe)
    crowd = int(np.take_along_axis(held, count[:, None] - 1, axis=1).max())
    return Probe(np.where(inside, lists, -1), similar), crowd
