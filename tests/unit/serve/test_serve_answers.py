"""Rows of the items table as the API's objects, spans that join, duplicates that collapse, forms and proxies."""

import datetime
from typing import Any

import numpy as np
import orjson
import pytest

from audiomae.search.hits import Hits, Members
from serve import answers
from serve.access import Quota, read_tokens
from serve.catalogue import spread
from serve.problems import Problem
from serve.uploads import parse_form


def hit(clip: int, score: float, start_s: float = 0.0, uri: str = "", windows: int = 1) -> dict[str, Any]:
    span = {"start_s": start_s, "end_s": start_s + 2, "score": score}
    return {"id": clip, "uri": uri or str(clip), "matches": {"windows": windows, "spans": [span]}, **span}


def test_rows_become_json_whatever_their_values() -> None:
    row = {"id": 2**62, "uri": "u", "start_s": 0.0, "end_s": 1.0, "corpus": 0}
    row |= {"x": float("nan"), "y": np.float32(0.5), "z": b"abc", "w": [None, True], "big": 2**70}
    row |= {"day": datetime.date(2026, 1, 2), "long": datetime.timedelta(seconds=3)}
    shown = orjson.loads(answers.dumps(answers.shown(row)))
    assert shown["item"] == {
        "x": None,
        "y": 0.5,
        "z": "<3 bytes>",
        "w": [None, True],
        "big": str(2**70),
        "day": "2026-01-02",
        "long": 3.0,
    }
    assert shown["id"] == 2**62 and shown["links"]["similar"] == f"search/id/{2**62}"


def test_windows_merge_into_files_with_what_matched() -> None:
    first = [hit(1, 0.9, 0.0, "a"), hit(2, 0.5, 0.0, "b")]
    second = [hit(3, 0.95, 2.0, "a"), hit(2, 0.6, 0.0, "b"), hit(4, 0.1, 8.0, "c")]
    merged = answers.merge_windows([first, second], [(0.0, 2.0), (2.0, 4.0)], k=2)
    assert [(one["uri"], one["id"], one["score"], one["query_start_s"]) for one in merged] == [
        ("a", 3, 0.95, 2.0),
        ("b", 2, 0.6, 2.0),
    ]
    (span,) = merged[0]["matches"]["spans"]
    assert span == {"start_s": 0.0, "end_s": 4.0, "score": 0.95, "query_start_s": 0.0, "query_end_s": 4.0}


def test_spans_join_where_they_touch_and_the_best_comes_first() -> None:
    spans = [{"start_s": s, "end_s": s + 2.0, "score": q} for s, q in ((8.0, 0.7), (0.0, 0.1), (2.0, 0.5), (3.0, 0.2))]
    joined = answers.join_spans(spans)
    assert [(span["start_s"], span["end_s"], span["score"]) for span in joined] == [(8.0, 10.0, 0.7), (0.0, 5.0, 0.5)]


def test_near_duplicates_collapse_into_the_better_hit() -> None:
    vectors = {1: [1.0, 0.0], 2: [0.9999, 0.01], 3: [0.0, 1.0]}
    kept = answers.collapse(
        [hit(1, 0.9), hit(2, 0.8), hit(3, 0.1)], lambda clips: np.array([vectors[clip] for clip in clips])
    )
    assert [(one["id"], one["duplicates"]) for one in kept] == [(1, 1), (3, 0)]


class Table:
    """An items table of ten rows, two of each file."""

    def rows(self, rows: Any, columns: Any = None) -> list[dict[str, Any]]:
        all = [
            {
                "id": 2**62 + row,
                "uri": f"{row // 2}.wav",
                "start_s": row % 2 * 2.0,
                "end_s": row % 2 * 2.0 + 2,
                "x": "ё 100%d",
            }
            for row in np.asarray(rows).tolist()
        ]
        return [{name: row[name] for name in columns or row} for row in all]


@pytest.mark.parametrize("by_file", [True, False])
@pytest.mark.parametrize("probability", [None, lambda scores: scores / 2])
@pytest.mark.parametrize("grouped", [True, False])
def test_hits_are_written_once_and_say_all_of_them(by_file: bool, probability: Any, grouped: bool) -> None:
    rows, scores = np.array([[3, 0, -1], [0, 9, 3]]), np.array([[1.0000001, 1e-7, -np.inf], [-0.25, -0.5, -1]])
    members = [
        [Members(np.array([3, 2]), np.array([1.0000001, 0.5])), Members(np.array([0]), np.array([1e-7], np.float32))],
        [Members(np.array([row]), np.array([score])) for row, score in zip(rows[1], scores[1], strict=True)],
    ]
    hits = Hits(rows, scores.astype(np.float32), rows, Table(), members if grouped else None)  # type: ignore[arg-type]
    ranked = [orjson.loads(ranking) for ranking in answers.rankings(hits, by_file, probability)]
    assert [len(ranking) for ranking in ranked] == [2, 3] and ranked[0][0]["score"] == 1.0

    def expected(row: int, score: float) -> dict[str, Any]:
        (item,) = Table().rows([row])
        spans = [{"start_s": item["start_s"], "end_s": item["end_s"], "score": score}]
        windows = 1
        if grouped and (row, score) == (3, 1.0):  # its file's other window, which it touches
            spans, windows = [{"start_s": 0.0, "end_s": 4.0, "score": 1.0}], 2
        return answers.shown(item) | {
            "score": score,
            "probability": score / 2 if probability else None,
            "matches": {"windows": windows, "spans": spans} if by_file else None,
            "query_start_s": None,
            "query_end_s": None,
        }

    tiny = float(np.float32(1e-7))
    assert ranked == [
        [expected(3, 1.0), expected(0, tiny)],
        [expected(0, -0.25), expected(9, -0.5), expected(3, -1.0)],
    ]
    empty = np.zeros((1, 0), np.int64)
    none = Hits(empty, empty.astype(np.float32), empty, Table())  # type: ignore[arg-type]
    assert answers.rankings(none, by_file, probability) == [b"[]"]


@pytest.mark.parametrize("by_file", [True, False])
def test_items_that_are_found_again_are_not_read_again(monkeypatch: pytest.MonkeyPatch, by_file: bool) -> None:
    read: list[list[int]] = []

    class Noting(Table):
        def rows(self, rows: Any, columns: Any = None) -> list[dict[str, Any]]:
            read.append(list(rows))
            return super().rows(rows, columns)

    monkeypatch.setattr(answers, "KEPT_ITEMS", 4)
    kept: answers.Written = {}
    for rows, expected in (([3, 0], [3, 0]), ([0, 5, 3], [5]), ([3, 5], None), ([1, 2, 3], [1, 2]), ([3], [3])):
        numbers, scores = np.array([rows]), -np.arange(len(rows), dtype=np.float32)[None]
        hits = Hits(numbers, scores, numbers, Noting())  # type: ignore[arg-type]
        alone = answers.rankings(hits, by_file)
        read.clear()
        assert answers.rankings(hits, by_file, None, kept) == alone
        assert read == ([expected] if expected else [])
    assert set(kept) == {1, 2, 3}


def form(*parts: tuple[str, bytes]) -> bytes:
    body = b"".join(b"--B\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts)
    return body + b"--B--\r\n"


def test_a_form_is_read_from_memory() -> None:
    body = form(
        ('Content-Disposition: form-data; name="file"; filename="x.wav"', b"\0\r\n--b\xff"),
        ('content-disposition: form-data; name="k"', b"3"),
    )
    found = parse_form(body, "multipart/form-data; boundary=B")
    assert (found.files, found.fields) == ({"file": b"\0\r\n--b\xff"}, {"k": "3"})
    assert (
        parse_form(body.replace(b'filename="', 'filename="дождь'.encode()), "multipart/form-data; boundary=B") == found
    )
    assert parse_form(b"k=3&text=a+b", "application/x-www-form-urlencoded").fields == {"k": "3", "text": "a b"}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{}", "application/json"),
        (b"", "multipart/form-data"),
        (b"--B\r\n", "multipart/form-data; boundary=B"),
        (form(('content-disposition: form-data; name="k"', b"3"))[:-8], "multipart/form-data; boundary=B"),
        (b"nonsense", "multipart/form-data; boundary=B"),
        (form(('content-disposition: form-data; name="k"', b"\xff"))[:], "multipart/form-data; boundary=B"),
        (
            form(*[('content-disposition: form-data; name="k"', b"3")] * 200),
            "multipart/form-data; boundary=" + "B" * 999,
        ),
    ],
)
def test_a_broken_form_is_refused(body: bytes, kind: str) -> None:
    with pytest.raises(Problem) as caught:
        parse_form(body, kind)
    assert (caught.value.status_code, caught.value.code) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("kinds", "first"),
    [
        ([0, 0, 0, 1, 1, 1], {0, 1}),
        ([3] * 9 + [7], {3, 7}),
        (list(range(100)), {0, 16, 32, 48, 64, 80}),
        ([5], {5}),
        ([], set()),
    ],
)
def test_the_first_rows_shown_are_of_all_kinds(kinds: list[int], first: set[int]) -> None:
    order = spread(np.array(kinds, int), 6)
    assert sorted(order) == list(range(len(kinds)))
    assert {kinds[place] for place in order[:6]} == first
    same = spread(np.zeros(60, int), 6)
    assert list(same[:6]) == [0, 10, 20, 30, 40, 50]


def test_quotas_are_used_up_and_fill_again() -> None:
    quota = Quota(per_s=2.0)
    assert [quota.take() == 0 for _ in range(20)] == [True] * 20
    wait = quota.take()
    assert 0 < wait <= 0.5
    quota.seen_at -= 1.0
    assert quota.take() == 0
    assert read_tokens("a=2, b").keys() == {"a", "b"}
    with pytest.raises(ValueError, match="above 0"):
        read_tokens("a=-1")
