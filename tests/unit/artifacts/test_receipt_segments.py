"""Copies of many receipts in one file: fewer reads, and never another answer than the receipts themselves."""

from pathlib import Path

import pyarrow as pa
import pytest

from audiomae import s3
from audiomae.artifacts import receipt_segments, receipts
from audiomae.artifacts.embeddings import ShardOrigin, ShardTables, commit_shard, read_receipt, read_receipts
from audiomae.artifacts.receipt_segments import Commits
from audiomae.storage import list_names, to_path

NAMES = [f"000000-{number:06d}" for number in range(12)]
ORIGIN = ShardOrigin(inputs=1, audio_s=5.0, fingerprint="f" * 64, manifest="m")


def commit(out: object, name: str) -> None:
    assert commit_shard(str(out), name, ShardTables(pa.table({"id": [1]})), ORIGIN)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for name in NAMES:
        commit(tmp_path, name)
    return tmp_path


def segments(out: object) -> list[str]:
    return [name for name in list_names(to_path(str(out)) / "commits") if receipt_segments.is_segment(name)]


def read_alone(out: object) -> dict[str, object]:
    return {name: read_receipt(str(out), name) for name in NAMES}


def test_a_segment_says_what_the_receipts_say(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Commits.list(out).compact(least=13) == 0 and not segments(out)
    assert Commits.list(out).compact(least=12) == 12 and len(segments(out)) == 1
    assert Commits.list(out).compact(least=1) == 0
    alone = read_alone(out)
    monkeypatch.setattr("audiomae.artifacts.embeddings.read_receipt", alone.pop)  # none is read by itself
    found = read_receipts(out, NAMES)
    assert found == alone and len(alone) == len(NAMES)


def test_on_s3_a_hundred_receipts_are_a_few_requests(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        commit(s3_bucket, name)
    alone = read_alone(s3_bucket)
    assert Commits.list(s3_bucket).compact(least=1) == len(NAMES)
    asked: list[str] = []
    monkeypatch.setattr(s3, "read", lambda uri, *rest, _read=s3.read: asked.append(uri) or _read(uri, *rest))
    assert read_receipts(s3_bucket, NAMES) == alone and len(asked) == 1


def test_a_shard_that_was_withdrawn_is_not_committed_and_its_next_receipt_counts(out: Path) -> None:
    Commits.list(out).compact(least=1)
    (out / "commits" / f"{NAMES[0]}.json").unlink()
    assert NAMES[0] not in read_receipts(out, NAMES)
    commit(out, NAMES[0])
    found = read_receipts(out, NAMES)
    assert found == read_alone(out) and (out / found[NAMES[0]].embeddings).exists()


def test_a_damaged_segment_costs_time_and_nothing_else(out: Path) -> None:
    Commits.list(out).compact(least=1)
    (name,) = segments(out)
    path = out / "commits" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert read_receipts(out, NAMES) == read_alone(out)
    path.unlink()
    assert read_receipts(out, NAMES) == read_alone(out)


def test_a_damaged_receipt_is_not_copied(out: Path) -> None:
    path = out / "commits" / f"{NAMES[3]}.json"
    path.write_bytes(path.read_bytes().replace(b'"m"', b'"n"'))
    assert Commits.list(out).compact(least=1) == len(NAMES) - 1
    with pytest.raises(receipts.IntegrityError, match=f"{NAMES[3]}.json: damaged"):
        read_receipts(out, NAMES)


def test_many_segments_become_one(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipt_segments, "MOST_SEGMENTS", 3)
    for number in range(4):
        commit(out, f"000001-{number:06d}")
        Commits.list(out).compact(least=1)
        assert len(segments(out)) == (number + 1 if number < 3 else 1)
    assert read_receipts(out, NAMES) == read_alone(out)
