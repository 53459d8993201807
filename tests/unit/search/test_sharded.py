"""Shards together find exactly what one index finds, however a release is divided; one that is dead is left out."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_sets import clusters, make_release, make_set

from audiomae.artifacts import releases
from audiomae.artifacts.releases import Release
from audiomae.search.audio_index import AudioIndex
from audiomae.search.hits import Hits
from audiomae.search.scanning import Scanner
from audiomae.search.sharded import (
    Ask,
    Divided,
    Question,
    SegmentPart,
    ShardMissingError,
    answer,
    divide,
    divide_release,
    needed_to_ask,
    open_shard,
)

DIM = 16
SIZES = (1200, 200, 200, 300)
KINDS: dict[str, dict[str, Any]] = {
    "flat": {},
    "fast scan": {"flat_max_rows": 100},
    "scalar": {"index": "IVF16,SQ8"},
    "graph": {"index": "HNSW8,SQ8"},
}


@pytest.fixture(scope="module", params=KINDS)
def index_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of four segments, some rows twice and some deleted, of files with several windows."""
    folder = tmp_path_factory.mktemp("sharded")
    kind = KINDS[request.param]
    for number, count in enumerate(SIZES):
        vectors = clusters(count, DIM, seed=number)
        vectors[-20:] = vectors[:20]  # equal vectors: the order of ties must not depend on shards
        names = [f"{number}-{row // 3}.wav" for row in range(count)]
        columns = {"label": [f"l{row % 7}" for row in range(count)], "take": list(range(count))}
        ids = [1 + number * 10_000 + row for row in range(count)]
        made = make_set(folder / str(number), vectors, names=names, columns=columns, ids=ids)
        make_release(folder / "index", [made], delete=[5, 77, 500] if number == 3 else (), **kind, fan_in=9)
    assert len(releases.resolve(folder / "index").info["segments"]) == 4
    return folder / "index"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def divided(release: Release, shards: int, pool: ThreadPoolExecutor, dead: Sequence[int] = ()) -> Divided:
    """So many shards in this process; the dead ones do not answer."""

    def ask_of(number: int) -> Ask:
        scanner = open_shard(release, number, shards)

        def ask(question: Question) -> Sequence[np.ndarray]:
            if number in dead:
                raise ShardMissingError(f"Shard{number}")
            return answer(scanner, question)

        return ask

    return Divided({f"Shard{number}": ask_of(number) for number in range(shards)}, pool)


SEARCHES: dict[str, Callable[[AudioIndex, np.ndarray], Hits]] = {
    "all": lambda index, queries: index.search(queries, k=10),
    "more than there are": lambda index, queries: index.search(queries[:2], k=2500),
    "one in seven": lambda index, queries: index.search(queries, k=10, filter={"label": "l3"}),
    "a handful": lambda index, queries: index.search(queries, k=10, filter={"take": {"in": [3, 5, 190, 290, 1100]}}),
    "half": lambda index, queries: index.search(queries, k=10, filter={"take": {"lt": 150}}),
    "files": lambda index, queries: index.search(queries, k=10, group_by="uri"),
    "labels": lambda index, queries: index.search(queries, k=7, group_by="label"),
    "files of a label": lambda index, queries: index.search(queries, k=5, filter={"label": "l1"}, group_by="uri"),
    "an item": lambda index, queries: index.search_id(10_003, k=10, group_by="uri"),
    "exactly": lambda index, queries: index.search_exactly(queries, k=10),
}


@pytest.mark.parametrize("shards", [1, 2, 4, 7])
def test_shards_find_what_one_index_finds(index_dir: Path, shards: int, pool: ThreadPoolExecutor) -> None:
    whole = AudioIndex.open(index_dir)
    many = AudioIndex.open(index_dir, divided=divided(whole.release, shards, pool))
    queries = np.concatenate([clusters(12, DIM, seed=9), whole.vectors([1, 10_001, 20_150])])
    for name, search in SEARCHES.items():
        one, found = search(whole, queries), search(many, queries)
        np.testing.assert_array_equal(found.ids, one.ids, err_msg=name)
        np.testing.assert_array_equal(found.scores, one.scores, err_msg=name)
        assert found.items == one.items and found.spans == one.spans and found.missing == ()
    np.testing.assert_array_equal(many.vectors([1200, 30_001, 3]), whole.vectors([1200, 30_001, 3]))


def test_a_dead_shard_is_named_and_the_others_answer(index_dir: Path, pool: ThreadPoolExecutor) -> None:
    whole = AudioIndex.open(index_dir)
    parts = divide_release(whole.release, 3)
    many = AudioIndex.open(index_dir, divided=divided(whole.release, 3, pool, dead=[1]))
    queries = clusters(5, DIM, seed=9)
    for name, search in SEARCHES.items():
        found = search(many, queries)
        if found.missing:
            assert found.missing == ("Shard1",), name
        else:  # it has no row in the lists that were looked at
            np.testing.assert_array_equal(found.ids, search(whole, queries).ids, err_msg=name)
    assert many.search(queries[:2], k=2500).missing == ("Shard1",)
    assert whole.spec.kind == "ivf" or all(search(many, queries).missing for search in SEARCHES.values())
    alive = {part.segment for number in (0, 2) for part in parts[number]}
    only_dead = next((part.segment for part in parts[1] if part.segment not in alive), None)
    if only_dead is not None:
        lost = 1 + only_dead * 10_000
        np.testing.assert_array_equal(many.vector(lost), whole.vector(lost))  # from the files
        assert not np.isin(many.search(queries, k=50).ids, range(lost, lost + 9999)).any()
    assert many.search(queries, k=50).ids[:, 0].min() > 0


def test_who_asks_shards_needs_no_vectors(index_dir: Path, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    whole = AudioIndex.open(index_dir)
    asks = divided(whole.release, 2, pool)
    for file in index_dir.rglob("*"):
        target = tmp_path / "index" / file.relative_to(index_dir)
        if file.is_file() and needed_to_ask(str(file.relative_to(index_dir))):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    assert not list(tmp_path.rglob("vectors.faiss")) and not list(tmp_path.rglob("lists.bin"))
    many = AudioIndex.open(tmp_path / "index", divided=asks)
    queries = clusters(5, DIM, seed=9)
    np.testing.assert_array_equal(many.search(queries).ids, whole.search(queries).ids)


@pytest.mark.parametrize(
    ("rows", "shards", "expected"),
    [
        ([1000], 4, [[(0, 0, 4)], [(0, 1, 4)], [(0, 2, 4)], [(0, 3, 4)]]),
        ([10, 10, 10, 10], 2, [[(0, 0, 1), (2, 0, 1)], [(1, 0, 1), (3, 0, 1)]]),
        ([90, 10], 2, [[(0, 0, 2), (1, 0, 1)], [(0, 1, 2)]]),
        ([5], 1, [[(0, 0, 1)]]),
        ([0], 2, [[(0, 0, 1)], []]),
    ],
)
def test_segments_are_divided_evenly(rows: list[int], shards: int, expected: list[Any]) -> None:
    found = divide(rows, shards, divisible=True)
    assert [[(part.segment, *part.part) for part in mine] for mine in found] == expected


def test_a_graph_stays_whole() -> None:
    assert divide([1000, 10], 3, divisible=False) == [[SegmentPart(0, (0, 1))], [SegmentPart(1, (0, 1))], []]


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="expected scan, sift, walk, compare or vectors"):
        answer(Scanner([], DIM), Question("drop"))


def test_who_has_nothing_in_the_lists_looked_at_is_not_asked(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Near lists lie with one shard: most queries ask few of eight."""
    made = make_set(tmp_path / "set", clusters(4000, DIM, seed=1))
    make_release(tmp_path / "index", [made], flat_max_rows=100)
    whole = AudioIndex.open(tmp_path / "index")
    given, asked = divided(whole.release, 8, pool), []

    def noting(name: str, ask: Ask) -> Ask:
        return lambda question: (asked.append(name), ask(question))[1]

    many = AudioIndex.open(tmp_path / "index", divided=Divided({n: noting(n, a) for n, a in given.asks.items()}, pool))
    queries = clusters(40, DIM, seed=2)
    for query in queries:
        np.testing.assert_array_equal(many.search(query, k=5).ids, whole.search(query, k=5).ids)
    assert 40 <= len(asked) < 4 * 40 and len(set(asked)) == 8
