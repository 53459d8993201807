"""The pictures of a report, each as PNG bytes. Figures are made without pyplot, so nothing global is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import librosa
import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from audiomae.pages import INK, RIGHT, WRONG, png

MELS = 96  # of a spectrogram
MAP_ROWS = 3000  # t-SNE of more points takes minutes and shows no more
_PCA_DIMS = 50


def metric_bars(series: Mapping[str, Mapping[str, float]], metric: str, title: str) -> bytes:
    """Grouped horizontal bars: ``series[run][category]`` in 0..1, categories ordered by the first run."""
    runs = list(series)
    categories = sorted(series[runs[0]], key=lambda name: series[runs[0]][name])
    height = 0.8 / len(runs)
    figure = Figure(figsize=(8, 1.2 + max(0.32, 0.13 * len(runs)) * len(categories)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(categories))
    for i, run in enumerate(runs):
        values = [series[run].get(name, 0.0) for name in categories]
        axes.barh(places + 0.4 - height * (i + 0.5), values, height, label=run, color=_colour(i))
    axes.set(yticks=places, yticklabels=categories, xlim=(0, 1), xlabel=metric, title=title)
    axes.grid(axis="x", alpha=0.3)
    if len(runs) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return png(figure)


def confusion(labels: Sequence[str], nearest: Sequence[str], title: str) -> bytes:
    """Heat map: of the queries of a class (row), the share whose nearest neighbour is of each class (column)."""
    classes = sorted({*labels, *nearest})
    place = {name: i for i, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, ([place[name] for name in labels], [place[name] for name in nearest]), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(16.0, 3.0 + 0.42 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = np.arange(len(classes))
    axes.set(
        xticks=ticks, yticks=ticks, xlabel="class of the nearest neighbour", ylabel="class of the query", title=title
    )
    axes.set_xticklabels(classes, rotation=60, ha="right")
    axes.set_yticklabels(classes)
    if len(classes) <= 30:
        for row, column in zip(*np.nonzero(counts), strict=True):
            shade = "white" if share[row, column] > 0.5 else INK
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=shade, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.7)
    return png(figure)


def embedding_map(vectors: npt.NDArray[np.float32], labels: npt.NDArray[np.str_], method: str, seed: int) -> bytes:
    """Scatter of float32[N, D] in two dimensions coloured by label; a seeded sample when there are very many."""
    if len(vectors) > MAP_ROWS:
        some = np.sort(np.random.default_rng(seed).choice(len(vectors), MAP_ROWS, replace=False))
        vectors, labels = vectors[some], labels[some]
    points = project_2d(vectors, method, seed)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    classes = sorted(set(labels.tolist()))
    for i, name in enumerate(classes):
        inside = labels == name
        axes.scatter(
            points[inside, 0],
            points[inside, 1],
            s=14,
            color=_colour(i, len(classes)),
            label=name,
            alpha=0.8,
            linewidths=0,
        )
    axes.set(xticks=[], yticks=[], title=f"{method} of the embeddings ({len(points)} rows, seed {seed})")
    if len(classes) <= 50:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8, ncols=1 + len(classes) // 26)
    return png(figure)


def project_2d(vectors: npt.NDArray[np.float32], method: str, seed: int) -> npt.NDArray[np.float64]:
    """float32[N, D] -> float64[N, 2] by ``t-SNE`` (on 50 principal components) or ``PCA``; same seed, same map."""
    if method not in ("t-SNE", "PCA"):
        raise ValueError(f"map method {method!r}: expected 't-SNE' or 'PCA'")
    count = min(_PCA_DIMS if method == "t-SNE" else 2, *vectors.shape)
    reduced = PCA(n_components=count, random_state=seed, svd_solver="full").fit_transform(vectors)
    if method == "PCA" or len(vectors) < 5:
        return np.pad(reduced, ((0, 0), (0, max(0, 2 - reduced.shape[1]))))[:, :2].astype(np.float64)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
    return tsne.fit_transform(reduced).astype(np.float64)


@dataclass(frozen=True)
class Picture:
    """A clip to draw: float32[S] mono samples (empty = could not be read), what to write above it, right or wrong."""

    samples: npt.NDArray[np.float32]
    title: str
    right: bool | None  # None = the query itself


def spectrogram_row(sounds: Sequence[Picture], sample_rate: int) -> bytes:
    """Log-mel spectrograms side by side: the query, then what it retrieved, green when right and red when wrong."""
    figure = Figure(figsize=(3.0 * len(sounds), 2.5))
    figure.subplots_adjust(left=0.15 / len(sounds), right=0.995, bottom=0.1, top=0.89, wspace=0.18)
    for sound, axes in zip(sounds, figure.subplots(1, len(sounds), squeeze=False)[0], strict=True):
        _spectrogram(axes, sound, sample_rate)
    return png(figure)


def _spectrogram(axes: Axes, sound: Picture, sample_rate: int) -> None:
    colour = INK if sound.right is None else RIGHT if sound.right else WRONG
    axes.set_title(sound.title, fontsize=9, color=colour)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)
    if len(sound.samples) < 2:
        axes.text(0.5, 0.5, "audio not readable", ha="center", va="center")
        axes.set(xticks=[], yticks=[])
        return
    power = librosa.feature.melspectrogram(y=sound.samples, sr=sample_rate, n_fft=1024, hop_length=256, n_mels=MELS)
    level = librosa.power_to_db(power, ref=max(float(power.max()), 1e-10), top_db=80)
    # librosa's specshow draws a mesh of as many cells, which takes ten times as long
    extent = 0, len(sound.samples) / sample_rate, 0, MELS
    axes.imshow(level, origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0, extent=extent)
    marks = [hz for hz in (500, 2000, 8000) if hz < sample_rate / 2]
    heights = librosa.hz_to_mel(marks) / librosa.hz_to_mel(sample_rate / 2) * MELS
    axes.set_yticks(heights, [f"{hz / 1000:g}k" for hz in marks])
    axes.tick_params(labelsize=7)


def _colour(i: int, total: int = 10) -> tuple[float, float, float, float]:
    if total <= 10:
        return colormaps["tab10"](i % 10)
    if total <= 20:
        return colormaps["tab20"](i % 20)
    return colormaps["gist_rainbow"](i / total)
