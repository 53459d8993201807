"""Asking shards over the wire, without Serve: what comes back, what is sent once, and what is refused."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.flight as flight
import pytest
from embedding_sets import clusters, make_release, make_set

from audiomae.search.audio_index import AudioIndex
from audiomae.search.sharded import Question, ShardMissingError, open_shard
from serve import shards as module
from serve.front import reserved_cpus, shards_needed
from serve.shard import ShardServer, pack, unpack
from serve.shards import IndexShards, ShardClient
from serve.versions import VersionCache

DIM, ROWS = 16, 40_000
SECRET = "known to both"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> AudioIndex:
    """A release with inverted lists whose selections are too large to be sent with every question."""
    folder = tmp_path_factory.mktemp("shards")
    columns = {"take": list(range(ROWS))}
    made = make_set(folder / "set", clusters(ROWS, DIM), columns=columns)
    make_release(folder / "index", [made], index="IVF64,SQ8")
    return AudioIndex.open(folder / "index")


class Handle:
    """The handle of a shard's deployment, which tells where its Flight server is."""

    def __init__(self, name: str, address: Callable[[], str]) -> None:
        self.deployment_name, self.is_initialized = name, True
        self.address = SimpleNamespace(remote=lambda: SimpleNamespace(result=lambda timeout_s: address()))


@pytest.fixture
def servers(index: AudioIndex, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ShardServer]]:
    monkeypatch.setattr(module, "secret", lambda: SECRET)

    def opener(number: int) -> Any:
        return VersionCache(lambda key: open_shard(index.release, number, int(key.rpartition("/")[2])))

    found = [ShardServer("127.0.0.1", SECRET, opener(number)) for number in range(2)]
    for server in found:
        threading.Thread(target=server.serve, daemon=True).start()
    yield found
    for server in found:
        server.shutdown()


def asking(servers: list[ShardServer]) -> IndexShards:
    handles: Any = [Handle(f"Shard{number}", lambda s=server: s.address) for number, server in enumerate(servers)]
    return IndexShards(handles, 30.0)


def test_shards_over_the_wire_find_what_one_index_finds(index: AudioIndex, servers: list[ShardServer]) -> None:
    shards = asking(servers)
    many = AudioIndex.open(index.release.path, divided=shards.divided(index.version))
    queries = clusters(5, DIM, seed=3)
    for where in (None, {"take": {"lt": 20_000}}, {"take": {"lt": 30}}, {"take": {"lt": 20_000}}):
        one, found = index.search(queries, filter=where), many.search(queries, filter=where)
        np.testing.assert_array_equal(found.ids, one.ids)
        np.testing.assert_array_equal(found.scores, one.scores)
    assert shards.missing == [] and shards.never_seen(0) == []


def test_a_selection_is_sent_once_and_again_to_a_shard_that_lost_it(index: AudioIndex, servers: list[Any]) -> None:
    shards = asking(servers)
    many = AudioIndex.open(index.release.path, divided=shards.divided(index.version))
    queries, where = clusters(2, DIM, seed=3), {"take": {"lt": 20_000}}
    wanted = index.search(queries, filter=where).ids
    np.testing.assert_array_equal(many.search(queries, filter=where).ids, wanted)
    assert all(len(server._selections) == 1 for server in servers)
    for server in servers:
        server._selections.clear()
    np.testing.assert_array_equal(many.search(queries, filter=where).ids, wanted)


def test_a_shard_that_ends_is_missing_and_found_again(index: AudioIndex, servers: list[ShardServer]) -> None:
    shards = asking(servers)
    many = AudioIndex.open(index.release.path, divided=shards.divided(index.version))
    queries = clusters(2, DIM, seed=3)
    assert many.search(queries).missing == ()
    lost = servers[1]
    lost.shutdown()
    assert many.search(queries).missing == ("Shard1",)
    assert shards.missing == ["Shard1"] and many.search(queries).missing == ("Shard1",)
    opener = VersionCache(lambda key: open_shard(index.release, 1, 2))
    servers[1] = ShardServer("127.0.0.1", SECRET, opener)  # the handle does not tell of it: its address is of the old
    shards.clients[1]._handle.address = SimpleNamespace(
        remote=lambda: SimpleNamespace(result=lambda timeout_s: servers[1].address)
    )
    for _ in range(600):
        if not shards.missing:
            break
        threading.Event().wait(0.05)
    assert many.search(queries).missing == ()


def test_a_shard_that_has_not_come_yet_is_missing(
    servers: list[ShardServer], index: AudioIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()

    def address() -> str:
        if not started.is_set():
            raise RuntimeError("no replica")
        return servers[0].address

    handle: Any = Handle("Shard0", address)
    client = ShardClient(handle, 1, 1.0)
    monkeypatch.setattr(module, "FIRST_S", 0.0)
    question = Question("vectors", {}, {"rows": np.array([3])})
    assert client.is_missing and not client.wait(0)
    with pytest.raises(ShardMissingError, match="Shard0"):
        client.ask(index.version, question)
    started.set()
    assert client.wait(30)
    assert client.ask(index.version, question)[0].shape == (1, DIM)


def test_who_does_not_know_the_secret_is_refused(servers: list[ShardServer]) -> None:
    client = flight.FlightClient(servers[0].address)
    for headers in ([], [(b"authorization", b"Bearer guessed")]):
        with pytest.raises(flight.FlightUnauthenticatedError, match="its own service only"):
            list(client.do_action(flight.Action("ping", b""), flight.FlightCallOptions(headers=headers)))


def test_heads_and_arrays_go_over_the_wire_as_they_are() -> None:
    arrays = [np.arange(6, dtype=np.int64).reshape(2, 3), np.zeros((0, 4), np.float32), np.array([3], np.uint8)]
    head, found = unpack(memoryview(pack({"a": {"b": [1]}}, arrays)))
    assert head == {"a": {"b": [1]}}
    for one, other in zip(arrays, found, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="an array of float64"):
        unpack(memoryview(pack({}, [np.zeros(1)])))


@pytest.mark.parametrize(
    ("rows", "memory", "autoscaled", "expected"),
    [
        (1_000_000, [16, 16], False, 1),
        (30_000_000, [16, 16, 64], False, 3),
        (300_000_000, [16, 16, 64], False, 3),
        (300_000_000, [16], False, 1),
        (300_000_000, [16], True, 30),
        (300_000_000, [], False, 1),
    ],
)
def test_large_indexes_are_divided(
    monkeypatch: pytest.MonkeyPatch, rows: int, memory: list[int], autoscaled: bool, expected: int
) -> None:
    from serve import front

    monkeypatch.setattr(front, "nodes", lambda: [{"memory": gib * 2**30, "CPU": 1} for gib in memory])
    monkeypatch.setattr(front, "node_types", lambda: [{"CPU": 4}] if autoscaled else [])
    monkeypatch.setattr(front.ray, "is_initialized", lambda: bool(memory))
    info = {"dim": 384, "spec": {"bytes_in_memory": 68}, "segments": [{"rows": rows // 2}, {"rows": rows // 2}]}
    release: Any = SimpleNamespace(info=info)
    assert shards_needed(release) == expected


@pytest.mark.parametrize(
    ("cpus", "replicas", "autoscaled", "expected"),
    [
        ([2], 3, False, 0.5),
        ([2], 6, False, 0.25),
        ([1, 1], 5, False, 0.25),  # two halves of one CPU each
        ([0, 2], 21, False, 0.05),
        ([1], 1000, False, 0.01),
        ([2], 6, True, 0.5),
        ([], 6, False, 0.5),
    ],
)
def test_every_replica_finds_a_node(
    monkeypatch: pytest.MonkeyPatch, cpus: list[int], replicas: int, autoscaled: bool, expected: float
) -> None:
    from serve import front

    monkeypatch.setattr(front, "nodes", lambda: [{"CPU": count} if count else {} for count in cpus])
    monkeypatch.setattr(front, "node_types", lambda: [{"CPU": 4}] if autoscaled else [])
    monkeypatch.setattr(front.ray, "is_initialized", lambda: bool(cpus))
    assert reserved_cpus(replicas) == expected


@pytest.mark.parametrize(
    ("cpus", "shards", "graph_rows", "expected"),
    [
        ([2], 1, 0, 2),
        ([0, 16, 8], 1, 0, 4),
        ([0], 1, 0, 1),
        ([], 1, 0, 3),
        ([16], 2, 0, 1),
        ([16], 1, 2_000_000, 4),
        ([16], 1, 7_000_000, 2),
        ([16], 1, 90_000_000, 1),
    ],
)
def test_the_cores_are_given_to_several_processes(
    monkeypatch: pytest.MonkeyPatch, cpus: list[int], shards: int, graph_rows: int, expected: int
) -> None:
    from serve import front

    monkeypatch.setattr(
        front, "nodes", lambda: [{"memory": 32.0 * 2**30} | ({"CPU": count} if count else {}) for count in cpus]
    )
    monkeypatch.setattr(front, "available_cpus", lambda: 3)
    monkeypatch.setattr(front.ray, "is_initialized", lambda: bool(cpus))
    spec = {"kind": "hnsw", "bytes_in_memory": 1024} if graph_rows else {"kind": "ivf", "bytes_in_memory": 68}
    release: Any = SimpleNamespace(info={"spec": spec, "segments": [{"rows": graph_rows or 90_000_000}]})
    assert front.api_replicas(release, shards) == expected
