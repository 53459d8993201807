"""Audio files -> plain log-mel for the feature cache. Normalising and resizing stay with the model, per view."""

from collections.abc import Iterator
from typing import Any

import torch

from audiomae.artifacts.features import Segment
from audiomae.corpus.decode import iter_windows
from audiomae.corpus.sources import open_source
from audiomae.model.features import FeatureConfig, LogMel


def plain_features(config: FeatureConfig) -> FeatureConfig:
    """The same log-mel, not yet limited, normalised or resized, so that power can still be mixed."""
    return config.model_copy(update={"normalize": "none", "range_db": None, "resize_time": 1.0, "resize_mels": None})


def cache_recipe(config: FeatureConfig, clip_s: float) -> dict[str, Any]:
    """What decides the bytes of a cache besides the files."""
    return {"features": plain_features(config).model_dump(mode="json"), "clip_s": clip_s, "layout": 2}


class Extractor:
    """Decodes files of a corpus into log-mel clips of at most `clip_s` seconds.

    Args:
        root: corpus root.
        features: of the encoder that will be trained.
        clip_s: clip length in seconds; the last part of a file is kept if at least half as long.
    """

    def __init__(self, root: str, features: FeatureConfig, clip_s: float) -> None:
        self.root, self.clip_s = root, clip_s
        self.logmel = LogMel(plain_features(features))

    def __call__(self, uri: str) -> Iterator[Segment]:
        """The clips of one file. Raises DecodeError for a file that cannot be read."""
        rate = self.logmel.config.sample_rate
        for window in iter_windows(open_source(self.root, uri), rate, self.clip_s, self.clip_s):
            with torch.inference_mode():
                frames = self.logmel(torch.from_numpy(window.samples)[None]).x[0, 0]
            yield Segment(window.start_s, window.end_s, frames.numpy())
