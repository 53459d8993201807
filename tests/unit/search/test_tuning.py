"""Recall against the exact answer: blocks joined, ties, self-matches, tuning until the target is met, and filters."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_sets import clusters

from audiomae.search import index as ann
from audiomae.search import searcher, segments, tuning
from audiomae.search.spec import IndexSpec
from audiomae.search.tuning import Queries, Task

DIM, ROWS, K = 16, 4000, 10


def write(folder: Path, rows: np.ndarray, trained: Path | None) -> Path:
    """A segment as far as measuring looks at it."""
    folder.mkdir()
    ann.write_row_store(iter([rows]), DIM, len(rows), folder / ann.VECTORS_FILE)
    segments.write_ids(np.random.default_rng(len(rows)).integers(0, 2**62, len(rows)), folder)
    if trained:
        lists = ann.assign(trained / ann.TRAINED_FILE, rows)
        np.save(folder / ann.ASSIGN_FILE, lists)
        ann.encode(trained / ann.TRAINED_FILE, rows, lists, folder)
    return folder


class Built:
    """Rows in two segments, and a task to measure them."""

    def __init__(self, folder: Path, rows: np.ndarray, spec: IndexSpec, count: int = 100, filtered: int = 0) -> None:
        self.rows, self.trained = rows.astype(np.float32), None
        if spec.kind == "ivf":
            self.trained = folder / "trained"
            self.trained.mkdir()
            ann.train(spec, rows, self.trained)
        cut = max(1, len(rows) * 3 // 4)
        pieces = [piece for piece in (rows[:cut], rows[cut:]) if len(piece)]
        self.folders = [write(folder / str(n), piece, self.trained) for n, piece in enumerate(pieces)]
        self.task = Task(("0", "1")[: len(pieces)], tuple(map(len, pieces)), "", spec, count, filtered, 0)

    def tune(self, target: float, deleted: np.ndarray) -> tuple[tuning.Recall, Queries, list[np.ndarray]]:
        queries, (answers, _) = self.ask(deleted)
        found_by = searcher.Searcher.open(self.folders, self.trained, self.task.spec)
        found = tuning.tune(found_by, self.task.spec, deleted, queries, answers, target)
        return found, queries, answers

    def ask(self, deleted: np.ndarray) -> tuple[Queries, tuning.Exact]:
        queries = tuning.pick_queries(self.task, self.folders, deleted, lambda ids: ids % 2 == 0)
        blocks = tuning.blocks(self.task)
        found = [
            tuning.exact_block(self.task, self.folders[block.segment], deleted, queries, block) for block in blocks
        ]
        return queries, tuning.join(found)


NONE = np.zeros(0, np.int64)
HARD = IndexSpec(kind="ivf", factory="IVF64,SQ4", nlist=64, nprobe=1, refine=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Four thousand little-clustered rows in 64 lists, coded coarsely: hard enough to miss neighbours."""
    rows = ann.to_rows(clusters(ROWS, DIM, centres=20, spread=1.0))
    return Built(tmp_path_factory.mktemp("built"), rows, HARD)


def test_answers_of_blocks_are_the_exact_ones(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built, "task", dataclasses.replace(built.task, filtered=8))
    monkeypatch.setattr(tuning, "BLOCK_ROWS", 999)
    monkeypatch.setattr(tuning, "STEP_ROWS", 400)
    deleted = np.arange(0, ROWS, 5)
    queries, (answers, near) = built.ask(deleted)
    assert not set(queries.own) & set(deleted)
    scores = built.rows[queries.own] @ built.rows.T
    scores[:, deleted] = -np.inf
    scores[np.arange(len(queries.own)), queries.own] = -np.inf
    np.testing.assert_allclose(answers[0], -np.sort(-scores, axis=1)[:, :K], atol=1e-5)
    ids = np.concatenate([np.load(folder / segments.IDS_FILE) for folder in built.folders])
    nearest = np.argsort(-scores, axis=1, kind="stable")[: tuning.KEPT_QUERIES, : tuning.KEPT]
    assert (near.queries == ids[queries.own]).all() and (near.ids == ids[nearest]).mean() > 0.99  # but for equal scores
    np.testing.assert_allclose(near.scores, np.take_along_axis(scores[: len(nearest)], nearest, axis=1), atol=1e-5)
    lists = np.concatenate([np.load(folder / ann.ASSIGN_FILE) for folder in built.folders])
    assert {filter.kind for filter in queries.filters} == {"independent", "correlated"}
    for filter, answer in zip(queries.filters, answers[1:], strict=True):
        mask = filter.mask(ids, lists)
        assert mask.mean() == pytest.approx(filter.share, abs=max(0.03, filter.share / 4))
        expected = -np.sort(-np.where(mask, scores[: queries.filtered], -np.inf), axis=1)[:, :K]
        np.testing.assert_allclose(answer, expected, atol=1e-5)


def test_tuning_stops_at_the_first_settings_that_reach_the_target(built: Built) -> None:
    modest, *_ = built.tune(0.5, NONE)
    high, *_ = built.tune(0.99, NONE)
    assert modest.value >= 0.5 and high.value >= 0.99
    assert modest.spec.nprobe * modest.spec.refine < high.spec.nprobe * high.spec.refine
    assert high.queries == 100
    assert [trial["recall"] for trial in high.tried] and high.tried[-1]["recall"] == high.value


def test_an_unreachable_target_gives_the_best_there_is(built: Built) -> None:
    found, *_ = built.tune(1.1, NONE)
    assert found.value > 0.99 and found.spec.refine > 1


def test_filters_keep_their_promise(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built, "task", dataclasses.replace(built.task, filtered=16))
    monkeypatch.setattr(searcher, "is_exact_cheaper", lambda *_: False)
    found, queries, _ = built.tune(0.9, np.arange(0, ROWS, 50))
    assert {(row["kind"], row["queries"]) for row in found.filtered} >= {
        (kind, where) for kind in ("independent", "correlated") for where in ("inside", "outside")
    }
    assert all(row["mean"] >= 0.95 and row["p5"] >= 0.9 for row in found.filtered), found.filtered
    assert len(found.filtered) > 2 * len(queries.filters) - 4


@pytest.mark.parametrize("spec", [IndexSpec(kind="flat"), HARD], ids=["flat", "lists"])
def test_copies_of_a_clip_stand_in_for_each_other(tmp_path: Path, spec: Any) -> None:
    rows = ann.to_rows(np.repeat(clusters(80, DIM), 25, axis=0))
    found, *_ = Built(tmp_path, rows, spec).tune(0.95, NONE)
    assert found.value >= 0.95


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_fewer_rows_than_k(tmp_path: Path, rows: int) -> None:
    found, *_ = Built(tmp_path, ann.to_rows(clusters(rows, DIM)), IndexSpec(kind="flat")).tune(0.95, NONE)
    assert found.value == 1.0


def test_queries_are_held_out_ids_when_there_are_enough() -> None:
    ids = np.arange(10_000)
    live = ids % 3 != 0
    held_out = ids % 10 == 0
    rows = tuning.choose_queries(live, held_out, 100, seed=0)
    assert len(rows) == 100 and held_out[rows].all() and live[rows].all() and (np.diff(rows) > 0).all()
    few = tuning.choose_queries(live[:200], held_out[:200], 100, seed=0)
    assert len(few) == 100 and live[few].all()
