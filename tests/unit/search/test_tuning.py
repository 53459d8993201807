"""Recall against the exact answer: a known index, ties, self-matches, and tuning until the target is met."""

from pathlib import Path

import numpy as np
import pytest
from embedding_sets import clusters

from audiomae.search import index as ann
from audiomae.search import tuning as recall
from audiomae.search.index import Searcher
from audiomae.search.spec import IndexSpec

DIM, ROWS, K = 16, 4000, 10


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """Four thousand little-clustered rows in 64 lists, coded coarsely: hard enough to miss neighbours."""
    folder = tmp_path_factory.mktemp("searcher")
    rows = ann.to_rows(clusters(ROWS, DIM, centres=20, spread=1.0))
    spec = IndexSpec(kind="ivf", factory="IVF64,SQ4", nlist=64, nprobe=1, refine=1)
    ann.write_row_store(iter([rows]), DIM, folder / ann.VECTORS_FILE)
    ann.train(spec, rows, folder / "trained")
    ann.build_part(folder / "trained", rows, folder / ann.INDEX_FILE)
    return Searcher(folder, spec)


def neighbours(rows: np.ndarray, own: np.ndarray, live: np.ndarray) -> list[set[int]]:
    """The K exact nearest other rows of each row in `own`."""
    scores = rows[own].astype(np.float32) @ rows.astype(np.float32).T
    scores[:, ~live] = -np.inf
    scores[np.arange(len(own)), own] = -np.inf
    return [set(order[:K]) for order in np.argsort(-scores, axis=1)]


def test_measured_recall_is_the_share_of_exact_neighbours_found(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "BLOCK_ROWS", 999)
    monkeypatch.setattr(ann, "EXACT_MAX_MATCHES", 0)  # so that the selection goes through the lists
    live = np.ones(ROWS, bool)
    live[::5] = False
    own = np.flatnonzero(live)[::40]
    threshold = recall.exact_threshold(searcher.rows[own].astype(np.float32), own, searcher.rows, live, K)
    spec = searcher.spec.model_copy(update={"nprobe": 4, "refine": 2})
    got = recall.measure(searcher, own, threshold, live, spec)

    _, found = searcher.search(searcher.rows[own].astype(np.float32), K + 1, ann.Selection.of(live), spec)
    exact = neighbours(searcher.rows, own, live)
    expected = np.mean([len(set(row) & truth) / K for row, truth in zip(found, exact, strict=True)])
    assert 0.3 < expected < 0.99
    assert got == pytest.approx(expected, abs=0.01)


def test_tuning_stops_at_the_first_settings_that_reach_the_target(searcher: Searcher) -> None:
    live = np.ones(ROWS, bool)
    own = np.arange(0, ROWS, 40)
    modest = recall.tune(searcher, live, own, target=0.5)
    high = recall.tune(searcher, live, own, target=0.99)
    assert modest.value >= 0.5 and high.value >= 0.99
    assert modest.spec.nprobe * modest.spec.refine < high.spec.nprobe * high.spec.refine
    assert high.queries == len(own)


def test_an_unreachable_target_gives_the_best_there_is(searcher: Searcher) -> None:
    found = recall.tune(searcher, np.ones(ROWS, bool), np.arange(0, ROWS, 40), target=1.1)
    assert found.value > 0.99 and found.spec.refine > 1


def test_copies_of_a_clip_stand_in_for_each_other(tmp_path: Path) -> None:
    rows = ann.to_rows(np.repeat(clusters(40, DIM), 25, axis=0))
    ann.write_row_store(iter([rows]), DIM, tmp_path / ann.VECTORS_FILE)
    searcher = Searcher(tmp_path, IndexSpec(kind="flat"))
    found = recall.tune(searcher, np.ones(1000, bool), np.arange(0, 1000, 7), target=0.95)
    assert found.value == 1.0


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_fewer_rows_than_k(tmp_path: Path, rows: int) -> None:
    ann.write_row_store(iter([ann.to_rows(clusters(rows, DIM))]), DIM, tmp_path / ann.VECTORS_FILE)
    searcher = Searcher(tmp_path, IndexSpec(kind="flat"))
    assert recall.tune(searcher, np.ones(rows, bool), np.arange(rows), target=0.95).value == 1.0


def test_queries_are_held_out_ids_when_there_are_enough() -> None:
    ids = np.arange(10_000)
    live = ids % 3 != 0
    held_out = ids % 10 == 0
    rows = recall.choose_queries(ids, live, held_out, 100, seed=0)
    assert len(rows) == 100 and held_out[rows].all() and live[rows].all() and (np.diff(rows) > 0).all()
    few = recall.choose_queries(ids[:200], live[:200], held_out[:200], 100, seed=0)
    assert len(few) == 100 and live[few].all()
