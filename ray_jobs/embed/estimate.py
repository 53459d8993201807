"""`embed_corpus --dry-run`: what a job would cost, from a sample of its files."""

import time
from functools import partial

import numpy as np
import psutil
import pyarrow as pa
import torch

from audiomae.artifacts.tables import EmbedSettings
from audiomae.corpus.decode import probe
from audiomae.corpus.manifest import open_source
from audiomae.cpus import available_cpus
from audiomae.embedding.decoding import decode_item
from audiomae.embedding.embedder import BatchEncoder, embed_shard
from audiomae.errors import DecodeError
from audiomae.model.encoder import AudioEncoder

PROBED_FILES = 64
TIMED_FILES = 8
TIMED_AUDIO_S = 300.0
ROW_BYTES = 64  # of a row besides its vector, compressed


def estimate(encoder: str, settings: EmbedSettings, root: str, listing: pa.Table) -> dict[str, float]:
    """Items, audio hours, hours of work, disk and memory of embedding a listing.

    Up to 64 files, spread evenly over the listing, are probed for their length; 8 of those that open are decoded and
    encoded with one thread here, after one for warming up.
    """
    rows = np.unique(np.linspace(0, listing.num_rows - 1, PROBED_FILES).astype(int))
    sample = [(row, duration) for row in rows if (duration := _duration(root, listing["uri"][row].as_py()))]
    sizes = np.maximum(listing["size"].to_numpy(), 0)
    sampled_bytes = max(1, sum(int(sizes[row]) for row, _ in sample))
    seconds = sum(duration for _, duration in sample) * float(sizes.sum()) / sampled_bytes
    # files that cannot be opened give no audio
    seconds *= sum(int(sizes[row]) for row, _ in sample) / max(1, int(sizes[rows].sum()))
    windows = (
        listing.num_rows
        if settings.mode == "file"
        else max(listing.num_rows * len(sample) / len(rows), seconds / settings.hop_s)
    )
    core_s = _core_seconds(encoder, settings, root, listing, [row for row, length in sample if length < TIMED_AUDIO_S])
    width = settings.dim * (2 if settings.vector_dtype == "float16" else 4)
    return {
        "files": listing.num_rows,
        "audio_hours": seconds / 3600,
        "windows": round(windows),
        "cpu_hours": core_s * seconds / 3600,
        "hours": core_s * seconds / 3600 / available_cpus(),
        "disk_gib": windows * (width + ROW_BYTES) / 2**30,
        "memory_gib_per_worker": psutil.Process().memory_info().rss / 2**30,
    }


def _core_seconds(encoder: str, settings: EmbedSettings, root: str, listing: pa.Table, rows: list[int]) -> float:
    """Core seconds per second of audio, decoding and encoding."""
    torch.set_num_threads(1)
    encode = BatchEncoder(AudioEncoder.load(encoder, device="cpu"))
    decode = partial(decode_item, root=root, settings=settings)
    spent = audio_s = 0.0
    for turn, part in enumerate((rows[:1], rows[1 : 1 + TIMED_FILES] or rows)):
        began = time.perf_counter()
        result = embed_shard(listing.take(pa.array(part, pa.int64())), decode, encode, settings)
        if turn:
            spent, audio_s = time.perf_counter() - began, result.audio_s
    return spent / audio_s if audio_s else 0.0


def _duration(root: str, uri: str) -> float | None:
    try:
        return probe(open_source(root, uri)).duration_s
    except DecodeError:
        return None
