"""Listings and tars that failed in the field, each with what is right; their kinds are in the tests beside this one."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from audiomae.corpus.manifest import list_corpus, open_source
from audiomae.errors import ListingError


@pytest.fixture(scope="module")
def cases() -> Path:
    path = Path(__file__).resolve().parents[4] / "shared" / "cases"
    if not path.is_dir():
        pytest.skip(f"the field cases are not at {path}")
    return path


def listed(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    corpus = list_corpus(str(path))
    rows = pa.concat_tables(corpus.batches()).to_pylist()
    return {row["uri"]: row for row in rows}, "\n".join(corpus.notes.lines())


def test_dots_in_names(cases: Path) -> None:
    rows, said = listed(cases / "15_dots_in_names_lose_labels.tar")
    assert [row.get("label") for row in rows.values()].count(None) == 0 and len(rows) == 2 and not said


def test_hard_link_member(cases: Path) -> None:
    name = "17_hard_link_member_missing.tar"
    rows, _ = listed(cases / name)
    assert list(rows) == [f"{name}#a.ogg", f"{name}#b.ogg"]
    for row in rows.values():
        assert open_source(str(cases), row["uri"], row["tar_offset"], row["size"]) == (cases / "a.ogg").read_bytes()


def test_null_words(cases: Path) -> None:
    rows, said = listed(cases / "18_null_words.csv")
    assert [row["label"] for row in rows.values()] == ["NA", "null", "nan", "None"]
    assert "4 unquoted words that may mean missing kept as text" in said


def test_labels_that_are_not_numbers(cases: Path) -> None:
    rows, said = listed(cases / "20_labels_become_numbers.csv")
    assert [row["label"] for row in rows.values()] == ["1.10", "1.1", "12e3"]
    assert "'1.1' / '1.10'" in said


def test_duplicate_column(cases: Path) -> None:
    with pytest.raises(ListingError, match="column 'label' comes twice") as caught:
        listed(cases / "21_duplicate_column.csv")
    assert caught.value.exit_status == 2
