"""One hit per file: its best window, how many windows matched, looking on until there are k files or no more."""

from pathlib import Path

import numpy as np
import pytest
from embedding_sets import clusters, make_release, make_set

from audiomae.corpus.manifest import clip_id
from audiomae.errors import FilterError
from audiomae.search.audio_index import AudioIndex

DIM, FILES = 32, 60
WINDOWS = np.array([1, 2, 3, 400, 5] * (FILES // 5))  # of each file; a long recording beside short ones
FILE_OF = np.repeat(np.arange(FILES), WINDOWS)
KINDS = {"flat": {}, "ivf": {"flat_max_rows": 100}}


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Windows of one file lie close together, so that a long one fills any ranking."""
    centre = clusters(FILES, DIM)[FILE_OF]
    noise = 0.05 * np.random.default_rng(3).standard_normal(centre.shape)
    return ((centre + noise) / np.linalg.norm(centre + noise, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module", params=list(KINDS))
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> AudioIndex:
    """The windows as rows; `file` is what they are grouped by, as make_set gives every row a uri of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    columns = {"file": [f"f{number:02d}.wav" for number in FILE_OF], "row": list(range(len(vectors)))}
    make_release(folder / "index", [make_set(folder / "e", vectors, columns=columns)], **KINDS[request.param])
    opened = AudioIndex.open(folder / "index")
    searcher = opened._searcher  # every list is probed, so that what is compared is the grouping alone
    searcher.spec = searcher.spec.model_copy(update={"nprobe": searcher.spec.nlist, "refine": 64})
    return opened


def expected(scores: np.ndarray, k: int, allowed: np.ndarray) -> list[tuple[int, int, int]]:
    """(file, best row, windows at least as near as the last file's best), by sorting everything."""
    order = [int(row) for row in np.argsort(-scores, kind="stable") if allowed[row]]
    best: dict[int, int] = {}
    for row in order:
        best.setdefault(int(FILE_OF[row]), row)
    files = list(best)[:k]
    last = scores[best[files[-1]]] if len(files) == k else -np.inf
    near = [int(FILE_OF[row]) for row in order if scores[row] >= last]
    return [(file, best[file], near.count(file)) for file in files]


@pytest.mark.parametrize("k", [1, 3, 10, FILES, FILES + 5])
def test_files_are_ranked_by_their_best_window(index: AudioIndex, vectors: np.ndarray, k: int) -> None:
    stored = index._searcher.scanner.vectors(np.arange(len(vectors)))
    for row in (0, 3, 6, 500, len(vectors) - 1):
        query = vectors[row] + 0.01
        hits = index.search(query, k=k, group_by="file")
        scores = stored @ (query / np.linalg.norm(query))
        wanted = expected(scores, k, np.ones(len(vectors), bool))
        count = len(wanted)
        assert [item["row"] for item in hits.items[0]] == [best for _, best, _ in wanted]
        assert hits.windows is not None
        np.testing.assert_allclose(hits.windows[0, :count], [n for *_, n in wanted], atol=1)  # ties of rounding
        assert (hits.ids[0, count:] == -1).all() and (hits.windows[0, count:] == 0).all()


def test_many_queries_at_once_and_a_filter(index: AudioIndex, vectors: np.ndarray) -> None:
    where = {"row": {"gte": 100, "lt": 3000}}
    allowed = (np.arange(len(vectors)) >= 100) & (np.arange(len(vectors)) < 3000)
    hits = index.search(vectors[::500], k=8, filter=where, group_by="file")
    stored = index._searcher.scanner.vectors(np.arange(len(vectors)))
    for query, items in zip(vectors[::500], hits.items, strict=True):
        wanted = expected(stored @ query, 8, allowed)
        assert [int(item["file"][1:3]) for item in items] == [file for file, *_ in wanted]


def test_more_like_this_leaves_the_whole_file_out(index: AudioIndex) -> None:
    hits = index.search(np.ones(DIM), k=1)
    item = hits.items[0][0]
    alike = index.search_id(int(hits.ids[0, 0]), k=FILES, group_by="file")
    files = [found["file"] for found in alike.items[0]]
    assert len(files) == len(set(files)) == FILES - 1 and item["file"] not in files
    rows = index.search_id(int(hits.ids[0, 0]), k=3)
    assert rows.windows is None and hits.ids[0, 0] not in rows.ids


def test_deleted_windows_do_not_stand_for_their_file(tmp_path: Path, vectors: np.ndarray) -> None:
    columns = {"file": FILE_OF.tolist(), "row": list(range(len(vectors)))}
    embeddings = make_set(tmp_path / "e", vectors, columns=columns)
    make_release(tmp_path / "index", [embeddings])
    best = AudioIndex.open(tmp_path / "index").search(vectors[3], k=1, group_by="file")
    make_release(tmp_path / "index", [embeddings], delete=best.ids[0].tolist())
    again = AudioIndex.open(tmp_path / "index").search(vectors[3], k=1, group_by="file")
    assert again.items[0][0]["file"] == best.items[0][0]["file"] and again.ids[0, 0] != best.ids[0, 0]


def test_equal_uris_of_two_corpora_are_two_files(tmp_path: Path, vectors: np.ndarray) -> None:
    uris = [f"{number}.wav" for number in range(50)]
    one = make_set(tmp_path / "a", vectors[:50], names=uris, root="/one")
    make_release(tmp_path / "index", [one])
    # the same file names under another root, by windows of another length
    ids = [clip_id(uri, 0.0, 2.0) for uri in uris]
    two = make_set(tmp_path / "b", vectors[:50], names=uris, root="/two", ids=ids)
    make_release(tmp_path / "index", [two])
    index = AudioIndex.open(tmp_path / "index")
    hits = index.search(vectors[0], k=100, group_by="uri")
    assert (hits.ids >= 0).all() and len(index) == 100
    assert (index.search(vectors[0], k=100, filter={"corpus": 1}, group_by="uri").ids >= 0).sum() == 50


def test_columns_that_cannot_be_grouped_by(index: AudioIndex) -> None:
    with pytest.raises(FilterError, match=r"group by 'fil'.*did you mean 'file'"):
        index.search(np.ones(DIM), group_by="fil")


def test_an_exact_search_is_a_comparison_with_all(index: AudioIndex, vectors: np.ndarray) -> None:
    exact = index.search_exactly(vectors[:3], k=5)
    wanted = np.sort(vectors[:3] @ vectors.T, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(exact.scores, wanted, atol=2e-3)  # rows are kept as float16
