import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from upath import UPath

from audiomae import storage


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    if request.param == "local":
        return storage.to_path(tmp_path)
    return storage.to_path(request.getfixturevalue("s3_bucket"))


def test_write_read_and_replace(root: UPath) -> None:
    path = root / "a" / "b.json"
    storage.write_json(path, {"b": 1, "a": [1, 2]})
    storage.write_json(path, {"a": 2})
    assert storage.read_json(path) == {"a": 2}
    assert storage.sha256_file(path) == storage.sha256_bytes(storage.encode_json({"a": 2}))
    assert [name for name, _ in storage.walk_files(root)] == ["a/b.json"], "no temporary file is left"


def test_put_if_absent_has_exactly_one_winner(root: UPath) -> None:
    path = root / "commits" / "0.json"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.put_if_absent(path, str(i).encode()), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(path) == str(won.index(True)).encode()


def test_a_writer_that_ends_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.link", ended)
        with pytest.raises(KeyboardInterrupt):
            storage.put_if_absent(tmp_path / "made" / "receipt.json", b"{}")
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("lacking", ["O_TMPFILE", "/proc"])
def test_without_files_that_have_no_name_there_is_one_winner_too(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacking == "O_TMPFILE":
        monkeypatch.delattr("os.O_TMPFILE")
    else:
        exists = os.path.lexists
        monkeypatch.setattr("os.path.lexists", lambda path: not str(path).startswith("/proc") and exists(path))
    place = tmp_path / "made" / "receipt.json"
    assert storage.put_if_absent(place, b"first") and not storage.put_if_absent(place, b"second")
    assert place.read_bytes() == b"first" and [path.name for path in place.parent.iterdir()] == ["receipt.json"]


def test_copy_tree_and_fetch_dir(root: UPath, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "x.bin").write_bytes(b"x" * 3_000_000)
    (source / "y.txt").write_text("y")
    storage.copy_tree(source, root / "copy")
    assert [name for name, _ in storage.walk_files(root / "copy")] == ["deep/x.bin", "y.txt"]
    local = storage.fetch_dir(root / "copy")
    assert (local / "deep" / "x.bin").read_bytes() == b"x" * 3_000_000


def test_an_interrupted_local_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    storage.write_json(path, {"old": True})
    monkeypatch.setattr(storage.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        storage.write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert [item.name for item in tmp_path.iterdir()] == ["file.json"]


def test_broken_json_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(storage.IntegrityError, match="not valid JSON"):
        storage.read_json(tmp_path / "x.json")
