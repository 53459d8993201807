"""The items table: both files, any column type in a filter, rows in any order."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiomae.errors import FilterError
from audiomae.search import items
from audiomae.search.items import Items, ItemsWriter

TABLE = pa.table(
    {
        "id": pa.array([1, 2, 3, 4], pa.int64()),
        "label": pa.array(["rain", None, "dog", "rain"]).dictionary_encode(),
        "when": pa.array([datetime(2024, 1, day) for day in (1, 2, 3, 4)]),
        "loud": pa.array([True, False, None, True]),
        "gain": pa.array([0.5, 1.5, float("nan"), -1.0]),
        "tags": pa.array([["a"], [], None, ["b"]]),
    }
)


def write(directory: Path, *tables: pa.Table) -> Items:
    schema = pa.unify_schemas([table.schema for table in tables], promote_options="permissive")
    with ItemsWriter(directory, schema) as writer:
        for table in tables:
            writer.write(table)
    return Items(directory)


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ({}, [1, 2, 3, 4]),
        ({"label": "rain"}, [1, 4]),
        ({"label": None}, [2]),
        ({"label": {"in": ["dog", None]}}, [2, 3]),
        ({"label": {"in": []}}, []),
        ({"when": {"gte": "2024-01-02", "lt": "2024-01-04"}}, [2, 3]),
        ({"loud": True}, [1, 4]),
        ({"gain": {"gt": 0}}, [1, 2]),
        ({"gain": {"gt": 0}, "loud": False}, [2]),
        ({"id": 3}, [3]),
    ],
)
def test_filters_over_every_kind_of_column(tmp_path: Path, where: dict[str, object], found: list[int]) -> None:
    table = write(tmp_path, TABLE)
    assert (np.flatnonzero(table.mask(where)) + 1).tolist() == found


@pytest.mark.parametrize("where", [{"tags": "a"}, {"id": 1.5}, {"when": "soon"}, {"loud": [True]}])
def test_values_that_do_not_fit_are_refused(tmp_path: Path, where: dict[str, object]) -> None:
    with pytest.raises(FilterError, match=f"filter on '{next(iter(where))}'"):
        write(tmp_path, TABLE).mask(where)


def test_rows_come_in_the_order_asked_for_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "BATCH_ROWS", 3)
    first = pa.table({"id": np.arange(4), "label": ["x"] * 4})
    second = pa.table({"id": np.arange(4, 10), "take": np.arange(6)})
    table = write(tmp_path, first, second)
    assert len(table) == 10 and table.columns == ["id", "label", "take"]
    assert [len(batch) for batch in table.table.to_batches()] == [3, 3, 3, 1]
    assert table.rows([9, 0, 3]) == [
        {"id": 9, "label": None, "take": 5},
        {"id": 0, "label": "x", "take": None},
        {"id": 3, "label": "x", "take": None},
    ]
    assert pq.read_table(tmp_path / "items.parquet").to_pylist() == table.rows(range(10))
