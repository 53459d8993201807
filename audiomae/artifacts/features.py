"""The feature cache: log-mel of a corpus decoded once, in shards that count only with their receipt.

A cache directory holds `shard-00000.npy` (float16[frames, mels], the clips of a shard end to end),
`shard-00000.parquet` (one row per clip, or per file that could not be decoded) and `shard-00000.json`, the receipt,
written last. Readers trust only shards whose files are what the receipt says. Features are memory-mapped: all workers
of a machine share one copy in memory.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae.artifacts import receipts
from audiomae.artifacts.receipts import Receipt, entry_of, entry_of_file
from audiomae.artifacts.shard_cache import FIX, ShardCache, read_receipt, shard_name
from audiomae.artifacts.tables import map_ahead, read_parquet
from audiomae.scratch import scratch
from audiomae.storage import Location, copy_file, list_names, to_path, write_bytes

KEY_ROWS = 1 << 16  # at a time
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
    names = ["uri", "size", "content_id"]
    files = files.select(names).sort_by([(name, "ascending") for name in names])
    for start in range(0, len(files), KEY_ROWS):
        columns = [column.to_pylist() for column in files.slice(start, KEY_ROWS).columns]
        digest.update("".join(map(repr, zip(*columns, strict=True))).encode())
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
    with scratch("features") as folder:
        with _Growing(folder / "features.npy") as features:
            for uri in uris:
                before, first = features.frames, len(rows)
                try:
                    for segment in extract(uri):
                        rows.append({"uri": uri, "first_frame": features.frames, "frames": len(segment.features)})
                        rows[-1] |= {"start_s": segment.start_s, "end_s": segment.end_s}
                        features.append(segment.features)
                except Exception as error:
                    features.cut(before)
                    rows[first:] = [{"uri": uri, "error": f"{type(error).__name__}: {error}"[:500]}]
        _commit_shard(cache, index, features.path, pa.Table.from_pylist(rows, CLIP_SCHEMA))
    return sum(1 for row in rows if "error" in row)


class _Growing:
    """A `.npy` file of float16[frames, mels] that is written row by row, so that memory holds one clip."""

    def __init__(self, path: Path) -> None:
        self.path, self.frames, self.bands = path, 0, 0
        self._file = path.open("w+b")

    def append(self, features: npt.NDArray[np.floating[Any]]) -> None:
        """Add rows. Raises ValueError when one is not finite."""
        rows = features.astype(np.float16)
        if not np.isfinite(rows).all():
            raise ValueError("the features are not finite")
        if not self.bands:
            self.bands = rows.shape[1]
            self._header()
        self._file.write(np.ascontiguousarray(rows).data)
        self.frames += len(rows)

    def cut(self, frames: int) -> None:
        """Back to the first `frames` rows."""
        if self.bands:
            self._file.seek(self._header_bytes + frames * self.bands * 2)
            self._file.truncate()
        self.frames = frames

    def _header(self) -> None:
        """numpy leaves room in the header for the first dimension to grow."""
        self._file.seek(0)
        shape = (self.frames, self.bands)
        np.lib.format.write_array_header_1_0(self._file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        self._header_bytes = self._file.tell()

    def __enter__(self) -> "_Growing":
        return self

    def __exit__(self, *_: object) -> None:
        self._header()
        self._file.close()


def pending_shards(cache: str, shards: int) -> list[int]:
    """Shard numbers without a receipt."""
    present = set(list_names(cache))
    return [index for index in range(shards) if f"{shard_name(index)}.json" not in present]


def read_clips(cache: str, shards: int) -> pa.Table:
    """The rows of all shards with a `shard` column added, in shard order; failed files have an `error`.

    Raises:
        IntegrityError: a shard is missing or its table is not what the receipt says.
    """

    def read(index: int) -> pa.Table:
        name = f"{shard_name(index)}.parquet"
        table = read_parquet(receipts.read_file(cache, name, read_receipt(cache, index), FIX))
        return table.append_column("shard", pa.array(np.full(len(table), index, np.int32)))

    return pa.concat_tables(map_ahead(read, range(shards), ahead=16))


def verify_features(cache: Location, shards: Iterable[int]) -> None:
    """Check the features of these shards. IntegrityError names the first file that is missing, cut or changed."""

    def check(index: int) -> None:
        name = f"{shard_name(index)}.npy"
        receipts.verify(cache, read_receipt(cache, index), [name], FIX)

    for _ in map_ahead(check, shards):
        pass


class FeatureStore:
    """Features of a set of clips.

    Args:
        cache: the shards.
        shard, first_frame, frames: int[N], where each clip lies.
    """

    def __init__(
        self, cache: ShardCache, shard: npt.ArrayLike, first_frame: npt.ArrayLike, frames: npt.ArrayLike
    ) -> None:
        self.cache = cache
        self.shard, self.first_frame = np.asarray(shard), np.asarray(first_frame)
        self.frames = np.asarray(frames)
        self._bands = 0

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def bands(self) -> int:
        """Mel bands per frame."""
        if not self._bands:
            self._bands = int(self.cache.get(int(self.shard[0])).shape[1])
        return self._bands

    def read(self, clip: int, start: int, length: int, out: npt.NDArray[np.float16]) -> None:
        """Copy `length` frames of a clip from frame `start` into `out` [length, F]; a short clip is repeated."""
        frames, first = int(self.frames[clip]), int(self.first_frame[clip])
        features = self.cache.get(int(self.shard[clip]))[first : first + frames]
        if start + length <= frames:
            out[:] = features[start : start + length]
        else:
            out[:] = features[np.arange(start, start + length) % frames]


def _commit_shard(cache: str, index: int, features: Path, clips: pa.Table) -> None:
    """Write the files of a shard, then its receipt.

    Raises:
        IntegrityError: another process committed the shard meanwhile, with other bytes than those now there.
    """
    root, stem = to_path(cache), shard_name(index)
    table = io.BytesIO()
    pq.write_table(clips, table)
    copy_file(features, root / f"{stem}.npy")
    write_bytes(root / f"{stem}.parquet", table.getvalue())
    files = {f"{stem}.npy": entry_of_file(features), f"{stem}.parquet": entry_of(table.getvalue())}
    receipt = Receipt(files, {"clips": len(clips)})
    if not receipts.create(root / f"{stem}.json", receipt):
        receipts.verify(root, read_receipt(cache, index), fix=FIX)
