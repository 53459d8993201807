"""Filters: every operator on every kind of column, what a column cannot hold, and agreement with plain Python."""

import math
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiomae.errors import FilterError
from audiomae.search import filters

TABLE = pa.table(
    {
        "id": pa.array([1, 2, 3, 4, 5], pa.int64()),
        "fold": pa.array([0, 1, 2, None, 1], pa.int8()),
        "label": ["rain", None, "dog", "Rain", "raindrop"],
        "site": pa.array(["a", "b", "a", None, "b"]).dictionary_encode(),
        "gain": pa.array([0.5, 1.5, math.nan, -1.0, None], pa.float32()),
        "loud": [True, False, None, True, False],
        "when": pa.array([datetime(2024, 1, day) for day in (1, 2, 3, 4, 5)]),
        "heard": pa.array([datetime(2024, 1, day, tzinfo=UTC) for day in (1, 2, 3, 4, 5)]),
        "price": pa.array([Decimal("1.50"), Decimal("2.25"), None, Decimal("0.10"), Decimal("9.00")]),
        "tags": [["a", "b"], [], None, ["b"], ["c", None]],
        "nothing": pa.nulls(5),
    }
)
TYPES = {field.name: field.type for field in TABLE.schema}


def found(where: Any, table: pa.Table = TABLE) -> list[int]:
    """The numbers, from 1, of the rows that satisfy a filter."""
    types = {field.name: field.type for field in table.schema}
    mask = filters.mask(where, types, lambda name: filters.encode_column(table.column(name)))
    return list(range(1, len(table) + 1)) if mask is None else (np.flatnonzero(mask) + 1).tolist()


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"label": "rain"}, [1]),
        ({"label": {"eq": "rain"}}, [1]),
        ({"label": None}, [2]),
        ({"label": {"ne": "rain"}}, [2, 3, 4, 5]),
        ({"label": {"ne": None}}, [1, 3, 4, 5]),
        ({"label": {"in": ["dog", None, "cat"]}}, [2, 3]),
        ({"label": {"in": []}}, []),
        ({"label": {"not_in": ["dog", "rain"]}}, [2, 4, 5]),
        ({"label": {"not_in": []}}, [1, 2, 3, 4, 5]),
        ({"label": {"is_null": True}}, [2]),
        ({"label": {"is_null": False}}, [1, 3, 4, 5]),
        ({"label": {"contains": "rain"}}, [1, 5]),
        ({"label": {"contains": "."}}, []),
        ({"label": {"contains": ""}}, [1, 3, 4, 5]),
        ({"label": {"gte": "e"}}, [1, 5]),
        ({"label": {"lt": "a"}}, [4]),
        ({"label": {"gt": "zzz"}}, []),
        ({"label": {"lte": "zzz"}}, [1, 3, 4, 5]),
        ({"site": "b"}, [2, 5]),
        ({"site": {"ne": "b", "is_null": False}}, [1, 3]),
        ({"fold": 1}, [2, 5]),
        ({"fold": 1.0}, [2, 5]),
        ({"fold": {"not_in": [0, 1, 2]}}, [4]),
        ({"fold": {"gte": 1}}, [2, 3, 5]),
        ({"gain": {"lt": 1}}, [1, 4]),
        ({"gain": {"ne": 0.5}}, [2, 3, 4, 5]),
        ({"gain": {"is_null": True}}, [5]),
        ({"loud": False}, [2, 5]),
        ({"loud": {"ne": True}}, [2, 3, 5]),
        ({"when": {"gte": "2024-01-02", "lt": "2024-01-04T00:00:00"}}, [2, 3]),
        ({"when": "2024-01-05"}, [5]),
        ({"heard": {"lte": "2024-01-02"}}, [1, 2]),
        ({"heard": "2024-01-03T01:00:00+01:00"}, [3]),
        ({"price": {"gt": 1.5}}, [2, 5]),
        ({"tags": {"contains": "b"}}, [1, 4]),
        ({"tags": {"is_null": True}}, [3]),
        ({"nothing": None}, [1, 2, 3, 4, 5]),
        ({"any": [{"label": "dog"}, {"fold": 1}]}, [2, 3, 5]),
        ({"any": [{"label": "dog"}, {"fold": 1, "id": {"gt": 2}}], "loud": False}, [5]),
        ({"any": [{"any": [{"id": 1}, {"id": 2}]}, {"id": 5}]}, [1, 2, 5]),
    ],
)
def test_operators(where: dict[str, Any], rows: list[int]) -> None:
    assert found(where) == rows
    whole = list(range(1, 6))
    doubled = {"any": [where or {"id": {"is_null": False}}], "id": {"in": whole}}
    assert found(doubled) == rows


@pytest.mark.parametrize(
    "where",
    [
        {"fold": True},
        {"fold": 1.5},
        {"fold": 128},
        {"fold": "1"},
        {"id": 2**70},
        {"id": {"lt": -(2**63) - 1}},
        {"id": math.nan},
        {"id": {"in": [1, "2"]}},
        {"id": {"not_in": [True]}},
        {"gain": math.nan},
        {"gain": {"gt": "loud"}},
        {"gain": 1e300},
        {"gain": 10**400},
        {"gain": False},
        {"loud": 1},
        {"loud": "true"},
        {"label": 3},
        {"label": True},
        {"label": {"contains": 3}},
        {"label": "\ud800"},
        {"label": {}},
        {"label": ["rain"]},
        {"label": {"in": "rain"}},
        {"label": {"in": [["rain"]]}},
        {"label": {"lt": None}},
        {"label": {"is_null": 1}},
        {"label": {"like": "r%"}},
        {"label": {"contains": None}},
        {"when": "soon"},
        {"when": 17},
        {"price": "1.5"},
        {"price": {"eq": True}},
        {"tags": "a"},
        {"tags": {"contains": 3}},
        {"tags": {"eq": ["a"]}},
        {"fold": {"contains": 1}},
        {"nothing": "x"},
        {"lable": "rain"},
        {"any": []},
        {"any": [{}]},
        {"any": ["label"]},
        {"any": {"label": "rain"}},
        {"any": [{"label": {}}]},
        {"any": [{"any": [{"lable": 1}]}]},
        ["label"],
        "label",
    ],
    ids=repr,
)
def test_what_does_not_fit_is_an_error_and_never_an_empty_answer(where: Any) -> None:
    with pytest.raises(FilterError, match=r"filter"):
        found(where)


def test_deep_nesting_is_refused() -> None:
    where: dict[str, Any] = {"id": 1}
    for _ in range(50):
        where = {"any": [where]}
    with pytest.raises(FilterError, match="nested more than"):
        found(where)


LABELS = st.sampled_from([None, "", "a", "b", "ab", "ä", "z" * 5])
NUMBERS = st.one_of(st.none(), st.integers(-3, 3))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(LABELS, NUMBERS), min_size=1, max_size=300),
    label=LABELS,
    number=st.integers(-3, 3),
    key=st.sampled_from(["eq", "ne", "gt", "gte", "lt", "lte", "in", "not_in"]),
)
def test_agrees_with_plain_python(
    rows: list[tuple[str | None, int | None]], label: str | None, number: int, key: str
) -> None:
    table = pa.table({"label": pa.array([r[0] for r in rows], pa.string()), "number": pa.array([r[1] for r in rows])})
    table = table.cast(pa.schema([("label", pa.string()), ("number", pa.int32())]))
    compare = {
        "eq": lambda value, other: value == other,
        "ne": lambda value, other: value != other,
        "in": lambda value, other: value in (other, None),
        "not_in": lambda value, other: value not in (other, None),
        "gt": lambda value, other: value is not None and value > other,
        "gte": lambda value, other: value is not None and value >= other,
        "lt": lambda value, other: value is not None and value < other,
        "lte": lambda value, other: value is not None and value <= other,
    }[key]
    for position, (name, operand) in enumerate((("label", label), ("number", number))):
        if operand is None and key in ("gt", "gte", "lt", "lte"):
            continue
        expected = [i + 1 for i, row in enumerate(rows) if compare(row[position], operand)]
        assert found({name: {key: [operand, None] if "in" in key else operand}}, table) == expected


def test_many_distinct_values_and_chunks() -> None:
    names = [f"{number:05d}" for number in range(3000)]
    column = pa.chunked_array([names[:700], names[700:], names[:5]])
    table = pa.table({"name": column, "n": pa.chunked_array([list(range(3005))])})
    assert found({"name": {"in": names[2:5]}}, table) == [3, 4, 5, 3003, 3004, 3005]
    assert found({"name": {"in": names[::2]}}, table) == [*range(1, 3000, 2), 3001, 3003, 3005]
    assert found({"name": {"gte": "02998"}}, table) == [2999, 3000]
    assert found({"n": {"in": list(range(0, 3005, 7))}}, table) == list(range(1, 3006, 7))
