"""How good the embeddings are while training: retrieval by held-out clips, and the collapse gauges."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from audiomae.artifacts.features import FeatureStore
from audiomae.metrics import Labelled, score_queries, summarise
from audiomae.model.encoder import AudioEncoder
from audiomae.training.augment import augment
from audiomae.training.clips import UNLABELLED
from audiomae.training.diagnostics import collapse_gauges
from audiomae.training.discriminant import discriminant_map
from audiomae.training.distributed import gather, rank, world_size
from audiomae.training.recipe import Recipe

BATCH = 32
BatchFn = Callable[[Sequence[int]], Tensor]


class Gives(NamedTuple):
    """What is computed of log-mel [B, 1, T, F] with frame lengths int64[B] or None: float32[B, width]."""

    compute: Callable[[Tensor, Tensor | None], Tensor]
    width: int


class Validator:
    """Embeds a fixed set of queries (validation clips) and gallery (training clips), shared among the ranks.

    Args:
        store: features of all clips.
        validation: bool[N], which clips are held out.
        labels: int64[N] class or `UNLABELLED`. Without any label a clip's first half looks for its second half.
        recipe: of the training; where its losses use no labels, the encoder is not fitted to them either.
        window: of the training, in frames.
    """

    def __init__(
        self,
        store: FeatureStore,
        validation: npt.NDArray[np.bool_],
        labels: npt.NDArray[np.int64],
        recipe: Recipe,
        window: int,
    ) -> None:
        self.store, self.labels, self.window = store, labels, window
        self.augmentation, self.seed, config = recipe.augment, recipe.seed, recipe.validation
        self._fits_labels = recipe.objective.learns_labels
        self.labelled = bool((labels != UNLABELLED).any())
        known = labels != UNLABELLED if self.labelled else np.ones(len(labels), bool)
        self.queries = _spread(np.flatnonzero(validation & known), config.max_queries)
        self.gallery = _spread(np.flatnonzero(~validation & known), config.max_gallery)

    @torch.inference_mode()
    def run(self, encoder: AudioEncoder) -> dict[str, float]:
        """Metrics of the encoder as it is: `val_mAP`, `val_R@1`, and the gauges over the queries.

        Empty when no clip is held out. What is fitted after training, the centre and the discriminant map, is fitted to
        the gallery first. Every rank gets the same numbers and must call this.
        """
        self._fit(encoder)
        if len(self.queries) < 2 or len(self.gallery) == 0:
            return {}
        training = encoder.training
        encoder.eval()
        try:
            metrics = self._retrieval(encoder)
            first, second = (self._embed_windows(encoder, self.queries, view, _vectors(encoder)) for view in (0, 1))
            return metrics | collapse_gauges(first, second)
        finally:
            encoder.train(training)

    def _fit(self, encoder: AudioEncoder) -> None:
        """Set the encoder's statistics, centre and discriminant map by the training clips (`max_gallery` of them).

        The map also sees an augmented window of each: training has brought the clips as they are closer together than
        unseen ones of a class will be.
        """
        if encoder.centre is None or not len(self.gallery):
            return
        training = encoder.training
        encoder.eval()
        if encoder.statistics is not None:
            raw = Gives(encoder.statistics_of, encoder.statistics.width)
            encoder.statistics.fit(self._embed(encoder, self.gallery, raw))
        described = Gives(encoder.describe, encoder.width)
        vectors = self._embed(encoder, self.gallery, described)
        if encoder.discriminant is not None:
            found = torch.eye(*encoder.discriminant.shape)
            if self.labelled and self._fits_labels:
                windows = self._embed_windows(encoder, self.gallery, 0, Gives(encoder.describe_crop, encoder.width))
                rows, labels = torch.cat([vectors, windows]).double().numpy(), np.tile(self.labels[self.gallery], 2)
                found = torch.from_numpy(discriminant_map(rows, labels, encoder.dim))
            encoder.discriminant.copy_(found)
        encoder.centre.copy_(vectors.mean(0))
        encoder.train(training)

    def _retrieval(self, encoder: AudioEncoder) -> dict[str, float]:
        gives = _vectors(encoder)
        if self.labelled:
            queries, gallery = (self._embed(encoder, clips, gives) for clips in (self.queries, self.gallery))
            query_labels, gallery_labels = self.labels[self.queries], self.labels[self.gallery]
        else:
            queries, gallery = (self._embed(encoder, self.queries, gives, half) for half in (0, 1))
            query_labels = gallery_labels = self.queries
        sides = (Labelled(queries.numpy(), query_labels), Labelled(gallery.numpy(), gallery_labels))
        scores = summarise(score_queries(*sides, ks=(1,)))
        return {"val_mAP": float(scores["mAP"]), "val_R@1": float(scores["R@1"])}

    def _embed(
        self, encoder: AudioEncoder, clips: npt.NDArray[np.int64], gives: Gives, half: int | None = None
    ) -> Tensor:
        """Of whole clips (or halves of them), float32[len(clips), width] on the CPU, in the order given."""

        def batch(rows: Sequence[int]) -> Tensor:
            spans = [_span(int(self.store.frames[row]), half) for row in rows]
            longest = max(stop - start for start, stop in spans)
            frames = np.zeros((len(rows), longest, self.store.bands), np.float16)
            for index, (row, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
                self.store.read(row, start, stop - start, frames[index, : stop - start])
            counts = torch.tensor([stop - start for start, stop in spans])
            spectrogram = encoder.features.finish(torch.from_numpy(frames).to(encoder.device).float(), counts)
            return gives.compute(*spectrogram)

        return self._shared(encoder.device, clips, batch, gives.width)

    def _embed_windows(self, encoder: AudioEncoder, clips: npt.NDArray[np.int64], view: int, gives: Gives) -> Tensor:
        """Of one augmented window of each clip, the same ones every time, float32[len(clips), width]."""
        length = self.augmentation.source_frames(self.window)

        def batch(rows: Sequence[int]) -> Tensor:
            draw = np.random.default_rng([self.seed, view, int(rows[0])])
            frames = np.empty((len(rows), length, self.store.bands), np.float16)
            for index, row in enumerate(rows):
                start = int(draw.integers(0, max(0, int(self.store.frames[row]) - length) + 1))
                self.store.read(row, start, length, frames[index])
            generator = torch.Generator().manual_seed(int(draw.integers(2**62)))
            views = augment(
                torch.from_numpy(frames).to(encoder.device).float(), self.window, self.augmentation, generator
            )
            return gives.compute(encoder.features.finish(views).x, None)

        return self._shared(encoder.device, clips, batch, gives.width)

    def _shared(self, device: torch.device, clips: npt.NDArray[np.int64], batch: BatchFn, width: int) -> Tensor:
        """Each rank embeds its share; everybody gets all rows."""
        share = -(-len(clips) // world_size())
        mine = clips[rank() * share : (rank() + 1) * share]
        mine = mine[np.argsort(self.store.frames[mine], kind="stable")]
        vectors = torch.zeros(share, width, device=device)
        order = np.full(share, -1, np.int64)
        order[: len(mine)] = mine
        for start in range(0, len(mine), BATCH):
            rows = [int(row) for row in mine[start : start + BATCH]]
            vectors[start : start + len(rows)] = batch(rows).float()
        every = gather(vectors).cpu()
        place = gather(torch.from_numpy(order).to(device)).cpu().numpy()
        where = {int(row): index for index, row in enumerate(place) if row >= 0}
        return every[[where[int(row)] for row in clips]]


def _vectors(encoder: AudioEncoder) -> Gives:
    return Gives(encoder.embed_spectrogram, encoder.dim)


def _span(frames: int, half: int | None) -> tuple[int, int]:
    if half is None or frames < 2:
        return 0, frames
    return (0, frames // 2) if half == 0 else (frames // 2, frames)


def _spread(rows: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """At most `most` of the rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]
