"""One request for each thing asked of S3, faults survived, objects replaced while they are read."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_s3 import faulty_s3

from audiomae import s3, storage
from audiomae.retries import retry


@pytest.fixture
def requests(s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The methods of all requests from here on."""
    seen: list[str] = []

    def choose(number: int, method: str, path: str) -> None:
        seen.append(method)

    with faulty_s3(s3_server, choose) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield seen


def test_every_operation_is_one_request(requests: list[str], s3_bucket: str, tmp_path: Path) -> None:
    root = storage.to_path(f"{s3_bucket}/run")
    (tmp_path / "local").write_bytes(b"x" * 3_000_000)

    def count(call: Callable[[], object]) -> list[str]:
        requests.clear()
        call()
        return list(requests)

    assert count(lambda: storage.write_json(root / "a.json", {"step": 1})) == ["PUT"]
    assert count(lambda: storage.put_if_absent(root / "b/c.bin", b"new" * 1000)) == ["PUT"]
    assert count(lambda: storage.put_if_absent(root / "b/c.bin", b"other")) == ["PUT"]
    assert count(lambda: storage.read_json(root / "a.json")) == ["GET"]
    assert count(lambda: storage.sha256_file(root / "b/c.bin")) == ["GET"]
    assert count(lambda: storage.list_names(root)) == ["GET"]
    assert count(lambda: storage.list_sizes(root)) == ["GET"]
    assert count(lambda: storage.copy_file(root / "b/c.bin", tmp_path / "copy")) == ["GET"]
    assert count(lambda: storage.copy_tree(root, tmp_path / "tree")) == ["GET"] * 3
    assert count(lambda: storage.remove(root / "a.json")) == ["DELETE"]
    assert storage.list_names(root) == ["b"] and storage.list_sizes(root) == {"b/c.bin": 3000}
    assert count(lambda: storage.remove_tree(root)) == ["GET", "POST"]
    assert storage.list_names(root) == []


def test_progress_is_read_while_it_is_being_replaced(s3_bucket: str) -> None:
    """A reader of an object that another process replaces all the time gets one whole version after the other."""
    path = storage.to_path(s3_bucket) / "progress.json"
    storage.write_json(path, {"step": 0, "note": "x" * 5000})
    done = threading.Event()

    def write() -> None:
        for step in range(1, 40):
            storage.write_json(path, {"step": step, "note": "x" * (5000 - step)})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    steps = []
    while not done.is_set():
        value = storage.read_json(path)
        assert len(value["note"]) == 5000 - value["step"]
        steps.append(value["step"])
    writer.join()
    assert steps == sorted(steps) and storage.read_json(path)["step"] == 39


@pytest.mark.parametrize("kind", ["cut", "503", "500", "dropped"])
def test_a_stream_goes_on_where_its_body_broke_off(
    s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data = bytes(range(256)) * 20_000
    storage.write_bytes(f"{s3_bucket}/big.bin", data)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with faulty_s3(s3_server, lambda number, method, path: kind if number in (1, 2) else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with storage.open_stream(f"{s3_bucket}/big.bin") as file:
            assert file.read() == data
        assert proxy.injected[kind] == 2


def test_a_stream_of_an_object_that_was_replaced_is_no_mixture(
    s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3_bucket}/big.bin", b"a" * 5_000_000)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with faulty_s3(s3_server, lambda number, method, path: "cut" if number == 1 else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with storage.open_stream(f"{s3_bucket}/big.bin") as file:
            file.read(10)
            storage.write_bytes(f"{s3_bucket}/big.bin", b"b" * 5_000_000)
            with pytest.raises(OSError, match=r"big\.bin"):
                file.read()


def test_parts_of_an_object_are_read_alone(s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/x.bin", bytes(range(200)))
    for size in (None, 200):
        with storage.open_seekable(f"{s3_bucket}/x.bin", size) as file:
            file.seek(-10, 2)
            assert file.read(5) == bytes(range(190, 195))
            file.seek(3)
            assert file.read(2) == b"\3\4"
    assert s3.read(f"{s3_bucket}/x.bin", 250, 10) == (b"", 250)
    entry = s3.head(f"{s3_bucket}/x.bin")
    assert entry is not None and entry.size == 200 and s3.head(f"{s3_bucket}/y") is None


def test_errors_are_pythons_own(s3_bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: no such object"):
        storage.read_bytes(f"{s3_bucket}/nothing")
    with pytest.raises(FileNotFoundError, match="no such object"):
        storage.open_stream(f"{s3_bucket}/nothing")
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        storage.list_names("s3://there-is-no-such-bucket/x")
    storage.remove(f"{s3_bucket}/nothing")
    assert storage.list_sizes(f"{s3_bucket}/nothing") == {}


def test_what_passes_is_tried_again_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)

    def flaky(failures: int, error: Exception) -> Callable[[], str]:
        left = [error] * failures

        def call() -> str:
            if left:
                raise left.pop()
            return "done"

        return call

    def passing(error: Exception) -> bool:
        return isinstance(error, TimeoutError)

    assert retry(flaky(2, TimeoutError()), passing, attempts=3, first_wait_s=1.0) == "done"
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2 and len(waits) == 2
    with pytest.raises(TimeoutError):
        retry(flaky(3, TimeoutError()), passing, attempts=3)
    with pytest.raises(KeyError):
        retry(flaky(1, KeyError()), passing, attempts=3)
    assert len(waits) == 4
