"""Arithmetic that every floor shares."""

import numpy as np

from audiomae.vectors import WIDENED_ROWS, widened


def test_every_finite_half_is_widened_exactly() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 16)
    assert len(halves) > 2 * WIDENED_ROWS and len(halves) % WIDENED_ROWS
    found = widened(halves)
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), halves.astype(np.float32).view(np.uint32))  # -0.0 as well


def test_rows_may_be_mapped_sparse_or_missing() -> None:
    rows = np.random.default_rng(0).normal(size=(700, 5)).astype(np.float16)
    rows.flags.writeable = False
    assert np.array_equal(widened(rows[::3]), rows[::3].astype(np.float32))
    assert widened(rows[:0]).shape == (0, 5)
