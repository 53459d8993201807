"""What filters cost and what they leave of the recall, at one million clustered vectors.

    python benchmarks/filters.py                      # 1M rows; docs/benchmarks/filters.json
    python benchmarks/filters.py --rows 100000        # a quick look
    python benchmarks/filters.py --work DIR           # keep the embedding set and the index there, and use them again

Filters that leave 50 to 0.01% of the rows: independent of the sound (`take`), whole clusters (`label`) and clusters
blurred at their edges (`site`), asked by queries from inside and outside of what they leave. For each: recall@10
against the exact filtered answer (mean and 5th percentile of the queries), and the time of `AudioIndex.search` for one
query on one thread (median and 95th percentile of wall and of CPU time; they differ on a busy machine). Then what a
filter costs the first time that it is asked for. Vectors are those of `_clustered.py`.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _clustered import Clustered, build_release, write_set

from audiomae import AudioIndex
from audiomae.artifacts import releases
from audiomae.artifacts.embeddings import EmbeddingSet
from audiomae.search import index as ann
from audiomae.search.spec import BuildOptions

SHARES = (0.5, 0.1, 0.05, 0.02, 0.01, 0.001, 0.0001)
COLUMNS = {"take": "independent", "label": "whole clusters", "site": "blurred clusters"}
K = 10
TIE = 1e-4
STEP_ROWS = 32_768
MEAN, LOW, P50_MS, MASK_MS = 0.95, 0.90, 15.0, 1.0


def prepared(work: Path, rows: int) -> AudioIndex:
    """The index over `rows` vectors below `work`, made unless it is there."""
    index_dir = work / f"index-{rows}"
    if releases.resolve_or_none(index_dir) is None:
        folder = work / f"embeddings-{rows}"
        sets = (
            EmbeddingSet.open(str(folder)) if (folder / "run.json").exists() else write_set(folder, Clustered(), rows)
        )
        with ann.threads(os.cpu_count() or 1):
            build_release(index_dir, [sets], BuildOptions(map=False))
    return AudioIndex.open(index_dir)


def cases(index: AudioIndex, count: int) -> list[dict[str, Any]]:
    """Every filter with its queries and where they come from."""
    rows, vectors, found = len(index), Clustered(), []
    for share in SHARES:
        if share * rows < K:
            continue
        for column in COLUMNS:
            where = {column: {"lt": round(share * rows)}}
            places = {"inside": (0.0, share), "outside": (share, 1.0)} if column != "take" else {"any": (0.0, 1.0)}
            for place, bounds in places.items():
                queries = vectors.queries(count, *bounds)
                found.append({"share": share, "column": column, "queries": place, "filter": where, "vectors": queries})
    return found


def exact(index: AudioIndex, found: list[dict[str, Any]]) -> list[np.ndarray]:
    """The K best scores of every case's queries among the rows that its filter leaves, float32[Q, K], descending."""
    store = ann.RowStore(segment_folder(index) / ann.VECTORS_FILE)
    columns = {name: index.table.parts[0].column(name).values for name in COLUMNS}
    best = [np.full((len(case["vectors"]), K), -np.inf, np.float32) for case in found]
    queries = np.concatenate([case["vectors"] for case in found])
    edges = np.cumsum([0, *(len(case["vectors"]) for case in found)])
    for start in range(0, store.num_rows, STEP_ROWS):
        scores = store.rows[start : start + STEP_ROWS].astype(np.float32) @ queries.T  # rows first: masks pick rows
        for number, case in enumerate(found):
            values = columns[case["column"]]
            assert values is not None
            mask = values[start : start + STEP_ROWS] < case["filter"][case["column"]]["lt"]
            mine = scores[mask, edges[number] : edges[number + 1]].T
            joined = np.concatenate([best[number], mine], axis=1)
            best[number] = np.partition(joined, joined.shape[1] - K, axis=1)[:, -K:]
    return [-np.sort(-scores, axis=1) for scores in best]


def segment_folder(index: AudioIndex) -> Path:
    """The one segment of the release."""
    (segment,) = index.release.info["segments"]
    return Path(str(index.release.path)).parent / segment["name"]


def measure(index: AudioIndex, case: dict[str, Any], answers: np.ndarray) -> dict[str, Any]:
    """One case."""
    index.search(case["vectors"][0], K, filter=case["filter"])  # the filter's rows are known from here on
    recalls, wall, cpu = [], [], []
    for query, answer in zip(case["vectors"], answers, strict=True):
        began, worked = time.perf_counter(), time.thread_time()
        hits = index.search(query, K, filter=case["filter"])
        wall.append(time.perf_counter() - began)
        cpu.append(time.thread_time() - worked)
        available = int(np.isfinite(answer).sum())
        last = answer[available - 1] - TIE
        recalls.append(min(int((hits.scores[0] >= last).sum()), available) / available)
    return {
        "share": case["share"],
        "filter": COLUMNS[case["column"]],
        "queries": case["queries"],
        "recall_mean": float(np.mean(recalls)),
        "recall_p5": float(np.percentile(recalls, 5)),
        "recall_min": float(np.min(recalls)),
        "p50_ms": float(np.median(wall) * 1e3),
        "p95_ms": float(np.percentile(wall, 95) * 1e3),
        "cpu_p50_ms": float(np.median(cpu) * 1e3),
        "cpu_p95_ms": float(np.percentile(cpu, 95) * 1e3),
    }


def masks(index: AudioIndex) -> dict[str, float]:
    """What a new filter costs, per million rows: CPU milliseconds of its mask alone, and of all that is prepared."""
    rows = len(index)
    wheres: dict[str, list[dict[str, Any]]] = {
        "a range of a number": [{"take": {"gte": n * 17, "lt": rows // 2 + n}} for n in range(15)],
        "a number": [{"take": n} for n in range(15)],
        "a text": [{"class": f"class-{n:02d}"} for n in range(15)],
        "one of five texts": [{"class": {"in": [f"class-{n + m:02d}" for m in range(5)]}} for n in range(15)],
    }
    found = {}
    for name, filters in wheres.items():
        index.table.mask(filters[0])  # maps the column
        mask, whole = [], []
        for where in filters:
            began = time.thread_time()
            index.table.mask(where)
            mask.append(time.thread_time() - began)
            began = time.thread_time()
            for part in index._selection(json.dumps(where)):
                _ = part.selection.rows, part.per_list if index.spec.kind == "ivf" else None
            whole.append(time.thread_time() - began)
        found[name] = round(float(np.median(mask)) * 1e9 / rows, 3)
        found[f"{name}, ready to search"] = round(float(np.median(whole)) * 1e9 / rows, 3)
    return found


def report(result: dict[str, Any]) -> None:
    """The table, and what falls short."""
    print(f"{result['rows']:,} rows, {result['spec']['factory']}, nprobe {result['spec']['nprobe']}")
    print(f"{'leaves':>8}  {'filter':<17}{'queries':<9}{'mean':>7}{'p5':>7}{'p50 ms':>9}{'CPU p50':>9}")
    for row in result["table"]:
        print(
            f"{row['share']:>8.2%}  {row['filter']:<17}{row['queries']:<9}{row['recall_mean']:>7.3f}"
            f"{row['recall_p5']:>7.2f}{row['p50_ms']:>9.2f}{row['cpu_p50_ms']:>9.2f}"
        )
    for name, value in result["mask_ms_per_million"].items():
        print(f"{value:>9.3f} ms of CPU per million rows: {name}")
    print("\n".join(result["short"]) or "every bar holds")


def falls_short(result: dict[str, Any]) -> list[str]:
    """What does not reach its bar, in words."""
    short = []
    for row in result["table"]:
        name = f"{row['share']:.2%} {row['filter']}, queries {row['queries']}"
        if row["recall_mean"] < MEAN or row["recall_p5"] < LOW - 1e-9:
            short.append(f"{name}: recall {row['recall_mean']:.3f}, p5 {row['recall_p5']:.2f} (bars {MEAN}, {LOW})")
        if row["p50_ms"] > P50_MS:
            short.append(f"{name}: p50 {row['p50_ms']:.1f} ms (bar {P50_MS}; of CPU {row['cpu_p50_ms']:.1f})")
    for name, value in result["mask_ms_per_million"].items():
        if "ready" not in name and value > MASK_MS:
            short.append(f"the mask of {name}: {value} ms per million rows (bar {MASK_MS})")
    return short


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=60, help="of every case")
    parser.add_argument("--work", type=Path, help="a folder to keep the embedding set and the index in")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/filters.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="audiomae-filters-") as folder:
        index = prepared(arguments.work or Path(folder), arguments.rows)
        found = cases(index, arguments.queries)
        answers = exact(index, found)
        load = os.getloadavg()[0]
        with ann.threads(1):
            table = [measure(index, case, answer) for case, answer in zip(found, answers, strict=True)]
            result: dict[str, Any] = {
                "rows": len(index),
                "dim": index.dim,
                "spec": index.spec.model_dump(),
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "load": load,
                "table": table,
                "mask_ms_per_million": masks(index),
            }
    result["short"] = falls_short(result)
    report(result)
    arguments.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
