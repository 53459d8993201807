"""The linear map under which the labels of the training clips tell them apart best."""

import numpy as np
import numpy.typing as npt

SHRINK = 0.1  # of the covariance towards a sphere, beyond OAS, which takes windows of one clip for independent
STRETCH = 2.0  # the directions in which classes differ count 1 + STRETCH times


def discriminant_map(vectors: npt.ArrayLike, labels: npt.ArrayLike, dim: int | None = None) -> npt.NDArray[np.float32]:
    """A map float32[D, dim] for centred vectors: `vectors @ map` is nearer among clips of one class.

    First within-class covariance normalisation (Hatch et al. 2006, Within-Class Covariance Normalization for SVM-based
    Speaker Recognition): directions in which clips of one class differ are scaled down, by their covariance as shrunk
    by OAS (Chen et al. 2010) and a tenth more. Then the directions in which the classes differ (Fisher's discriminants,
    at most classes - 1) are stretched; all others stay, for sounds of no known class. Of a map to fewer dimensions
    those are kept in which the mapped vectors vary most (principal components).

    Args:
        vectors: float[N, D], unit length, centred or not.
        labels: int[N] classes.
        dim: how many numbers a mapped vector has, at most D (the default).

    Returns:
        The map; the first `dim` columns of the identity where there is nothing to learn from: one class, or no class
        with two clips.
    """
    from sklearn.covariance import oas

    rows, classes = np.asarray(vectors, np.float64), np.unique(np.asarray(labels), return_inverse=True)[1]
    width, counts = rows.shape[1], np.bincount(classes)
    dim = width if dim is None else dim
    if len(counts) < 2 or counts.max() < 2:
        return np.eye(width, dim, dtype=np.float32)
    means = np.stack([rows[classes == one].mean(0) for one in range(len(counts))])
    covariance, _ = oas((rows - means[classes])[counts[classes] > 1], assume_centered=True)
    covariance = (1 - SHRINK) * covariance + SHRINK * np.trace(covariance) / width * np.eye(width)
    values, axes = np.linalg.eigh(covariance)
    if values[-1] < 1e-12:  # clips of one class are equal, but for rounding
        return np.eye(width, dim, dtype=np.float32)
    whiten = (axes / np.sqrt(values)) @ axes.T
    _, spread, between = np.linalg.svd((means - rows.mean(0)) @ whiten, full_matrices=False)
    between = between[: len(counts) - 1][spread[: len(counts) - 1] > spread[0] * 1e-6]
    found = whiten @ (np.eye(width) + STRETCH * between.T @ between)
    if dim < width:
        mapped = (rows - rows.mean(0)) @ found
        found = found @ np.linalg.eigh(mapped.T @ mapped)[1][:, : -dim - 1 : -1]
    return (found / np.linalg.norm(found, 2)).astype(np.float32)
