"""Where each sound lies on a map in which sounds that are alike lie together; made when an index is built.

t-SNE (van der Maaten & Hinton 2008, here scikit-learn's Barnes-Hut on exact PCA scores) places up to 1,000 landmarks;
every other vector goes to the weighted mean of its five nearest landmarks. So a map of 100,000 sounds costs little more
than one of 1,000, and is the same for the same vectors.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MAP_FILE = "map.parquet"
SIZE = 65_535  # coordinates are uint16
MOST_LANDMARKS = 1_000
ITERATIONS = 500
MOST_POINTS = 100_000
COMPONENTS = 32
NEIGHBOURS = 5
SHARPNESS = 20.0  # of the weights: a landmark 0.1 of cosine further away counts 7 times less
BLOCK_ROWS = 8_192


def write_map(directory: Path, ids: np.ndarray, uris: np.ndarray, vectors: np.ndarray, live: np.ndarray) -> None:
    """Write `map.parquet` (id int64, x and y uint16) of a release.

    Args:
        directory: of the release.
        ids: int64[N]; uris: [N], names or codes of the files; vectors: float16[N, D], may be mapped; live: bool[N].
    """
    rows = pick_points(ids, uris, live)
    places = place(np.asarray(vectors[rows], np.float32))
    table = pa.table({"id": ids[rows], "x": places[:, 0], "y": places[:, 1]})
    pq.write_table(table, directory / MAP_FILE, compression="zstd")


def pick_points(ids: np.ndarray, uris: np.ndarray, live: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """The rows to draw: one of each file, and of too many files those with the lowest ids (ids are hashes).

    Args:
        ids: int64[N] clip ids; uris: [N] anything comparable; live: bool[N], rows that can be found.

    Returns:
        int64[M], ascending, M <= most.
    """
    rows = np.flatnonzero(live)
    _, first = np.unique(uris[rows], return_index=True)
    rows = np.sort(rows[first])
    return np.sort(rows[np.argsort(ids[rows], kind="stable")[:most]])


def place(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """Coordinates uint16[N, 2] of unit vectors float[N, D], filling 0 to 65,535."""
    count = len(vectors)
    if not count:
        return np.zeros((0, 2), np.uint16)
    chosen = np.arange(count)
    if count > MOST_LANDMARKS:
        chosen = np.sort(np.random.default_rng(seed).choice(count, MOST_LANDMARKS, replace=False))
    landmarks = vectors[chosen].astype(np.float32)
    flat = _embed_landmarks(landmarks, seed)
    places = np.empty((count, 2), np.float32)
    for start in range(0, count, BLOCK_ROWS):
        places[start : start + BLOCK_ROWS] = _between(vectors[start : start + BLOCK_ROWS], landmarks, flat)
    places[chosen] = flat
    low, high = places.min(axis=0), places.max(axis=0)
    span = max(float((high - low).max()), 1e-9)
    centred = (places - (low + high) / 2) / span + 0.5
    return np.rint(np.clip(centred, 0, 1) * SIZE).astype(np.uint16)


def _embed_landmarks(vectors: np.ndarray, seed: int) -> np.ndarray:
    """float32[N, 2] by t-SNE; the first principal components where there are too few points for it."""
    scores = _principal_components(vectors)
    if len(vectors) < 8:
        return np.pad(scores[:, :2], ((0, 0), (0, 2 - min(2, scores.shape[1]))))
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    start = scores[:, :2] / max(float(scores[:, 0].std()), 1e-12) * 1e-4
    start = np.pad(start, ((0, 0), (0, 2 - start.shape[1])))
    return np.asarray(
        TSNE(perplexity=perplexity, init=start, max_iter=ITERATIONS, random_state=seed, n_jobs=1).fit_transform(scores)
    )


def _principal_components(vectors: np.ndarray) -> np.ndarray:
    """Scores float32[N, C] on the first principal components, signs fixed so that they are the same everywhere."""
    centred = vectors - vectors.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    left, values = left[:, :COMPONENTS], values[:COMPONENTS]
    strongest = left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])]
    scores: np.ndarray = left * np.where(strongest < 0, -1, 1) * values
    return scores.astype(np.float32)


def _between(vectors: np.ndarray, landmarks: np.ndarray, flat: np.ndarray) -> np.ndarray:
    likeness = vectors.astype(np.float32) @ landmarks.T
    count = min(NEIGHBOURS, len(landmarks))
    nearest = np.argpartition(-likeness, count - 1, axis=1)[:, :count]
    near = np.take_along_axis(likeness, nearest, axis=1)
    weights = np.exp(SHARPNESS * (near - near.max(axis=1, keepdims=True)))
    weights /= weights.sum(axis=1, keepdims=True)
    mixed: np.ndarray = np.einsum("nk,nkd->nd", weights, flat[nearest])
    return mixed
