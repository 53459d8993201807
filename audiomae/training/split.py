"""Which files are held out, and what a person should know about the split before the training begins."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from audiomae.artifacts.features import FeatureStore

FEW_HELD_OUT, FEW_STEPS = 20, 100
TAKE = re.compile(r"(.+)[-_ .](?:[A-Za-z]|(?:part|seg|segment|chunk|take)[-_]?\d+)$")


def source_of(uri: str) -> str:
    """What a file was cut from, as far as its name tells: `1-100032-A.ogg` and `1-100032-B.ogg` are takes of one."""
    found = TAKE.match(re.sub(r"\.[^./]+$", "", uri))
    return found[1] if found else uri


def held_out(uris: Sequence[str], labels: Sequence[str | None], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """About the same share of each class, chosen by a hash: a file stays on its side when others come or go.

    Files cut from one source (`source_of`) are on one side, since a clip that hears its own recording again finds it.
    """
    chosen = np.zeros(len(uris), bool)
    groups: dict[str | None, dict[str, list[int]]] = {}
    for row, (uri, label) in enumerate(zip(uris, labels, strict=True)):
        groups.setdefault(label, {}).setdefault(source_of(uri), []).append(row)
    for sources in groups.values():
        wanted = round(fraction * sum(len(rows) for rows in sources.values()))
        for source in sorted(sources, key=lambda name: _rank(seed, name)):
            if wanted <= 0:
                break
            chosen[sources[source]] = True
            wanted -= len(sources[source])
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
    labels = np.array([str(value) for value in items["label"].to_pylist()])
    uris = np.array(items["uri"].to_pylist())
    found = []
    known = {label for label in labels[~validation].tolist() if label != "None"}
    if len(known) == 1:
        found.append(f"every clip that is trained on has the label {known.pop()!r}: labels teach nothing here")
    if steps < FEW_STEPS:
        found.append(f"only {steps} optimiser steps: too few to learn much; raise epochs")
    files = len(set(uris[validation].tolist()))
    if not files:
        found.append("no clip is held out: nothing will say how well it does on sounds it has not heard")
    elif files < FEW_HELD_OUT:
        found.append(f"only {files} files are held out: validation figures are coarse")
    sources = np.array([source_of(uri) for uri in uris])
    shared = np.isin(sources[validation], sources[~validation])
    if shared.any():
        found.append(
            f"{int(shared.sum())} held-out clips come from recordings that are trained on too (by their names), so "
            "validation flatters"
        )
    if copies:
        found.append(f"{copies} held-out clips are copies of clips that are trained on, so validation flatters")
    return found
