"""The map: alike lies together, any number of sounds has one, the same vectors give the same map."""

import numpy as np
import pytest
from embedding_sets import clusters

from audiomae.search import layout


def neighbours_of_same_kind(places: np.ndarray, kinds: np.ndarray) -> float:
    distances = np.linalg.norm(places[:, None].astype(float) - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return float((kinds[distances.argmin(axis=1)] == kinds).mean())


def groups(count: int, dim: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 5, count)
    vectors = rng.normal(size=(5, dim))[kinds] + 0.3 * rng.normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), kinds


def test_sounds_of_a_kind_lie_together() -> None:
    vectors, kinds = groups(120)
    assert neighbours_of_same_kind(layout.place(vectors), kinds) > 0.95


def test_sounds_beside_the_landmarks_go_where_their_kind_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MOST_LANDMARKS", 60)
    vectors, kinds = groups(400)
    assert neighbours_of_same_kind(layout.place(vectors), kinds) > 0.95


def test_the_same_vectors_give_the_same_map() -> None:
    vectors, _ = groups(60)
    np.testing.assert_array_equal(layout.place(vectors), layout.place(vectors.copy()))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9])
def test_any_number_of_sounds_has_a_map(count: int) -> None:
    places = layout.place(clusters(count, 16) if count else np.zeros((0, 16), np.float32))
    assert places.shape == (count, 2) and places.dtype == np.uint16


def test_equal_sounds_do_not_break_it() -> None:
    assert layout.place(np.ones((20, 4), np.float32) / 2).shape == (20, 2)


def test_a_file_is_one_point_and_deleted_rows_are_none() -> None:
    ids, uris = np.array([9, 3, 7, 1, 5]), np.array([0, 0, 1, 2, 2])
    live = np.array([True, True, True, False, True])
    np.testing.assert_array_equal(layout.pick_points(ids, uris, live), [0, 2, 4])
    np.testing.assert_array_equal(layout.pick_points(ids, uris, live, most=2), [2, 4])
