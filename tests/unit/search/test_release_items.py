"""The items table: both files, any column type in a filter, rows in any order."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiomae.errors import FilterError
from audiomae.search import items
from audiomae.search.items import ItemsTable, ItemsWriter

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


def write(directory: Path, *tables: pa.Table) -> ItemsTable:
    schema = pa.unify_schemas([table.schema for table in tables], promote_options="permissive")
    with ItemsWriter(directory, schema) as writer:
        for table in tables:
            writer.write(table)
    items.write_columns(directory)
    return ItemsTable([directory])


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
    assert [len(batch) for batch in table.parts[0].table.to_batches()] == [3, 3, 3, 1]
    assert table.rows([9, 0, 3]) == [
        {"id": 9, "label": None, "take": 5},
        {"id": 0, "label": "x", "take": None},
        {"id": 3, "label": "x", "take": None},
    ]
    assert pq.read_table(tmp_path / "items.parquet").to_pylist() == table.rows(range(10))


def test_segments_with_other_columns_are_one_table(tmp_path: Path) -> None:
    first = pa.table({"id": [1, 2], "label": ["b", "a"], "n": pa.array([1, None], pa.int8())})
    second = pa.table({"id": [3, 4, 5], "n": pa.array([300, 1, 7], pa.int64()), "take": [0.5, 1.5, 2.5]})
    third = pa.table({"id": [6], "label": ["c"], "n": pa.array([None], pa.int64())})
    folders = []
    for number, table in enumerate((first, second, third)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, table)
        folders.append(folder)
    whole = ItemsTable(folders)
    assert len(whole) == 6 and whole.columns == ["id", "label", "n", "take"]
    assert [row["id"] for row in whole.rows([5, 0, 3])] == [6, 1, 4]
    assert whole.rows([2])[0] == {"id": 3, "label": None, "n": 300, "take": 0.5}
    for where, found in (
        ({"n": 300}, [3]),
        ({"n": {"lt": 300}}, [1, 4, 5]),
        ({"n": None}, [2, 6]),
        ({"label": {"in": ["a", "c"]}}, [2, 6]),
        ({"label": None}, [3, 4, 5]),
        ({"label": {"ne": "a"}}, [1, 3, 4, 5, 6]),
        ({"take": {"gte": 1}}, [4, 5]),
        ({"take": {"in": [0.5, None]}}, [1, 2, 3, 6]),
    ):
        assert (np.flatnonzero(whole.mask(where)) + 1).tolist() == found, where
    groups = whole.groups("label")
    assert len(set(groups)) == 4 and groups[2] == groups[3] == groups[4]
    assert len(set(whole.groups("n"))) == 4
