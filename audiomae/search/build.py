"""Carrying out a build plan: rows, a trained quantiser, lists, segments, recall; then a release over all of it.

Every step is a plain function of where things lie, writes a piece of its own (finished when its receipt is there) and
can run on any node; `run_build` puts them in order and hands them to a runner, which is Ray's in
`ray_jobs/build_index.py`. What a build makes lies under names that begin with the history entry it started from and
end in a hash of what decides their content: an interrupted build finds what it had finished, and builds of different
work never meet.

    write_rows    rows of some shards -> a part: vectors, ids, items        (many at once)
    train         a sample of all rows -> a quantiser
    assign_rows   the list of every row of a part or an older segment       (many at once)
    make_segment  parts and rows of older segments, as a stream -> a segment
    measure       recall of held-out queries, search settings               (exact answers: many at once)
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from audiomae import storage
from audiomae.artifacts import receipts, releases
from audiomae.artifacts.embeddings import read_receipt, read_shard
from audiomae.artifacts.releases import Release
from audiomae.artifacts.tables import column_to_vectors
from audiomae.errors import IntegrityError, ReleaseConflictError, UserError
from audiomae.search import index as ann
from audiomae.search import segments
from audiomae.search import tuning as recall
from audiomae.search.build_plan import BuildPlan, OldRows, Part, SegmentPlan, Slice
from audiomae.search.indexed import BLOCKED_FILE, DELETED_FILE
from audiomae.search.items import ItemsTable, ItemsWriter
from audiomae.search.layout import MAP_FILE, write_map
from audiomae.search.segments import Source
from audiomae.search.spec import BuildOptions, IndexSpec

HELD_OUT = 64  # one id in so many is never trained on: the queries that recall is measured with
ASSIGN_ROWS = 250_000
SMALL_CHANGE = 0.05  # share of new rows up to which the settings in force are checked rather than tuned again
QUICK_QUERIES = 100


class Runner(Protocol):
    """Runs one step for many arguments; results in their order."""

    def __call__(self, label: str, step: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]: ...


def run_here(label: str, step: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """A runner without processes."""
    return [step(*call) for call in calls]


@dataclass(frozen=True)
class Place:
    """Where a build works.

    Attributes:
        index: INDEX, local or s3://.
        prefix: what all names of the build begin with.
        base: the version directory of the release that is extended, for one of an older form; else empty.
    """

    index: str
    prefix: str
    base: str = ""

    def part(self, part: Part) -> str:
        """The piece that a part is."""
        return f"parts/{self.prefix}-{part.key}"

    def segment(self, plan: SegmentPlan, spec: IndexSpec, quantiser: str) -> str:
        """The piece that a segment is."""
        facts = [plan.key, spec.kind, spec.factory, quantiser.rpartition("-")[2]]
        return f"segments/{self.prefix}-{storage.sha256_bytes(storage.encode_json(facts))[:16]}"

    def path(self, name: str) -> UPath:
        """Where a piece lies; that of a release of an older form is the version itself."""
        return storage.to_path(self.index) / name if name else storage.to_path(self.base)


def run_build(
    work: BuildPlan,
    index_dir: str,
    config: BuildOptions,
    run: Runner,
    save_encoder: Callable[[Path], None],
    facts: dict[str, Any],
) -> Release:
    """Carry out a plan and put the new release in force.

    Args:
        work: the plan.
        index_dir: INDEX.
        config: the build settings.
        run: what runs the steps.
        save_encoder: puts the encoder into a directory.
        facts: fingerprint, dim and what else release.json should say.

    Raises:
        UserError: the recall asked for is not reached. ReleaseConflictError: another build published meanwhile.
    """
    prefix = f"{releases.sequence_of(work.base):06d}"
    place = Place(str(storage.to_path(index_dir)), prefix, str(work.base.path) if work.base else "")
    try:
        published = _build(work, place, config, run, save_encoder, facts)
    except (OSError, IntegrityError, RuntimeError) as error:
        if _is_overtaken(index_dir, work.base) and not isinstance(error, ReleaseConflictError):
            raise ReleaseConflictError(
                f"{index_dir}: another version was put in force while this one was made; run the same command again "
                "to build on the newer one"
            ) from error
        raise
    finally:
        if _is_overtaken(index_dir, work.base):  # by us, or by another build: what was made on the way is garbage
            releases.gc(index_dir, config.keep_versions)
    return published


def _is_overtaken(index_dir: str, base: Release | None) -> bool:
    return max(releases.history(index_dir).numbers(), default=0) > releases.sequence_of(base)


def _build(
    work: BuildPlan,
    place: Place,
    config: BuildOptions,
    run: Runner,
    save_encoder: Callable[[Path], None],
    facts: dict[str, Any],
) -> Release:
    with releases.staging(place.index, work.base) as staging:
        save_encoder(staging / "encoder")  # first, as it is refused when it does not belong to the embeddings
        run("rows", write_rows, [(part, place) for part in work.parts])
        quantiser = _quantiser(work, place, config, run)
        if work.spec.kind == "ivf":
            run("lists", assign_rows, _to_assign(work, place, quantiser))
        run("segments", make_segment, [(plan, work.spec, place, quantiser, facts["dim"]) for plan in work.made])
        names = [*work.kept, *(place.segment(plan, work.spec, quantiser) for plan in work.made)]
        written = [_receipt_of(place, name).facts for name in names]
        segments.unify([segments.read_schema(segment) for segment in written])
        rows = [segment["rows"] for segment in written]
        spec, measured = _measure(work, place, config, run, (names, rows, quantiser))
        if config.map:
            (staging / MAP_FILE).write_bytes(_map(work, place, run, (names, rows, quantiser)))
        np.save(staging / DELETED_FILE, work.deleted)
        np.save(staging / BLOCKED_FILE, work.blocked)
        info = facts | {
            "rows": sum(rows) - len(work.deleted),
            "rows_deleted": len(work.deleted),
            "corpora": work.corpora,
            "spec": spec.model_dump(),
            "segments": [{"name": name, "rows": count} for name, count in zip(names, rows, strict=True)],
            "quantiser": quantiser or None,
            "pieces": {name: _checksum_of(place, name) for name in [*names, *([quantiser] if quantiser else [])]},
            "recall": measured,
            "config": config.model_dump(include=set(BuildOptions.model_fields)),
        }
        return releases.publish(place.index, staging, info, work.base)


# --- rows -------------------------------------------------------------------------------------------------------------


def write_rows(part: Part, place: Place) -> dict[str, Any]:
    """Write the rows of a part, unless that was done before; return its facts."""

    def write(out: Path) -> dict[str, Any]:
        read = []
        start = 0
        for piece in part.slices:
            keep = part.keep[start : start + piece.stop - piece.start]
            start += piece.stop - piece.start
            read.append(_read_slice(piece, keep))
        table = pa.concat_tables([table for table, _ in read], promote_options="permissive")
        vectors = [rows for _, rows in read]
        ann.write_row_store(iter(vectors), vectors[0].shape[1], table.num_rows, out / ann.VECTORS_FILE)
        segments.write_ids(table.column("id").to_numpy(), out)
        with ItemsWriter(out, table.schema, parquet=False) as writer:
            writer.write(table)
        return {"rows": table.num_rows}

    return _piece(place, place.part(part), write)


def _read_slice(piece: Slice, keep: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """Items and float16 vectors of the kept rows."""
    directory = storage.to_path(piece.directory)
    receipt = read_receipt(directory, piece.shard)
    if receipt.sha256 != piece.sha256:
        raise IntegrityError(
            f"{directory}: shard {piece.shard} changed while it was indexed: SHA-256 {receipt.sha256}, expected "
            f"{piece.sha256}; run the same command again once the embedding job is done"
        )
    table = read_shard(directory, receipt).slice(piece.start, len(keep)).filter(pa.array(keep))
    rows = ann.to_rows(column_to_vectors(table.column("embedding")), f"{directory}, shard {piece.shard}")
    table = table.drop_columns(["embedding"])
    if "corpus" in table.column_names:  # the name is ours: what the manifest called so stays under another
        table = table.rename_columns({"corpus": "manifest_corpus"})
    corpus = pa.array(np.full(table.num_rows, piece.corpus, dtype=np.int32))
    return table.append_column("corpus", corpus), rows


# --- the quantiser and lists ------------------------------------------------------------------------------------------


def _quantiser(work: BuildPlan, place: Place, config: BuildOptions, run: Runner) -> str:
    """The name of the quantiser that the new segments go by; empty for other kinds of index."""
    if work.spec.kind != "ivf":
        return ""
    if not work.trains:
        assert work.base is not None
        return str(work.base.info["quantiser"])
    facts = [[plan.key for plan in work.made], work.spec.factory, config.seed]
    name = f"quantisers/{place.prefix}-{storage.sha256_bytes(storage.encode_json(facts))[:16]}"
    run("train", train, [(work.spec, work.made, place, name, config.seed)])
    return name


def train(spec: IndexSpec, made: Sequence[SegmentPlan], place: Place, name: str, seed: int) -> dict[str, Any]:
    """Train a quantiser on a sample of the rows, unless that was done before; return its facts."""

    def write(out: Path) -> dict[str, Any]:
        with ann.threads(os.cpu_count() or 1):
            vectors = sample(made, place, spec.nlist * ann.TRAIN_ROWS_PER_LIST, seed)
            ann.train(spec, vectors, out, seed)
        return {"rows": len(vectors)}

    return _piece(place, name, write)


def sample(made: Sequence[SegmentPlan], place: Place, count: int, seed: int) -> np.ndarray:
    """`count` rows (or all there are) to train on, float16[n, D]: drawn evenly, never a held-out id, in row order."""
    pieces: list[OldRows | Part] = []
    for plan in made:
        pieces += [*plan.old, *plan.parts]
    sizes = np.cumsum([0, *(piece.num_rows for piece in pieces)])
    rng = np.random.default_rng(seed)
    wanted = min(int(sizes[-1]), round(count * (1 + 2 / HELD_OUT)) + 8)
    chosen = np.sort(rng.choice(sizes[-1], size=wanted, replace=False))
    found = []
    for number, piece in enumerate(pieces):
        mine = chosen[(chosen >= sizes[number]) & (chosen < sizes[number + 1])] - sizes[number]
        with _local(place.path(_name_of(piece, place)), (ann.VECTORS_FILE, segments.IDS_FILE)) as folder:
            ids = np.load(folder / segments.IDS_FILE, mmap_mode="r")
            rows = mine if isinstance(piece, Part) else np.delete(np.arange(piece.rows), piece.dropped)[mine]
            rows = rows[~held_out(ids[rows])]
            found.append(ann.RowStore(folder / ann.VECTORS_FILE).rows[rows])
    return np.concatenate(found)[:count]


def held_out(ids: np.ndarray) -> np.ndarray:
    """Which ids are kept out of training, bool[N]: a fixed choice, as ids are hashes."""
    return ids % HELD_OUT == 0


def _to_assign(work: BuildPlan, place: Place, quantiser: str) -> list[tuple[Any, ...]]:
    """The calls of `assign_rows`: every part, and older segments when there is a new quantiser, piece by piece."""
    calls: list[tuple[Any, ...]] = []
    for plan in work.made:
        pieces: list[OldRows | Part] = [*(plan.old if work.trains else ()), *plan.parts]
        for piece in pieces:
            total = piece.num_rows if isinstance(piece, Part) else piece.rows
            for start in range(0, total, ASSIGN_ROWS):
                stop = min(start + ASSIGN_ROWS, total)
                calls.append((_name_of(piece, place), start, stop, place, quantiser))
    return calls


def assign_rows(name: str, start: int, stop: int, place: Place, quantiser: str) -> dict[str, Any]:
    """Find the lists of some rows of a part or segment, unless that was done before; return the facts."""

    def write(out: Path) -> dict[str, Any]:
        with (
            _local(place.path(name), (ann.VECTORS_FILE,)) as folder,
            _local(place.path(quantiser), (ann.TRAINED_FILE,)) as trained,
        ):
            rows = ann.RowStore(folder / ann.VECTORS_FILE).rows[start:stop]
            np.save(out / ann.ASSIGN_FILE, ann.assign(trained / ann.TRAINED_FILE, rows))
        return {"rows": stop - start}

    return _piece(place, _assigned_name(name, start, place, quantiser), write)


def _assigned_name(name: str, start: int, place: Place, quantiser: str) -> str:
    key = storage.sha256_bytes(storage.encode_json([name or place.base, quantiser, start]))[:16]
    return f"parts/{place.prefix}-lists-{key}"


def _name_of(piece: OldRows | Part, place: Place) -> str:
    return place.part(piece) if isinstance(piece, Part) else piece.name


# --- segments ---------------------------------------------------------------------------------------------------------


def make_segment(plan: SegmentPlan, spec: IndexSpec, place: Place, quantiser: str, dim: int) -> dict[str, Any]:
    """Write a segment, unless that was done before; return its facts."""

    def write(out: Path) -> dict[str, Any]:
        pieces: list[OldRows | Part] = [*plan.old, *plan.parts]
        with _all_local(place, pieces) as folders:
            sources = [
                Source(
                    folder,
                    piece.dropped if isinstance(piece, OldRows) else np.zeros(0, np.int64),
                    _find_lists(piece, place, quantiser),
                )
                for piece, folder in zip(pieces, folders, strict=True)
            ]
            if not quantiser:
                return segments.write_segment(sources, spec, None, out)
            with _local(place.path(quantiser), (ann.TRAINED_FILE,)) as trained:
                return segments.write_segment(sources, spec, trained / ann.TRAINED_FILE, out)

    return _piece(place, place.segment(plan, spec, quantiser), write)


def _find_lists(piece: OldRows | Part, place: Place, quantiser: str) -> np.ndarray | None:
    """The lists that `assign_rows` found; None for an older segment that has its own."""
    if not quantiser:
        return None
    name = _name_of(piece, place)
    total = piece.num_rows if isinstance(piece, Part) else piece.rows
    found = []
    for start in range(0, total, ASSIGN_ROWS):
        path = place.path(_assigned_name(name, start, place, quantiser))
        if releases.read_piece(place.index, _assigned_name(name, start, place, quantiser)) is None:
            return None
        with _local(path, (ann.ASSIGN_FILE,)) as folder:
            found.append(np.load(folder / ann.ASSIGN_FILE))
    return np.concatenate(found)


# --- recall -----------------------------------------------------------------------------------------------------------


def _measure(
    work: BuildPlan, place: Place, config: BuildOptions, run: Runner, made: tuple[list[str], list[int], str]
) -> tuple[IndexSpec, dict[str, Any]]:
    """Search settings and the recall they reach: tuned, checked after a small change, or those in force."""
    names, rows, quantiser = made
    base, new = work.base, sum(plan.num_rows for plan in work.made)
    total = sum(rows)
    before = dict(base.info["recall"]) if base else {}
    extends = base is not None and not work.trains and IndexSpec(**base.info["spec"]).factory == work.spec.factory
    reached = extends and before.get("value", 0) >= config.recall
    if base is not None and reached and not work.made and len(work.deleted) <= config.compact_share * total:
        return IndexSpec(**base.info["spec"]), before | {"measured": before.get("measured", base.version)}
    small = reached and new <= SMALL_CHANGE * total
    task = recall.Task(
        tuple(names),
        tuple(rows),
        quantiser,
        work.spec,
        min(QUICK_QUERIES, config.queries) if small else config.queries,
        0 if small else config.filter_queries,
        config.seed,
    )
    queries = run("queries", pick_queries, [(task, place, work.deleted)])[0]
    blocks = recall.blocks(task)
    exact = run("exact answers", exact_block, [(task, place, work.deleted, queries, block) for block in blocks])
    answers = recall.join(exact)
    found: recall.Recall = run("recall", tune, [(task, place, work.deleted, queries, answers, config.recall, small)])[0]
    if small and found.value < config.recall:
        found = run("recall", tune, [(task, place, work.deleted, queries, answers, config.recall, False)])[0]
    if found.value < config.recall:
        raise UserError(
            f"recall@{found.k} is {found.value:.4f} on {found.queries} held-out queries at best ({found.spec.factory}, "
            f"nprobe {found.spec.nprobe}), --recall asks for {config.recall}; nothing was published: raise "
            "--memory-gib, or lower --recall"
        )
    facts = found.facts() | {"asked": config.recall}
    if small and "filtered" in before:
        facts["filtered"] = before["filtered"]
    return found.spec, facts


def pick_queries(task: recall.Task, place: Place, deleted: np.ndarray) -> recall.Queries:
    """Held-out rows to query with."""
    with _release(task, place, (segments.IDS_FILE, ann.VECTORS_FILE, ann.ASSIGN_FILE)) as (folders, _):
        return recall.pick_queries(task, folders, deleted, held_out)


def exact_block(
    task: recall.Task, place: Place, deleted: np.ndarray, queries: recall.Queries, block: recall.Block
) -> list[np.ndarray]:
    """The best scores among some rows, of all queries and filters."""
    name = task.segments[block.segment]
    with _local(place.path(name), (segments.IDS_FILE, ann.VECTORS_FILE, ann.ASSIGN_FILE)) as folder:
        return recall.exact_block(task, folder, deleted, queries, block)


def tune(
    task: recall.Task,
    place: Place,
    deleted: np.ndarray,
    queries: recall.Queries,
    answers: list[np.ndarray],
    target: float,
    check_only: bool,
) -> recall.Recall:
    """Search settings that reach the target, or whether those in force still do."""
    with _release(task, place, None) as (folders, trained), ann.threads(os.cpu_count() or 1):
        return recall.tune(task, folders, trained, deleted, queries, answers, target, check_only)


@contextmanager
def _release(
    task: recall.Task, place: Place, files: tuple[str, ...] | None
) -> Iterator[tuple[list[Path], Path | None]]:
    names = [*task.segments, *([task.quantiser] if task.quantiser else [])]
    with _each_local([place.path(name) for name in names], files) as folders:
        count = len(task.segments)
        yield folders[:count], folders[count] if task.quantiser else None


# --- the map ----------------------------------------------------------------------------------------------------------


def _map(work: BuildPlan, place: Place, run: Runner, made: tuple[list[str], list[int], str]) -> bytes:
    """The map of the release: drawn again when there are new rows, else that in force without what was deleted."""
    task = recall.Task(tuple(made[0]), tuple(made[1]), made[2], work.spec, 0, 0, 0)
    before = None
    if work.base is not None and not work.made and MAP_FILE in work.base.files:
        before = receipts.read_file(work.base.path, MAP_FILE, receipts.Receipt(work.base.files), releases.FIX)
    drawn: bytes = run("map", draw_map, [(task, place, work.deleted, before)])[0]
    return drawn


def draw_map(task: recall.Task, place: Place, deleted: np.ndarray, before: bytes | None) -> bytes:
    """The content of `map.parquet`."""
    needed = None if before is None else (segments.IDS_FILE,)
    with _release(task, place, needed) as (folders, _), tempfile.TemporaryDirectory() as work:
        ids = np.concatenate([np.load(folder / segments.IDS_FILE, mmap_mode="r") for folder in folders])
        if before is not None:
            table = pq.read_table(pa.BufferReader(before))
            gone = np.isin(table.column("id").to_numpy(), ids[deleted])
            pq.write_table(table.filter(pa.array(~gone)), Path(work) / MAP_FILE, compression="zstd")
        else:
            live = np.ones(len(ids), bool)
            live[deleted] = False
            rows = _Rows([ann.RowStore(folder / ann.VECTORS_FILE).rows for folder in folders])
            write_map(Path(work), ids, ItemsTable(folders).groups("uri"), rows, live)  # type: ignore[arg-type]
        return (Path(work) / MAP_FILE).read_bytes()


class _Rows:
    """The mapped rows of several segments, to be indexed by an ascending array of row numbers."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts, self._starts = parts, np.cumsum([0, *map(len, parts)])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        edges = np.searchsorted(rows, self._starts)
        pieces = zip(self._parts, self._starts, edges, edges[1:], strict=False)
        return np.concatenate([part[rows[low:high] - start] for part, start, low, high in pieces])


# --- pieces -----------------------------------------------------------------------------------------------------------


def _piece(place: Place, name: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make a piece with `write`, unless it is finished and whole; return its facts."""
    done = releases.read_piece(place.index, name)
    if done is not None:
        try:
            receipts.verify(place.path(name), done[0])
            return dict(done[0].facts)
        except IntegrityError:
            receipts.withdraw(place.path(name) / receipts.RECEIPT_FILE)
    root = storage.to_path(place.index)
    local = storage.is_local(root)
    if local:
        root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{releases.STAGING_PREFIX}{place.prefix}-", dir=str(root) if local else None))
    try:
        facts = write(work)
        releases.create_piece(place.index, name, work, facts)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return facts


def _receipt_of(place: Place, name: str) -> receipts.Receipt:
    return _finished(place, name)[0]


def _checksum_of(place: Place, name: str) -> str:
    return _finished(place, name)[1]


def _finished(place: Place, name: str) -> tuple[receipts.Receipt, str]:
    """The receipt of a finished piece and its checksum; IntegrityError when another build's clean-up has removed it."""
    found = releases.read_piece(place.index, name)
    if found is None:
        raise IntegrityError(f"{place.path(name)}: not there any more; run the same command again")
    return found


@contextmanager
def _local(path: UPath, files: tuple[str, ...] | None) -> Iterator[Path]:
    """A local directory with the files of a piece (all, or those named that exist): itself, or a copy while needed."""
    if storage.is_local(path):
        yield Path(str(path))
        return
    target = Path(tempfile.mkdtemp(prefix="audiomae-piece-"))
    try:
        for name in storage.list_names(path):
            if files is None or name in files:
                storage.copy_file(path / name, target / name)
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


@contextmanager
def _each_local(paths: Sequence[UPath], files: tuple[str, ...] | None) -> Iterator[list[Path]]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield [stack.enter_context(_local(path, files)) for path in paths]


def _all_local(place: Place, pieces: Sequence[OldRows | Part]) -> Any:
    needed = (ann.VECTORS_FILE, segments.IDS_FILE, "items.arrow", ann.ASSIGN_FILE)
    return _each_local([place.path(_name_of(piece, place)) for piece in pieces], needed)
