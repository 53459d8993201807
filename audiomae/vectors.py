"""Arithmetic of embeddings that every floor shares: unit length, and one vector for a clip of several windows."""

import numpy as np
import numpy.typing as npt

LEAST_LENGTH = 1e-12


def normalised(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows [N, D] scaled to unit length; rows of zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), LEAST_LENGTH)


def clip_vectors(windows: npt.NDArray[np.float32], clips: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """One unit vector for each clip: the mean direction of its windows.

    Args:
        windows: float32[N, D], unit length.
        clips: int64[N], the clip of each window as a number from 0 to M - 1; each number occurs.

    Returns:
        float32[M, D].
    """
    sums = np.zeros((int(clips.max(initial=-1)) + 1, windows.shape[1]), np.float32)
    np.add.at(sums, clips, windows)
    return normalised(sums)
