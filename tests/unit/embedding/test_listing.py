"""A listing in runs on disk is the same as one in memory, whatever order and pieces it came in."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from audiomae.artifacts.tables import EmbedSettings
from audiomae.embedding import listing as listings
from audiomae.embedding import plan as planning
from audiomae.embedding.listing import Listing, ManifestHash
from audiomae.embedding.update import difference, updated_plan
from audiomae.errors import UserError

SETTINGS = EmbedSettings(fingerprint="f" * 64, dim=4, sample_rate=16000, mode="windows", window_s=5, hop_s=5)
REQUEST = planning.PlanRequest("e", "c", "/r", shard_cost_s=60.0)


def table_of(numbers: list[int]) -> pa.Table:
    return pa.table(
        {
            "uri": [
                f"é{number:04d}.wav" if number % 7 == 0 else f"{number % 5}/{number:04d}.wav" for number in numbers
            ],
            "size": pa.array([number * 1000 for number in numbers], pa.int64()),
            "content_id": [f"c{number}" for number in numbers],
            "label": [None if number % 3 == 0 else f"l{number % 4}" for number in numbers],
            "fold": pa.array([None if number % 11 == 0 else number % 5 for number in numbers], pa.int64()),
        }
    )


def in_runs(numbers: list[int], monkeypatch: pytest.MonkeyPatch, pieces: int = 37) -> Listing:
    monkeypatch.setattr(listings, "RUN_ROWS", 100)
    monkeypatch.setattr(listings, "BATCH_ROWS", 10)
    table = table_of(numbers)
    return Listing(table.slice(start, pieces) for start in range(0, len(numbers), pieces))


@pytest.mark.parametrize("order", ["sorted", "reversed", "shuffled", "interleaved"])
def test_runs_come_back_as_one_sorted_whole(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = table_of(list(range(1000))).sort_by("uri")
    positions = {uri: number for number, uri in enumerate(table_of(list(range(1000)))["uri"].to_pylist())}
    numbers = [positions[uri] for uri in whole["uri"].to_pylist()]
    if order == "reversed":
        numbers.reverse()
    elif order == "shuffled":
        random.Random(0).shuffle(numbers)
    elif order == "interleaved":
        numbers = numbers[::3] + numbers[1::3] + numbers[2::3]
    listing = in_runs(numbers, monkeypatch)
    parts = list(listing.partitions())
    assert len(parts) > 3 and max(part.num_rows for part in parts) < 400
    assert listing.table().equals(whole.combine_chunks()) and listing.num_rows == 1000
    uris = whole["uri"].to_pylist()
    for low, high in (
        (None, None),
        (uris[3], uris[700]),
        (uris[699], None),
        (None, "0"),
        ("zz", "zzz"),
        (uris[5], uris[6]),
    ):
        expected = [uri for uri in uris if (low is None or uri >= low) and (high is None or uri < high)]
        assert listing.between(low, high)["uri"].to_pylist() == expected
    wanted = [uris[0], uris[413], "absent", uris[999]]
    assert listing.rows_of(pa.array(wanted))["uri"].to_pylist() == [uris[0], uris[413], uris[999]]
    assert len(listing.sample(20)) == 20 and listing.sample(20)["uri"].to_pylist() == sorted(
        listing.sample(20)["uri"].to_pylist()
    )


def test_repeated_uris_and_names_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table(
        {"uri": ["b", "a", "b"], "size": [1, 2, 3], "content_id": ["x"] * 3, "id": [7, 8, 9], "shard": [1, 2, 3]}
    )
    listing = Listing([table])
    assert listing.table()["uri"].to_pylist() == ["a", "b"] and (listing.num_rows, listing.duplicates) == (2, 1)
    assert listing.table()["size"].to_pylist() == [2, 1]
    assert listing.schema.names == ["uri", "size", "content_id", "listing_id", "listing_shard"]
    with pytest.raises(UserError, match="lists no audio"):
        Listing([])


def test_the_manifest_hash_depends_on_content_and_columns_not_on_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "HASHED_ROWS", 64)

    def digest(table: pa.Table, rows: int) -> str:
        manifest = ManifestHash()
        for start in range(0, len(table), rows):
            manifest.update(table.slice(start, rows))
        return manifest.hexdigest()

    table = table_of(list(range(300)))
    whole = digest(table, 300)
    assert {digest(table, rows) for rows in (1, 63, 64, 65, 299)} == {whole}
    garbage = pa.array(np.arange(300) % 5, pa.int64(), mask=np.arange(300) % 11 == 0)  # other bytes under the nulls
    assert digest(table.set_column(4, "fold", garbage), 100) == whole
    for name in ("content_id", "label", "fold"):
        column = table[name].to_pylist()
        for changed in ([*column[:-1], None], column[1:] + column[:1]):
            number = table.column_names.index(name)
            assert digest(table.set_column(number, name, pa.array(changed, table[name].type)), 100) != whole
    assert digest(table.rename_columns(["uri", "size", "content_id", "label", "other"]), 100) != whole


def test_plans_and_updates_do_not_depend_on_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_in(out: Path, listing: Listing) -> planning.Plan:
        return planning.new_plan(str(out), listing, SETTINGS, lambda uris: [None] * len(uris), REQUEST)

    numbers = list(range(1000))
    held = plan_in(tmp_path / "held", Listing([table_of(numbers)]))
    random.Random(1).shuffle(numbers)
    stored = plan_in(tmp_path / "stored", in_runs(numbers, monkeypatch))
    assert stored.manifest_hash == held.manifest_hash
    items = [planning.read_items(tmp_path / name, plan) for name, plan in (("held", held), ("stored", stored))]
    assert items[0].equals(items[1]) and len(stored.shards) > 20
    changed = table_of([number for number in numbers if number != 500] + [2000])
    changed = changed.set_column(
        2,
        "content_id",
        pa.array(["new" if n == 3 else f"c{n}" for n in [*(number for number in numbers if number != 500), 2000]]),
    )
    fresh = Listing(changed.slice(start, 41) for start in range(0, len(changed), 41))
    found = difference(tmp_path / "stored", stored, fresh)
    assert (found.new, found.changed, found.vanished) == (["0/2000.wav"], ["3/0003.wav"], ["0/0500.wav"])
    changes = difference(tmp_path / "stored", stored, fresh)
    after = updated_plan(str(tmp_path / "stored"), stored, fresh, lambda uris: [None] * len(uris), REQUEST, changes)
    kept = {entry.name for entry in after.shards} & {entry.name for entry in stored.shards}
    assert len(kept) == len(stored.shards) - 2
    written = [file for file in after.files if "items-000001" in file["name"]]
    assert sum(file["rows"] for file in written) < 100  # in proportion to the change
    again = planning.read_items(tmp_path / "stored", after)
    assert sorted(again["uri"].to_pylist()) == sorted(changed["uri"].to_pylist())
    assert not difference(tmp_path / "stored", after, fresh)
    assert after.manifest_hash == plan_in(tmp_path / "anew", fresh).manifest_hash
