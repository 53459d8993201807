"""Training that reads its features from S3 through a cache a tenth of their size.

    python benchmarks/ingest.py                     # about 260 MB of features; a minute or two on 2 idle cores

An S3 protocol server on loopback holds a feature cache. Measured:

- `nodes`: two nodes (a process and a cache folder each) read one epoch: bytes fetched over the share of each, peak
  memory, bytes on disk, and seconds to the first batch;
- `killed`: a node that is SIGKILLed in mid-epoch and started again at the step it had reached gives batches of the
  same bytes as one that is not;
- `training`: the debug encoder trains an epoch, one worker: seconds to the first step, share of the time that it waits
  for data.
"""

import argparse
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

FRAMES, WINDOW_SHARDS = 100, 8
CACHE = "s3://ingest/features"


@contextmanager
def s3_server() -> Iterator[None]:
    """moto in a process of its own, with the AWS variables of this process and its children pointing at it."""
    from serve.proxy import free_ports

    (port,) = free_ports(1)
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(environment, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        from audiomae import s3

        s3.client().create_bucket(Bucket="ingest")
        yield
    finally:
        server.kill()
        server.wait()


def write_cache(shards: int, clips: int, bands: int) -> int:
    """A feature cache of random numbers on S3; its bytes."""
    from audiomae.artifacts.features import Segment, write_shard
    from audiomae.storage import list_sizes

    def extract(uri: str) -> list[Segment]:
        draw = np.random.default_rng(int(uri))
        return [Segment(0.0, 1.0, draw.random((FRAMES, bands), np.float32))]

    for shard in range(shards):
        write_shard(CACHE, shard, [f"{shard * clips + clip:08d}" for clip in range(clips)], extract)
    return sum(size for name, size in list_sizes(CACHE).items() if name.endswith(".npy"))


def node(arguments: argparse.Namespace) -> None:
    """One node's batches: a line for each with the digest of its bytes, then what it took."""
    from audiomae.artifacts.features import FeatureStore, read_clips
    from audiomae.artifacts.shard_cache import GIB, ShardCache
    from audiomae.training.data import Loader
    from audiomae.training.sampling import Sampler

    before, began, first_s = peak_mib(), time.perf_counter(), 0.0
    clips = read_clips(CACHE, arguments.shards)
    cache = ShardCache(CACHE, arguments.limit / GIB, Path(arguments.folder))
    store = FeatureStore(cache, clips["shard"], clips["first_frame"], clips["frames"])
    sampler = Sampler(np.arange(len(clips)), arguments.batch, 0, store.shard, WINDOW_SHARDS)
    loader = Loader(store, sampler, FRAMES, [FRAMES * 3 // 4], arguments.rank, 2)
    for batch in loader.batches(arguments.first, sampler.steps_per_epoch):
        first_s = first_s or time.perf_counter() - began
        digest = hashlib.sha256(batch.clips.tobytes() + batch.features.tobytes()).hexdigest()
        print(batch.step, digest, flush=True)
    on_disk = sum(path.stat().st_size for path in Path(arguments.folder).glob("*.npy"))
    facts = {"fetched": cache.fetched_bytes, "on_disk": on_disk, "first_batch_s": first_s}
    print(json.dumps({**facts, "rss_mib": peak_mib(), "rss_before_mib": before}), flush=True)


def run_node(
    arguments: argparse.Namespace, folder: Path, rank: int, limit: int, first: int = 0
) -> subprocess.Popen[str]:
    """Start a node at a step."""
    options = {"shards": arguments.shards, "batch": arguments.batch, "limit": limit, "folder": folder}
    options |= {"rank": rank, "first": first}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, __file__, "--node", *words], stdout=subprocess.PIPE, text=True)


def read_epoch(arguments: argparse.Namespace, place: Path, total: int, limit: int) -> tuple[dict[str, Any], list[str]]:
    """Two nodes side by side; what they took, and the digests of the first node's batches."""
    nodes = [run_node(arguments, place / f"node-{rank}", rank, limit) for rank in range(2)]
    lines = [each.communicate()[0].splitlines() for each in nodes]
    facts = [json.loads(each[-1]) for each in lines]
    found = {
        "fetched_over_share": max(each["fetched"] for each in facts) / (total / 2),
        "on_disk_over_limit": max(each["on_disk"] for each in facts) / limit,
        "first_batch_s": max(each["first_batch_s"] for each in facts),
        "rss_mib": max(each["rss_mib"] for each in facts),
        "rss_before_mib": max(each["rss_before_mib"] for each in facts),
    }
    return found, lines[0][:-1]


def kill_in_mid_epoch(arguments: argparse.Namespace, place: Path, limit: int) -> list[str]:
    """The first node's batches, killed at a third of the epoch and started again where it was."""
    steps = arguments.shards * arguments.clips // arguments.batch
    first = run_node(arguments, place / "killed", 0, limit)
    assert first.stdout is not None
    lines = [first.stdout.readline().strip() for _ in range(steps // 3)]
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = run_node(arguments, place / "killed", 0, limit, first=len(lines))
    return lines + second.communicate()[0].splitlines()[:-1]


def train(arguments: argparse.Namespace, limit: int) -> dict[str, Any]:
    """The debug recipe's encoder over the same cache, in this process."""
    import torch

    from audiomae.artifacts.features import read_clips
    from audiomae.artifacts.shard_cache import GIB
    from audiomae.config import load_config
    from audiomae.training.clips import build_items
    from audiomae.training.loop import TrainLoop
    from audiomae.training.recipe import Recipe
    from ray_jobs.configs import RECIPES

    began = time.perf_counter()
    sets = [f"batch_size={arguments.batch}", "epochs=1", f"data.shuffle_shards={WINDOW_SHARDS}"]
    sets += [f"data.cache_gib={limit / GIB}", "data.val_fraction=0"]
    config = load_config(Recipe, [RECIPES / "debug.yaml"], sets)
    clips = read_clips(CACHE, arguments.shards)
    listing = pa.table({"uri": clips["uri"], "size": [1] * len(clips), "content_id": ["x"] * len(clips)})
    loop = TrainLoop(config, build_items(clips, listing, config.data, 0), CACHE, torch.device("cpu"), Silent())
    first_s = started = waited_s = 0.0
    for step, _ in enumerate(loop.steps()):
        if step == 0:
            started, waited_s = time.perf_counter(), loop.meter.waited_s
            first_s = started - began
    share = (loop.meter.waited_s - waited_s) / (time.perf_counter() - started)
    return {"first_step_s": first_s, "data_wait_share": share, "steps": loop.meter.steps}


class Silent:
    """A host that keeps nothing."""

    def restore(self) -> None:
        return None

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        pass

    def progress(self, step: int, total: int, note: str) -> None:
        pass

    def history(self, records: Sequence[dict[str, Any]]) -> None:
        pass


def peak_mib() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a line of JSON for each part, write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=160)
    parser.add_argument("--clips", type=int, default=64, help="in each shard")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/ingest.json"))
    parser.add_argument("--node", action="store_true", help=argparse.SUPPRESS)
    for name in ("limit", "rank", "first"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.node:
        node(arguments)
        return
    from audiomae.model.features import FeatureConfig

    measured: dict[str, Any] = {}

    def note(name: str, found: object) -> None:
        measured[name] = found
        print(json.dumps({name: found}), flush=True)

    with s3_server(), tempfile.TemporaryDirectory(prefix="audiomae-ingest-") as folder:
        total = write_cache(arguments.shards, arguments.clips, FeatureConfig().n_mels)
        limit = total // 10
        note("hardware", {"cpus": os.cpu_count(), "load": os.getloadavg()[0]})
        note("features", {"mib": total >> 20, "cache_limit_mib": limit >> 20})
        found, whole = read_epoch(arguments, Path(folder), total, limit)
        note("nodes", found)
        same = kill_in_mid_epoch(arguments, Path(folder), limit) == whole
        note("killed", {"batches": len(whole), "same_bytes": same})
        os.environ["TMPDIR"] = tempfile.tempdir = f"{folder}/training"
        Path(tempfile.tempdir).mkdir()
        note("training", train(arguments, limit))
    arguments.out.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
