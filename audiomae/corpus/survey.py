"""What a corpus is like, from a sample of its files' headers: lengths and sample rates."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from audiomae.corpus.decode import AudioInfo, probe
from audiomae.corpus.sources import open_source

PROBED_FILES = 64
PROBE_THREADS = 8


def sampled_headers(root: str, listing: pa.Table, most: int = PROBED_FILES) -> list[AudioInfo]:
    """The headers of up to `most` files spread evenly over the listing, of those that open."""
    places = np.unique(np.linspace(0, listing.num_rows - 1, most).astype(np.int64))
    rows = listing.take(pa.array(places)).to_pylist()

    def header(row: dict[str, Any]) -> AudioInfo | None:
        try:
            return probe(open_source(root, row["uri"], row.get("tar_offset"), row.get("size")))
        except Exception:  # storage clients raise what they like; the file fails with its reason when it is decoded
            return None

    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        return [info for info in pool.map(header, rows) if info]


def sampled_durations(root: str, listing: pa.Table, most: int = PROBED_FILES) -> list[float]:
    """Seconds of audio of such a sample; files whose header does not tell are left out."""
    return [info.duration_s for info in sampled_headers(root, listing, most) if info.duration_s]
