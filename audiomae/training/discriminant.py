"""The linear map under which the labels of the training clips tell them apart best."""

import numpy as np
import numpy.typing as npt

STRETCH = 2.0  # the directions in which classes differ count 1 + STRETCH times


def discriminant_map(vectors: npt.ArrayLike, labels: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """A map float32[D, D] for centred vectors: `vectors @ map` is nearer among clips of one class.

    First within-class covariance normalisation (Hatch et al. 2006, Within-Class Covariance Normalization for SVM-based
    Speaker Recognition): directions in which clips of one class differ are scaled down, by their covariance as shrunk
    by OAS (Chen et al. 2010). Then the directions in which the classes differ (Fisher's discriminants, at most
    classes - 1) are stretched; all others stay, for sounds of no known class.

    Args:
        vectors: float[N, D], unit length, centred or not.
        labels: int[N] classes.

    Returns:
        The map; the identity where there is nothing to learn from: one class, or no class with two clips.
    """
    from sklearn.covariance import oas

    rows, classes = np.asarray(vectors, np.float64), np.unique(np.asarray(labels), return_inverse=True)[1]
    dim, counts = rows.shape[1], np.bincount(classes)
    if len(counts) < 2 or counts.max() < 2:
        return np.eye(dim, dtype=np.float32)
    means = np.stack([rows[classes == one].mean(0) for one in range(len(counts))])
    covariance, _ = oas((rows - means[classes])[counts[classes] > 1], assume_centered=True)
    values, axes = np.linalg.eigh(covariance)
    if values[-1] < 1e-12:  # clips of one class are equal, but for rounding
        return np.eye(dim, dtype=np.float32)
    whiten = (axes / np.sqrt(np.maximum(values, values[-1] * 1e-6))) @ axes.T
    _, spread, between = np.linalg.svd((means - rows.mean(0)) @ whiten, full_matrices=False)
    between = between[: len(counts) - 1][spread[: len(counts) - 1] > spread[0] * 1e-6]
    found = whiten @ (np.eye(dim) + STRETCH * between.T @ between)
    return (found / np.linalg.norm(found, 2)).astype(np.float32)
