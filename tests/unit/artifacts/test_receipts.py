"""Receipts: exclusive, sealed, and no changed byte of what they name is ever taken for the file."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from audiomae import storage
from audiomae.artifacts import receipts
from audiomae.artifacts.receipts import FileEntry, Numbered, Receipt, describe
from audiomae.errors import IntegrityError


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    if request.param == "local":
        return storage.to_path(tmp_path)
    return storage.to_path(request.getfixturevalue("s3_bucket"))


def test_of_several_writers_one_receipt_counts(root: UPath) -> None:
    storage.write_bytes(root / "a/x.bin", b"abc")
    with ThreadPoolExecutor(8) as pool:
        won = list(
            pool.map(lambda i: receipts.create(root / "r.json", describe(root, ["a/x.bin"], {"by": i})), range(8))
        )
    assert sum(won) == 1
    receipt = receipts.read(root / "r.json")
    assert receipt.facts == {"by": won.index(True)}
    assert receipt.files == {"a/x.bin": FileEntry(storage.sha256_bytes(b"abc"), 3)}
    assert receipts.read_file(root, "a/x.bin", receipt) == b"abc"
    receipts.verify(root, receipt)


def test_what_is_missing_cut_or_changed_is_named(root: UPath) -> None:
    for name in ("a", "b"):
        storage.write_bytes(root / name, b"0123456789")
    receipt = describe(root, ["a", "b"])
    for damaged, words in ((b"012345678", "9 bytes, expected 10"), (b"0123456780", "got sha256")):
        storage.write_bytes(root / "b", damaged)
        for check in (
            lambda: receipts.verify(root, receipt),
            lambda: receipts.read_file(root, "b", receipt, "call us"),
        ):
            with pytest.raises(IntegrityError, match=rf"/b: damaged: {words}"):
                check()
    receipts.verify(root, receipt, ["a"])
    (root / "b").unlink()
    with pytest.raises(IntegrityError, match="/b: missing"):
        receipts.verify(root, receipt)
    with pytest.raises(IntegrityError, match="/c: its receipt does not name it: call us"):
        receipts.read_file(root, "c", receipt, "call us")


@settings(deadline=None)
@given(st.data())
def test_no_change_to_a_sealed_file_goes_unseen(data: st.DataObject) -> None:
    value = {"files": {"x": {"sha256": "0" * 64, "bytes": 3}}, "facts": {"rows": 5, "root": "/a b", "x": [1.5, None]}}
    sealed = receipts.seal(value)
    assert receipts.unseal("r.json", sealed) == value
    position = data.draw(st.integers(0, len(sealed) - 1))
    if data.draw(st.booleans()):
        changed = sealed[:position]
    else:
        changed = bytearray(sealed)
        changed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError, match=r"r\.json: damaged"):
        receipts.unseal("r.json", bytes(changed), unsealed=["files", "facts"])


def test_older_files_without_a_seal_are_taken_only_with_the_keys_they_had() -> None:
    old = storage.encode_json({"version": "v000001"})
    assert receipts.unseal("h", old, {"version", "by"}) == {"version": "v000001"}
    for refused in (old.replace(b"version", b"versjon"), b"{}", b"[]", b"null", b""):
        with pytest.raises(IntegrityError, match="h: damaged"):
            receipts.unseal("h", refused, {"version", "by"})
    with pytest.raises(IntegrityError, match="h: damaged"):
        receipts.unseal("h", old)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ""])
def test_a_receipt_names_nothing_outside_its_root(name: str, tmp_path: Path) -> None:
    value = {"files": {name: {"sha256": "0" * 64, "bytes": 1}}, "facts": {}}
    (tmp_path / "r.json").write_bytes(receipts.seal(value))
    with pytest.raises(IntegrityError, match="not a receipt"):
        receipts.read(tmp_path / "r.json")


def test_numbered_entries(root: UPath) -> None:
    history = Numbered(root / "history", unsealed=frozenset({"version"}))
    assert history.numbers() == [] and history.latest() is None
    assert history.create(1, {"version": "a"}) and not history.create(1, {"version": "b"})
    assert history.create(1, {"version": "a"}), "the same entry again: a put whose answer was lost"
    storage.write_bytes(root / "history/000002.json", json.dumps({"version": "old"}).encode())
    storage.write_bytes(root / "history/.000003.json.tmp", b"half")
    assert history.numbers() == [1, 2] and history.latest() == {"version": "old"}
    assert Receipt.decode({"files": {}, "facts": {}}, "r") == Receipt()
