"""The feature cache: log-mel of a corpus decoded once, in shards that count only with their receipt.

A cache directory holds `shard-00000.npy` (float16[frames, mels], the clips of a shard end to end),
`shard-00000.parquet` (one row per clip, or per file that could not be decoded) and `shard-00000.json`, the receipt,
written last. Readers trust only shards whose files are what the receipt says. Features are memory-mapped: all workers
of a machine share one copy in memory.
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

from audiomae.artifacts import receipts
from audiomae.artifacts.receipts import FileEntry, Receipt, entry_of
from audiomae.artifacts.tables import map_ahead, read_parquet
from audiomae.errors import IntegrityError
from audiomae.storage import Location, copy_file, is_local, list_names, to_path, write_bytes

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


FIX = "delete the shard's receipt (the .json beside it) and run the same command again to make it anew"
UNSEALED = frozenset({"clips", "clips_sha256", "features_bytes", "features_sha256"})  # receipts of older versions


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
    present = set(list_names(cache))
    return [index for index in range(shards) if f"{_stem(index)}.json" not in present]


def read_clips(cache: str, shards: int) -> pa.Table:
    """The rows of all shards with a `shard` column added, in shard order; failed files have an `error`.

    Raises:
        IntegrityError: a shard is missing or its table is not what the receipt says.
    """

    def read(index: int) -> pa.Table:
        name = f"{_stem(index)}.parquet"
        table = read_parquet(receipts.read_file(cache, name, read_receipt(cache, index), FIX))
        return table.append_column("shard", pa.array(np.full(len(table), index, np.int32)))

    return pa.concat_tables(map_ahead(read, range(shards), ahead=16))


def read_receipt(cache: Location, index: int) -> Receipt:
    """The receipt of one shard, in today's form for older caches too.

    Raises:
        IntegrityError: there is none, or it is damaged.
    """
    stem, root = _stem(index), to_path(cache)
    path = root / f"{stem}.json"
    try:
        value = receipts.read_sealed(path, UNSEALED, FIX)
    except FileNotFoundError:
        raise IntegrityError(
            f"{root}: {stem} has no receipt, so it was not finished; run the same command again"
        ) from None
    if "facts" in value:
        return Receipt.decode(value, path)
    files = {
        f"{stem}.npy": FileEntry(value["features_sha256"], value["features_bytes"]),
        f"{stem}.parquet": FileEntry(value["clips_sha256"]),
    }
    return Receipt(files, {"clips": value["clips"]})


def verify_features(cache: Location, shards: Iterable[int]) -> None:
    """Check the features of these shards. IntegrityError names the first file that is missing, cut or changed."""

    def check(index: int) -> None:
        name = f"{_stem(index)}.npy"
        receipts.verify(cache, read_receipt(cache, index), [name], FIX)

    for _ in map_ahead(check, shards):
        pass


def localise(cache: str) -> Path:
    """A local directory with the features of `cache`: itself when local, else a copy kept for the next run.

    A copy that is not what the receipt says is fetched again.
    """
    root = to_path(cache)
    if is_local(root):
        return Path(str(root))
    target = Path(tempfile.gettempdir()) / "audiomae-features" / root.name
    for name in list_names(root):
        if name.startswith("shard-") and name.endswith(".json"):
            index = int(name.removeprefix("shard-").removesuffix(".json"))
            if not (target / name).exists():
                copy_file(root / name, target / name)
            try:
                verify_features(target, [index])
            except IntegrityError:
                for suffix in (".npy", ".json"):
                    copy_file(root / (_stem(index) + suffix), target / (_stem(index) + suffix))
    return target


class FeatureStore:
    """Memory-mapped features of a set of clips.

    Args:
        cache: local cache directory.
        shard, first_frame, frames: int[N], where each clip lies.

    Raises:
        IntegrityError: a file of features is not what its receipt says.
    """

    def __init__(self, cache: Path, shard: npt.ArrayLike, first_frame: npt.ArrayLike, frames: npt.ArrayLike) -> None:
        self.shard, self.first_frame = np.asarray(shard), np.asarray(first_frame)
        self.frames = np.asarray(frames)
        used = np.unique(self.shard).tolist()
        verify_features(cache, used)
        self._maps = {index: np.load(cache / f"{_stem(index)}.npy", mmap_mode="r") for index in used}

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
    """Write the files of a shard, then its receipt.

    Raises:
        IntegrityError: another process committed the shard meanwhile, with other bytes than those now there.
    """
    root, stem = to_path(cache), _stem(index)
    array, table = io.BytesIO(), io.BytesIO()
    np.save(array, features)
    pq.write_table(clips, table)
    files = {f"{stem}.npy": array.getvalue(), f"{stem}.parquet": table.getvalue()}
    for name, data in files.items():
        write_bytes(root / name, data)
    receipt = Receipt({name: entry_of(data) for name, data in files.items()}, {"clips": len(clips)})
    if not receipts.create(root / f"{stem}.json", receipt):
        receipts.verify(root, read_receipt(cache, index), fix=FIX)
