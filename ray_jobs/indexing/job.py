"""The work of `ray_jobs/build_index.py`: the steps of a build as Ray tasks, and what is said about it."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audiomae import storage
from audiomae.artifacts import releases
from audiomae.artifacts.embeddings import EmbeddingSet, joined_precision
from audiomae.artifacts.releases import Release
from audiomae.cli import Progress
from audiomae.errors import AudioMAEError, IntegrityError, UserError
from audiomae.search import index as ann
from audiomae.search.build import run_build, run_here
from audiomae.search.build_plan import make_plan
from audiomae.search.plan import Part, Request
from ray_jobs._cluster import NodeRequest, notice_of_waiting
from ray_jobs._ray import connect, in_cluster
from ray_jobs._shared_disk import check_shared_disk
from ray_jobs.configs import BuildConfig
from ray_jobs.indexing.report import write_report

MAX_ID = 2**63 - 1
TASK_RETRIES = 3
ROWS_BUILT_HERE = 20_000  # are indexed in this process before a local Ray would have started
GPU_STEPS = ("train", "lists")  # k-means and finding the nearest centroids, by `faiss` where it has a GPU


def run(config: BuildConfig) -> Release:
    """See `ray_jobs.build_index.build`."""
    started = time.monotonic()
    if in_cluster():
        connect()
        check_shared_disk({"--embeddings": next(iter(config.embeddings), None)}, {"--out": config.out})
    base = releases.resolve_or_none(config.out)
    sets = [_open_set(uri) for uri in config.embeddings]
    fingerprint, dim = _check_same_encoder(sets, base)
    precision = _check_precision(sets, base, config.allow_mixed_precision)
    request = Request(
        read_ids(config.delete_ids, "--delete-ids"), read_ids(config.undelete, "--undelete"), tuple(config.remove)
    )
    work = make_plan(sets, base, request, config)
    for note in work.notes if work else ():
        print(note, file=sys.stderr)
    if work is None:
        assert base is not None
        removed = releases.gc(config.out, config.keep_versions)
        left = f" ({len(removed)} left-overs of other builds removed)" if removed else ""
        print(f"nothing to do: {base.version} at {config.out} already holds all {base.info['rows']:,} rows{left}")
        return base
    print(
        f"{work.reason}: {work.num_new:,} rows to index in {len(work.parts)} parts; segments: "
        f"{len(work.made)} to write, {len(work.kept)} stay, {len(work.deleted):,} deleted rows in them",
        file=sys.stderr,
    )
    facts = {"fingerprint": fingerprint, "dim": dim, "precision": precision}

    def save_encoder(target: Path) -> None:
        _save_encoder(config.encoder, sets, base, fingerprint, target)

    here = sum(segment.num_rows for segment in work.made) <= ROWS_BUILT_HERE and not in_cluster()
    published = run_build(work, config.out, config, run_here if here else run_tasks, save_encoder, facts)
    print_summary(published, config.out, time.monotonic() - started)
    if report := write_report(published, config.out):
        print(f"what was tried:  {report}")
    return published


def run_tasks(label: str, step: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Run a step of the build as Ray tasks on any node (`resources`); results in the order of the calls."""
    if not calls:
        return []
    import ray

    connect()
    request = NodeRequest(resources(label, ray.cluster_resources(), ann.can_use_gpus()))
    task = ray.remote(step).options(**request.options, max_retries=TASK_RETRIES)
    references = [task.remote(*call) for call in calls]
    waiting, sizes = list(references), dict(zip(references, map(_size, calls), strict=True))
    try:
        unit = "rows" if isinstance(calls[0][0], Part) else "tasks"
        with (
            notice_of_waiting(request, len(calls)),
            Progress(label, sum(sizes.values()), unit) as progress,
        ):
            while waiting:
                done, waiting = ray.wait(waiting)
                _get(done[0])
                progress.update(sizes[done[0]])
        return [_get(reference) for reference in references]
    except BaseException:
        for reference in waiting:
            ray.cancel(reference)
        raise


def resources(label: str, cluster: Mapping[str, float], gpu_build: bool) -> dict[str, float]:
    """What one call of a step asks of Ray: a CPU, and a GPU where the cluster has one that FAISS can use for it.

    Ray hides the GPUs from tasks that ask for none.
    """
    on_gpu = label in GPU_STEPS and gpu_build and cluster.get("GPU", 0) >= 1
    return {"CPU": 1.0} | ({"GPU": 1.0} if on_gpu else {})


def _size(call: tuple[Any, ...]) -> int:
    return call[0].num_rows if isinstance(call[0], Part) else 1


def _get(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (AudioMAEError, OSError)):
            raise error.cause from None
        raise


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


def _check_precision(sets: Sequence[EmbeddingSet], base: Release | None, mixed: bool) -> str | None:
    """The precision of all vectors together, as release.json records it; None where no set says it."""
    known = [(str(s.path), s.precision) for s in sets]
    if base:
        known.insert(0, (f"{base.path} (in force)", base.info.get("precision")))
    joined = joined_precision(name for _, names in known if names for name in names.split("+"))
    if joined and "+" in joined and not mixed:
        said = ", ".join(f"{path}: {names or 'not recorded'}" for path, names in known)
        raise UserError(
            f"the vectors were computed in different precisions ({said}): embed the corpus again in one of them, build "
            "into another --out, or allow it with --allow-mixed-precision"
        )
    return joined


def read_ids(uri: str | None, flag: str) -> np.ndarray:
    """The clip ids in a text file, one a line, `#` begins a comment: int64[N].

    Raises:
        UserError: no such file, or a line that is not an id, with its number.
    """
    if uri is None:
        return np.zeros(0, dtype=np.int64)
    try:
        lines = storage.read_bytes(uri).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {uri}: {error}; expected a text file with one clip id a line") from None
    ids = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not text.isascii() or not text.lstrip("-").isdigit():
            raise UserError(f"{flag} {uri}, line {number}: expected a clip id, got {text[:80]!r}")
        if len(text) > 20 or not 0 <= int(text) <= MAX_ID:
            raise UserError(f"{flag} {uri}, line {number}: {text[:80]} is no clip id: expected 0 to {MAX_ID}")
        ids.append(int(text))
    return np.unique(np.array(ids, dtype=np.int64))


def _save_encoder(
    given: str | None, sets: Sequence[EmbeddingSet], base: Release | None, fingerprint: str, target: Path
) -> None:
    if base is not None and (given is None or _recorded_fingerprint(given) == base.fingerprint):
        _link_tree(base, target)
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


def _recorded_fingerprint(uri: str) -> str | None:
    """What a saved encoder says of itself; the release's own copy is what is used then."""
    try:
        return str(storage.read_json(storage.to_path(uri) / "config.json")["fingerprint"])
    except (OSError, IntegrityError, KeyError, TypeError):
        return None


def _link_tree(base: Release, target: Path) -> None:
    """The encoder of the release in force, checked; on one disk its files are linked rather than copied."""
    releases.verify(base, lambda name: name.startswith("encoder/"))
    for name, item in storage.walk_files(base.path / "encoder"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(item.path, target / name)
        except OSError:
            storage.copy_file(item, target / name)


def print_summary(published: Release, out: str, seconds: float) -> None:
    """What was built, on stdout."""
    info = published.info
    spec, measured = info["spec"], info["recall"]
    settings = {"ivf": f", nprobe {spec['nprobe']}, refine {spec['refine']}", "hnsw": f", effort {spec['effort']}"}
    kind = spec["factory"] + settings[spec["kind"]] if spec["factory"] else "exhaustive scan"
    lines = [
        f"published {published.path}: {info['rows']:,} rows ({info['rows_deleted']:,} deleted) in "
        f"{len(info['segments'])} segments, {kind}, recall@{measured['k']} {measured['value']:.4f} on "
        f"{measured['queries']} queries, {seconds:.1f} s"
    ]
    if measured.get("filtered"):
        worst = min(measured["filtered"], key=lambda row: row["mean"])
        lines.append(
            f"filtered: recall {worst['mean']:.3f} at worst ({worst['kind']} filter that leaves {worst['share']:.2%}, "
            f"queries {worst['queries']})"
        )
    print("\n".join([*lines, f"serve it:  serve run serve.app:build index={out}"]))
