"""The discriminant map brings clips of one class together, unseen ones too."""

import numpy as np

from audiomae.metrics import Labelled, score_queries, summarise
from audiomae.training.discriminant import discriminant_map

CLASSES, DIM = 6, 24


def clips(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float[count, DIM] with labels: classes differ little beside what varies within each of them."""
    fixed, draw = np.random.default_rng(0), np.random.default_rng(seed)
    means, nuisance = 0.4 * fixed.standard_normal((CLASSES, DIM)), fixed.standard_normal((4, DIM))
    labels = np.arange(count) % CLASSES
    rows = means[labels] + draw.standard_normal((count, 4)) @ nuisance + 0.2 * draw.standard_normal((count, DIM))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def mean_ap(
    gallery: tuple[np.ndarray, np.ndarray], queries: tuple[np.ndarray, np.ndarray], matrix: np.ndarray
) -> float:
    centre = gallery[0].mean(0)
    sides = [((rows - centre) @ matrix, labels) for rows, labels in (queries, gallery)]
    unit = [Labelled(rows / np.linalg.norm(rows, axis=1, keepdims=True), labels) for rows, labels in sides]
    return float(summarise(score_queries(*unit, ks=(1,)))["mAP"])


def test_unseen_clips_of_a_class_come_together() -> None:
    known, unseen = clips(120, 1), clips(60, 2)
    before = mean_ap(known, unseen, np.eye(DIM))
    assert before < 0.6 < 0.9 < mean_ap(known, unseen, discriminant_map(*known))


def test_it_is_of_full_rank_so_that_sounds_of_no_class_stay_apart() -> None:
    values = np.linalg.svd(discriminant_map(*clips(120, 1)), compute_uv=False)
    assert values[0] == np.float32(1) and values[-1] > 1e-3


def test_few_clips_are_enough_and_nothing_to_learn_from_gives_the_identity() -> None:
    rows, labels = clips(12, 1)
    assert np.isfinite(discriminant_map(rows, labels)).all()
    assert np.isfinite(discriminant_map(rows[:7], labels[:7])).all()  # five classes of one clip
    for nothing in (np.zeros(12), np.arange(12)):
        assert np.array_equal(discriminant_map(rows, nothing), np.eye(DIM, dtype=np.float32))
    equal = np.repeat(rows[:2], 6, axis=0)
    assert np.array_equal(discriminant_map(equal, np.repeat([0, 1], 6)), np.eye(DIM, dtype=np.float32))


def test_a_map_to_fewer_dimensions_keeps_what_tells_classes_apart() -> None:
    known, unseen = clips(120, 1), clips(60, 2)
    noise = [0.05 * np.random.default_rng(seed).standard_normal((count, 40)) for seed, count in ((3, 120), (4, 60))]
    wide = [(np.hstack([rows, more]), labels) for (rows, labels), more in zip((known, unseen), noise, strict=True)]
    found = discriminant_map(*wide[0], dim=10)
    assert found.shape == (DIM + 40, 10)
    assert mean_ap(*wide, found) > 0.9 > 0.6 > mean_ap(*wide, np.eye(DIM + 40))
    assert np.array_equal(discriminant_map(wide[0][0], np.zeros(120), dim=10), np.eye(DIM + 40, 10, dtype=np.float32))


def test_the_names_of_the_classes_do_not_matter() -> None:
    rows, labels = clips(60, 1)
    np.testing.assert_allclose(discriminant_map(rows, labels), discriminant_map(rows, 7 - labels * 3), atol=1e-6)
