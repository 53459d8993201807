"""Retrieval metrics over labelled vectors: numpy only, so that training can call them after every epoch.

A query ranks the gallery by cosine similarity; a gallery row is relevant when it carries the query's label.

===========  =========================================================================================
mAP          mean over queries of average precision: the mean, over the relevant rows, of the precision
             at that row's rank (Manning et al., *Introduction to Information Retrieval*, section 8.4)
R@k          share of queries with at least one relevant row among the first k (hit rate)
P@k          share of relevant rows among the first k
nDCG@k       discounted gain with binary relevance over that of the ideal ranking (Järvelin & Kekäläinen 2002)
kNN          accuracy of the label voted by the first k rows, weighted exp(similarity / 0.07) (Wu et al. 2018,
             *Unsupervised Feature Learning via Non-Parametric Instance Discrimination*)
===========  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from audiomae.vectors import normalised

DEFAULT_KS = (1, 5, 10)
KNN_TEMPERATURE = 0.07
_SIMILARITIES_PER_BLOCK = 8_000_000  # float32: 32 MB of similarities in memory at a time

FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class QueryScores:
    """What each of Q queries scored. Row i of every array belongs to query i.

    ``values`` holds float64[Q] arrays by metric name (``AP``, ``R@1`` ...); NaN for a query whose label has no
    candidate in the gallery. ``top`` int64[Q, T] are the gallery rows found, nearest first (-1 = none left) and
    ``top_scores`` float32[Q, T] their cosine similarities. ``voted`` is the label that kNN gave.
    """

    labels: npt.NDArray[Any]
    values: Mapping[str, npt.NDArray[np.float64]]
    top: npt.NDArray[np.int64]
    top_scores: npt.NDArray[np.float32]
    voted: npt.NDArray[Any]
    num_gallery: int
    query_rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.labels)


class Labelled(NamedTuple):
    """Rows with their labels.

    ``vectors`` float[N, D], normalised where they are scored; ``labels`` [N] one class a row, of any hashable type;
    ``ids`` [N] or None: rows of one id are the same recording and never find each other.
    """

    vectors: npt.ArrayLike
    labels: npt.ArrayLike
    ids: npt.ArrayLike | None = None


def score_queries(
    queried: Labelled, searched: Labelled, *, ks: Sequence[int] = DEFAULT_KS, knn_k: int = 10
) -> QueryScores:
    """Score every query against the gallery.

    Args:
        queried: the Q queries.
        searched: the G gallery rows. One with the query's id is the query itself (or another window of the same
            recording) and is no candidate for it.
        ks: the cut-offs of R@k, P@k and nDCG@k.
        knn_k: how many neighbours vote.

    Equal similarities are ordered by a fixed shuffle of the gallery, so a collapsed encoder scores chance and does
    not profit from a gallery that happens to be sorted by label.

    Raises:
        ValueError: shapes that do not fit, an empty side, or non-finite vectors.
    """
    queries, labels = _checked("query", queried)
    gallery, gallery_classes = _checked("gallery", searched)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"query vectors have {queries.shape[1]} dimensions, gallery vectors {gallery.shape[1]}")
    if (queried.ids is None) != (searched.ids is None):
        raise ValueError("ids of queries and of the gallery go together: give both or neither")
    if not ks or min(ks) < 1 or knn_k < 1:
        raise ValueError(f"ks and knn_k must be positive, got ks={tuple(ks)}, knn_k={knn_k}")

    classes, codes = np.unique(np.concatenate([labels, gallery_classes]), return_inverse=True)
    query_codes, gallery_codes = codes[: len(labels)], codes[len(labels) :]
    shuffle = np.random.default_rng(0).permutation(len(gallery))
    gallery, gallery_codes = gallery[shuffle], gallery_codes[shuffle]
    own_query, own_gallery = _same_id_codes(queried.ids, searched.ids, shuffle)

    blocks = []
    for rows in _blocks(len(queries), len(gallery)):
        similarity = queries[rows] @ gallery.T
        if own_query is not None and own_gallery is not None:
            similarity[own_query[rows, None] == own_gallery[None, :]] = -np.inf
        blocks.append(_score_block(similarity, query_codes[rows], gallery_codes, len(classes), tuple(ks), knn_k))
    values = {name: np.concatenate([b.values[name] for b in blocks]) for name in blocks[0].values}
    top = np.concatenate([b.top for b in blocks])
    return QueryScores(
        labels=labels,
        values=values,
        top=np.where(top >= 0, shuffle[top], -1),
        top_scores=np.concatenate([b.top_scores for b in blocks]),
        voted=classes[np.concatenate([b.voted for b in blocks])],
        num_gallery=len(gallery),
        query_rows=np.arange(len(labels)),
    )


def score_protocol(
    rows: Labelled,
    *,
    groups: npt.ArrayLike | None = None,
    query_groups: Sequence[Any] | None = None,
    query_rows: npt.ArrayLike | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    knn_k: int = 10,
) -> QueryScores:
    """Score one labelled set against itself: cross-group when ``groups`` is given, leave-one-out otherwise.

    Args:
        rows: the N rows; without ids each is a recording of its own.
        groups: [N] (folds); queries of a group search all the other groups.
        query_groups: only these groups ask; default all of them.
        query_rows: int[M]; only these rows ask (a sample of a large set).

    Returns scores whose ``query_rows`` and ``top`` are row numbers of ``rows``.
    """
    data, classes = _checked("vectors", rows)
    own = np.arange(len(data)) if rows.ids is None else np.asarray(rows.ids)
    asking = np.zeros(len(data), bool)
    asking[np.arange(len(data)) if query_rows is None else np.asarray(query_rows, np.int64)] = True
    everything = np.arange(len(data))
    if groups is None:
        splits = [(everything[asking], everything)]
    else:
        splits = _group_splits(np.asarray(groups), asking, query_groups)
    parts = []
    for queries, gallery in splits:
        sides = (Labelled(data[side], classes[side], own[side]) for side in (queries, gallery))
        found = score_queries(*sides, ks=ks, knn_k=knn_k)
        parts.append((queries, gallery, found))
    return _join(parts)


def summarise(scores: QueryScores) -> dict[str, Any]:
    """The means of ``scores``, overall and per class.

    Returns ``{"mAP", "R@k"..., "P@k"..., "nDCG@k"..., "kNN", "num_queries", "num_gallery", "queries_without_match",
    "per_class": {label: {the same metrics, "num_queries"}}}``. Queries without any relevant candidate are counted in
    ``queries_without_match`` and left out of the means.
    """
    matched = ~np.isnan(scores.values["AP"])
    summary: dict[str, Any] = {
        **mean_values(scores.values),
        "num_queries": len(scores),
        "num_gallery": scores.num_gallery,
        "queries_without_match": int((~matched).sum()),
    }
    summary["per_class"] = {
        str(label): {
            **mean_values({name: column[scores.labels == label] for name, column in scores.values.items()}),
            "num_queries": int((scores.labels == label).sum()),
        }
        for label in np.unique(scores.labels)
    }
    return summary


def mean_values(values: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, float]:
    """Mean of each metric over the queries that have one, 0.0 where none has; ``AP`` becomes ``mAP``."""
    means = {}
    for name, column in values.items():
        known = column[~np.isnan(column)]
        means["mAP" if name == "AP" else name] = float(known.mean()) if len(known) else 0.0
    return means


@dataclass(frozen=True)
class _Block:
    values: dict[str, npt.NDArray[np.float64]]
    top: npt.NDArray[np.int64]
    top_scores: npt.NDArray[np.float32]
    voted: npt.NDArray[np.int64]


def _score_block(
    similarity: FloatArray,
    query_codes: npt.NDArray[np.int64],
    gallery_codes: npt.NDArray[np.int64],
    num_classes: int,
    ks: tuple[int, ...],
    knn_k: int,
) -> _Block:
    """All metrics of a block of queries from similarity float32[B, G] (-inf = no candidate)."""
    order = np.argsort(-similarity, axis=1, kind="stable")
    ranked = np.take_along_axis(similarity, order, axis=1)
    candidate = np.isfinite(ranked)
    relevant = (gallery_codes[order] == query_codes[:, None]) & candidate
    num_relevant = relevant.sum(axis=1)
    matched = num_relevant > 0

    found_so_far = np.cumsum(relevant, axis=1)
    precision = found_so_far / np.arange(1, relevant.shape[1] + 1)
    values = {"AP": (precision * relevant).sum(axis=1) / np.maximum(num_relevant, 1)}
    discount = 1.0 / np.log2(np.arange(2, max(ks) + 2))
    for k in ks:
        depth = min(k, relevant.shape[1])
        gain = (relevant[:, :depth] * discount[:depth]).sum(axis=1)
        ideal = np.cumsum(discount[:k])[np.clip(num_relevant, 1, k) - 1]
        values[f"R@{k}"] = (found_so_far[:, depth - 1] > 0).astype(np.float64)
        values[f"P@{k}"] = found_so_far[:, depth - 1] / k
        values[f"nDCG@{k}"] = gain / ideal
    voted = _vote(gallery_codes[order[:, :knn_k]], ranked[:, :knn_k], num_classes)
    values["kNN"] = (voted == query_codes).astype(np.float64)

    width = max(*ks, knn_k)
    top, top_scores = order[:, :width], ranked[:, :width]
    return _Block(
        values={name: np.where(matched, column, np.nan) for name, column in values.items()},
        top=np.where(np.isfinite(top_scores), top, -1),
        top_scores=top_scores.astype(np.float32),
        voted=voted,
    )


def _vote(codes: npt.NDArray[np.int64], scores: FloatArray, num_classes: int) -> npt.NDArray[np.int64]:
    """The class with the most weight among neighbours ``codes`` int64[B, K] of similarity ``scores`` float[B, K]."""
    best = np.where(np.isfinite(scores[:, :1]), scores[:, :1], 0.0)
    weights = np.exp((scores - best) / KNN_TEMPERATURE)  # exp(-inf) = 0 for a row that is no candidate
    votes = np.zeros((len(codes), num_classes))
    np.add.at(votes, (np.arange(len(codes))[:, None], codes), weights)
    return votes.argmax(axis=1)


def _checked(name: str, rows: Labelled) -> tuple[FloatArray, npt.NDArray[Any]]:
    """L2-normalised float32[N, D] and labels [N]; ValueError saying what is wrong with them."""
    data, classes = np.asarray(rows.vectors, np.float32), np.asarray(rows.labels)
    if data.ndim != 2 or len(data) == 0:
        raise ValueError(f"{name}: expected vectors [rows, dim] with at least one row, got shape {data.shape}")
    if classes.shape != (len(data),):
        raise ValueError(f"{name}: {len(data)} vectors but labels of shape {classes.shape}")
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data).all(axis=1)).sum())
        raise ValueError(
            f"{name}: {bad} of {len(data)} vectors hold NaN or infinity; the encoder that made them is broken"
        )
    return normalised(data), classes


def _same_id_codes(
    query_ids: npt.ArrayLike | None, gallery_ids: npt.ArrayLike | None, shuffle: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64] | None]:
    """Ids of any type as small integers that compare fast."""
    if query_ids is None or gallery_ids is None:
        return None, None
    ids = np.asarray(query_ids), np.asarray(gallery_ids)
    codes = np.unique(np.concatenate(ids), return_inverse=True)[1]
    return codes[: len(ids[0])], codes[len(ids[0]) :][shuffle]


def _blocks(num_queries: int, num_gallery: int) -> Iterator[slice]:
    step = max(1, _SIMILARITIES_PER_BLOCK // num_gallery)
    for start in range(0, num_queries, step):
        yield slice(start, start + step)


def _group_splits(
    groups: npt.NDArray[Any], asking: npt.NDArray[np.bool_], query_groups: Sequence[Any] | None
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """(query rows, gallery rows) for each group that asks."""
    if groups.shape != asking.shape:
        raise ValueError(f"groups: expected one per vector ({len(asking)}), got shape {groups.shape}")
    present = np.unique(groups)
    if len(present) < 2:
        raise ValueError(f"groups: expected at least two, got only {present.tolist()}: the gallery would be empty")
    wanted = present if query_groups is None else np.asarray(query_groups)
    splits = []
    for group in wanted.tolist():
        if group not in present:
            raise ValueError(f"query group {group!r} is not in the data; it has {present.tolist()}")
        inside = groups == group
        if (inside & asking).any():
            splits.append((np.flatnonzero(inside & asking), np.flatnonzero(~inside)))
    if not splits:
        raise ValueError("no query is left: query_groups and query_rows have no row in common")
    return splits


def _join(parts: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], QueryScores]]) -> QueryScores:
    """Scores of several (queries, gallery) splits as one, in the order of the rows."""
    rows = np.concatenate([queries for queries, _, _ in parts])
    order = np.argsort(rows, kind="stable")
    width = min(found.top.shape[1] for _, _, found in parts)
    top = np.concatenate([np.where(f.top >= 0, gallery[f.top], -1)[:, :width] for _, gallery, f in parts])
    first = parts[0][2]
    return QueryScores(
        labels=np.concatenate([f.labels for _, _, f in parts])[order],
        values={name: np.concatenate([f.values[name] for _, _, f in parts])[order] for name in first.values},
        top=top[order],
        top_scores=np.concatenate([f.top_scores[:, :width] for _, _, f in parts])[order],
        voted=np.concatenate([f.voted for _, _, f in parts])[order],
        num_gallery=round(sum(f.num_gallery for _, _, f in parts) / len(parts)),
        query_rows=rows[order],
    )
