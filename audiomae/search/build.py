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
    exact_block   exact answers of held-out queries                         (many at once)
    tune          recall, search settings
    draw_map      the map of the sounds
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from audiomae import storage
from audiomae.artifacts import receipts, releases
from audiomae.artifacts.releases import Release
from audiomae.errors import IntegrityError, ReleaseConflictError, UserError
from audiomae.search import build_measure, build_steps, segments, tuning
from audiomae.search.indexed import BLOCKED_FILE, DELETED_FILE
from audiomae.search.layout import MAP_FILE
from audiomae.search.pieces import Place, checksum_of, receipt_of
from audiomae.search.plan import BuildPlan, OldRows, Part
from audiomae.search.spec import BuildOptions, IndexSpec
from audiomae.search.tuning import KEPT_QUERIES, NEIGHBOURS_FILE, Neighbours, Queries, Recall, Task

SMALL_CHANGE = 0.05  # share of new rows up to which the settings in force are checked rather than tuned again


class Runner(Protocol):
    """Runs one step for many arguments; results in their order."""

    def __call__(self, label: str, step: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]: ...


def run_here(label: str, step: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """A runner without processes."""
    return [step(*call) for call in calls]


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
        published = _Build(work, place, config, run).publish(save_encoder, facts)
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


@dataclass(frozen=True)
class _Made:
    """The segments of the release to be, in order, with their rows, and the quantiser ("" for none)."""

    names: list[str]
    rows: list[int]
    quantiser: str

    def task(self, spec: IndexSpec, queries: int = 0, filtered: int = 0, seed: int = 0) -> Task:
        return Task(tuple(self.names), tuple(self.rows), self.quantiser, spec, queries, filtered, seed)


@dataclass(frozen=True)
class _Build:
    """One plan being carried out."""

    work: BuildPlan
    place: Place
    config: BuildOptions
    run: Runner

    def publish(self, save_encoder: Callable[[Path], None], facts: dict[str, Any]) -> Release:
        work, place = self.work, self.place
        with releases.staging(place.index, work.base) as staging:
            save_encoder(staging / "encoder")  # first, as it is refused when it does not belong to the embeddings
            made = self._make_segments(facts["dim"])
            spec, measured, near = self._measure(made)
            if near is not None:
                (staging / NEIGHBOURS_FILE).write_bytes(near)
            if self.config.map:
                (staging / MAP_FILE).write_bytes(self._map(made))
            np.save(staging / DELETED_FILE, work.deleted)
            np.save(staging / BLOCKED_FILE, work.blocked)
            pieces = [*made.names, *([made.quantiser] if made.quantiser else [])]
            info = facts | {
                "rows": sum(made.rows) - len(work.deleted),
                "rows_deleted": len(work.deleted),
                "corpora": work.corpora,
                "spec": spec.model_dump(),
                "segments": [{"name": n, "rows": count} for n, count in zip(made.names, made.rows, strict=True)],
                "quantiser": made.quantiser or None,
                "pieces": {name: checksum_of(place, name) for name in pieces},
                "recall": measured,
                "config": self.config.model_dump(include=set(BuildOptions.model_fields)),
            }
            return releases.publish(place.index, staging, info, work.base)

    def _make_segments(self, dim: int) -> _Made:
        work, place = self.work, self.place
        self.run("rows", build_steps.write_rows, [(part, place) for part in work.parts])
        quantiser = self._quantiser()
        if work.spec.kind == "ivf":
            pieces: list[OldRows | Part] = []
            for plan in work.made:
                pieces += [*(plan.old if work.trains else ()), *plan.parts]
            self.run("lists", build_steps.assign_rows, build_steps.to_assign(pieces, place, quantiser))
        self.run("segments", build_steps.make_segment, [(plan, work.spec, place, quantiser, dim) for plan in work.made])
        names = [*work.kept, *(place.segment(plan, work.spec, quantiser) for plan in work.made)]
        written = [receipt_of(place, name).facts for name in names]
        segments.unify([segments.read_schema(segment) for segment in written])
        return _Made(names, [segment["rows"] for segment in written], quantiser)

    def _quantiser(self) -> str:
        """The name of the quantiser that the new segments go by; empty for other kinds of index."""
        work, place, seed = self.work, self.place, self.config.seed
        if work.spec.kind != "ivf":
            return ""
        if not work.trains:
            assert work.base is not None
            return str(work.base.info["quantiser"])
        facts = [[plan.key for plan in work.made], work.spec.factory, seed]
        name = f"quantisers/{place.prefix}-{storage.sha256_bytes(storage.encode_json(facts))[:16]}"
        self.run("train", build_steps.train, [(work.spec, work.made, place, name, seed)])
        return name

    def _measure(self, made: _Made) -> tuple[IndexSpec, dict[str, Any], bytes | None]:
        """Search settings and the recall they reach: tuned, checked after a small change, or those in force.

        And the exact answers that the release keeps.
        """
        work, config, base = self.work, self.config, self.work.base
        total, new = sum(made.rows), sum(plan.num_rows for plan in work.made)
        before = dict(base.info["recall"]) if base else {}
        extends = base is not None and not work.trains and IndexSpec(**base.info["spec"]).factory == work.spec.factory
        reached = extends and before.get("value", 0) >= config.recall
        if base is not None and reached and not work.made and len(work.deleted) <= config.compact_share * total:
            before |= {"measured": before.get("measured", base.version)}
            return IndexSpec(**base.info["spec"]), before, self._in_force(NEIGHBOURS_FILE)
        small = reached and new <= SMALL_CHANGE * total
        found, near = self._recall(made, small)
        if found.value < config.recall:
            raise UserError(
                f"recall@{found.k} is {found.value:.4f} on {found.queries} held-out queries at best "
                f"({found.spec.factory}, nprobe {found.spec.nprobe}), --recall asks for {config.recall}; nothing was "
                "published: raise --memory-gib, or lower --recall"
            )
        facts = found.facts() | {"asked": config.recall}
        if small and "filtered" in before:
            facts["filtered"] = before["filtered"]
        return found.spec, facts, near.to_bytes()

    def _recall(self, made: _Made, small: bool) -> tuple[Recall, Neighbours]:
        """Of the settings in force after a small change, when they still reach what is asked; else of tuned ones."""
        work, config, place = self.work, self.config, self.place
        if small and (kept := self._kept_answers(made)) is not None:
            task, queries, near = kept
            (checked,) = self.run(
                "recall", build_measure.tune, [(task, place, work.deleted, queries, [near.best], None)]
            )
            if checked.value >= config.recall:
                return checked, near
        count = min(KEPT_QUERIES, config.queries) if small else config.queries
        task = made.task(work.spec, count, 0 if small else config.filter_queries, config.seed)
        queries = self.run("queries", build_measure.pick_queries, [(task, place, work.deleted)])[0]
        blocks = [(task, place, work.deleted, queries, block) for block in tuning.blocks(task)]
        answers = tuning.join(self.run("exact answers", build_measure.exact_block, blocks))
        found: Recall
        for target in (None, config.recall) if small else (config.recall,):
            call = (task, place, work.deleted, queries, answers.best, target)
            (found,) = self.run("recall", build_measure.tune, [call])
            if found.value >= config.recall:
                break
        return found, answers.near

    def _kept_answers(self, made: _Made) -> tuple[Task, Queries, Neighbours] | None:
        """Queries with exact answers, of those that the release in force has kept: only new rows are compared.

        None where it has kept none, too few are left, or segments were merged, which compares all of their rows anyway.
        """
        work, place = self.work, self.place
        data = self._in_force(NEIGHBOURS_FILE)
        if data is None or any(plan.old for plan in work.made):
            return None
        task = made.task(work.spec)
        call = (task, place, work.deleted, Neighbours.from_bytes(data))
        queries, near = self.run("queries", build_measure.kept_queries, [call])[0]
        if not near.is_enough:
            return None
        fresh = [block for block in tuning.blocks(task) if made.names[block.segment] not in work.kept]
        if fresh:
            calls = [(task, place, work.deleted, queries, block) for block in fresh]
            near = near.with_rows(tuning.join(self.run("exact answers", build_measure.exact_block, calls)).near)
        return task, queries, near

    def _in_force(self, name: str) -> bytes | None:
        """A file of the release in force; None where it has no such file."""
        base = self.work.base
        if base is None or name not in base.files:
            return None
        return receipts.read_file(base.path, name, receipts.Receipt(base.files), releases.FIX)

    def _map(self, made: _Made) -> bytes:
        """The map of the release: drawn again for new rows, else that in force without what was deleted."""
        work = self.work
        before = None if work.made else self._in_force(MAP_FILE)
        call = (made.task(work.spec), self.place, work.deleted, before)
        drawn: bytes = self.run("map", build_measure.draw_map, [call])[0]
        return drawn
