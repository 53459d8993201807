"""The encoder deployment: windows of sound in, unit vectors out, batched across requests."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve

from audiomae import storage
from audiomae.artifacts import releases as releases
from audiomae.model.encoder import AudioEncoder
from serve.records import EncoderInfo
from serve.schema import ServeArgs
from serve.versions import VersionCache, mismatch


class Encoder:
    """Holds the encoder of the serving release (two of them while releases are being swapped).

    Every call names its release, so a query is always encoded by the encoder its index was built with.
    """

    def __init__(self, args: ServeArgs, version: str) -> None:
        torch.set_num_threads(args.encoder_threads or os.cpu_count() or 1)
        self._args = args
        self._encoders: VersionCache[AudioEncoder] = VersionCache(self._open)
        queue: Any = self._encode_batch  # @serve.batch gives the method these two setters
        queue.set_max_batch_size(args.max_batch_size)
        queue.set_batch_wait_timeout_s(args.batch_wait_ms / 1000)
        self._encoders.get(version)

    def load(self, version: str) -> EncoderInfo:
        """Make the encoder of release `version` ready and describe it.

        Raises:
            IntegrityError: when the release's encoder is not the one that made its vectors.
        """
        encoder = self._encoders.get(version)
        return EncoderInfo(
            fingerprint=encoder.fingerprint,
            sample_rate=encoder.sample_rate,
            window_s=encoder.window_s,
            dim=encoder.dim,
            device=str(encoder.device),
            text_reason=text_reason(encoder),
        )

    async def encode(self, version: str, windows: Sequence[np.ndarray]) -> np.ndarray:
        """Unit vectors float32[W, dim] of W windows, each float32[S] mono at the encoder's sample rate."""
        return np.stack(await asyncio.gather(*(self._encode_batch((version, window)) for window in windows)))

    def encode_text(self, version: str, texts: list[str]) -> np.ndarray:
        """Unit vectors float32[T, dim] of texts; only for encoders with a text tower."""
        return self._encoders.get(version).embed_text(texts)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.0)
    async def _encode_batch(self, jobs: list[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        return await asyncio.to_thread(self._encode_jobs, jobs)

    def _encode_jobs(self, jobs: list[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        vectors: dict[int, np.ndarray] = {}
        for version in {version for version, _ in jobs}:
            rows = [row for row, job in enumerate(jobs) if job[0] == version]
            embedded = self._encoders.get(version).embed([jobs[row][1] for row in rows], batch_size=len(rows))
            vectors.update(zip(rows, embedded, strict=True))
        return [vectors[row] for row in range(len(jobs))]

    def _open(self, version: str) -> AudioEncoder:
        release = releases.resolve(self._args.index, version)
        encoder = AudioEncoder.load(str(checked_encoder_dir(release)), device=self._args.device, dtype=self._args.dtype)
        if encoder.fingerprint != release.fingerprint:
            raise mismatch(release, encoder.fingerprint)
        return encoder


def text_reason(encoder: AudioEncoder) -> str | None:
    """Why the encoder cannot embed text; `None` when it can, its text model then being loaded."""
    if not encoder.has_text:
        return "its encoder was trained on sound alone: train with a CLAP objective and publish that encoder"
    try:
        encoder.text_tower  # noqa: B018 (loads on first use)
    except RuntimeError as error:
        return str(error)
    return None


def checked_encoder_dir(release: releases.Release) -> Path:
    """The release's encoder on a local disk, its checksums checked; the index files are left where they are."""
    releases.verify(release, below="encoder/")
    return storage.fetch_dir(str(release.path / "encoder"))
