"""What lives on after a build: small changes, replicas of one node, shards, and the memory of the driver.

    python benchmarks/index_updates.py --work DIR       # 1M x 384, DIR as benchmarks/index_build.py left it (or new)
    python benchmarks/index_updates.py --rows 100000    # a quick look
    python benchmarks/index_updates.py --driver 1000000 10000000

Changes (each on the release that the one before left): ten ids deleted; 1% more rows; seconds, CPU seconds and bytes
written (files that were not there before) against those of the full build and of what changed. Replicas: two processes
open the release and search; what each adds to the memory of the node is the growth of its proportional share (PSS) over
a process that has imported everything and opened nothing. Shards: the same rows in one segment and in eight, searched
by `ShardedSearcher` in one process; CPU time per query. Driver: a build of synthetic rows of four dimensions, whose
steps run in processes of their own as they do in Ray; the peak of the driver's own memory.
"""

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from _clustered import Clustered, Spent, build_release, memory_bytes, row_store, write_set

from audiomae import AudioIndex
from audiomae.artifacts import releases
from audiomae.artifacts.embeddings import EmbeddingSet, ShardOrigin, ShardTables, commit_shard, plans, write_run
from audiomae.artifacts.tables import EmbedSettings, embedding_schema, vectors_to_column
from audiomae.search import build
from audiomae.search import index as ann
from audiomae.search.plan import Request
from audiomae.search.segments import IDS_FILE
from audiomae.search.sharded import Divided, answer, open_shard
from audiomae.search.spec import BuildOptions

SHARDS, K = 8, 10
CONFIG = BuildOptions(map=False)
BARS = {
    "delete ten ids, s": 3.0,
    "1% more rows, of a full build": 0.05,
    "1% more rows, bytes written over the change": 3.0,
    "second replica over the first": 0.10,
    "CPU of eight shards over one index": 2.1,
    "driver at the most rows, MB": 500.0,
}


# --- changes ----------------------------------------------------------------------------------------------------------


def changes(work: Path, rows: int) -> dict[str, Any]:
    """A full build (unless it is there), ten deletions, one per cent more."""
    sets = work / "embeddings"
    base = EmbeddingSet.open(str(sets)) if (sets / "run.json").exists() else write_set(sets, Clustered(), rows)
    index_dir = work / "index"
    found: dict[str, Any] = {}
    with ann.threads(os.cpu_count() or 1):
        kept = work / "full.json"
        if releases.resolve_or_none(index_dir) is None:
            kept.write_text(json.dumps(change(index_dir, [base], Request())))
        elif not kept.exists():  # built by benchmarks/index_build.py
            kept.write_text((work / "index.json").read_text())
        found["full"] = json.loads(kept.read_text())
        ids = np.load(index_dir / releases.resolve(index_dir).info["segments"][0]["name"] / IDS_FILE, mmap_mode="r")
        found["delete"] = change(index_dir, [], Request(delete=np.sort(ids[:10])))
        more = work / "more"
        if not more.exists():
            write_set(more, Clustered(), rows // 100, first_block=1 << 20, total=rows)
        found["more"] = change(index_dir, [EmbeddingSet.open(str(more))], Request())
        found["more"]["change_bytes"] = sum(size for name, size in files(more).items() if "embeddings" in name)
        releases.rollback(index_dir, "v000001")
    return found


def change(index_dir: Path, sets: list[EmbeddingSet], request: Request) -> dict[str, Any]:
    """One build; what it took and what it wrote."""
    before = files(index_dir)
    with Spent() as spent:
        assert build_release(index_dir, sets, CONFIG, request) is not None
    written = sum(size for name, size in files(index_dir).items() if name not in before)
    return spent.facts | {"written_bytes": written}


def files(folder: Path) -> dict[str, int]:
    """Sizes by name and inode."""
    found = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {f"{path.relative_to(folder)} {stat.st_ino}": stat.st_size for path, stat in found}


# --- replicas ---------------------------------------------------------------------------------------------------------


def replicas(work: Path) -> dict[str, Any]:
    """What one and two replicas add to the memory of the node, MB."""
    first = Replica(work)
    alone = first.added()
    second = Replica(work)
    together = first.added() + second.added()
    private = second.private()
    for replica in (first, second):
        replica.end()
    return {"first_mb": alone, "both_mb": together, "second_mb": together - alone, "second_private_mb": private}


class Replica:
    """A process that opens the index, searches and waits."""

    def __init__(self, work: Path) -> None:
        command = [sys.executable, __file__, "--replica", str(work)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._before = json.loads(self._process.stdout.readline())
        json.loads(self._process.stdout.readline())  # open and warm

    def _now(self, name: str) -> float:
        return rollup(self._process.pid)[name] - self._before[name]

    def added(self) -> float:
        """Its share of the node's memory since it opened nothing, MB."""
        return self._now("Pss")

    def private(self) -> float:
        """What it shares with no other process, MB."""
        return self._now("Private_Clean") + self._now("Private_Dirty")

    def end(self) -> None:
        """Let it go."""
        self._process.communicate("\n")


def rollup(pid: int | str) -> dict[str, float]:
    """/proc/<pid>/smaps_rollup, MB."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
    return {words[0].rstrip(":"): int(words[1]) / 1000 for words in lines}


def be_replica(work: Path) -> None:
    """The process of a `Replica`."""
    queries = Clustered().queries(300)
    np.dot(queries, queries.T)  # what numpy starts once
    print(json.dumps(rollup("self")), flush=True)
    index = AudioIndex.open(work / "index", "v000001")
    for query in queries:
        assert len(index.search(query, K).items[0]) == K
    print(json.dumps(rollup("self")), flush=True)
    sys.stdin.readline()


# --- shards -----------------------------------------------------------------------------------------------------------


def shards(work: Path) -> dict[str, Any]:
    """CPU milliseconds a query of one index and of the same release divided among eight shards."""
    release = releases.resolve(work / "index", "v000001")
    scanners = [open_shard(release, number, SHARDS) for number in range(SHARDS)]
    asks = {f"shard-{number}": functools.partial(answer, scanner) for number, scanner in enumerate(scanners)}
    spent: dict[str, list[float]] = {"one": [], "many": []}
    same, queries = 0, Clustered().queries(300)
    with ThreadPoolExecutor(SHARDS) as pool, ann.threads(1):
        one = AudioIndex.open(work / "index", "v000001")
        many = AudioIndex.open(work / "index", "v000001", divided=Divided(asks, pool))
        for query in queries:
            found = []
            for name, index in (("one", one), ("many", many)):
                began = time.process_time()
                found.append(index.search(query, K).ids)
                spent[name].append(time.process_time() - began)
            same += int(np.array_equal(found[0], found[1]))
    milliseconds = {name: float(np.median(times[20:]) * 1e3) for name, times in spent.items()}
    return milliseconds | {"same_answers": same / len(queries)}


# --- the driver -------------------------------------------------------------------------------------------------------


def driver(rows: int) -> dict[str, Any]:
    """The peak memory of the driver over a build, in a process of its own."""
    command = [sys.executable, __file__, "--run-driver", str(rows)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def run_driver(rows: int) -> dict[str, Any]:
    """A build whose steps run in other processes."""
    with tempfile.TemporaryDirectory(prefix="audiomae-driver-") as folder:
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            pool.apply(write_small_set, (Path(folder) / "set", rows))
        before = memory_bytes("RssAnon") / 1e6
        embeddings = EmbeddingSet.open(str(Path(folder) / "set"))
        with context.Pool(os.cpu_count() or 1, maxtasksperchild=8) as pool, Spent() as spent:

            def elsewhere(label: str, step: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
                return pool.starmap(step, calls, chunksize=1)

            build.run_here = elsewhere
            build_release(Path(folder) / "index", [embeddings], CONFIG.model_copy(update={"index": "Flat"}))
    peak = spent.facts["peak_mib"] * 2**20 / 1e6
    return {"rows": rows, "peak_mb": peak, "imports_mb": before, "wall_s": spent.facts["wall_s"]}


def write_small_set(directory: Path, rows: int, dim: int = 4, shard_rows: int = 100_000) -> None:
    """An embedding set of random vectors and ids."""
    settings = EmbedSettings(
        fingerprint="c" * 64, dim=dim, sample_rate=16000, mode="file", window_s=0.0, hop_s=0.0, vector_dtype="float16"
    )
    schema = embedding_schema(settings)
    names = [f"000000-{number:06d}" for number in range(-(-rows // shard_rows))]
    write_run(str(directory), {"fingerprint": "c" * 64, "dim": dim, "encoder": "none", "corpus_root": "/random"})
    plan = {"generation": 0, "settings": settings.model_dump(), "shards": [{"name": n} for n in names], "files": []}
    plans(str(directory)).create(0, plan)
    for number, name in enumerate(names):
        rng, count = np.random.default_rng(number), min(shard_rows, rows - number * shard_rows)
        columns = [
            pa.array(rng.integers(0, 2**63, count)),
            pa.array([f"{number:05d}/{row:06d}.wav" for row in range(count)]),
            pa.array(np.zeros(count)),
            pa.array(np.full(count, 5.0)),
            vectors_to_column(rng.standard_normal((count, dim)).astype(np.float16)),
        ]
        tables = ShardTables(pa.table(columns, schema=schema))
        origin = ShardOrigin(inputs=count, audio_s=0.0, fingerprint="c" * 64, manifest="m", precision="float32")
        commit_shard(str(directory), name, tables, origin)


# --- putting it together ----------------------------------------------------------------------------------------------


def main() -> None:
    """Print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, help="a folder as benchmarks/index_build.py left it")
    parser.add_argument("--driver", type=int, nargs="*", default=[], help="rows of driver builds; nothing else is done")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/index_updates.json"))
    parser.add_argument("--replica", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run-driver", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replica:
        be_replica(arguments.replica)
    elif arguments.run_driver:
        print(json.dumps(run_driver(arguments.run_driver)))
    else:
        write(arguments)


def write(arguments: argparse.Namespace) -> None:
    """All that was asked for, added to what the file holds from before."""
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.driver:
        result["driver"] = [driver(rows) for rows in arguments.driver]
    else:
        with tempfile.TemporaryDirectory(prefix="audiomae-updates-") as folder:
            work = arguments.work or Path(folder)
            result |= {"rows": arguments.rows, "load": os.getloadavg()[0], "changes": changes(work, arguments.rows)}
            result["replicas"] = replicas(work)
            result["shards"] = shards(work)
            result["row_store_mb"] = row_store(work / "index").rows.nbytes / 1e6
    result["bars"] = bars(result)
    arguments.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "bars"}, indent=1))
    for name, (value, holds) in result["bars"].items():
        print(f"{'holds      ' if holds else 'FALLS SHORT'} {name}: {value:.3f} (bar {BARS[name]})")


def bars(result: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    """Every bar that was measured: what was reached, and whether it holds."""
    values: dict[str, float] = {}
    if "changes" in result:
        full, more = result["changes"]["full"], result["changes"]["more"]
        values["delete ten ids, s"] = result["changes"]["delete"]["wall_s"]
        values["1% more rows, of a full build"] = more["cpu_s"] / full["cpu_s"]
        values["1% more rows, bytes written over the change"] = more["written_bytes"] / more["change_bytes"]
        values["second replica over the first"] = result["replicas"]["second_mb"] / result["replicas"]["first_mb"]
        values["CPU of eight shards over one index"] = result["shards"]["many"] / result["shards"]["one"]
    if "driver" in result:
        values["driver at the most rows, MB"] = max(entry["peak_mb"] for entry in result["driver"])
    return {name: (value, value <= BARS[name]) for name, value in values.items()}


if __name__ == "__main__":
    main()
