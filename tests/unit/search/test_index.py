"""The index: its choice, parts against one piece, search with filters and deletions, damaged and foreign files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from embedding_sets import clusters, make_release, make_set

from audiomae.artifacts import releases as release
from audiomae.errors import FilterError, IntegrityError, UserError
from audiomae.search import index as ann
from audiomae.search import searcher
from audiomae.search.audio_index import AudioIndex
from audiomae.search.spec import IndexSpec

DIM, ROWS = 32, 3000
VECTORS = clusters(ROWS, DIM)
LABELS = [f"class{row % 7}" for row in range(ROWS)]
KINDS: dict[str, dict[str, Any]] = {"flat": {}, "ivf": {"flat_max_rows": 100, "recall": 0.97}}


@pytest.fixture(scope="module", params=list(KINDS))
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AudioIndex:
    """3,000 clips, once searched exhaustively and once through an inverted file."""
    folder = tmp_path_factory.mktemp(request.param)
    columns = {"label": LABELS, "take": list(range(ROWS)), "snr": [row / ROWS for row in range(ROWS)]}
    embeddings = make_set(folder / "embeddings", VECTORS, columns=columns)
    make_release(folder / "index", [embeddings], **KINDS[request.param])
    return AudioIndex.open(folder / "index")


def exact(queries: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """Rows by brute force, int64[Q, k]."""
    scores = queries @ VECTORS.T
    scores[:, ~allowed] = -np.inf
    return np.argsort(-scores, axis=1)[:, :k]


@pytest.mark.parametrize("codes", ["RaBitQfs", "RaBitQ", "SQfp16", "SQ8", "SQ4", "Flat"])
def test_mapped_lists_hold_what_faiss_itself_would(tmp_path: Path, codes: str) -> None:
    rows = ann.to_rows(VECTORS)
    spec = IndexSpec(kind="ivf", factory=f"IVF16,{codes}", nlist=16)
    ann.train(spec, rows[::3], tmp_path)
    lists = np.concatenate([ann.assign(tmp_path / ann.TRAINED_FILE, part) for part in np.array_split(rows, 5)])
    ann.encode(tmp_path / ann.TRAINED_FILE, rows, lists, tmp_path)
    quantiser = ann.Quantiser(tmp_path)
    mapped = ann.Lists(quantiser, tmp_path)
    whole = faiss.read_index(str(tmp_path / ann.TRAINED_FILE))
    whole.add(rows.astype(np.float32))
    queries = clusters(30, DIM, seed=1)
    similar, numbers = quantiser.nearest(queries, 5)
    scores, found = mapped.scan(queries, 20, numbers, similar)
    expected = whole.search(queries, 20, params=faiss.SearchParametersIVF(nprobe=5))
    np.testing.assert_array_equal(found, expected[1])
    np.testing.assert_allclose(scores, expected[0], rtol=1e-5)
    mask = np.arange(ROWS) % 3 == 0
    chosen = mapped.scan(queries, 20, numbers, similar, ann.Selection.of(mask))[1]
    assert mask[chosen[chosen >= 0]].all()


def test_lists_that_lie_elsewhere_than_said_are_refused(tmp_path: Path) -> None:
    rows = ann.to_rows(VECTORS)
    ann.train(IndexSpec(kind="ivf", factory="IVF16,RaBitQfs", nlist=16), rows[::3], tmp_path)
    lists = ann.assign(tmp_path / ann.TRAINED_FILE, rows)
    ann.encode(tmp_path / ann.TRAINED_FILE, rows, lists, tmp_path)
    file = tmp_path / ann.LISTS_FILE
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(IntegrityError, match="do not lie where"):
        ann.Lists(ann.Quantiser(tmp_path), tmp_path)


def test_rows_are_unit_float16_and_bad_vectors_are_named() -> None:
    rows = ann.to_rows(VECTORS * 7)
    assert rows.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=1e-3)
    bad = VECTORS[:5].copy()
    bad[3, 0] = np.nan
    with pytest.raises(IntegrityError, match=r"shard 7: the vector in row 3 has length nan"):
        ann.to_rows(bad, "shard 7")


def test_row_store_gives_back_what_was_written_in_the_bytes_of_faiss(tmp_path: Path) -> None:
    rows = ann.to_rows(VECTORS)
    ann.write_row_store(iter([rows[:1000], rows[1000:]]), DIM, ROWS, tmp_path / ann.VECTORS_FILE)
    store = ann.RowStore(tmp_path / ann.VECTORS_FILE)
    np.testing.assert_array_equal(store.rows, rows)
    np.testing.assert_array_equal(store.vectors(np.array([7, 3])), rows[[7, 3]].astype(np.float32))
    own = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    own.add_sa_codes(rows.view(np.uint8))
    faiss.write_index(own, str(tmp_path / "faiss"))
    assert (tmp_path / "faiss").read_bytes() == (tmp_path / ann.VECTORS_FILE).read_bytes()
    few = np.array([5, 100, 2000, 2999])
    scores, found = store.search_rows(VECTORS[:3], 3, few)
    exactly = np.sort(VECTORS[:3] @ rows[few].astype(np.float32).T, axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(scores, exactly, atol=1e-5)
    assert set(found.ravel()) <= set(few)


def test_search_agrees_with_brute_force(index: AudioIndex) -> None:
    queries = clusters(50, DIM, seed=1)
    hits = index.search(queries, k=10)
    expected = exact(queries, np.ones(ROWS, bool), 10)
    found = np.array([[item["take"] for item in items] for items in hits.items])
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, expected, strict=True)]) > 0.95
    np.testing.assert_allclose(hits.scores, np.einsum("qd,qnd->qn", queries, VECTORS[found]), atol=1e-3)
    assert (np.diff(hits.scores, axis=1) <= 0).all()
    assert hits.ids.dtype == np.int64 and hits.scores.dtype == np.float32
    assert [[item["id"] for item in items] for items in hits.items] == hits.ids.tolist()


def test_a_query_of_any_length_finds_itself_with_score_one(index: AudioIndex) -> None:
    hits = index.search(VECTORS[5] * 40, k=1)
    assert hits.items[0][0]["uri"] == "000005.wav"
    assert hits.scores[0, 0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        ({"label": "class3"}, lambda row: row % 7 == 3),
        (
            {"label": {"in": ["class1", "class2"]}, "take": {"gte": 100, "lt": 900}},
            lambda r: r % 7 in (1, 2) and 100 <= r < 900,
        ),
        ({"snr": {"gt": 0.5}, "take": {"lte": 2000}}, lambda row: 1500 < row <= 2000),
        ({"take": {"in": [5, 6]}}, lambda row: row in (5, 6)),
        ({"label": "nobody"}, lambda row: False),
    ],
    ids=["equal", "in and range", "two ranges", "two rows", "none"],
)
def test_filters_leave_only_what_matches(
    index: AudioIndex, where: dict[str, object], allowed: Callable[[int], bool]
) -> None:
    mask = np.array([allowed(row) for row in range(ROWS)])
    queries = clusters(20, DIM, seed=2)
    hits = index.search(queries, k=5, filter=where)
    expected = exact(queries, mask, 5)[:, : min(5, mask.sum())]
    found = [[item["take"] for item in items] for items in hits.items]
    assert found == expected.tolist()
    if mask.sum() < 5:
        assert (hits.ids[:, mask.sum() :] == -1).all() and np.isneginf(hits.scores[:, mask.sum() :]).all()


def test_filter_with_many_matches_goes_through_the_lists(index: AudioIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searcher, "is_exact_cheaper", lambda *_: False)
    queries = clusters(20, DIM, seed=3)
    for low, high in ((0, 1500), (0, 200), (2500, 3000)):
        mask = (np.arange(ROWS) >= low) & (np.arange(ROWS) < high)
        found = index.search(queries, k=10, filter={"take": {"gte": low, "lt": high}})
        expected = exact(queries, mask, 10)
        rows = [[item["take"] for item in items] for items in found.items]
        assert all(mask[row].all() for row in rows)
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, expected, strict=True)]) >= 0.95


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"lable": "x"}, "unknown filter column 'lable'; did you mean 'label'"),
        ({"take": {"gtee": 3}}, "unknown operator 'gtee'; did you mean 'gte'"),
        ({"take": {"lt": "many"}}, "type int64"),
        ({"take": {"in": 3}}, "'in' needs a list, got 3"),
        ({"take": object()}, "only text, numbers"),
        (["label"], "a filter is an object"),
    ],
)
def test_bad_filters_say_what_fits(index: AudioIndex, where: object, message: str) -> None:
    with pytest.raises(FilterError, match=message):
        index.search(VECTORS[0], filter=where)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vectors", "k", "message"),
    [
        (np.ones((1, DIM + 1)), 1, r"expected \[Q, 32\]"),
        (np.ones((2, 2, DIM)), 1, r"expected \[Q, 32\]"),
        (np.full((1, DIM), np.nan), 1, "NaN"),
        (np.zeros((1, DIM)), 1, "zero"),
        (np.ones((1, DIM)), 0, "k=0"),
    ],
)
def test_bad_queries_are_refused(index: AudioIndex, vectors: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index.search(vectors, k)


def test_no_query_and_more_than_there_is(index: AudioIndex) -> None:
    assert index.search(np.empty((0, DIM)), k=3).ids.shape == (0, 3)
    hits = index.search(VECTORS[:1], k=ROWS + 5)
    assert len(set(hits.ids[0, :ROWS])) == ROWS and (hits.ids[0, ROWS:] == -1).all()


def test_items_and_vectors_by_id(index: AudioIndex) -> None:
    hits = index.search(VECTORS[77], k=1)
    clip = int(hits.ids[0, 0])
    assert index.item(clip)["uri"] == "000077.wav"
    np.testing.assert_allclose(index.vector(clip), VECTORS[77], atol=1e-3)
    assert index.corpus_root(index.item(clip)) == "/corpus"
    with pytest.raises(KeyError, match="no clip with id 12345"):
        index.vector(12345)


def test_more_like_this_leaves_itself_out(index: AudioIndex) -> None:
    clip = int(index.search(VECTORS[77], k=1).ids[0, 0])
    hits = index.search_id(clip, k=5, filter={"label": "class0"})
    assert hits.ids.shape == (1, 5) and clip not in hits.ids
    expected = [row for row in exact(VECTORS[77:78], np.arange(ROWS) % 7 == 0, 6)[0] if row != 77][:5]
    assert [item["take"] for item in hits.items[0]] == expected


def test_deleted_clips_are_not_found(tmp_path: Path) -> None:
    for kind, settings in KINDS.items():
        embeddings = make_set(tmp_path / f"{kind}-embeddings", VECTORS)
        make_release(tmp_path / kind, [embeddings], **settings)
        victims = AudioIndex.open(tmp_path / kind).search(VECTORS[0], k=20).ids[0].tolist()
        make_release(tmp_path / kind, [embeddings], delete=victims, **settings)
        index = AudioIndex.open(tmp_path / kind)
        assert len(index) == ROWS - 20
        assert not set(index.search(VECTORS[0], k=50).ids[0]) & set(victims)
        with pytest.raises(KeyError):
            index.item(victims[0])


def test_encoder_of_another_fingerprint_is_refused(index: AudioIndex) -> None:
    index.check_fingerprint(index.fingerprint)
    with pytest.raises(IntegrityError, match=r"encoder fingerprint other, expected f{64}; use the encoder in"):
        AudioIndex.open(index.release.path, fingerprint="other")


def test_every_damaged_file_is_caught_before_it_is_parsed(tmp_path: Path) -> None:
    embeddings = make_set(tmp_path / "embeddings", VECTORS[:300], columns={"label": LABELS[:300]})
    made = make_release(tmp_path / "index", [embeddings], flat_max_rows=100)
    assert made is not None
    root = tmp_path / "index"
    names = [f"{made.version}/{name}" for name in [*made.files, release.RELEASE_FILE]]
    for piece in made.info["pieces"]:
        names += [str(path.relative_to(root)) for path in sorted((root / piece).iterdir())]
    assert len(names) > 20
    for name in names:
        path = root / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
        with pytest.raises(IntegrityError, match=f"{path.name}.*: damaged"):
            AudioIndex.open(tmp_path / "index")
        path.unlink()
        with pytest.raises((IntegrityError, UserError), match=r"missing, but its receipt names it|was removed"):
            AudioIndex.open(tmp_path / "index")
        path.write_bytes(whole)
    assert len(AudioIndex.open(tmp_path / "index")) == 300


def test_a_truncated_index_is_an_integrity_error(tmp_path: Path) -> None:
    ann.write_row_store(iter([ann.to_rows(VECTORS)]), DIM, ROWS, tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:5000])
    limit = faiss.get_deserialization_vector_byte_limit()
    with pytest.raises(IntegrityError, match="build the index again"):
        ann.read_index(tmp_path / "half")
    assert limit == faiss.get_deserialization_vector_byte_limit()


def test_no_vector_is_in_memory_twice(tmp_path: Path) -> None:
    """What an opened index holds of its own does not grow with the rows: rows, codes, ids and items are mapped."""
    embeddings = make_set(tmp_path / "e", VECTORS)
    make_release(tmp_path / "index", [embeddings], **KINDS["ivf"])
    index = AudioIndex.open(tmp_path / "index")
    segment: Any = index._searcher.segments[0]
    assert isinstance(segment.store.rows.base, np.memmap) and isinstance(index._ids[0].base, np.memmap)
    assert segment.lists is not None
    maps = Path("/proc/self/maps").read_text()
    for name in ("lists.bin", "vectors.faiss", "items.arrow"):
        assert any(line.endswith(f"{segment.directory}/{name}") for line in maps.splitlines()), name
