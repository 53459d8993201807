"""Scores as probabilities, and the recall that is watched."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serve.quality import Calibration, RecallShadow, calibrate, calibration_error


class Index:
    """Items of two labels whose hits have the query's label as often as their score says."""

    def __init__(self, honest: bool = True, columns: tuple[str, ...] = ("id", "label")) -> None:
        self.columns, self._honest = columns, honest
        self._rng = np.random.default_rng(1)
        self.table = SimpleNamespace(rows=lambda rows, _: [{"id": int(row), "label": "ab"[row % 2]} for row in rows])

    def search_id(self, clip: int, k: int, group_by: str) -> Any:
        scores = np.sort(self._rng.uniform(0, 1, k))[::-1]
        chance = scores if self._honest else np.full(k, float(clip < 100))
        same = self._rng.uniform(size=k) < chance
        labels = [("ab" if right else "ba")[clip % 2] for right in same]
        return SimpleNamespace(scores=scores[None], items=[[{"label": label} for label in labels]])


def test_a_probability_is_what_happens() -> None:
    index: Any = Index()
    found = calibrate(index, np.arange(400))
    assert found is not None and found.error <= 0.05
    np.testing.assert_allclose(found(np.array([[0.2, 0.5, 0.9]])), [[0.2, 0.5, 0.9]], atol=0.12)
    assert (np.diff(found(np.linspace(-1, 1, 50))) >= 0).all()


def test_what_would_mislead_is_not_given() -> None:
    without, few, lying = Index(columns=("id",)), Index(), Index(honest=False)
    assert calibrate(without, np.arange(400)) is None  # type: ignore[arg-type]
    assert calibrate(few, np.arange(10)) is None  # type: ignore[arg-type]
    found = calibrate(lying, np.arange(2), seed=0)  # type: ignore[arg-type]
    assert found is None


def test_calibration_error_is_the_gap_between_promise_and_fact() -> None:
    promised = np.array([0.2] * 10 + [0.8] * 10)
    happened = np.array([True] * 4 + [False] * 6 + [True] * 8 + [False] * 2)
    assert calibration_error(promised, happened, bins=2) == pytest.approx(0.1)


@pytest.mark.parametrize(("share", "kind", "queries"), [(1.0, "ivf", 1), (0.0, "ivf", 0), (1.0, "flat", 0)])
def test_a_share_of_the_searches_is_repeated_exactly(share: float, kind: str, queries: int) -> None:
    exact = np.array([[0.9, 0.8, 0.7, -np.inf]])
    index: Any = SimpleNamespace(
        spec=SimpleNamespace(kind=kind), search_exactly=lambda *_: SimpleNamespace(scores=exact)
    )
    shadow = RecallShadow(share)
    shadow.watch(index, np.ones((2, 3)), 4, np.array([[0.9, 0.7, 0.6, 0.5]] * 2))
    shadow._pool.shutdown()
    assert (shadow.queries, shadow.wanted, shadow.found) == (queries, 3 * queries, 2 * queries)


def test_a_curve_is_straight_between_its_points() -> None:
    curve = Calibration(np.array([0.0, 1.0]), np.array([0.1, 0.9]), 0.0)
    np.testing.assert_allclose(curve(np.array([-1.0, 0.5, 2.0])), [0.1, 0.5, 0.9])
