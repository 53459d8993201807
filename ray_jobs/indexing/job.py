"""The work of `ray_jobs/build_index.py`: rows and parts as Ray tasks, one index of them, measured and published."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audiomae import storage
from audiomae.artifacts import releases as release
from audiomae.artifacts.embeddings import EmbeddingSet
from audiomae.artifacts.releases import Release
from audiomae.cli import Progress
from audiomae.errors import IntegrityError, UserError
from audiomae.search import build
from audiomae.search import index as ann
from audiomae.search import tuning as recall
from audiomae.search.build_plan import Plan, make_plan
from audiomae.search.items import Items
from audiomae.search.layout import write_map
from audiomae.search.spec import BuildOptions
from ray_jobs._cluster import Request, notice_of_waiting
from ray_jobs._ray import connect, in_cluster
from ray_jobs._shared_disk import check_shared_disk
from ray_jobs.configs import BuildConfig


def run(config: BuildConfig) -> Release:
    """See `ray_jobs.build_index.build`."""
    started = time.monotonic()
    if in_cluster():
        connect()
        check_shared_disk({"--embeddings": next(iter(config.embeddings), None)}, {"--out": config.out})
    base = release.resolve_or_none(config.out)
    sets = [_open_set(uri) for uri in config.embeddings]
    fingerprint, dim = _check_same_encoder(sets, base)
    work = make_plan(sets, base, _read_delete_ids(config.delete_ids), config)
    if work is None:
        assert base is not None
        print(f"nothing to do: {base.version} at {config.out} already holds all {base.info['rows']:,} clips")
        return base
    print(f"{work.reason}: {work.num_new:,} rows to index in {len(work.parts)} parts", file=sys.stderr)
    parts_dir = str(storage.to_path(config.out) / "parts")
    with release.staging(config.out) as staging:
        _save_encoder(config.encoder, sets, base, fingerprint, staging / "encoder")
        connect()
        with notice_of_waiting(Request({"CPU": 1}), len(work.parts)):
            trained = _make_parts(work, parts_dir, config)
        build.assemble(work, parts_dir, trained, dim, staging)
        live, found = _measure(work, staging, config)
        draw_map(staging, live)
        facts = {
            "fingerprint": fingerprint,
            "dim": dim,
            "rows": int(np.count_nonzero(live)),
            "rows_deleted": int(np.count_nonzero(~live)),
            "corpora": work.corpora,
            "spec": found.spec.model_dump(),
            "recall": {"k": found.k, "value": found.value, "queries": found.queries, "asked": config.recall},
            "parts": [{"key": part.key, "rows": part.num_rows} for part in work.parts],
            "config": config.model_dump(include=set(BuildOptions.model_fields)),
        }
        published = release.publish(config.out, staging, facts, base)
    build.tidy(parts_dir, work, config.keep_parts)
    _print_summary(published, config.out, time.monotonic() - started)
    return published


def _open_set(uri: str) -> EmbeddingSet:
    try:
        embeddings = EmbeddingSet.open(uri)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    if not embeddings.complete:
        done, planned = len(embeddings.receipts), len(embeddings.plan["shards"])
        print(f"{uri}: only {done} of {planned} shards are embedded yet; indexing those", file=sys.stderr)
    return embeddings


def _check_same_encoder(sets: Sequence[EmbeddingSet], base: Release | None) -> tuple[str, int]:
    """The one fingerprint and dimension of everything that is to be indexed together."""
    known = [(str(s.path), s.fingerprint, s.dim) for s in sets]
    if base:
        known.insert(0, (f"{base.path} (in force)", base.fingerprint, int(base.info["dim"])))
    if not known:
        raise UserError("nothing to index: name at least one --embeddings DIR")
    for name, fingerprint, _ in known[1:]:
        if fingerprint != known[0][1]:
            raise IntegrityError(
                f"{name}: embedded by another encoder: fingerprint {fingerprint}, expected {known[0][1]} as in "
                f"{known[0][0]}; embed the corpus again with one encoder, or build into another --out"
            )
    return known[0][1], known[0][2]


def _read_delete_ids(uri: str | None) -> np.ndarray:
    if uri is None:
        return np.zeros(0, dtype=np.int64)
    try:
        lines = storage.read_bytes(uri).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--delete-ids {uri}: {error}; expected a text file with one clip id a line") from None
    ids = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                ids.append(int(text))
            except ValueError:
                raise UserError(f"--delete-ids {uri}, line {number}: expected a clip id, got {text!r}") from None
    return np.array(ids, dtype=np.int64)


def _save_encoder(
    given: str | None, sets: Sequence[EmbeddingSet], base: Release | None, fingerprint: str, target: Path
) -> None:
    if given is None and base is not None:
        storage.copy_tree(base.path / "encoder", target)
        return
    from audiomae.model.encoder import AudioEncoder

    uri = given or sets[0].encoder
    try:
        encoder = AudioEncoder.load(uri, device="cpu")
    except FileNotFoundError as error:
        raise UserError(f"--encoder {uri}: {error}") from None
    if encoder.fingerprint != fingerprint:
        raise IntegrityError(
            f"--encoder {uri}: fingerprint {encoder.fingerprint}, expected {fingerprint} as the embeddings; name the "
            "encoder that embedded them, or embed the corpus again with this one"
        )
    encoder.save(target)


def _make_parts(work: Plan, parts_dir: str, config: BuildConfig) -> str | None:
    """Read and index all parts as Ray tasks; return where the trained index lies (None: none is needed)."""
    _run_tasks("rows", build.write_rows, [(part, parts_dir) for part in work.parts])
    if work.spec.kind == "flat":
        return None
    if work.base:
        trained = str(work.base.path / ann.TRAINED_FILE)
    else:
        print(f"training {work.spec.factory}", file=sys.stderr)
        trained = _run_train(work, parts_dir, config)
    _run_tasks("index", build.index_part, [(part, parts_dir, trained) for part in work.parts])
    return trained


def _run_train(work: Plan, parts_dir: str, config: BuildConfig) -> str:
    import ray

    # one Ray CPU, so that it starts beside anything; k-means uses all cores of its machine for the moment it takes
    return str(_get(ray.remote(build.train).remote(work.spec, work.parts, parts_dir, config.seed)))


def _run_tasks(label: str, function: Callable[..., dict[str, Any]], calls: Sequence[tuple[Any, ...]]) -> None:
    import ray

    if not calls:
        return
    task = ray.remote(function).options(num_cpus=1)
    waiting = [task.remote(*call) for call in calls]
    with Progress(label, sum(call[0].num_rows for call in calls), "rows") as progress:
        while waiting:
            done, waiting = ray.wait(waiting)
            progress.update(_get(done[0])["rows"])


def _get(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (UserError, IntegrityError)):
            raise error.cause from None
        raise


def _measure(work: Plan, staging: Path, config: BuildConfig) -> tuple[np.ndarray, recall.Recall]:
    """Which rows are found, bool[N], and the tuned search settings with the recall they reach."""
    ids = np.load(staging / ann.IDS_FILE)
    live = np.ones(len(ids), dtype=bool)
    live[work.deleted] = False
    own = recall.choose_queries(ids, live, build.held_out(ids), config.queries, config.seed)
    found = recall.tune(ann.Searcher(staging, work.spec), live, own, config.recall)
    if found.value < config.recall:
        raise UserError(
            f"recall@{found.k} is {found.value:.4f} on {found.queries} held-out queries at best ({found.spec.factory}, "
            f"nprobe {found.spec.nprobe}), --recall asks for {config.recall}; nothing was published: raise "
            "--memory-gib, or lower --recall"
        )
    return live, found


def draw_map(staging: Path, live: np.ndarray) -> None:
    """Place the sounds of a release in the making on its map; `live` bool[N] are the rows that can be found."""
    items = Items(staging)
    ids = np.load(staging / ann.IDS_FILE)
    vectors = np.load(staging / ann.VECTORS_FILE, mmap_mode="r")
    write_map(staging, ids, items.groups("uri"), vectors, live)


def _print_summary(published: Release, out: str, seconds: float) -> None:
    info = published.info
    spec, measured = info["spec"], info["recall"]
    kind = spec["factory"] + f", nprobe {spec['nprobe']}" if spec["factory"] else "exhaustive scan"
    print(
        f"published {published.path}: {info['rows']:,} clips ({info['rows_deleted']:,} deleted), {kind}, "
        f"recall@{measured['k']} {measured['value']:.4f} on {measured['queries']} queries, {seconds:.1f} s\n"
        f"serve it:  serve run serve.app:build index={out}"
    )
