"""The feature cache: log-mel of a corpus decoded once, in shards that count only with their receipt.

A cache directory holds `shard-00000.npy` (float16[frames, mels], the clips of a shard end to end),
`shard-00000.parquet` (one row per clip, or per file that could not be decoded) and `shard-00000.json`, the receipt,
written last. Readers trust only shards with a receipt. Features are memory-mapped: all workers of a machine share one
copy in memory.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae.errors import IntegrityError
from audiomae.storage import (
    copy_file,
    is_local,
    read_bytes,
    read_json,
    sha256_bytes,
    to_path,
    walk_files,
    write_bytes,
    write_json,
)

CLIP_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("first_frame", pa.int64()),
        ("frames", pa.int64()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Segment:
    """One clip for the cache: `features` float[T, F] of `start_s` to `end_s` seconds of a file."""

    start_s: float
    end_s: float
    features: npt.NDArray[np.floating[Any]]


Extract = Callable[[str], Iterable[Segment]]


def cache_key(files: pa.Table, recipe: Mapping[str, Any]) -> str:
    """Name of the cache for these files and this way of making features (16 hex digits).

    Args:
        files: columns `uri`, `size`, `content_id`; the order does not matter.
        recipe: everything else that decides the bytes: feature settings, clip length.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for row in sorted(zip(*(files[name].to_pylist() for name in ("uri", "size", "content_id")), strict=True)):
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def write_shard(cache: str, index: int, uris: Sequence[str], extract: Extract) -> int:
    """Extract the files of one shard and commit them; returns the number of files that failed.

    Args:
        cache: directory or S3 prefix of the cache.
        index: shard number.
        uris: files of the shard.
        extract: uri -> its clips; an exception becomes a row with the reason and the job goes on.
    """
    rows: list[dict[str, Any]] = []
    parts: list[npt.NDArray[np.float16]] = []
    offset = 0
    for uri in uris:
        try:
            segments = [(s.start_s, s.end_s, s.features.astype(np.float16)) for s in extract(uri)]
            if not all(np.isfinite(features).all() for *_, features in segments):
                raise ValueError("the features are not finite")
        except Exception as error:
            rows.append({"uri": uri, "error": f"{type(error).__name__}: {error}"[:500]})
            continue
        for start_s, end_s, features in segments:
            frames = len(features)
            rows.append({"uri": uri, "start_s": start_s, "end_s": end_s, "first_frame": offset, "frames": frames})
            parts.append(features)
            offset += frames
    features = np.concatenate(parts) if parts else np.empty((0, 0), np.float16)
    _commit_shard(cache, index, features, pa.Table.from_pylist(rows, CLIP_SCHEMA))
    return sum(1 for row in rows if "error" in row)


def pending_shards(cache: str, shards: int) -> list[int]:
    """Shard numbers without a receipt."""
    root = to_path(cache)
    present = {item.name for item in root.iterdir()} if root.exists() else set()
    return [index for index in range(shards) if f"{_stem(index)}.json" not in present]


def read_clips(cache: str, shards: int) -> pa.Table:
    """The rows of all shards with a `shard` column added, in shard order; failed files have an `error`.

    Raises:
        IntegrityError: a shard is missing or its files do not match the receipt.
    """
    root = to_path(cache)
    tables = []
    for index in range(shards):
        stem = _stem(index)
        if not (root / f"{stem}.json").exists():
            raise IntegrityError(f"{root}: {stem} has no receipt, so it was not finished; run the same command again")
        receipt = read_json(root / f"{stem}.json")
        data = read_bytes(root / f"{stem}.parquet")
        size = (root / f"{stem}.npy").stat().st_size
        if sha256_bytes(data) != receipt["clips_sha256"] or size != receipt["features_bytes"]:
            raise IntegrityError(
                f"{root}/{stem}: the files do not match their receipt (features {size} bytes, expected "
                f"{receipt['features_bytes']}); delete the cache directory and run again"
            )
        table = pq.read_table(io.BytesIO(data))
        tables.append(table.append_column("shard", pa.array(np.full(len(table), index, np.int32))))
    return pa.concat_tables(tables)


def localise(cache: str) -> Path:
    """A local directory with the shards of `cache`: itself when local, else a copy kept for the next run."""
    root = to_path(cache)
    if is_local(root):
        return Path(str(root))
    target = Path(tempfile.gettempdir()) / "audiomae-features" / root.name
    for name, item in walk_files(root):
        if name.endswith(".npy"):
            copy = target / name
            if not copy.exists() or copy.stat().st_size != item.stat().st_size:
                copy_file(item, copy)
    return target


class FeatureStore:
    """Memory-mapped features of a set of clips.

    Args:
        cache: local cache directory.
        shard, first_frame, frames: int[N], where each clip lies.
    """

    def __init__(self, cache: Path, shard: npt.ArrayLike, first_frame: npt.ArrayLike, frames: npt.ArrayLike) -> None:
        self.shard, self.first_frame = np.asarray(shard), np.asarray(first_frame)
        self.frames = np.asarray(frames)
        self._maps = {
            int(index): np.load(cache / f"{_stem(int(index))}.npy", mmap_mode="r") for index in np.unique(self.shard)
        }

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def bands(self) -> int:
        """Mel bands per frame."""
        return int(next(iter(self._maps.values())).shape[1])

    def read(self, clip: int, start: int, length: int, out: npt.NDArray[np.float16]) -> None:
        """Copy `length` frames of a clip from frame `start` into `out` [length, F]; a short clip is repeated."""
        frames, first = int(self.frames[clip]), int(self.first_frame[clip])
        features = self._maps[int(self.shard[clip])][first : first + frames]
        if start + length <= frames:
            out[:] = features[start : start + length]
        else:
            out[:] = features[np.arange(start, start + length) % frames]


def _stem(index: int) -> str:
    return f"shard-{index:05d}"


def _commit_shard(cache: str, index: int, features: npt.NDArray[np.float16], clips: pa.Table) -> None:
    root, stem = to_path(cache), _stem(index)
    array, table = io.BytesIO(), io.BytesIO()
    np.save(array, features)
    pq.write_table(clips, table)
    write_bytes(root / f"{stem}.npy", array.getvalue())
    write_bytes(root / f"{stem}.parquet", table.getvalue())
    receipt = {
        "clips": len(clips),
        "clips_sha256": sha256_bytes(table.getvalue()),
        "features_bytes": len(array.getvalue()),
        "features_sha256": sha256_bytes(array.getvalue()),
    }
    write_json(root / f"{stem}.json", receipt)
