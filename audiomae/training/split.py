"""Which files are held out, and what a person should know about the split before the training begins."""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.artifacts.features import FeatureStore
from audiomae.training.columns import Texts, coded, parts, starts

FEW_HELD_OUT, FEW_STEPS = 20, 100
ENDING = r"\.[^./]+$"
TAKE = r"^(.+)[-_ .](?:[A-Za-z]|(?:part|seg|segment|chunk|take)[-_]?\d+)$"  # of RE2


def source_of(uri: str) -> str:
    """What a file was cut from, as far as its name tells: `1-100032-A.ogg` and `1-100032-B.ogg` are takes of one."""
    return str(_sources(pa.array([uri]))[0].as_py())


def _sources(uris: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    stems = pc.replace_substring_regex(uris, ENDING, "")
    return pc.if_else(pc.match_substring_regex(stems, TAKE), pc.replace_substring_regex(stems, TAKE, r"\1"), uris)


def source_ranks(uris: Texts, seed: int) -> npt.NDArray[np.uint64]:
    """uint64[N]: a hash of (seed, source) that stands for the source of each file, and for its place in a draw."""
    ranks = np.empty(len(uris), np.uint64)
    for start, part in zip(starts(len(uris)), parts(uris), strict=True):
        names, codes = coded(_sources(part))
        drawn = b"".join(_rank(seed, name) for name in names.to_pylist())
        ranks[start : start + len(codes)] = np.frombuffer(drawn, ">u8")[codes]
    return ranks


def held_out(uris: Texts, labels: Texts, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """About the same share of each class, chosen by a hash: a file stays on its side when others come or go.

    Files cut from one source (`source_of`) are on one side, since a clip that hears its own recording again finds it.
    """
    chosen = np.zeros(len(uris), bool)
    if not len(uris):
        return chosen
    ranks, (names, label_of) = source_ranks(uris, seed), coded(labels)
    order = np.lexsort((ranks, label_of))
    label_of, ranks = label_of[order], ranks[order]
    first_of_class = np.diff(label_of, prepend=label_of[0] - 1) != 0
    first_of_source = first_of_class | (np.diff(ranks, prepend=ranks[0]) != 0)
    at = np.arange(len(order))
    begins = np.maximum.accumulate(np.where(first_of_class, at, 0))
    before = np.maximum.accumulate(np.where(first_of_source, at, 0)) - begins  # files of the class in earlier sources
    sizes = np.bincount(label_of + 1, minlength=len(names) + 1)
    wanted = np.rint(fraction * sizes)  # to even, as round() does
    chosen[order] = before < wanted[label_of + 1]
    return chosen


def _rank(seed: int, source: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{source}".encode(), digest_size=8).digest()


def repeated(store: FeatureStore, validation: npt.NDArray[np.bool_]) -> int:
    """How many held-out clips sound exactly like one that is trained on (the same cached features)."""
    digests = []
    for clip in range(len(store)):
        features = np.empty((int(store.frames[clip]), store.bands), np.float16)
        store.read(clip, 0, len(features), features)
        digests.append(hashlib.blake2b(features.tobytes(), digest_size=16).digest())
    trained = {digest for digest, out in zip(digests, validation, strict=True) if not out}
    return sum(out and digest in trained for digest, out in zip(digests, validation, strict=True))


def cautions(items: pa.Table, steps: int, copies: int = 0) -> list[str]:
    """What to know of a split (`items` of `build_items`) and of the training; none when all is well.

    Args:
        steps: optimiser steps of the whole training.
        copies: as `repeated` counts them.
    """
    validation = np.asarray(items["validation"])
    uris, held = items["uri"], items["uri"].filter(pa.array(validation))
    found = []
    known = pc.unique(items["label"].filter(pa.array(~validation))).drop_null()
    if len(known) == 1:
        found.append(f"every clip that is trained on has the label {known[0].as_py()!r}: labels teach nothing here")
    if steps < FEW_STEPS:
        found.append(f"only {steps} optimiser steps: too few to learn much; raise epochs")
    files = pc.count_distinct(held).as_py()
    if not files:
        found.append("no clip is held out: nothing will say how well it does on sounds it has not heard")
    elif files < FEW_HELD_OUT:
        found.append(f"only {files} files are held out: validation figures are coarse")
    sources = source_ranks(uris, seed=0)
    shared = np.isin(sources[validation], sources[~validation])
    if shared.any():
        found.append(
            f"{int(shared.sum())} held-out clips come from recordings that are trained on too (by their names), so "
            "validation flatters"
        )
    if copies:
        found.append(f"{copies} held-out clips are copies of clips that are trained on, so validation flatters")
    return found
