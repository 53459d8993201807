"""Work items, their packing into shards, and plans that are written once."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiomae.artifacts.embeddings import EmbedSettings
from audiomae.embedding import plan as planning
from audiomae.errors import IntegrityError, UserError

SETTINGS = EmbedSettings(fingerprint="f" * 64, dim=4, sample_rate=16000, mode="windows", window_s=5, hop_s=5)


def listing(count: int, size: int = 160_000) -> pa.Table:
    uris = [f"{number % 3}/{number:05d}.wav" for number in range(count)]
    table = pa.table(
        {
            "uri": uris,
            "size": [size] * count,
            "content_id": [f"c{number}" for number in range(count)],
            "label": ["a"] * count,
        }
    )
    return planning.normalise_listing(iter([table]))[0]


def plan_of(out: Path, table: pa.Table, probe: planning.Probe = lambda uris: [None] * len(uris)) -> planning.Plan:
    return planning.new_plan(out, table, SETTINGS, probe, encoder="enc", corpus="src", root="/root", shard_cost_s=100)


def test_every_item_is_in_one_shard_and_can_be_read_alone(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, listing(1000))
    assert len(plan.shards) > 10 and plan.num_items == 1000
    uris = [uri for entry in plan.shards for uri in planning.read_shard_items(str(tmp_path), entry)["uri"].to_pylist()]
    assert uris == listing(1000)["uri"].to_pylist() == planning.read_items(tmp_path, plan)["uri"].to_pylist()
    assert max(entry.items for entry in plan.shards) <= 1.5 * min(entry.items for entry in plan.shards[:-1])
    assert planning.load_plan(tmp_path) == plan


def test_the_first_plan_wins(tmp_path: Path) -> None:
    first, second = plan_of(tmp_path, listing(10)), plan_of(tmp_path, listing(10))
    assert second == first


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, listing(10))
    path = tmp_path / plan.files[0]["name"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"items-.*damaged: got sha256"):
        planning.read_items(tmp_path, plan)


def test_the_manifest_hash_depends_on_content_and_columns_not_on_listing_batches() -> None:
    table = listing(100)
    whole, _ = planning.normalise_listing(iter([table]))
    pieces, _ = planning.normalise_listing(iter([table.slice(60), table.slice(0, 60)]))
    assert planning.manifest_hash(whole) == planning.manifest_hash(pieces)
    for column in ("content_id", "label"):
        changed = table.set_column(table.column_names.index(column), column, pa.array(["z"] * 100))
        assert planning.manifest_hash(changed) != planning.manifest_hash(whole)


def test_listings_are_sorted_deduplicated_and_freed_of_our_names() -> None:
    table = pa.table(
        {"uri": ["b", "a", "b"], "size": [1, 2, 3], "content_id": ["x"] * 3, "id": [7, 8, 9], "shard": [1, 2, 3]}
    )
    result, duplicates = planning.normalise_listing(iter([table]))
    assert (result["uri"].to_pylist(), duplicates) == (["a", "b"], 1)
    assert result.column_names == ["uri", "size", "content_id", "listing_id", "listing_shard"]
    with pytest.raises(UserError, match="lists no audio"):
        planning.normalise_listing(iter([]))


def test_long_files_become_segments_on_window_boundaries(tmp_path: Path) -> None:
    table = listing(3, size=50 << 20)
    plan = plan_of(tmp_path, table, probe=lambda uris: [86_400.0, 60.0, None])
    items = planning.read_items(tmp_path, plan).to_pylist()
    long = sorted(
        (row["segment_start_s"], row["segment_end_s"]) for row in items if row["uri"] == table["uri"][0].as_py()
    )
    assert len(long) == 48 and len(items) == 50
    assert [start for start, _ in long] == [1800.0 * k for k in range(48)]
    assert [end for _, end in long[:-1]] == [start for start, _ in long[1:]] and math.isinf(long[-1][1])
    assert all(row["segment_start_s"] is None for row in items if row["uri"] != table["uri"][0].as_py())


def test_one_vector_per_file_means_one_item_per_file(tmp_path: Path) -> None:
    items = planning.build_items(
        listing(2, size=50 << 20),
        SETTINGS.model_copy(update={"mode": "file"}),
        lambda uris: pytest.fail("no probe needed"),
    )
    assert items.num_rows == 2


@settings(deadline=None)
@given(
    duration=st.floats(1, 200_000),
    window=st.floats(0.5, 30),
    overlap=st.sampled_from([0.25, 0.5, 1.0, 1.5]),
)
def test_segments_cover_every_window_once(duration: float, window: float, overlap: float) -> None:
    own = SETTINGS.model_copy(update={"window_s": window, "hop_s": window * overlap})
    spans = planning.segments(duration, own)
    if not spans:
        return
    starts, ends = zip(*spans, strict=True)
    assert starts[0] == 0 and math.isinf(ends[-1]) and list(starts[1:]) == list(ends[:-1])
    assert all(abs(start / own.hop_s - round(start / own.hop_s)) < 1e-6 for start in starts)
    assert starts[-1] + window <= duration + 1e-6  # the last one holds a whole window


def test_cost_balances_by_length_and_kind() -> None:
    table = pa.table(
        {
            "uri": [f"{number}.{'mp3' if number % 2 else 'wav'}" for number in range(400)],
            "size": [16_000 * 10 if number % 2 else 64_000 * 10 for number in range(400)],
            "segment_start_s": pa.array([None] * 400, pa.float64()),
            "segment_end_s": pa.array([None] * 400, pa.float64()),
        }
    )
    numbers = planning.pack(table, shard_cost_s=110)
    assert np.bincount(numbers).tolist() == [10] * 40


def test_ten_thousand_times_ten_thousand_items_would_still_be_bounded_shards() -> None:
    """Shards grow with the corpus up to half an hour of audio, then their number does."""
    sizes = [
        planning.pack(planning.build_items(listing(count), SETTINGS, list), None).max() + 1
        for count in (50, 3000, 300_000)
    ]
    assert sizes[0] == 1 and 20 <= sizes[1] <= 256 and 256 < sizes[2] < 2000
