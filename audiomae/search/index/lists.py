"""Inverted lists searched: which rows may be returned, the centroids, the codes of a segment, mapped."""

import ctypes
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from audiomae.errors import IntegrityError
from audiomae.search.index.encoding import LAYOUT_FILE, LISTS_FILE, SHAPE_FILE, TRAINED_FILE, flat_centroids
from audiomae.search.index.store import RowStore, read_index


@dataclass(frozen=True)
class Selection:
    """The rows of a segment that may be returned: `bits` is bool[N] packed little-endian, `count` how many are set."""

    bits: np.ndarray
    count: int

    @classmethod
    def of(cls, mask: np.ndarray) -> "Selection":
        """From bool[N]."""
        return cls(np.packbits(mask, bitorder="little"), int(np.count_nonzero(mask)))

    def mask(self, count: int) -> np.ndarray:
        """The selection as bool[count]."""
        return np.unpackbits(self.bits, count=count, bitorder="little").view(bool)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The rows' numbers in ascending order, int64[n]."""
        return np.flatnonzero(np.unpackbits(self.bits, bitorder="little"))

    @functools.cached_property
    def digest(self) -> str:
        """Of the bits: equal for equal selections."""
        return hashlib.blake2b(self.bits.data, digest_size=16).hexdigest()


class Quantiser:
    """The centroids that all segments of a release share.

    Args:
        directory: where `trained.faiss` and `shape.npy` lie, checked already.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / TRAINED_FILE
        shape = directory / SHAPE_FILE
        self._open(np.load(shape) if shape.exists() else None)

    def _open(self, shape: np.ndarray | None) -> None:
        self.index = read_index(self.path)
        self.nlist, self.shape = int(self.index.nlist), shape
        self.flat = flat_centroids(faiss.downcast_index(self.index.quantizer))

    @functools.cached_property
    def centroids(self) -> np.ndarray:
        """float32[nlist, D], those that `flat` holds: a view of its memory, good for as long as this object lives."""
        values: np.ndarray = faiss.rev_swig_ptr(self.flat.get_xb(), self.nlist * self.flat.d)
        return values.reshape(self.nlist, -1)

    def similarities(self, queries: np.ndarray) -> np.ndarray:
        """Of queries to the centroids of all lists, float32[Q, nlist]."""
        similar: np.ndarray = queries @ self.centroids.T
        return similar

    def nearest(self, queries: np.ndarray, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """Similarities float32[Q, nprobe] and numbers int64[Q, nprobe] of the nearest lists, best first."""
        found: tuple[np.ndarray, np.ndarray] = self.flat.search(queries, min(nprobe, self.nlist))
        return found


def shares_of_lists(sizes: np.ndarray, shares: int) -> np.ndarray:
    """To which of so many shares of a segment, about as large each, every list belongs: int64[nlist]."""
    before = np.cumsum(sizes) - sizes
    found: np.ndarray = before * shares // max(int(sizes.sum()), 1)
    return found


class Lists:
    """The codes of one segment in inverted lists, mapped.

    Args:
        quantiser: the release's.
        directory: the segment, its files checked.
        part: only this share of the lists (a number, of how many shares of about as many rows); the others are empty.
    """

    def __init__(self, quantiser: Quantiser, directory: Path, part: tuple[int, int] = (0, 1)) -> None:
        layout = np.ascontiguousarray(np.load(directory / LAYOUT_FILE), np.uint64)
        path = directory / LISTS_FILE
        self._check(layout, quantiser.nlist, path)
        self.sizes = layout[:, 0].astype(np.int64)
        layout[shares_of_lists(self.sizes, part[1]) != part[0]] = 0
        self._inverted = faiss.OnDiskInvertedLists()
        self._inverted.nlist, self._inverted.code_size = quantiser.nlist, 1  # so that a list's `capacity` is in bytes
        self._inverted.filename, self._inverted.totsize = str(path), os.path.getsize(path)
        self._inverted.read_only, self._inverted.prefetch_nthread = True, 0
        self._inverted.lists.resize(quantiser.nlist)
        ctypes.memmove(int(self._inverted.lists.data().this), layout.ctypes.data, layout.nbytes)
        if os.path.getsize(path):
            self._inverted.do_mmap()
        index = read_index(quantiser.path)
        index.own_invlists = False  # the empty ones are left to themselves
        index.invlists = self._inverted
        index.ntotal = int(layout[:, 0].sum())
        self._use(index, quantiser)

    def _use(self, index: Any, quantiser: Quantiser) -> None:
        self._index, self._quantiser = index, quantiser  # FAISS keeps bare pointers
        if index.own_fields:
            index.quantizer.this.own(True)  # freed with this line: it holds the same centroids once more, as float16
            index.own_fields = False
        index.quantizer = quantiser.flat

    @staticmethod
    def _check(layout: np.ndarray, nlist: int, path: Path) -> None:
        counts, sizes, offsets = (layout[:, i].astype(np.int64) for i in range(3))
        ends = offsets + sizes + 8 * counts
        if layout.shape != (nlist, 3) or (layout >= 2**62).any() or ends.max(initial=0) > os.path.getsize(path):
            raise IntegrityError(f"{path}: the lists do not lie where {LAYOUT_FILE} says; build the index again")

    def scan(
        self, queries: np.ndarray, k: int, lists: np.ndarray, similar: np.ndarray, selection: Selection | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows by their codes in some lists.

        Args:
            queries: float32[Q, D].
            k: how many.
            lists: int64[Q, n], -1 for none.
            similar: float32[Q, n], what `Quantiser.nearest` gave for them.
            selection: only these rows.

        Returns:
            approximate scores float32[Q, k] and rows int64[Q, k], -1 padded.
        """
        selector = None if selection is None else faiss.IDSelectorBitmap(selection.bits)
        params = faiss.SearchParametersIVF(sel=selector, nprobe=lists.shape[1])
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        lists, similar = np.ascontiguousarray(lists, np.int64), np.ascontiguousarray(similar, np.float32)
        pointers = [faiss.swig_ptr(array) for array in (lists, similar, scores, rows)]
        self._index.search_preassigned_c(len(queries), faiss.swig_ptr(queries), int(k), *pointers, False, params)
        return scores, rows


class Refined:
    """All lists of a segment with its row store behind them, searched by one call of FAISS.

    What `Quantiser.nearest`, `Lists.scan` and a comparison with the stored vectors give; those are read where they lie.

    Args:
        lists: all of them.
        store: of the same segment.
    """

    def __init__(self, lists: Lists, store: RowStore) -> None:
        self._lists, self._store = lists, store  # FAISS keeps bare pointers
        self._index = faiss.IndexRefine(lists._index, store._store)

    def search(
        self, queries: np.ndarray, k: int, nprobe: int, selection: Selection | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows by their codes in the nearest lists: exact scores float32[Q, k] and rows int64[Q, k]."""
        params = _unfiltered(nprobe) if selection is None else _refining(nprobe, faiss.IDSelectorBitmap(selection.bits))
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        pointers = [faiss.swig_ptr(array) for array in (scores, rows)]
        self._index.search_c(len(queries), faiss.swig_ptr(queries), int(k), *pointers, params)
        return scores, rows


def _refining(nprobe: int, selector: Any = None) -> Any:
    inner = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
    return faiss.IndexRefineSearchParameters(k_factor=1.0, base_index_params=inner)


# they are only read, and making them takes a tenth of a search
_unfiltered = functools.lru_cache(maxsize=64)(_refining)


class OldQuantiser(Quantiser):
    """The quantiser of a release that an older version wrote, inside its index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open(None)


class OldLists(Lists):
    """The index of a release that an older version wrote, in memory."""

    def __init__(self, quantiser: OldQuantiser) -> None:
        self._use(quantiser.index, quantiser)
        inverted = self._index.invlists
        self.sizes = np.array([inverted.list_size(number) for number in range(quantiser.nlist)], np.int64)
