"""Work items, their packing into shards, and plans that are written once."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiomae.artifacts.embeddings import EmbedSettings
from audiomae.embedding import plan as planning
from audiomae.embedding.listing import Listing
from audiomae.errors import IntegrityError

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
    return table.sort_by("uri")


def plan_of(out: Path, table: pa.Table, probe: planning.Probe = lambda uris: [None] * len(uris)) -> planning.Plan:
    return planning.new_plan(
        out, Listing([table]), SETTINGS, probe, planning.PlanRequest("enc", "src", "/root", shard_cost_s=100)
    )


def pack(items: pa.Table, shard_cost_s: float | None = None, rows: int = 1 << 30) -> np.ndarray:
    """int64[N]: the shard of each item, given to the packer so many rows at a time."""
    packer = planning.Packer(shard_cost_s)
    found = [pair for start in range(0, items.num_rows, rows) for pair in packer.add(items.slice(start, rows))]
    return np.concatenate([shards for _, shards in [*found, *packer.finish()]])


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
    assert np.bincount(pack(table, shard_cost_s=110)).tolist() == [10] * 40
    for rows in (1, 7, 399):
        np.testing.assert_array_equal(pack(table, 110, rows), pack(table, 110))
        np.testing.assert_array_equal(pack(table, None, rows), pack(table, None))


def test_ten_thousand_times_ten_thousand_items_would_still_be_bounded_shards() -> None:
    """Shards grow with the corpus up to half an hour of audio, then their number does."""
    sizes = [
        pack(planning.build_items(listing(count), SETTINGS, list), None, 70_000).max() + 1
        for count in (50, 3000, 300_000)
    ]
    assert sizes[0] == 3 and 20 <= sizes[1] <= 256 and 256 < sizes[2] < 2000


def test_the_items_of_shards_are_read_by_several_threads(tmp_path: Path) -> None:
    """As a worker does, which reads the next shard while one ends: Arrow's reader crashes when it is shared."""
    plan = plan_of(tmp_path, listing(3000))
    assert len(plan.shards) > 100 and len({entry.file for entry in plan.shards}) > 1

    def read(first: int) -> list[int]:
        entries = plan.shards[first::3] * 10
        return [planning.read_shard_items(str(tmp_path), entry).num_rows - entry.items for entry in entries]

    with ThreadPoolExecutor(6) as pool:
        assert not any(map(any, pool.map(read, [0, 1, 2] * 2)))
