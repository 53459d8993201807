"""Publishing a version once, finding it, rolling back, cleaning up; on a local disk and on S3."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from audiomae import storage
from audiomae.artifacts import receipts, release_files
from audiomae.artifacts import releases as release
from audiomae.artifacts.receipts import Receipt
from audiomae.artifacts.releases import Release
from audiomae.errors import IntegrityError, ReleaseConflictError, UserError


def stage(tmp_path: Path, text: str = "bytes") -> Path:
    """Finished files, waiting to be published."""
    staging = tmp_path / "staging"
    (staging / "encoder").mkdir(parents=True, exist_ok=True)
    (staging / "index.faiss").write_text(text)
    (staging / "encoder" / "config.json").write_text("{}")
    return staging


def publish(index_dir: str | Path, tmp_path: Path, parent: Release | None = None, text: str = "bytes") -> Release:
    return release.publish(index_dir, stage(tmp_path, text), {"fingerprint": "abc", "rows": 3}, parent)


@pytest.fixture(params=["local", "s3"])
def index_dir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An INDEX that does not exist yet."""
    monkeypatch.setenv("AUDIOMAE_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        return str(tmp_path / "index")
    return request.getfixturevalue("s3_bucket") + "/index"


def test_publish_resolve_verify_fetch(index_dir: str, tmp_path: Path) -> None:
    assert release.resolve_or_none(index_dir) is None
    first = publish(index_dir, tmp_path)
    second = publish(index_dir, tmp_path, first, "more bytes")
    assert (first.version, second.version) == ("v000001", "v000002")
    assert storage.read_bytes(f"{index_dir}/LATEST") == b"v000002\n"
    assert release.resolve(index_dir) == second
    assert release.resolve(index_dir, "v000001") == first
    assert second.info["parent"] == "v000001" and second.fingerprint == "abc"
    release.verify(second)
    local = release.fetch(second)
    assert (Path(str(local.path)) / "index.faiss").read_text() == "more bytes"
    assert storage.is_local(local.path)


def test_a_release_directory_can_be_opened_by_itself(tmp_path: Path) -> None:
    made = publish(tmp_path / "index", tmp_path)
    storage.copy_tree(made.path, tmp_path / "elsewhere" / made.version)
    alone = release.resolve(tmp_path / "elsewhere" / made.version)
    assert alone.info == made.info
    release.verify(alone)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no index release at .*build_index.py --out"):
        release.resolve(tmp_path / "nothing")
    publish(tmp_path / "index", tmp_path)
    with pytest.raises(UserError, match=r"no version 'v00001'.*did you mean 'v000001'"):
        release.resolve(tmp_path / "index", "v00001")


def test_a_damaged_or_missing_file_is_named(index_dir: str, tmp_path: Path) -> None:
    made = publish(index_dir, tmp_path)
    storage.write_bytes(made.path / "index.faiss", b"bytez")
    with pytest.raises(IntegrityError, match=r"index.faiss: damaged: got sha256 \w+, expected \w+.*: roll back"):
        release.fetch(made)
    (made.path / "index.faiss").unlink()
    with pytest.raises(IntegrityError, match=r"index.faiss: missing, but its receipt names it: roll back"):
        release.verify(made)


def test_a_changed_release_file_is_noticed(tmp_path: Path) -> None:
    made = publish(tmp_path / "index", tmp_path)
    path = Path(str(made.path)) / release.RELEASE_FILE
    path.write_text(path.read_text().replace('"abc"', '"abd"'))
    with pytest.raises(IntegrityError, match=r"release.json: damaged"):
        release.resolve(tmp_path / "index")
    path.write_bytes(Receipt(made.files, dict(made.info) | {"rows": 4}).encode())
    with pytest.raises(IntegrityError, match=r"release.json: damaged"):
        release.verify(release.resolve(tmp_path / "index"))
    path.write_bytes(Receipt(made.files, dict(made.info) | {"format": 7}).encode())
    with pytest.raises(IntegrityError, match="release format 7, expected 2"):
        release.resolve(tmp_path / "index")


def test_releases_of_older_versions_stay_readable(tmp_path: Path) -> None:
    made = publish(tmp_path / "index", tmp_path)
    checksums = {name: entry.sha256 for name, entry in made.files.items()}
    old = storage.encode_json(dict(made.info) | {"format": 1, "checksums": checksums})
    storage.write_bytes(made.path / release.RELEASE_FILE, old)
    entry = {"version": made.version, "release_sha256": storage.sha256_bytes(old), "action": "publish", "by": "someone"}
    storage.write_json(tmp_path / "index" / "history" / "000001.json", entry | {"time": 0.0})
    found = release.resolve(tmp_path / "index")
    assert found.info["rows"] == 3 and set(found.files) == set(made.files)
    release.verify(found)
    assert publish(tmp_path / "index", tmp_path, found).version == "v000002"
    storage.write_bytes(made.path / "index.faiss", b"bytez")
    with pytest.raises(IntegrityError, match=r"index.faiss: damaged"):
        release.verify(found)


def test_the_second_of_two_builds_on_one_base_publishes_nothing(index_dir: str, tmp_path: Path) -> None:
    base = publish(index_dir, tmp_path)
    winner = publish(index_dir, tmp_path, base)
    with pytest.raises(ReleaseConflictError, match="run the same command again"):
        publish(index_dir, tmp_path, base)
    with pytest.raises(ReleaseConflictError):
        publish(index_dir, tmp_path, None)
    assert release.resolve(index_dir) == winner
    versions = {path.name for path in storage.to_path(index_dir).iterdir() if path.name.startswith("v")}
    assert versions == {"v000001", "v000002"}


def test_a_number_whose_owner_is_just_leaving_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = publish(tmp_path / "index", tmp_path)
    link = os.link

    def leave_first(source: str, path: str, **options: Any) -> None:
        if path.endswith("v000002/CLAIM"):
            release._remove(storage.to_path(path).parent)
        link(source, path, **options)

    monkeypatch.setattr(os, "link", leave_first)
    assert publish(tmp_path / "index", tmp_path, base).version == "v000003"
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["LATEST", "history", "v000001", "v000003"]


def test_of_many_builds_at_once_exactly_one_wins(index_dir: str, tmp_path: Path) -> None:
    base = publish(index_dir, tmp_path)
    won: list[str] = []
    lost: list[ReleaseConflictError] = []
    barrier = threading.Barrier(6)

    def race(number: int) -> None:
        staging = stage(tmp_path / str(number), f"from {number}")
        barrier.wait()
        try:
            won.append(release.publish(index_dir, staging, {"fingerprint": "abc", "rows": number}, base).version)
        except ReleaseConflictError as error:
            lost.append(error)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 5
    latest = release.resolve(index_dir)
    assert latest.version == won[0]
    release.verify(latest)
    assert storage.read_bytes(latest.path / "index.faiss") == f"from {latest.info['rows']}".encode()


def test_rollback_then_publish_goes_on_from_there(index_dir: str, tmp_path: Path) -> None:
    first = publish(index_dir, tmp_path)
    publish(index_dir, tmp_path, first)
    back = release.rollback(index_dir)
    assert back.version == "v000001" and release.resolve(index_dir) == back
    assert storage.read_bytes(f"{index_dir}/LATEST") == b"v000001\n"
    with pytest.raises(UserError, match="no earlier version"):
        release.rollback(index_dir)
    third = publish(index_dir, tmp_path, back)
    assert third.version == "v000003" and release.resolve(index_dir) == third
    assert release.rollback(index_dir, "v000002").version == "v000002"


def test_rollback_refuses_a_damaged_version(tmp_path: Path) -> None:
    first = publish(tmp_path / "index", tmp_path)
    second = publish(tmp_path / "index", tmp_path, first)
    storage.write_bytes(first.path / "index.faiss", b"bytez")
    with pytest.raises(IntegrityError, match="damaged"):
        release.rollback(tmp_path / "index")
    assert release.resolve(tmp_path / "index") == second


def test_gc_keeps_what_is_in_force_and_what_is_being_built(index_dir: str, tmp_path: Path) -> None:
    root = storage.to_path(index_dir)
    made = publish(index_dir, tmp_path)
    for _ in range(3):
        made = publish(index_dir, tmp_path, made)
    # left by builds that started from the version in force, and from an earlier one
    storage.write_json(root / "v000008" / "CLAIM", {"by": "someone", "base": 4})
    storage.write_json(root / "v000009" / "CLAIM", {"by": "someone", "base": 3})
    for name in ("segments/000004-aa", "segments/000003-bb", "parts/000002-cc", "quantisers/000001-dd"):
        storage.write_bytes(root / name / "ids.npy", b"rows")
    for version in range(1, 5):
        storage.write_bytes(root / "reports" / f"v{version:06d}.html", b"what was tried")
    removed = release.gc(index_dir, keep=2)
    assert storage.list_names(root / "reports") == ["v000003.html", "v000004.html"]
    assert removed[:3] == ["v000001", "v000002", "v000009"]
    assert sorted(removed[3:]) == ["parts/000002-cc", "quantisers/000001-dd", "segments/000003-bb"]
    assert (root / "segments" / "000004-aa" / "ids.npy").exists()
    assert release.gc(index_dir, keep=2) == []
    assert release.resolve(index_dir).version == "v000004"
    with pytest.raises(UserError, match="was removed"):
        release.resolve(index_dir, "v000001")
    release.rollback(index_dir)
    assert sorted(release.gc(index_dir, keep=1)) == ["segments/000004-aa", "v000004", "v000008"]


def test_a_copy_in_the_cache_is_fetched_once_and_again_when_damaged(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUDIOMAE_CACHE", str(tmp_path / "cache"))
    made = publish(f"{s3_bucket}/index", tmp_path)
    first = release.fetch(made)
    file = Path(str(first.path)) / "index.faiss"
    before = file.stat().st_ino
    assert release.fetch(made).path == first.path and file.stat().st_ino == before
    file.write_text("bytez")
    assert release.fetch(made).path == first.path
    assert file.read_text() == "bytes"
    assert [p.name for p in file.parent.parent.iterdir()] == ["v000001"]


def test_copies_that_were_not_used_for_a_week_go(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUDIOMAE_CACHE", str(tmp_path / "cache"))
    made = publish(f"{s3_bucket}/index", tmp_path)
    old = Path(str(release.fetch(made).path))
    newer = publish(f"{s3_bucket}/index", tmp_path, made, "more")
    release.fetch(newer)
    assert old.exists()
    week = time.time() - 8 * 24 * 3600
    os.utime(old / release_files.USED_FILE, (week, week))
    release.fetch(newer)
    assert not old.exists()


def test_a_large_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUDIOMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(release_files, "SMALL_BYTES", 4)
    made = publish(tmp_path / "index", tmp_path)
    read: list[str] = []
    whole = receipts.verify_file
    monkeypatch.setattr(
        receipts, "verify_file", lambda root, name, *rest: (read.append(name), whole(root, name, *rest))
    )
    for version in ("latest", "v000001", "latest"):
        release.verify(release.resolve(tmp_path / "index", version))
    release.verify(release.resolve(made.path))
    assert read.count("index.faiss") == 1
    file = Path(str(made.path)) / "index.faiss"
    before = file.stat()
    file.write_bytes(b"bytez")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had happened
    with pytest.raises(IntegrityError, match="damaged"):
        release.verify(release.resolve(made.path))


def test_a_piece_is_part_of_what_is_checked(tmp_path: Path) -> None:
    index_dir, name = tmp_path / "index", "segments/000000-ab"
    work = tmp_path / "work"
    work.mkdir()
    (work / "ids.npy").write_bytes(b"rows")
    assert release.read_piece(index_dir, name) is None
    release.create_piece(index_dir, name, work, {"rows": 4})
    found = release.read_piece(index_dir, name)
    assert found is not None and found[0].facts == {"rows": 4}
    made = release.publish(index_dir, stage(tmp_path), {"fingerprint": "abc", "pieces": {name: found[1]}})
    release.verify(made)
    receipt = index_dir / name / "receipt.json"
    for path, message in ((index_dir / name / "ids.npy", "damaged"), (receipt, "damaged|seal")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"?")
        with pytest.raises(IntegrityError, match=message):
            release.verify(release.resolve(made.path))
        path.unlink()
        with pytest.raises(IntegrityError, match="missing"):
            release.verify(made)
        path.write_bytes(whole)
    release.verify(made)
