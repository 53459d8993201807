"""Hits as JSON: rows of the items table become the API's objects once, and bytes straight from there."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response

from audiomae.search.hits import Hits
from serve.catalogue import HIDDEN, PLACE, json_default
from serve.queries import Answer

OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
NO_SPAN = {"query_start_s": None, "query_end_s": None}
NEAR_DUPLICATE = 0.995  # two items whose vectors are this near sound the same
KEPT_ITEMS = 4_096  # written items of a release that are kept: what is found is found again
MATCHES = b',"matches":'

Written = dict[int, tuple[bytes, bytes]]
"""Items of a release as JSON, by row: what stands before a hit's score, and its only window up to that score."""


def dumps(value: Any) -> bytes:
    """JSON, whatever the items table held: NaN becomes null, dates ISO text, bytes their length in words."""
    return orjson.dumps(value, default=json_default, option=OPTIONS)


def json_response(value: Any, status: int = 200) -> Response:
    """`value` as a JSON response."""
    return Response(dumps(value), status, media_type="application/json")


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the items table as the API shows it."""
    return {
        "id": row["id"],
        "uri": row["uri"],
        "start_s": row["start_s"],
        "end_s": row["end_s"],
        "item": {name: _safe(value) for name, value in row.items() if name not in PLACE and name not in HIDDEN},
        "links": links(row["id"]),
    }


def links(clip: int) -> dict[str, str]:
    """Where an item's parts are, relative to the service's root."""
    base = f"items/{clip}"
    return {
        "item": base,
        "audio": f"{base}/audio",
        "spectrogram": f"{base}/spectrogram.png",
        "similar": f"search/id/{clip}",
    }


def rankings(hits: Hits, by_file: bool, probability: Any = None, kept: Written | None = None) -> list[bytes]:
    """The hits of each query as JSON, best first, without the padding. Rounding can lift a cosine over 1: cut there.

    An item that many queries find is read and written once; what each of its hits adds comes between the pieces.

    Args:
        hits: of one search.
        by_file: whether they are files, else windows.
        probability: `serve.quality.Calibration`, where there is one.
        kept: what earlier calls have written of this release; taken from, and added to.
    """
    scores = np.minimum(hits.scores, 1.0)
    chances = np.full(scores.shape, None) if probability is None else probability(scores)
    distinct, entries = _distinct(hits.rows)
    one_window = by_file and hits.windows is None  # files of one window each, which has the hit's own score
    items = _written(hits, distinct.tolist(), {} if kept is None else kept)
    end = (b"}]}," if one_window else b",") + dumps(NO_SPAN)[1:]
    written, likely = _each(scores), _each(chances)
    counts = np.count_nonzero(hits.rows >= 0, axis=1).tolist()
    ranked = []
    for query, (row, count) in enumerate(zip(entries.tolist(), counts, strict=True)):
        if one_window:
            matches = written[query]
        elif by_file:
            matches = [dumps(_matches(hits, query, number)) for number in range(count)]
        else:
            matches = [b"null"] * count
        pieces = [b"["]
        for entry, score, chance, match in zip(row[:count], written[query], likely[query], matches, strict=False):
            item, window = items[entry]
            before = window if one_window else MATCHES
            pieces += (item, score, b',"probability":', chance, before, match, end, b",")
        pieces[max(1, len(pieces) - 1) :] = [b"]"]  # in place of the last comma
        ranked.append(b"".join(pieces))
    return ranked


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of hits int64[Q, k] but once each and without the padding, and where among them each hit's row is."""
    if len(rows) == 1:  # a query finds a row once
        return rows[0][rows[0] >= 0], np.arange(rows.shape[1])[None]
    distinct, inverse = np.unique(rows, return_inverse=True)
    padded = int(len(distinct) > 0 and distinct[0] < 0)
    return distinct[padded:], inverse.reshape(rows.shape) - padded


def _written(hits: Hits, rows: list[int], kept: Written) -> list[tuple[bytes, bytes]]:
    """The items of some rows as JSON; those that are not kept are read and written, and kept."""
    found = {row: kept.get(row) for row in rows}
    missing = [row for row, pieces in found.items() if pieces is None]
    if missing:
        new = {row: _pieces(shown(item)) for row, item in zip(missing, hits.rows_of(missing), strict=True)}
        if len(kept) + len(new) > KEPT_ITEMS:
            kept.clear()
        kept.update(new)
        found |= new
    return [found[row] for row in rows]  # type: ignore[misc]


def _pieces(item: dict[str, Any]) -> tuple[bytes, bytes]:
    """As `Written` has it."""
    window = b'{"windows":1,"spans":[' + dumps(_span(item | {"score": 0}))[:-2]
    return dumps(item)[:-1] + b',"score":', MATCHES + window


def _each(values: np.ndarray) -> list[list[bytes]]:
    """Numbers (or None) of each query [Q, k], each as JSON."""
    flat, k = orjson.dumps(values.ravel().tolist())[1:-1].split(b","), values.shape[1]
    return [flat[start : start + k] for start in range(0, len(flat), max(k, 1))]


def merge_windows(ranked: Sequence[list[dict[str, Any]]], spans: Sequence[tuple[float, float]], k: int) -> list[Any]:
    """One ranking of the hits of a query's windows: each file (or item) once, by its best, with all that matched.

    Args:
        ranked: hits of each window of the query.
        spans: where these windows lie in the query, in seconds.
        k: how many to keep.
    """
    best: dict[Any, dict[str, Any]] = {}
    for (start_s, end_s), ranking in zip(spans, ranked, strict=True):
        for hit in ranking:
            hit["query_start_s"], hit["query_end_s"] = start_s, end_s
            matches = hit["matches"] or {"windows": 1, "spans": [_span(hit)]}
            for span in matches["spans"]:
                span["query_start_s"], span["query_end_s"] = start_s, end_s
            key = hit["uri"] if hit["matches"] else hit["id"]
            known = best.get(key)
            if known is None:
                best[key] = hit
                hit["matches"] = matches if hit["matches"] else None
                continue
            better, other = (hit, known) if hit["score"] > known["score"] else (known, hit)
            if better["matches"]:
                better["matches"] = {
                    "windows": better["matches"]["windows"] + other["matches"]["windows"],
                    "spans": better["matches"]["spans"] + other["matches"]["spans"],
                }
            best[key] = better
    ranking = sorted(best.values(), key=lambda hit: (-hit["score"], hit["id"]))[:k]
    for hit in ranking:
        if hit["matches"]:
            hit["matches"]["spans"] = join_spans(hit["matches"]["spans"])
            hit["matches"]["windows"] = max(hit["matches"]["windows"], len(hit["matches"]["spans"]))
    return ranking


def collapse(ranking: list[dict[str, Any]], vectors_of: Callable[[list[int]], np.ndarray]) -> list[dict[str, Any]]:
    """Drop every hit that is a near-duplicate of a better one; that one says how many in `duplicates`.

    Args:
        ranking: hits, best first.
        vectors_of: the unit vectors float32[n, dim] of items.
    """
    if not ranking:
        return []
    vectors = vectors_of([hit["id"] for hit in ranking])
    kept: list[int] = []
    for place in range(len(ranking)):
        alike = vectors[kept] @ vectors[place] if kept else np.zeros(0)
        if len(alike) and alike.max() >= NEAR_DUPLICATE:
            ranking[kept[int(alike.argmax())]]["duplicates"] += 1
        else:
            ranking[place]["duplicates"] = 0
            kept.append(place)
    return [ranking[place] for place in kept]


def join_spans(spans: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spans of one file, those that touch or overlap joined, best first; query spans join with them."""
    joined: list[dict[str, Any]] = []
    for span in sorted(spans, key=lambda span: (span["start_s"], span["end_s"])):
        last = joined[-1] if joined else None
        if last is not None and span["start_s"] <= last["end_s"] + 1e-6:
            last["end_s"] = max(last["end_s"], span["end_s"])
            last["score"] = max(last["score"], span["score"])
            if last.get("query_start_s") is not None and span.get("query_start_s") is not None:
                last["query_start_s"] = min(last["query_start_s"], span["query_start_s"])
                last["query_end_s"] = max(last["query_end_s"], span["query_end_s"])
        else:
            joined.append(dict(span))
    return sorted(joined, key=lambda span: -span["score"])


def search_json(answer: Answer, timing_ms: dict[str, float]) -> bytes:
    """The body of a `SearchResponse`."""
    return dumps(
        {
            "release": answer.release,
            "results": answer.results[0],
            "timing_ms": timing_ms,
            "partial": bool(answer.missing),
            "missing": list(answer.missing),
        }
    )


def vector_search_json(answer: Answer, timing_ms: dict[str, float]) -> bytes:
    """The body of a `VectorSearchResponse`."""
    return dumps(
        {
            "release": answer.release,
            "results": answer.results,
            "timing_ms": timing_ms,
            "partial": bool(answer.missing),
            "missing": list(answer.missing),
        }
    )


def _safe(value: Any) -> Any:
    """Integers beyond 64 bits, which orjson refuses, as text; everything else as it is."""
    if type(value) is int and not -(2**63) <= value < 2**64:
        return str(value)
    return value


def _span(hit: dict[str, Any]) -> dict[str, Any]:
    return {"start_s": hit["start_s"], "end_s": hit["end_s"], "score": hit["score"]}


def _matches(hits: Hits, query: int, place: int) -> dict[str, Any]:
    assert hits.windows is not None
    return {"windows": int(hits.windows[query, place]), "spans": join_spans(hits.spans[query][place])}
