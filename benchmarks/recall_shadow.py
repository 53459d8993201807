"""What the recall shadow costs a search: blocks of searches with it and without it, in turn, in one process.

    python benchmarks/recall_shadow.py                        # generated vectors
    python benchmarks/recall_shadow.py --rows 1000000 --seconds 60

The shadow searches one query in a hundred again, exactly, in a thread of the lowest priority, as the service has it by
default. Without decoding, encoding and HTTP around it a search has least to hide the cost behind. Bar: p50 up by 2% at
most.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray gives its replicas
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "benchmarks" / "recall_shadow.json"
SHARE, BLOCK, DIM = 0.01, 10, 64


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", default=str(OUT))
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import embedding_sets  # type: ignore[import-not-found]

    from audiomae import AudioIndex

    with tempfile.TemporaryDirectory() as work:
        vectors = embedding_sets.clusters(args.rows, DIM, centres=500)
        embedding_sets.make_release(Path(work) / "index", [embedding_sets.make_set(Path(work) / "set", vectors)])
        report = measure(AudioIndex.open(Path(work) / "index"), args.seconds)
    report |= {"rows": args.rows, "share": SHARE, "cpus": os.cpu_count(), "load": os.getloadavg()}
    Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def measure(index: Any, seconds: float) -> dict[str, Any]:
    """p50 of both, their ratio, and what the shadow found."""
    from serve.quality import RecallShadow

    shadows = {"without": RecallShadow(0.0, seed=0), "with": RecallShadow(SHARE, seed=0)}
    times: dict[str, list[float]] = {name: [] for name in shadows}
    queries = [vector + 0.02 * np.sin(np.arange(index.dim)) for vector in index.vectors(some_ids(index))]
    place, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        for name, shadow in shadows.items():
            for query in queries[place : place + BLOCK]:
                began = time.perf_counter()
                hits = index.search(query, k=10)
                shadow.watch(index, query[None] / np.linalg.norm(query), 10, hits.scores)
                times[name].append(1000 * (time.perf_counter() - began))
        place = (place + BLOCK) % (len(queries) - BLOCK)
    p50 = {name: round(float(np.median(seen)), 4) for name, seen in times.items()}
    shadow = shadows["with"]
    return {
        "p50_ms": p50,
        "with / without": round(p50["with"] / p50["without"], 4),
        "searches": {name: len(seen) for name, seen in times.items()},
        "searched again": shadow.queries,
        "recall seen": round(shadow.found / max(shadow.wanted, 1), 4),
    }


def some_ids(index: Any, count: int = 5_000) -> list[int]:
    """Ids of items spread over the index."""
    rows = np.linspace(0, len(index) - 1, min(count, len(index))).astype(np.int64)
    return [row["id"] for row in index.table.rows(rows, ["id"])]


if __name__ == "__main__":
    main()
