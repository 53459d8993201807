"""The control plane of embedding at 10^5, 10^6, 10^7 files: time, memory of the driver, storage requests.

    python benchmarks/scale.py --files 100000 1000000 10000000
    python benchmarks/scale.py --shards 10000          # null shards through the engine
    python benchmarks/scale.py --clips 1000000         # listing, split and captions of training

Planning: a Parquet listing (uri, size, content_id, label; in random order with `--shuffled`) is listed and planned by a
process of its own, which gives its time, its peak memory and the files it wrote, each of which is one request on S3. A
second process resumes: it reads the plan and lists the commits, of which every second shard has one, and then reads
all receipts, which were copied into segments.

Engine: shards of one file each that name files which are not there go through the job's own Ray Data pipeline and are
committed with their failures, by an encoder that has nothing to do. Rate from the first to the last commit; then the
set is opened, once with its receipts copied into segments and once without.

Training: clips of 10 s, one of each file, 500 labels, in shards of 512, go through the key of their cache, the split,
their table and what a worker makes of it, in a process of its own.
"""

import argparse
import json
import logging
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae.artifacts.embeddings import committed_shards, compact_receipts, read_receipts, receipt_path
from audiomae.artifacts.receipt_segments import is_segment
from audiomae.artifacts.receipts import FileEntry, Receipt
from audiomae.artifacts.tables import EmbedSettings
from audiomae.corpus.manifest import list_corpus
from audiomae.embedding.listing import Listing
from audiomae.embedding.plan import PlanRequest, load_plan, new_plan
from audiomae.storage import list_names

SETTINGS = EmbedSettings(fingerprint="f" * 64, dim=4, sample_rate=16_000, mode="windows", window_s=5, hop_s=5)
CHUNK = 1 << 18


def no_probe(uris: list[str]) -> list[float | None]:
    """No file here is long."""
    return [None] * len(uris)


def write_listing(path: Path, files: int, shuffled: bool) -> None:
    """`files` rows as a crawler would leave them; 10 s Ogg clips by their sizes."""
    rng = np.random.default_rng(0)
    numbers = rng.permutation(files) if shuffled else np.arange(files)
    schema = pa.schema({"uri": pa.string(), "size": pa.int64(), "content_id": pa.string(), "label": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, files, CHUNK):
            some = numbers[start : start + CHUNK]
            uris = [f"s3://bucket/corpus/{number // 10_000:06d}/{number:010d}.ogg" for number in some]
            etags = [f"{number * 2654435761 % 2**64:032x}" for number in some.tolist()]
            labels = np.array([f"class-{number:03d}" for number in range(500)])[some % 500]
            sizes = rng.integers(100_000, 180_000, len(some))
            writer.write_table(pa.table([uris, sizes, etags, labels], schema=schema))


def write_receipts(out: Path, shards: list[str]) -> None:
    """Receipts as workers leave them, of shards that were not embedded."""
    (out / "commits").mkdir(parents=True)
    counts = {"inputs": 164, "rows": 328, "failed": 0, "damaged": 0, "silent": 0, "audio_s": 1640.0}
    for shard in shards:
        files = {f"embeddings/{shard}-{'a' * 12}.parquet": FileEntry("f" * 64, 500_000)}
        facts = {**counts, "shard": shard, "attempt": "a" * 12, "fingerprint": "f" * 64, "manifest": "m" * 64}
        receipt = Receipt(files, {**facts, "precision": "float32"})
        Path(receipt_path(str(out), shard)).write_bytes(receipt.encode())


def plan(listing: str, out: str) -> dict[str, Any]:
    """List and plan; what it took."""
    began = time.perf_counter()
    corpus = list_corpus(listing)
    listed = Listing(corpus.batches())
    gathered = time.perf_counter()
    made = new_plan(out, listed, SETTINGS, no_probe, PlanRequest("null", listing, corpus.root))
    ended = time.perf_counter()
    return {
        "list_s": gathered - began,
        "plan_s": ended - gathered,
        "cpu_s": time.process_time(),
        "rss_mib": peak_mib(),
        "files": made.num_items,
        "shards": len(made.shards),
        "requests": len(made.files) + 2,  # and the plan, created and read back
    }


def resume(listing: str, out: str) -> dict[str, Any]:
    """Read the plan, find what is committed."""
    began = time.perf_counter()
    made = load_plan(out)
    assert made is not None and listing
    committed = committed_shards(out)
    pending = [entry for entry in made.shards if entry.name not in committed]
    requests = 2 + math.ceil(len(committed) / 1000)  # list the plans, read one, list the commits
    resumed = time.perf_counter() - began
    return {
        "resume_s": resumed,
        "receipts_s": seconds_of(lambda: read_receipts(out, sorted(committed))),
        "rss_mib": peak_mib(),
        "pending": len(pending),
        "requests": requests,
    }


def training(clips: str, _: str) -> dict[str, Any]:
    """What train.py's driver and one of its workers do with the corpus, features apart."""
    from audiomae.artifacts.features import cache_key
    from audiomae.training.clips import build_items, numbered
    from audiomae.training.recipe import DataConfig
    from audiomae.training.sampling import Sampler
    from audiomae.training.split import cautions
    from ray_jobs.training.feature_cache import shard_starts

    count = int(clips)
    numbers = np.arange(count)
    uris = pa.chunked_array(
        [
            [f"corpus/{n // 10_000:06d}/{n:010d}.ogg" for n in part]
            for part in np.array_split(numbers, count // CHUNK + 1)
        ]
    )
    label = pa.array([f"class-{number:03d}" for number in range(500)]).take(pa.array(numbers % 500))
    listing = pa.table({"uri": uris, "size": np.full(count, 140_000), "content_id": uris, "label": label})
    columns = {"uri": uris, "start_s": np.zeros(count), "end_s": np.full(count, 10.0), "frames": np.full(count, 1000)}
    columns |= {"first_frame": numbers % 512 * 1000, "error": pa.nulls(count, pa.string())}
    table = pa.table({**columns, "shard": (numbers // 512).astype(np.int32)})
    before, began = peak_mib(), time.perf_counter()
    cache_key(listing, {})
    shard_starts(listing["size"].to_numpy(), 10.0)
    items = build_items(table, listing, DataConfig(), seed=0)
    cautions(items, 1000)
    driver_s, driver_mib = time.perf_counter() - began, peak_mib()
    held_out = items["validation"].to_numpy()
    for name in ("label", "caption"):
        numbered(items[name])
    Sampler(np.flatnonzero(~held_out), 256, 0, items["shard"].to_numpy()).global_batch(0)
    return {
        "clips": count,
        "driver_s": driver_s,
        "inputs_mib": before,
        "driver_bytes_per_clip": (driver_mib - before) * 2**20 / count,
        "with_worker_s": time.perf_counter() - began,
        "cpu_s": time.process_time(),
        "rss_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds_of(call: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_process(kind: str, listing: object, out: object) -> dict[str, Any]:
    """`plan`, `resume` or `training` in a process of its own."""
    command = [sys.executable, __file__, "--run", kind, str(listing), str(out)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def measure(files: int, shuffled: bool) -> dict[str, Any]:
    """One size."""
    with tempfile.TemporaryDirectory(prefix="audiomae-scale-") as folder:
        listing, out = Path(folder) / "list.parquet", Path(folder) / "out"
        write_listing(listing, files, shuffled)
        planned = in_process("plan", listing, out)
        made = load_plan(str(out))
        assert made is not None
        write_receipts(out, [entry.name for entry in made.shards[::2]])
        compact_receipts(str(out))
        resumed = in_process("resume", listing, out)
    seconds = planned["list_s"] + planned["plan_s"]
    requests = planned["requests"] + resumed["requests"]
    return {
        "files": files,
        "shards": planned["shards"],
        "list_s": planned["list_s"],
        "plan_s": planned["plan_s"],
        "cpu_s": planned["cpu_s"],
        "files_per_s": files / seconds,
        "rss_mib": planned["rss_mib"],
        "resume_s": resumed["resume_s"],
        "receipts_s": resumed["receipts_s"],
        "resume_rss_mib": resumed["rss_mib"],
        "requests_per_1000": 1000 * requests / files,
    }


def engine(shards: int) -> dict[str, Any]:
    """Null shards through the pipeline of the job."""
    import ray

    from audiomae.embedding.decoding import EmbedJob
    from audiomae.model.audiomae import AudioMAEConfig
    from audiomae.model.encoder import AudioEncoder, EncoderConfig
    from ray_jobs.configs import EmbedConfig
    from ray_jobs.embed.execution import run_passes
    from ray_jobs.embed.topology import choose_topology

    with tempfile.TemporaryDirectory(prefix="audiomae-scale-") as folder:
        encoder = AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig.model_validate({"size": "debug"})))
        encoder.save(Path(folder) / "encoder")
        settings = SETTINGS.model_copy(update={"fingerprint": encoder.fingerprint, "dim": encoder.dim})
        table = pa.table(
            {
                "uri": [f"{number:08d}.wav" for number in range(shards)],
                "size": pa.array([0] * shards, pa.int64()),
                "content_id": ["x"] * shards,
            }
        )
        out = f"{folder}/out"
        made = new_plan(out, Listing([table]), settings, no_probe, PlanRequest("e", "c", folder, shard_cost_s=1.0))
        config = EmbedConfig(encoder=f"{folder}/encoder", corpus=folder, out=out)
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
        )
        job = EmbedJob(out=out, encoder=config.encoder, root=folder, settings=settings, manifest=made.manifest_hash)
        began = time.perf_counter()
        reports = run_passes(job, made.shards, choose_topology(config, len(made.shards)))
        ended = time.perf_counter()
        names = [entry.name for entry in made.shards]
        opened_s = seconds_of(lambda: read_receipts(out, names))
        for name in list_names(f"{out}/commits"):
            if is_segment(name):
                Path(out, "commits", name).unlink()
        alone_s = seconds_of(lambda: read_receipts(out, names))
        first, last = (function(report["ended"] for report in reports) for function in (min, max))
        committed = len(committed_shards(out))
        ray.shutdown()
    return {
        "shards": len(made.shards),
        "committed": committed,
        "engine_s": ended - began,
        "shards_per_s": committed / (last - first),
        "receipts_s": opened_s,
        "receipts_one_by_one_s": alone_s,
        "driver_rss_mib": peak_mib(),
    }


def main() -> None:
    """Print a line and JSON for each size, and the growth exponent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="*", default=[])
    parser.add_argument("--shuffled", action="store_true", help="the listing is in random order")
    parser.add_argument("--shards", type=int, help="null shards through the engine")
    parser.add_argument("--clips", type=int, nargs="*", default=[], help="clips of a training")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        kind, listing, out = arguments.run
        print(json.dumps({"plan": plan, "resume": resume, "training": training}[kind](listing, out)))
        return
    rows = []
    for files in arguments.files:
        rows.append(measure(files, arguments.shuffled))
        print(json.dumps(rows[-1]), flush=True)
    if len(rows) > 1:
        spent = [row["list_s"] + row["plan_s"] for row in rows]
        growth = math.log(spent[-1] / spent[0]) / math.log(rows[-1]["files"] / rows[0]["files"])
        print(f"growth exponent {growth:.3f}")
    for clips in arguments.clips:
        print(json.dumps(in_process("training", clips, "")), flush=True)
    if arguments.shards:
        print(json.dumps(engine(arguments.shards)))


if __name__ == "__main__":
    main()
