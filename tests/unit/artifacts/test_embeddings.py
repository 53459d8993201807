"""Commits that count once, readers that trust nothing else, and garbage that is only garbage when all is done."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiomae.artifacts import receipts
from audiomae.artifacts.embeddings import (
    EmbeddingSet,
    ShardOrigin,
    ShardTables,
    collect_garbage,
    commit_shard,
    read_receipt,
    receipt_path,
    write_run,
)
from audiomae.artifacts.tables import (
    FAILURE_SCHEMA,
    SILENT_SCHEMA,
    EmbedSettings,
    embedding_schema,
    map_ahead,
    vectors_to_column,
)
from audiomae.errors import IntegrityError
from audiomae.storage import to_path, write_json

SETTINGS = EmbedSettings(fingerprint="f" * 64, dim=4, sample_rate=16000, mode="windows", window_s=5, hop_s=5)


def table(rows: int, start: int = 0, settings: EmbedSettings = SETTINGS) -> pa.Table:
    vectors = np.arange(start * settings.dim, (start + rows) * settings.dim, dtype=np.float32).reshape(rows, -1)
    columns = [
        pa.array(range(start, start + rows), pa.int64()),
        pa.array([f"{number}.wav" for number in range(start, start + rows)]),
        pa.array(np.zeros(rows)),
        pa.array(np.full(rows, 5.0)),
        vectors_to_column(vectors.astype(np.float16 if settings.vector_dtype == "float16" else np.float32)),
        pa.array(["rain"] * rows),
    ]
    return pa.Table.from_arrays(columns, schema=embedding_schema(settings, [pa.field("label", pa.string())]))


def failures(count: int) -> pa.Table:
    row = {
        "uri": "x.wav",
        "start_s": 0.0,
        "end_s": None,
        "stage": "open",
        "error_class": "EmptyFile",
        "message": "0 bytes",
    }
    return pa.Table.from_pylist([row] * count, FAILURE_SCHEMA)


def commit(out: Path, shard: str, rows: pa.Table, failed: int = 0, settings: EmbedSettings = SETTINGS) -> bool:
    return commit_shard(
        out,
        shard,
        ShardTables(rows, failures(failed)),
        ShardOrigin(
            inputs=rows.num_rows + failed,
            audio_s=5.0 * rows.num_rows,
            fingerprint=settings.fingerprint,
            manifest="m",
        ),
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder with a plan of two shards."""
    entries = [
        {"name": name, "file": "manifest/items.parquet", "group": 0, "items": 3, "base": None} for name in ("a", "b")
    ]
    plan = {"generation": 0, "settings": SETTINGS.model_dump(), "files": [], "shards": entries, "vanished": None}
    write_json(tmp_path / "manifest" / "plan-000000.json", plan)
    write_run(tmp_path, SETTINGS.model_dump() | {"encoder": "enc", "corpus_root": "sounds"})
    return tmp_path


def names(out: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (out / folder).iterdir()) if (out / folder).exists() else []


def test_the_first_attempt_wins_and_the_loser_leaves_nothing(out: Path) -> None:
    assert commit(out, "a", table(3), failed=1)
    before = names(out, "embeddings"), names(out, "failures"), names(out, "commits")
    assert not commit(out, "a", table(3), failed=1)
    assert (names(out, "embeddings"), names(out, "failures"), names(out, "commits")) == before
    assert len(before[0]) == len(before[1]) == 1


def test_of_many_concurrent_attempts_one_wins(out: Path) -> None:
    barrier, wins = threading.Barrier(8), []

    def attempt() -> None:
        barrier.wait()
        wins.append(commit(out, "a", table(3)))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [False] * 7 + [True]
    assert len(names(out, "embeddings")) == 1


def test_a_commit_whose_answer_was_lost_is_still_ours(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conditional put that succeeded, whose answer was lost, is refused when it is sent again."""
    original = receipts.put_if_absent
    monkeypatch.setattr(receipts, "put_if_absent", lambda path, data: original(path, data) and False)
    assert commit(out, "a", table(3))
    monkeypatch.undo()
    assert EmbeddingSet.open(out).read().num_rows == 3


def test_readers_see_commits_only(out: Path) -> None:
    commit(out, "a", table(3), failed=2)
    pq.write_table(table(5), out / "embeddings" / "b-0123456789ab.parquet")  # an attempt that was killed
    embeddings = EmbeddingSet.open(out)
    assert (embeddings.num_rows, embeddings.shards, embeddings.complete) == (3, ["a"], False)
    assert embeddings.read()["id"].to_pylist() == [0, 1, 2]
    assert embeddings.vectors().tolist() == np.arange(12, dtype=np.float32).reshape(3, 4).tolist()
    assert embeddings.failures().num_rows == 2
    assert (embeddings.dim, embeddings.encoder, embeddings.corpus_root) == (4, "enc", "sounds")


def test_garbage_is_collected_only_when_every_shard_is_committed(out: Path) -> None:
    commit(out, "a", table(3))
    orphan = out / "embeddings" / "b-0123456789ab.parquet"
    pq.write_table(table(5), orphan)
    (out / "embeddings" / ".b-1.parquet.77.tmp").write_bytes(b"half")
    assert collect_garbage(out) == 0 and orphan.exists()  # its writer may still be about to commit it
    commit(out, "b", table(3, start=3), failed=1)
    assert collect_garbage(out) == 2
    assert len(names(out, "embeddings")) == 2
    assert EmbeddingSet.open(out).read().num_rows == 6
    assert collect_garbage(out) == 0


def test_files_of_an_update_being_planned_are_not_garbage(out: Path) -> None:
    commit(out, "a", table(3))
    commit(out, "b", table(3, start=3))
    (out / "manifest" / "items-000001-00000-0123456789ab.parquet").write_bytes(b"the next generation")
    assert commit(out, "000001-000000", table(2, start=6))
    commit(out, "000000-000009", table(2, start=6))
    assert collect_garbage(out) == 2  # the last shard and its receipt
    assert EmbeddingSet.open(out).complete
    assert "items-000001-00000-0123456789ab.parquet" in names(out, "manifest")
    assert "000001-000000.json" in names(out, "commits") and len(names(out, "embeddings")) == 3


def test_a_changed_shard_is_refused(out: Path) -> None:
    commit(out, "a", table(3))
    path = out / read_receipt(out, "a").embeddings
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=r"sha256 .* expected .* relaunch"):
        EmbeddingSet.open(out).read()
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        EmbeddingSet.open(out).read()


def test_two_encoders_in_one_folder_are_refused(out: Path) -> None:
    commit(out, "a", table(3), settings=SETTINGS.model_copy(update={"fingerprint": "e" * 64}))
    with pytest.raises(IntegrityError, match="two encoders"):
        EmbeddingSet.open(out)


def test_a_folder_without_embeddings_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="embed_corpus"):
        EmbeddingSet.open(tmp_path)


def test_the_empty_set_reads_as_empty_tables(out: Path) -> None:
    embeddings = EmbeddingSet.open(out)
    assert embeddings.read().num_rows == embeddings.failures().num_rows == embeddings.vanished().num_rows == 0
    assert embeddings.vectors().shape == (0, 4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_readers_need_no_help_of_ours(tmp_path: Path, dtype: str) -> None:
    duckdb, pandas, polars = (pytest.importorskip(name) for name in ("duckdb", "pandas", "polars"))
    settings = SETTINGS.model_copy(update={"vector_dtype": dtype})
    commit(tmp_path, "a", table(3, settings=settings), settings=settings)
    path = str(tmp_path / "embeddings" / names(tmp_path, "embeddings")[0])
    assert np.stack(pandas.read_parquet(path)["embedding"].to_numpy()).shape == (3, 4)
    assert polars.read_parquet(path)["embedding"].to_numpy().shape == (3, 4)
    assert duckdb.sql(f"select sum(embedding[1]) from '{path}' where label = 'rain'").fetchall() == [(0 + 4 + 8,)]
    assert pq.read_table(path)["embedding"].type.list_size == 4


def test_equal_shards_are_equal_bytes(tmp_path: Path) -> None:
    checksums = []
    for name in ("one", "two"):
        commit(tmp_path / name, "a", table(100))
        checksums.append(read_receipt(tmp_path / name, "a").sha256)
    assert checksums[0] == checksums[1]


def test_map_ahead_keeps_order_and_bounds_what_waits() -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        return number * number

    results = map_ahead(work, range(100), ahead=3)
    assert next(results) == 0
    assert len(started) <= 5
    assert list(results) == [number * number for number in range(1, 100)]


def test_every_table_of_a_shard_is_committed_counted_and_read_back(out: Path) -> None:
    row = {"uri": "0.wav", "start_s": 1.0, "end_s": 2.0, "stage": "decode", "error_class": "CorruptAudio"}
    lost = [
        row | {"kind": "damaged"},
        row | {"kind": "damaged", "start_s": 3.0},
        row | {"uri": "x.wav", "kind": "failed"},
    ]
    quiet = [{"uri": "1.wav", "start_s": 5.0, "end_s": 10.0, "reason": "digital silence", "peak_db": -90.5}]
    tables = ShardTables(
        table(3), pa.Table.from_pylist(lost, FAILURE_SCHEMA), pa.Table.from_pylist(quiet, SILENT_SCHEMA)
    )
    commit_shard(out, "a", tables, ShardOrigin(inputs=4, audio_s=15.0, fingerprint="f" * 64, manifest="m"))
    receipt = read_receipt(out, "a")
    assert (receipt.inputs, receipt.rows, receipt.failed, receipt.damaged, receipt.silent) == (4, 3, 1, 1, 1)
    assert sorted(name.split("/")[0] for name in receipt.files) == ["embeddings", "failures", "silent"]
    found = EmbeddingSet.open(out)
    assert (found.failed, found.damaged) == (1, 1)
    assert found.failures().to_pylist() == tables.failures.to_pylist()
    assert found.silent().to_pylist() == quiet
    commit(out, "b", table(3, start=3))
    assert collect_garbage(out) == 0 and EmbeddingSet.open(out).silent().num_rows == 1


def test_folders_of_older_versions_stay_readable(out: Path) -> None:
    """Receipts without a seal, failures without a kind, a plan and a run.json without a seal."""
    (out / "embeddings").mkdir()
    (out / "failures").mkdir()
    (out / "commits").mkdir()
    old = failures(2).drop_columns(["kind"])
    entries = {}
    for name, content in (("embeddings/a-1.parquet", table(3)), ("failures/a-1.parquet", old)):
        pq.write_table(content, out / name)
        entries[name] = receipts.entry_of_file(out / name)
    first, second = entries.values()
    value = {"shard": "a", "attempt": "1", "inputs": 5, "rows": 3, "failed": 2, "audio_s": 15.0, "manifest": "m"}
    value |= {"embeddings": "embeddings/a-1.parquet", "sha256": first.sha256, "bytes": first.bytes}
    value |= {"failures": "failures/a-1.parquet", "failures_sha256": second.sha256, "fingerprint": "f" * 64}
    write_json(out / "commits" / "a.json", value)
    found = EmbeddingSet.open(out)
    assert found.num_rows == 3 and (found.failed, found.damaged) == (2, 0)
    assert found.failures()["kind"].to_pylist() == ["failed", "failed"] and found.silent().num_rows == 0
    commit(out, "b", table(3, start=3))
    assert collect_garbage(out) == 0
    (out / "failures" / "a-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match=r"failures/a-1.parquet: damaged: got sha256"):
        found.failures()


def test_a_damaged_receipt_plan_or_run_record_is_refused(out: Path) -> None:
    commit(out, "a", table(3), failed=1)
    write_run(out, SETTINGS.model_dump() | {"encoder": "enc", "corpus_root": "sounds"})
    for name, old, new in (("commits/a.json", '"failed": 1', '"failed": 0'), ("run.json", "sounds", "soundz")):
        text = (out / name).read_text()
        (out / name).write_text(text.replace(old, new))
        with pytest.raises(IntegrityError, match=rf"{name}: damaged"):
            EmbeddingSet.open(out)
        (out / name).write_text(text)
    assert EmbeddingSet.open(out).num_rows == 3


@pytest.mark.parametrize("out", ["s3://bucket/out/", "s3://bucket/out", "s3://bucket/", "s3://bucket", "/disk/out/"])
def test_a_folder_may_be_a_bucket_or_named_with_a_slash_at_its_end(out: str) -> None:
    for folder in (out, to_path(out)):
        assert receipt_path(folder, "000000-000001") == f"{out.rstrip('/')}/commits/000000-000001.json"
        assert to_path(receipt_path(folder, "000000-000001")) == to_path(out) / "commits" / "000000-000001.json"
